"""For a process whose wall clock libfaketime fakes, and whose PYTHONPATH leads here.

libfaketime 0.9.10 has the system call behind time.sleep fail (EINVAL, Python 3.11 and later) when
the monotonic clock is left alone; a select that waits for nothing but the time does not fail.
"""

import select
import time


def sleep(seconds: float) -> None:
    select.select((), (), (), seconds)


time.sleep = sleep
