"""Measurements side by side with other systems; python3 benchmarks/run.py runs them.

run        the command: its own virtual environment, options, writing the results
contest    rounds in rotating order, set-up by set-up
entrant    one running peer: its processes and its caller           child, children
peers/     one module each, all with the same small interface       handlers: the work itself
loads      what a caller does: windows, threads, bulks; verifies    rows: what is measured
figures    statistics                                               report, plot, machine: output
"""
