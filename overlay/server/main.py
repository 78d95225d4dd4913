"""The command `overlay-node CONFIG ID` of an installed package: runs node.py."""

import runpy
import sys
from pathlib import Path

BESIDE = Path(__file__).with_name("node.py")  # in a wheel, where setup.py puts it
IN_A_CLONE = Path(__file__).resolve().parents[2] / "node.py"


def main() -> None:
    """Ends with SystemExit, as node.py does."""
    path = BESIDE if BESIDE.exists() else IN_A_CLONE
    # As __main__, or it would not run its last lines.
    runpy.run_path(str(path), run_name="__main__")
    sys.exit(0)
