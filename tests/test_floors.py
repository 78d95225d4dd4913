"""The floor plan of overlay/__init__.py against the imports of the code."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import overlay

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "overlay"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

GRPC = {"grpc", "grpc_health", "grpc_reflection", "grpc_status"}
GENERATED = {"overlay_pb2", "overlay_pb2_grpc"}
THREADS = {"threading", "_thread", "queue", "concurrent", "multiprocessing", "asyncio"}
CLOCKS = {"time", "datetime", "random", "secrets"}


def floor_plan() -> tuple[dict[str, int], set[tuple[str, str]]]:
    """module -> floor, and the arrows.

    `a -> b, c` and `a -> b -> c` are both understood; a line without a number goes on with the
    floor above it.
    """
    floors: dict[str, int] = {}
    arrows: set[tuple[str, str]] = set()
    plan = re.search(r"^    4 .*?(?=^$)", overlay.__doc__ or "", re.MULTILINE | re.DOTALL)
    for number, text in re.findall(r"^    (\d) \w+ ((?:.|\n {6})+)", plan[0], re.MULTILINE):
        for group in re.split(r"\s{2,}", text.strip()):
            steps = [[name.strip() for name in step.split(",")] for step in group.split("->")]
            floors.update({name: int(number) for step in steps for name in step})
            for left, right in itertools.pairwise(steps):
                arrows |= set(itertools.product(left, right))
    return floors, arrows


FLOORS, ARROWS = floor_plan()


def imported(module: str) -> Iterator[str]:
    """Full names of all that a module imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def own_imports(module: str) -> set[str]:
    names = {name.split(".")[1] for name in imported(module) if name.startswith("overlay.")}
    return names & set(MODULES)


def foreign_imports(module: str) -> set[str]:
    return {name.split(".")[0] for name in imported(module)}


def test_the_plan_is_read_as_it_is_drawn():
    assert FLOORS["errors"] == FLOORS["values"] == 0
    assert FLOORS["service"] == 4
    assert ("executor", "handlers") in ARROWS
    assert ("executor", "batch") in ARROWS
    assert ("pipes", "wire") in ARROWS
    assert ("wire", "meter") in ARROWS
    assert ("service", "streams") in ARROWS
    assert set(FLOORS.values()) == {0, 1, 2, 3, 4}


def test_every_module_is_in_the_plan_and_the_other_way_round():
    assert set(FLOORS) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_point_down_or_along_an_arrow(module):
    wrong = {
        other
        for other in own_imports(module)
        if FLOORS[other] >= FLOORS[module] and (module, other) not in ARROWS
    }
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))} without an arrow in the plan"


@pytest.mark.parametrize("arrow", sorted(ARROWS), ids=" -> ".join)
def test_every_arrow_is_an_import(arrow):
    assert arrow[1] in own_imports(arrow[0])


@pytest.mark.parametrize("module", MODULES)
def test_grpc_is_known_only_to_the_wire_the_links_and_the_edges(module):
    edges = {"admin", "service", "streams", "reception", "connection", "calls", "watch"}
    edges |= {"reflection"}
    if module not in {"wire", "pipes", "books", "channels", "links"} | edges:
        assert not foreign_imports(module) & (GRPC | {"google"})


@pytest.mark.parametrize("module", MODULES)
def test_only_wire_imports_the_generated_code(module):
    if module != "wire":
        assert not foreign_imports(module) & GENERATED


@pytest.mark.parametrize("module", MODULES)
def test_threads_and_clocks_begin_at_the_mechanism_floor(module):
    if FLOORS[module] < 2 and module != "clocks":
        assert not foreign_imports(module) & (THREADS | CLOCKS)
        assert "clocks" not in own_imports(module)


@pytest.mark.parametrize("module", MODULES)
def test_the_time_is_taken_from_one_place(module):
    if module != "clocks":
        assert "time" not in foreign_imports(module)


def test_the_process_asks_for_the_generated_code_through_wire():
    tree = ast.parse((ROOT / "node.py").read_text("utf-8"))
    names = {
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    assert not names & GENERATED


def test_importing_the_package_needs_neither_grpc_nor_the_generated_code():
    code = (
        "import sys, overlay; "
        "print(sorted(set(sys.modules) & {'grpc', 'google.protobuf', 'overlay_pb2', 'pydantic'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_floors_0_and_1_need_neither_grpc_nor_the_generated_code():
    low = sorted(module for module in MODULES if FLOORS[module] < 2)
    code = (
        f"import sys, importlib; [importlib.import_module('overlay.' + m) for m in {low}]; "
        "print(sorted(set(sys.modules) & {'grpc', 'google.protobuf', 'overlay_pb2'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
