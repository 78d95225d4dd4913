"""The pages that are made from the code agree with it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from overlay.cli import main
from scripts import reference
from tests.harness.cluster import ROOT

made = functools.cache(reference.pages)


# Words are compared, not lines: argparse breaks lines differently in other Pythons.
@pytest.mark.parametrize("path", ["docs/configuration.md", "docs/verbs.md"])
def test_a_page_made_from_the_code_is_current(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")

    assert text.split() == made()[path].split(), "run: python scripts/reference.py"


def test_every_key_of_the_configuration_is_explained() -> None:
    schema = reference.config.schema()
    parts = [schema, *schema["$defs"].values()]
    keys = [(name, key) for part in parts for name, key in part["properties"].items()]

    assert [name for name, key in keys if name != "$schema" and "description" not in key] == []


def test_the_page_has_the_help_of_every_verb() -> None:
    page = (ROOT / "docs" / "verbs.md").read_text(encoding="utf-8")
    headings = {line.split()[1] for line in page.splitlines() if line.startswith("## ")}

    verbs = {*main.OF_A_PROCESS, *main.OF_A_CONFIGURATION, *main.OF_CERTIFICATES}
    assert verbs - {"ask"} <= headings


def test_every_verb_of_the_table_has_its_file_and_every_file_its_row() -> None:
    verbs = {*main.OF_A_PROCESS, *main.OF_A_CONFIGURATION, *main.OF_CERTIFICATES}
    rooms = (ROOT / "overlay" / "cli", ROOT / "overlay" / "cli" / "identity")
    found = {path.stem for room in rooms for path in room.iterdir() if is_verb(path)}

    assert found == verbs


def is_verb(path: Path) -> bool:
    """A file, or a package of the verb's name."""
    source = path / "__init__.py" if path.is_dir() else path
    return source.is_file() and "\ndef run(args: " in source.read_text(encoding="utf-8")
