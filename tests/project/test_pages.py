"""The pages for people: their links lead somewhere, and what they ask the reader to type works.

A fence's language says what is done with it:

    sh       each line is a command and is run, unless ELSEWHERE says why it is not run here
    python   is run as a program; one that begins with `# mine.py` is the handlers' module instead
    json     is part of the configuration of the overlay that everything here runs on
    text     is not run: output, or what is typed on a PC (which tests/system/test_windows.py does)
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from overlay.cli.main import main as client
from tests.harness import same_process
from tests.harness.cluster import IDS, ROOT, Overlay, free_port, running, six_processes, tool

PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name / "README.md" for name in ("examples", "benchmarks")),
    ]
)

WATCHED = "it runs until it is ended; tests/cli/test_views.py runs it"
LAUNCHED = "tests/project/test_launcher.py runs it, in a copy of the project"
DRAINED = "tests/server/test_drain.py runs it; here it would stop what other tests use"
IS_THIS = "it runs these very tests"
ELSEWHERE = {
    "python3 scripts/run.py": LAUNCHED,
    "python3 scripts/run.py start one_host_config.json": LAUNCHED,
    "python3 scripts/run.py restart one_host_config.json": LAUNCHED,
    ". .venv/bin/activate": "it only changes the reader's own shell",
    "python scripts/run.py restart two_hosts_config.json": LAUNCHED,
    "python scripts/run.py restart two_hosts_config.json C": LAUNCHED,
    "python client.py 127.0.0.1 50053 drain --grace 60": DRAINED,
    "python client.py 127.0.0.1 50056 drain --no-wait": DRAINED,
    "python client.py 127.0.0.1 50051 web": WATCHED,
    "python client.py 127.0.0.1 50051 top": WATCHED,
    "python3 scripts/run.py test": IS_THIS,
    ".venv/bin/python -m pytest -q tests/queueing/test_request_queue.py": IS_THIS,
    "python3 scripts/run.py test -k queue": IS_THIS,
    ".venv/bin/ruff check .": "scripts/run.py test runs it beside these tests",
    ".venv/bin/ruff format .": "it changes files; scripts/run.py test checks them",
    ".venv/bin/mypy": "scripts/run.py test runs it beside these tests",
    ".venv/bin/lint-imports": "scripts/run.py test runs it beside these tests",
    "sh build_proto.sh": "tests/project/test_launcher.py makes the stubs, in a copy",
    "python scripts/reference.py": "it writes pages; test_reference.py compares them",
    "pre-commit install": "it changes the repository's hooks",
}

# Runs a page's text as a program, which may use `await` as if it had an event loop.
RUN = """
import ast, asyncio, inspect, sys
code = compile(sys.argv[1], "the page", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
result = eval(code, {"__name__": "__main__"})
if inspect.iscoroutine(result):
    asyncio.run(result)
"""


@dataclass(frozen=True)
class Fence:
    """line: the line of the page on which its text begins."""

    page: str
    line: int
    language: str
    text: str

    @property
    def is_module(self) -> bool:
        return self.language == "python" and self.text.startswith("# mine.py\n")


def fences() -> Iterator[Fence]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"(?ms)^( *)```(\w*)\n(.*?)^ *```$", text):
            line = text.count("\n", 0, found.start()) + 2
            yield Fence(page.relative_to(ROOT).as_posix(), line, found[2], found[3])


FENCES = list(fences())
TYPED = {
    f"{fence.page}:{fence.line + n}": line
    for fence in FENCES
    if fence.language == "sh"
    for n, line in enumerate(fence.text.splitlines())
}
PLACES = {line: at for at, line in reversed(TYPED.items())}  # of each command, the first
COMMANDS = [pytest.param(line, id=at) for line, at in PLACES.items() if line not in ELSEWHERE]
PROGRAMS = [
    pytest.param(fence.text, id=f"{fence.page}:{fence.line}")
    for fence in FENCES
    if fence.language == "python" and not fence.is_module
]


# Links


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> Iterator[str]:
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in slugs(there):
            yield f"{target}: no such heading; there are {', '.join(sorted(slugs(there)))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One, two\n[a](#one-two) [b](none.md) [c](page.md#three) [d](https://x.y)\n")

    assert [line.partition(":")[0] for line in broken_links(page)] == ["none.md", "page.md#three"]


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page not in reached:
            reached.add(page)
            links = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8"))
            todo += [(page.parent / link).resolve() for link in links if "://" not in link]

    assert set(PAGES) - reached == set()


def test_pages_that_the_code_names_exist() -> None:
    folders = ("overlay", "scripts", "tests", "faults", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    files += [*ROOT.glob("*.py"), *ROOT.glob("*.proto"), ROOT / "pyproject.toml"]
    named = {
        (path.relative_to(ROOT).as_posix(), page)
        for path in files
        if ".venv" not in path.parts
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8"))
    }

    assert named
    assert [(path, page) for path, page in sorted(named) if not (ROOT / page).exists()] == []


def test_files_and_modules_that_the_pages_name_exist() -> None:
    packages = [path.parent.name for path in (ROOT / "overlay").glob("*/__init__.py")]
    named = set()
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # which has the names of earlier releases
            continue
        for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            if re.fullmatch(r"[a-z][\w./-]*/[\w./-]*\.(py|json|sh|md|proto)", span):
                named.add((page.relative_to(ROOT).as_posix(), span))
            elif re.fullmatch(
                rf"(overlay\.)?({'|'.join(packages)})\.(?!py$)[a-z_]+(\.[A-Z]\w*)?", span
            ):
                module = re.sub(r"\.[A-Z]\w*$", "", span.removeprefix("overlay."))
                named.add((page.relative_to(ROOT).as_posix(), module.replace(".", "/") + ".py"))

    def exists(path: str) -> bool:
        return any((ROOT / base / path).exists() for base in ("", "overlay", "examples"))

    named = {(page, path) for page, path in named if "NAME" not in path}
    assert len(named) > 30
    assert [f"{page}: {path}" for page, path in sorted(named) if not exists(path)] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


# What the reader is asked to type


def test_every_fence_has_one_of_the_four_languages() -> None:
    others = [fence for fence in FENCES if fence.language not in {"sh", "python", "json", "text"}]

    assert others == []


def test_every_command_that_is_not_run_here_is_still_on_a_page() -> None:
    assert set(ELSEWHERE) - set(TYPED.values()) == set()


@dataclass(frozen=True)
class Reader:
    """Types what the pages say, in the configuration's folder and with the overlay's ports."""

    overlay: Overlay

    def adapted(self, text: str) -> str:
        """The same text with this overlay's ports and file."""
        ports = {str(50051 + i): str(self.overlay.port(id_)) for i, id_ in enumerate(IDS)}
        text = re.sub(r"\b5005[1-6]\b", lambda found: ports[found[0]], text)
        text = text.replace("one_host_config.json", self.overlay.path.name)
        return text.replace("192.168.1.1:", "127.0.0.1:")

    def type(self, line: str) -> subprocess.CompletedProcess[str]:
        program, *words = shlex.split(self.adapted(line))
        if program == "buf":
            command = [tool("buf", "python3 scripts/run.py test"), *words]
        else:
            assert program == "python", f"this test cannot run: {line}"
            if words[0] == "client.py":
                words = [self.job_id() if word == "ID" else word for word in words]
                # test_launcher.py starts it
                return same_process.ran(client, *words, folder=self.overlay.folder)
            command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        return self._run(command)

    def job_id(self) -> str:
        """Of a job that is done."""
        with self.overlay.connect("A") as leader:
            return leader.later(None, b"hello").wait(30).id

    def run(self, program: str) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, "-c", RUN, self.adapted(program)])

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.overlay.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("pages")
    module = "\n".join(fence.text for fence in FENCES if fence.is_module)
    (folder / "mine.py").write_text(module, encoding="utf-8")
    (folder / "photos.jsonl").write_text('{"path": "a.jpg"}\n{"path": "b.jpg", "width": 10}\n')
    for name in ("README.md", "overlay.proto"):
        shutil.copy(ROOT / name, folder)
    functions = [node.name for node in ast.parse(module).body if isinstance(node, ast.FunctionDef)]
    top: dict[str, Any] = {"handlers": {f: f"mine:{f}" for f in functions if f != "merge"}}
    for fence in FENCES:
        if fence.language == "json":
            part = json.loads("{" + fence.text.strip().rstrip(",") + "}")
            top["handlers"].update(part.pop("handlers", {}))
            top.update(part)
    config = six_processes(**top)
    config["processes"]["A"]["metrics_port"] = free_port()
    with running(folder, config) as overlay:
        yield Reader(overlay)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_pages_succeeds_and_prints_something(reader: Reader, line: str) -> None:
    done = reader.type(line)

    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (done.stdout + done.stderr).strip() != ""


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_the_pages_runs(reader: Reader, program: str) -> None:
    done = reader.run(program)

    assert (done.returncode, done.stderr) == (0, ""), f"{program}\n{done.stderr}"


def test_the_page_of_operations_lists_every_metric_that_is_served(reader: Reader) -> None:
    port = reader.overlay.config["processes"]["A"]["metrics_port"]
    text = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    served = set(re.findall(r"(?m)^# TYPE (overlay_\w+)", text))
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page.partition("## Prometheus")[2]
    listed = set(re.findall(r"`(overlay_\w+)`", table))

    assert {name for name in served if not name.endswith("_created")} == listed
