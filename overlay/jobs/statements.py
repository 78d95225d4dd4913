"""The statements that change the jobs' file, by number.

Several leaders keep the same jobs: one changes its copy of the file and sends the others what it
did, as the numbers of these statements with their values (`changes`). So each has to do the same on
every copy: no clock, no chance, and an order wherever there is a limit. The numbers are part of the
format of what is sent: `changes.FORMAT` rises when one of them gets another meaning.
"""

from __future__ import annotations

ACCEPT = (
    "insert into job(mark, kind, state, ready, priority, due, expires, accepted, limit_s, "
    "max_attempts, size, key, digest, schedule) values(?,?,0,?,?,?,?,?,?,?,?,?,?,?)"
)
KEEP_PAYLOAD = "insert into payload values(?,?)"
MAKE_KIND = "insert into kind(address, name, request, handler) values(?,?,?,?)"
TAKE = (
    "update job set state = 1, attempts = attempts + 1, started = ? where id = ? "
    "returning (select body from payload where job = id), limit_s, attempts, "
    "max_attempts, priority"
)
DROP_PAYLOAD = "delete from payload where job = ?"
KEEP_ANSWER = "insert into answer values(?,?)"
DROP_ANSWER = "delete from answer where job = ?"
DONE = "update job set state = 2, ended = ?, size = ?, code = 0, reason = '' where id = ?"
END = (
    "update job set state = ?, ended = ?, attempts = ?, "
    "refusals = case when ? then refusals + 1 else 0 end, "
    "due = ?, ready = ?, code = ?, reason = ?, story = ? where id = ?"
)
MAKE_READY = (
    "update job set ready = 1 where id in (select id from job where state = 0 and "
    "ready = 0 and due <= ? order by due, id limit ?) returning kind"
)
EXPIRE = (
    "update job set state = 6, ended = ?, reason = 'it was not started in time', code = 4 "
    "where id in (select id from job where state = 0 and expires <= ? order by expires, id "
    "limit ?) returning id, kind, ready"
)
HURRY = (
    "update job set ready = 1 where id in (select id from job where state = 0 and "
    "ready = 0 and (refusals > 0 or attempts > 0) order by id limit ?) returning kind"
)
CANCEL = (
    "update job set state = 5, ended = ?, reason = 'cancelled before it was started', "
    "code = 1 where id = ? and state = 0 returning kind, ready"
)
RELEASE = (
    "update job set state = 0, ready = 1, due = 0, ended = null, attempts = 0, "
    "refusals = 0, expires = null, story = ? where id = ?"
)
NOTE_FETCHED = "update job set fetched = 1 where id = ? and fetched = 0"
FORGET = "delete from job where id = ? returning state, size"
FORGET_KINDS = (
    "delete from kind where id not in (select distinct kind from job) "
    "and id not in (select kind from schedule)"
)
MAKE_SCHEDULE = (
    "insert into schedule(mark, kind, priority, limit_s, max_attempts, key, every_s, next, "
    "expires_s, accepted, payload) values(?,?,?,?,?,?,?,?,?,?,?)"
)
RUN_SCHEDULE = "update schedule set next = ?, missed = missed + ?, last = ? where id = ?"
CANCEL_SCHEDULE = "delete from schedule where id = ? returning length(payload)"
KEEP_CHUNK = "insert into chunk values(?,?,?,?)"
GROW = "update job set size = size + ? where id = ?"
DROP_PART = "delete from chunk where job = ? and worker = ? returning length(body)"
DROP_PARTS = "delete from chunk where job = ? returning length(body)"

ALL = (
    ACCEPT,
    KEEP_PAYLOAD,
    MAKE_KIND,
    TAKE,
    DROP_PAYLOAD,
    KEEP_ANSWER,
    DROP_ANSWER,
    DONE,
    END,
    MAKE_READY,
    EXPIRE,
    HURRY,
    CANCEL,
    RELEASE,
    NOTE_FETCHED,
    FORGET,
    FORGET_KINDS,
    MAKE_SCHEDULE,
    RUN_SCHEDULE,
    CANCEL_SCHEDULE,
    KEEP_CHUNK,
    GROW,
    DROP_PART,
    DROP_PARTS,
)
NUMBERS = {statement: number for number, statement in enumerate(ALL)}
VALUES = tuple(statement.count("?") for statement in ALL)  # how many each takes
