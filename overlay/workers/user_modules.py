"""Keeps the sources of the user's modules, so that edits take effect only when the worker restarts.

A handler's process may start at any time, and a function may import modules when it is called. It
would then mix edited files with unedited ones, or read a half-written file. So a worker reads the
handlers' modules, and all that they import from the configuration file's folder, when it starts,
for itself and for its handlers' processes. A module that no import statement names is kept when it
is first imported.
"""

from __future__ import annotations

import ast
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import resolve_name, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

OWN_MODULES = {
    "overlay",
    "overlay_pb2",
    "overlay_pb2_grpc",
}  # even if they are in the user's folder


class Source(NamedTuple):
    path: str
    text: bytes
    is_package: bool


class Sources(MetaPathFinder):
    """Finds the folder's modules as Python does, and loads the source that was first read.

    kept: the sources, by the module's full name.
    """

    def __init__(self, folder: Path, kept: Mapping[str, Source]) -> None:
        self.folder = str(folder)
        self._spellings = (
            self.folder,
            os.path.abspath(folder),
        )  # Windows: Python uses the second
        self.kept = dict(kept)
        self._followed = set(kept)  # modules whose imports are kept

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        source = self.kept.get(fullname)
        if source is None and self._is_user_module(fullname):
            source = self._keep(fullname, path)
        if source is None:
            return None
        locations = [os.path.dirname(source.path)] if source.is_package else None
        return spec_from_file_location(
            fullname,
            source.path,
            loader=_KeptLoader(fullname, source),
            submodule_search_locations=locations,
        )

    def keep_imported(self) -> None:
        """Keeps all modules that kept modules import, even inside functions."""
        while todo := self.kept.keys() - self._followed:
            self._followed |= todo
            names = {name for one in todo for name in _imported(one, self.kept[one])}
            for name in sorted(names - self.kept.keys()):
                if self._is_user_module(name):
                    with contextlib.suppress(ImportError):
                        self._keep(name, _search_path(name))

    def add(self, kept: Mapping[str, Source]) -> None:
        """Adds the sources that another process has kept, with their imports."""
        self._followed |= kept.keys()
        self.kept = {**kept, **self.kept}

    def shadowed(self, name: str) -> str | None:
        """The path of the folder's module of that name, if another one was imported instead."""
        own = None if name in OWN_MODULES else PathFinder.find_spec(name, [self.folder])
        if own is None or own.origin is None or name not in sys.modules:
            return None
        found = getattr(sys.modules[name], "__file__", None) or ""
        return None if os.path.realpath(found) == os.path.realpath(own.origin) else own.origin

    def _is_user_module(self, fullname: str) -> bool:
        top = fullname.partition(".")[0]
        spec = None if top in OWN_MODULES else PathFinder.find_spec(top)
        places = (spec.submodule_search_locations or [spec.origin or ""]) if spec else []
        return any(os.path.dirname(place) in self._spellings for place in places)

    def _keep(self, fullname: str, path: Sequence[str] | None) -> Source | None:
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.origin is None or type(spec.loader) is not SourceFileLoader:
            return None
        with contextlib.suppress(OSError, SyntaxError, ValueError):  # Python will report it
            text, is_package = Path(spec.origin).read_bytes(), spec.submodule_search_locations
            ast.parse(text)  # a file that is being written may be complete next time
            source = Source(spec.origin, text, is_package is not None)
            return self.kept.setdefault(fullname, source)
        return None


class _KeptLoader(SourceFileLoader):
    def __init__(self, fullname: str, source: Source) -> None:
        super().__init__(fullname, source.path)
        self._source = source

    def get_data(self, path: str) -> bytes:
        return self._source.text if path == self._source.path else super().get_data(path)

    def path_stats(self, path: str) -> Mapping[str, float]:
        raise OSError  # cached bytecode belongs to the current file


def install(folder: Path, kept: Mapping[str, Source]) -> Sources:
    """Makes this process import the folder's modules from kept sources from now on."""
    found = installed()
    if found is None or found.folder != str(folder):
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not found]
        found = Sources(folder, kept)
        # After the finders of Python's built-in and frozen modules.
        sys.meta_path.insert(sys.meta_path.index(PathFinder), found)
    return found


def installed() -> Sources | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, Sources)), None)


def _search_path(fullname: str) -> Sequence[str] | None:
    """Where Python searches for the module: the path of its package. Imports nothing."""
    package = fullname.rpartition(".")[0]
    if not package:
        return None
    spec = PathFinder.find_spec(package, _search_path(package))
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"{package} is not a package")
    return spec.submodule_search_locations


def _imported(importer: str, source: Source) -> Iterator[str]:
    """The full names in its import statements that can be modules."""
    package = importer if source.is_package else importer.rpartition(".")[0]
    for node in ast.walk(ast.parse(source.text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from _with_packages(name.name)
        elif isinstance(node, ast.ImportFrom):
            with contextlib.suppress(ImportError):  # beyond the top package: Python will report it
                module = resolve_name("." * node.level + (node.module or ""), package or None)
                yield from _with_packages(module)
                yield from (f"{module}.{name.name}" for name in node.names)


def _with_packages(fullname: str) -> Iterator[str]:
    parts = fullname.split(".")
    yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))
