"""Fixtures: `six` is the shipped overlay, shared by a module; `overlays` makes others.

`fuzz` says how much a fuzz test sends, and makes its random numbers from the seed.
"""

from __future__ import annotations

import compileall
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.harness.cluster import ROOT, Overlay, running, six_processes

# The machine may be busy, so no example fails because it takes long.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


LONG_S = 3600  # the timeout of a fuzz test with --long


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="fuzz tests send 10 to 200 times as much")
    help_ = "for fuzz tests: 1 by default, random with --long; a failure shows it"
    parser.addoption("--seed", type=int, help=help_)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "six: starts the six processes")
    if config.option.seed is None:
        # A commit must not fail by chance; --long is there to find new failures.
        config.option.seed = random.randrange(10**6) if config.option.long else 1
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist: its parent has done this
        compile_once()


def compile_once() -> None:
    """Compiles the sources, because the thousands of processes in the tests write no bytecode."""
    for folder in ("overlay", "scripts"):
        compileall.compile_dir(ROOT / folder, quiet=2)
    compileall.compile_dir(ROOT, maxlevels=0, quiet=2)


def pytest_report_header(config: pytest.Config) -> str:
    return f"fuzz: --seed {config.option.seed}"


# Files that take long start first, the longest before the others, so that no core idles at the end.
LONG_FILES = ("windows", "launcher", "faults", "jobs", "two_hosts", "strangers", "two_hosts_tls")
LONG_FILES += ("flights", "client", "views", "lanes", "rules", "sync", "hostile", "map", "drain")
LONG_FILES += ("map_resume", "resolver", "executor", "fairness", "both_ways", "routing_around")
LONG_FILES += ("tls", "stream_limit", "packaging", "several_leaders", "examples", "interop")
LONG_FILES += ("rules_over_tls", "store", "pages", "request_queue", "web_jobs", "partials")
LONG_FILES += ("misbehaving_handlers", "versions", "aio", "stdio", "bad_input", "stream_session")
LONG_FILES += ("overload", "doctor", "idempotency", "dispatcher", "soak", "resume", "programs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: first.get(item.path.stem.removeprefix("test_"), len(first)))
    for item in items:
        if {"six", "overlays"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("six")
    for item in items if config.option.long else ():
        if "fuzz" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(LONG_S))


@dataclass(frozen=True)
class Fuzz:
    """How much a fuzz test does. The same seed gives the same test."""

    is_long: bool
    seed: int

    def count(self, short: int, long: int) -> int:
        return long if self.is_long else short

    def rng(self, what: str, number: int) -> random.Random:
        """The random numbers of one test case."""
        return random.Random(f"{self.seed} {what} {number}")


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    fuzz = Fuzz(request.config.option.long, request.config.option.seed)
    print(f"repeat with --seed {fuzz.seed}")  # pytest shows it with a failure
    return fuzz


@pytest.fixture(scope="module")
def security() -> dict[str, Any]:
    """Top-level keys for overlays; a module that repeats tests over TLS overrides them."""
    return {}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory, security: dict[str, Any]) -> Iterator[Overlay]:
    """A to F with echo handlers. Tests that kill or overload processes make their own overlay."""
    with running(tmp_path_factory.mktemp("six"), six_processes(**security)) as overlay:
        yield overlay


@pytest.fixture
def overlays(tmp_path: Path) -> Iterator[Callable[..., Overlay]]:
    """Starts six processes for one test: overlays(module="def f(...)...", **top_level_keys).

    The module's text is saved as `mine.py` beside the configuration.
    """
    with ExitStack() as stack:

        def make(module: str = "", config: dict[str, Any] | None = None, **top: Any) -> Overlay:
            folder = tmp_path / f"overlay{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            (folder / "mine.py").write_text(module)
            return stack.enter_context(running(folder, config or six_processes(**top)))

        yield make
