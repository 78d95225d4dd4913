"""The rules about imports that `lint-imports` (pyproject.toml) cannot check."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.harness.cluster import ROOT

GENERATED = {"overlay_pb2", "overlay_pb2_grpc"}


def loaded_by(code: str, *watched: str) -> str:
    """The watched modules that are loaded once the code has run."""
    code = f"import sys; {code}; print(sorted(set(sys.modules) & set({watched})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_node_imports_the_generated_code_only_through_the_codec():
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


def test_the_packages_that_decide_need_neither_grpc_nor_the_generated_code():
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
