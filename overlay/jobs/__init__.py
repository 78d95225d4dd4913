"""Requests that are accepted once they are on disk, and whose answers are kept.

store       the file: what is accepted, how it stands, what became of it
journal     the thread that writes it, many changes in one commit
outcome     what an attempt makes of a job: done, again, failed or quarantined
runner      which jobs go into the leader's queue, and when
parts       the parts of a job in parts, kept as they arrive
requests    the RPCs: submit, result, part, list, change

and for several leaders that keep the same jobs:

replicas    which of them has the jobs, and how the others follow
changes     what one sends to the others: numbers of statements, and values
copy_file   each leader's copy of the file
statements  the statements that change the file, which have these numbers
log         what they agree on; jetstream is one on NATS servers, memory_log one within a process
server_tls  the certificates that a leader and those servers show each other
"""
