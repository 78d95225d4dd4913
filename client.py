"""The command line of an overlay: `python client.py --help` lists its verbs.

Each verb is a file in overlay/cli. If the package is installed, the same program is `overlay`.
"""

from __future__ import annotations

import sys

import overlay  # noqa: F401 - from this folder, even if another one is installed

if __name__ == "__main__":  # so that a random.py in this folder does not replace Python's
    sys.path.append(sys.path.pop(0))

from overlay.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
