"""The main module of the processes that multiprocessing starts here, for us or for a handler.

It replaces node.py, which would load our whole program into each process. Measured: 0.6 s and
50 MiB a process with node.py, 0.2 s and 17 MiB without.
"""

import sys
from multiprocessing import util
from pathlib import Path


def be_main() -> None:
    """Takes effect for all processes started from now on, and for those that they start."""
    main = sys.modules["__main__"]
    main.__file__, main.__spec__ = __file__, None
    # Or a new process, before it has our path, would look in the current folder for modules of the
    # standard library. Python 3.10 has no such flag; a later Python may lack the function.
    flags = getattr(util, "_args_from_interpreter_flags", None)
    if flags and sys.version_info >= (3, 11) and "-P" not in flags():
        util._args_from_interpreter_flags = lambda: [*flags(), "-P"]  # type: ignore[attr-defined]


if __name__ == "__mp_main__":
    # Without this an overlay.py beside the configuration would be imported instead of ours.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import overlay  # noqa: F401

    del sys.path[0]
