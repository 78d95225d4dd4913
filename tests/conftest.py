"""Fixtures: `six` is the shipped overlay, shared by a module; `overlays` makes others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.cluster import Overlay, running, six_processes

# A busy machine is no fault of the code: no example is judged by the time that it takes.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A to F with echo handlers. Tests that kill or fill processes make their own overlay."""
    with running(tmp_path_factory.mktemp("six"), six_processes()) as overlay:
        yield overlay


@pytest.fixture
def overlays(tmp_path: Path) -> Iterator[Callable[..., Overlay]]:
    """Makes six processes of one's own: overlays(module="def f(...)...", **top_level_keys).

    The module's text is saved as `mine.py` beside the configuration.
    """
    with ExitStack() as stack:

        def make(module: str = "", config: dict[str, Any] | None = None, **top: Any) -> Overlay:
            folder = tmp_path / f"overlay{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            (folder / "mine.py").write_text(module)
            return stack.enter_context(running(folder, config or six_processes(**top)))

        yield make
