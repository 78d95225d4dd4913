"""The user's modules, each as it was when this process first needed it.

A handler's process may start at any time, and a function may import when it is called. Edited files
would then be mixed with unedited ones, or be read half written. So the modules in the
configuration's folder are kept as they are when the worker starts, for the worker and its handlers'
processes, until the worker starts again. A module that no import statement names is kept when it is
first imported.
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

OURS = {"overlay", "overlay_pb2", "overlay_pb2_grpc"}  # where ours and the user's lie in one folder


class Source(NamedTuple):
    path: str
    text: bytes
    is_package: bool


class Sources(MetaPathFinder):
    """Finds the folder's modules as Python does, and loads the source that was first found there.

    kept: by the module's full name.
    """

    def __init__(self, folder: Path, kept: Mapping[str, Source]) -> None:
        self.folder = str(folder)
        self._spellings = (self.folder, os.path.abspath(folder))  # Windows' Python uses the second
        self.kept = dict(kept)
        self._followed = set(kept)  # modules whose imports are kept too

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        source = self.kept.get(fullname)
        if source is None and self._is_the_users(fullname):
            source = self._keep(fullname, path)
        if source is None:
            return None
        within = [os.path.dirname(source.path)] if source.is_package else None
        return spec_from_file_location(
            fullname,
            source.path,
            loader=_AsItWas(fullname, source),
            submodule_search_locations=within,
        )

    def keep_imported(self) -> None:
        """Keeps the modules that those kept so far import, within functions too."""
        while todo := self.kept.keys() - self._followed:
            self._followed |= todo
            names = {name for one in todo for name in _imported(one, self.kept[one])}
            for name in sorted(names - self.kept.keys()):
                if self._is_the_users(name):
                    with contextlib.suppress(ImportError):
                        self._keep(name, _search_path(name))

    def add(self, kept: Mapping[str, Source]) -> None:
        """Adds what another process has kept, imports included."""
        self._followed |= kept.keys()
        self.kept = {**kept, **self.kept}

    def passed_over(self, name: str) -> str | None:
        """The path of the folder's own module of that name, if the imported one is another."""
        own = None if name in OURS else PathFinder.find_spec(name, [self.folder])
        if own is None or own.origin is None or name not in sys.modules:
            return None
        found = getattr(sys.modules[name], "__file__", None) or ""
        return None if os.path.realpath(found) == os.path.realpath(own.origin) else own.origin

    def _is_the_users(self, fullname: str) -> bool:
        top = fullname.partition(".")[0]
        spec = None if top in OURS else PathFinder.find_spec(top)
        places = (spec.submodule_search_locations or [spec.origin or ""]) if spec else []
        return any(os.path.dirname(place) in self._spellings for place in places)

    def _keep(self, fullname: str, path: Sequence[str] | None) -> Source | None:
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.origin is None or type(spec.loader) is not SourceFileLoader:
            return None
        with contextlib.suppress(OSError, SyntaxError, ValueError):  # then Python says so
            text, is_package = Path(spec.origin).read_bytes(), spec.submodule_search_locations
            ast.parse(text)  # a file that is just being written may be whole the next time
            source = Source(spec.origin, text, is_package is not None)
            return self.kept.setdefault(fullname, source)
        return None


class _AsItWas(SourceFileLoader):
    def __init__(self, fullname: str, source: Source) -> None:
        super().__init__(fullname, source.path)
        self._source = source

    def get_data(self, path: str) -> bytes:
        return self._source.text if path == self._source.path else super().get_data(path)

    def path_stats(self, path: str) -> Mapping[str, float]:
        raise OSError  # bytecode on disk belongs to the file as it is now


def keep(folder: Path, kept: Mapping[str, Source]) -> Sources:
    """Makes this process import the folder's modules through these sources from now on."""
    found = kept_here()
    if found is None or found.folder != str(folder):
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not found]
        found = Sources(folder, kept)
        # Python's own modules, built in or frozen, go first.
        sys.meta_path.insert(sys.meta_path.index(PathFinder), found)
    return found


def kept_here() -> Sources | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, Sources)), None)


def _search_path(fullname: str) -> Sequence[str] | None:
    """Where Python looks for a module: in its package. Imports nothing."""
    package = fullname.rpartition(".")[0]
    if not package:
        return None
    spec = PathFinder.find_spec(package, _search_path(package))
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"{package} is not a package")
    return spec.submodule_search_locations


def _imported(importer: str, source: Source) -> Iterator[str]:
    """The full names in its import statements that may be modules."""
    package = importer if source.is_package else importer.rpartition(".")[0]
    for node in ast.walk(ast.parse(source.text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from _with_packages(name.name)
        elif isinstance(node, ast.ImportFrom):
            with contextlib.suppress(
                ImportError
            ):  # beyond the top package: Python will report that
                module = resolve_name("." * node.level + (node.module or ""), package or None)
                yield from _with_packages(module)
                yield from (f"{module}.{name.name}" for name in node.names)


def _with_packages(fullname: str) -> Iterator[str]:
    parts = fullname.split(".")
    yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))
