"""Who imports gRPC, and how it polls then."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.harness.cluster import ROOT

SHOW = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print("imported with", os.environ.get("GRPC_EXPERIMENTS", "nothing"))
sys.meta_path.insert(0, Watch())
"""
OLDER = "-event_engine_client,-event_engine_listener"


def shown(program: str, **env: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SHOW + program],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the older poller")
def test_the_library_imports_grpc_with_its_older_poller_and_leaves_no_trace() -> None:
    program = "import overlay; overlay.connect; print(os.environ.get('GRPC_EXPERIMENTS'))"
    assert shown(program) == [f"imported with {OLDER}", "None"]


def test_a_program_keeps_the_choice_that_it_has_made() -> None:
    program = "import overlay; overlay.connect; print(os.environ['GRPC_EXPERIMENTS'])"
    own = "event_engine_client"
    assert shown(program, GRPC_EXPERIMENTS=own) == [f"imported with {own}", own]
    assert shown("import grpc, overlay; overlay.connect") == ["imported with nothing"]


@pytest.mark.parametrize("module", ["overlay", "overlay.workers.process_main", "overlay.cli.main"])
def test_what_sends_no_request_does_not_import_grpc(module: str) -> None:
    assert shown(f"import {module}") == []
