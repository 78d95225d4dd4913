"""The fault bench: loads a real overlay, injects faults, and checks the recorded history.

scenarios   the table: a load, a fault, the allowed statuses
bench       runs one scenario                -> overlays, load, breaking, tests.harness.hosts
strangers   attacks by clients that can reach a port; the tests use them too
neighbour   a program that answers wrongly in a process's place
history     what happened, as values and JSON lines
checker     history -> violations; a pure function
seeded      bugs injected into the product, to test the checker; fitting tells if they fit it
figures     the targets under overload and after a fault, and their arithmetic; pure
trials      measures the figures             -> ground, which runs and loads an overlay
report      the table; plot draws it
"""
