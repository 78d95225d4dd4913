"""A command line that is wrong: one sentence on what is, and whose help tells more."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; the program ends with exit code 2."""

    def __init__(self, prog: str, description: str, epilog: str = "", **more: Any) -> None:
        """prog: the command up to its verb. more: what argparse itself gives to those of verbs."""
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )

    def error(self, message: str) -> NoReturn:
        name = self.prog.split()[0]
        sentence = re.sub(r"^argument (\S+): ", r"\1: ", message)
        self.exit(2, f"{name}: {sentence}; {self.prog} --help tells more\n")
