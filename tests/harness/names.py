"""Names of machines that this system's resolver knows, and neither a hosts file nor a DNS server.

`Names(folder)` makes them; what runs with its `environment` looks them up there, each time anew.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.harness.cluster import ROOT, tool


class Names:
    def __init__(self, folder: Path, **names: str) -> None:
        """names: the addresses of each, with blanks between; see resolver.c for what else."""
        self._names = dict(names)
        self._file = folder / "names"
        library = folder / "resolver.so"
        compiler = tool("cc", "sudo apt-get install gcc")
        source = str(ROOT / "tests" / "harness" / "resolver.c")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), source, "-ldl"], check=True
        )
        self.environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "NAMES": str(self._file),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.stand_for()

    def stand_for(self, **names: str) -> None:
        """From now on these do; "_" in a name of Python's is a dot."""
        self._names |= names
        lines = [f"{name.replace('_', '.')} {what}\n" for name, what in self._names.items()]
        beside = self._file.with_suffix(".new")
        beside.write_text("".join(lines))
        os.replace(beside, self._file)
