"""The pages that are made from the code agree with it."""

from __future__ import annotations

import functools

import pytest

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
    folder = ROOT / "overlay" / "cli"  # a verb is a file, or a package of its name
    modules = {path.stem for path in folder.iterdir() if path.name != "page"}
    verbs = {line.split()[1] for line in page.splitlines() if line.startswith("## ")}

    assert verbs & modules == {
        *("map", "check", "handlers", "logs", "top", "web", "drain", "init", "doctor")
    }
