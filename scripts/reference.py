"""Makes the pages that are generated from the code: python scripts/reference.py (in .venv).

docs/configuration.md and overlay/configuration.schema.json from the configuration's schema, and
docs/verbs.md from what each verb says with --help. tests/project/test_reference.py compares them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from overlay.cli.main import main as client  # noqa: E402 - found through the line above
from overlay.model import config  # noqa: E402

CONFIGURATION = """\
# The configuration

Made from the schema by `python scripts/reference.py`; change the text in `overlay/model/config.py`.

One JSON file describes the whole overlay and is the same on every machine. The first six keys of a
process are required; everything else is optional. `two_hosts_config.json` and
`one_host_config.json` are complete examples.

To add a process, add its entry, and add its id to the `neighbors` of the processes that ask it.

- `python node.py CONFIG A --check` names every problem of the file at once, with process, field
  and value, and starts nothing. An unknown key is a problem too; the message suggests a known one.
- `"$schema": "overlay/configuration.schema.json"` at the top of the file lets an editor check it
  while you type.
"""

SECTIONS = {
    "The file": ("", "The top level."),
    "A process": ("ProcessEntry", "An entry of `processes`."),
    "A handler": (
        "HandlerEntry",
        'An entry of `handlers`: `"name": "module:function"`, or an object with these keys.',
    ),
    "A caller": (
        "AccessEntry",
        "An entry of `access`. A key that is left out restricts nothing, an empty list allows "
        "nothing. See [who may do what](security.md#who-may-do-what).",
    ),
}

VERBS = """\
# The verbs of the command line

Made from the programs' own help by `python scripts/reference.py`. An installed package has the
command `overlay` in place of `python client.py`.
"""

PLAIN = {"COLUMNS": "100", "NO_COLOR": "1"}  # the environment of what prints help


def main() -> int:
    for path, text in pages().items():
        (ROOT / path).write_text(text, encoding="utf-8")
        print(f"made {path}")
    return 0


def pages() -> dict[str, str]:
    """The text of each page by its path."""
    schema = config.schema()
    return {
        "overlay/configuration.schema.json": json.dumps(schema, indent=2) + "\n",
        "docs/configuration.md": configuration(schema),
        "docs/verbs.md": verbs(),
    }


# The configuration


def configuration(schema: dict[str, Any]) -> str:
    lines = [CONFIGURATION]
    for title, (entry, about) in SECTIONS.items():
        part = schema["$defs"][entry] if entry else schema
        lines += [f"## {title}\n", f"{about}\n"]
        lines += ["| key | values | default | what it is |", "|---|---|---|---|"]
        for name, key in part["properties"].items():
            if name != "$schema":
                default = _default(key, name in part.get("required", ()))
                what = " ".join(key["description"].split())
                lines.append(f"| `{name}` | {_values(key)} | {default} | {what} |")
        lines.append("")
    return "\n".join(lines)


def _default(key: dict[str, Any], is_required: bool) -> str:
    if is_required:
        return "required"
    default = key.get("default")
    return "" if default in (None, {}) else f"`{json.dumps(default)}`"


def _values(key: dict[str, Any]) -> str:
    kinds = [kind for kind in key.get("anyOf", [key]) if kind.get("type") != "null"]
    if len(kinds) > 1 or "$ref" in kinds[0]:
        return "an object"
    (kind,) = kinds
    if "enum" in kind:
        return ", ".join(f"`{value}`" for value in kind["enum"])
    if "enum" in kind.get("items", ()):
        return f"a list of {_values(kind['items'])}"
    most = kind.get("maximum")
    if most is None:
        return {"string": "text", "array": "a list of names"}.get(kind["type"], "an object")
    number = "a whole number" if kind["type"] == "integer" else "a number"
    least = f"{kind['minimum']:,}" if "minimum" in kind else f"above {kind['exclusiveMinimum']:,}"
    return f"{number}, {least} to {most:,}"


# The verbs


def verbs() -> str:
    """Each verb's help, and the exit codes once: they are the same for all."""
    overview, exits = _help().split("\nexit codes:\n", 1)
    forms = re.findall(r"(?m)^  client\.py (HOST PORT )?([a-z]+)((?: [A-Z]+)?)", overview)
    lines = [VERBS, "## One request", "", *_block(overview)]
    for of_a_process, verb, argument in forms:
        words = ["HOST", "PORT", verb] if of_a_process else [verb]
        text = _help(*words).split("\nexit codes:\n", 1)[0]
        lines += [f"## {verb}{argument}", "", *_block(text)]
    return "\n".join([*lines, "## Exit codes", "", *_block(exits)])


def _block(text: str) -> Iterator[str]:
    yield from ("```text", text.rstrip(), "```", "")


def _help(*words: str) -> str:
    """What `client.py` prints for these words, called here: a start for each verb takes long."""
    output, argv = io.StringIO(), sys.argv
    before = {name: os.environ.get(name) for name in PLAIN}
    sys.argv = [str(ROOT / "client.py"), *words, "--help"]
    os.environ.update(PLAIN)
    try:
        with contextlib.redirect_stdout(output):
            code = client()
    finally:
        sys.argv = argv
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    if code:
        raise RuntimeError(f"client.py {' '.join(words)} --help ended with exit code {code}")
    return output.getvalue()


if __name__ == "__main__":
    sys.exit(main())
