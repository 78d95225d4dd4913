"""Host names without a hosts file or a DNS server, for processes that run with `environment`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.harness.cluster import ROOT, tool


class FakeResolver:
    def __init__(self, folder: Path, **names: str) -> None:
        """names: the addresses of each, separated by blanks; resolver.c has the other values."""
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
        self.resolve()

    def resolve(self, **names: str) -> None:
        """Changes what these names resolve to. "_" stands for a dot."""
        self._names |= names
        lines = [f"{name.replace('_', '.')} {what}\n" for name, what in self._names.items()]
        new = self._file.with_suffix(".new")
        new.write_text("".join(lines))
        os.replace(new, self._file)
