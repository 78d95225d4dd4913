"""What people call the command-line program by here, for messages that name a command."""

from __future__ import annotations

from pathlib import Path

# In the project's folder it is a file there; an installed package has none beside it.
_FILE = Path(__file__).resolve().parent.parent.parent / "client.py"
CLIENT = "client.py" if _FILE.exists() else "overlay"
