"""The main module of the processes that multiprocessing starts here, for us or for a handler.

In place of node.py, which would bring our whole program into each. Measured: 0.6 s and 50 MiB a
process with it, 0.2 s and 17 MiB without.
"""

import sys
from multiprocessing import util
from pathlib import Path


def be_main() -> None:
    """Of all the processes that are started from now on, and of those that they start."""
    main = sys.modules["__main__"]
    main.__file__, main.__spec__ = __file__, None
    # Or a new process, before it knows our path, would look into the current folder for modules of
    # the standard library. Python 3.10 cannot be told, nor one that has no such function any more.
    flags = getattr(util, "_args_from_interpreter_flags", None)
    if flags and sys.version_info >= (3, 11) and "-P" not in flags():
        util._args_from_interpreter_flags = lambda: [*flags(), "-P"]  # type: ignore[attr-defined]


if __name__ == "__mp_main__":
    # Once the path is searched, an overlay.py beside the configuration would come before us.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import overlay  # noqa: F401

    del sys.path[0]
