"""What of the layers an import cannot show; `lint-imports` checks the rest (pyproject.toml)."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.harness.cluster import ROOT

GENERATED = {"overlay_pb2", "overlay_pb2_grpc"}


def loaded_by(code: str, *watched: str) -> str:
    """Those of the watched modules that are loaded after the code."""
    code = f"import sys; {code}; print(sorted(set(sys.modules) & set({watched})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_process_asks_for_the_generated_code_through_the_codec():
    tree = ast.parse((ROOT / "node.py").read_text("utf-8"))
    names = {
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    assert not names & GENERATED


def test_importing_the_package_needs_neither_grpc_nor_the_generated_code():
    assert loaded_by("import overlay", "grpc", "google.protobuf", "overlay_pb2", "pydantic") == "[]"


def test_what_decides_needs_neither_grpc_nor_the_generated_code():
    rooms = ("model", "observability", "queueing", "routing")
    modules = [
        f"overlay.{room}.{path.stem}"
        for room in rooms
        for path in sorted((ROOT / "overlay" / room).glob("*.py"))
        if path.stem != "__init__"
    ]
    assert len(modules) > 20
    code = f"import importlib; [importlib.import_module(m) for m in {modules}]"
    assert loaded_by(code, "grpc", "google.protobuf", "overlay_pb2") == "[]"
