"""The fault bench: loads a real overlay, breaks it on purpose, and checks the history.

scenarios   the table: a load, a fault, what answers may say
bench       one scenario from start to end   -> overlays, load, breaking, tests.harness.hosts
strangers   what anybody who reaches a port can do to it; the tests use it too
neighbour   a program that answers wrongly in a process's place
history     what happened, as values; JSON lines
checker     a history -> the promises that were broken (pure)
seeded      product bugs made on purpose, so that the checker can be tested
figures     what is to be reached under overload and after a fault, and its arithmetic (pure)
trials      measures the figures                -> ground, which has an overlay and loads it
report      the table and the plot
"""
