"""Asks an overlay from the command line: `python client.py --help` shows how.

The verbs are the files of overlay/cli; where the package is installed, the same program is
`overlay`.
"""

from __future__ import annotations

import sys

import overlay  # noqa: F401 - this folder's, whatever else is installed

if __name__ == "__main__":  # a random.py of yours in this folder is not Python's
    sys.path.append(sys.path.pop(0))

from overlay.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
