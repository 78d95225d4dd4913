# ruff: noqa: UP032, UP036, RUF005 - even Python 2 must be able to read this file
"""Everything from one command; needs only Python.

    python3 scripts/run.py                     the demo: six processes here, real requests
    python3 scripts/run.py demo --once         the same, and stops after the requests
    python3 scripts/run.py test [ARGS]         lint, types and tests; ARGS go to pytest
    python3 scripts/run.py start CONFIG [IDS]  starts this machine's processes of a configuration
    python3 scripts/run.py stop CONFIG [IDS]   stops what start started
    python3 scripts/run.py restart CONFIG [IDS]  the same one after another; no request is lost
    python3 scripts/run.py status CONFIG       who serves, with pids
    python3 scripts/run.py setup               only the set-up
    python3 scripts/run.py lock                makes the lock files anew from requirements*.txt

Every verb but stop and status, which install nothing, first sets up what is missing, and touches
the network only when it must: .venv beside the project, the packages of requirements.lock (checked
against their hashes), the stubs of overlay.proto. On Windows: py scripts\\run.py.

Exit codes: 0 all well, 1 something failed, 2 it could not begin.
"""

import sys

if sys.version_info < (3, 10):
    sys.stderr.write(
        "Python 3.10 or later is needed, this is {}.{} ({}); install a newer one from python.org "
        "or your system's packages, and run this again with it\n".format(
            sys.version_info[0], sys.version_info[1], sys.executable
        )
    )
    sys.exit(2)

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from overlay.cli import stdio  # noqa: E402 - found through the line above; needs no package

SCRIPTS = ROOT / "scripts"
VENV = ROOT / ".venv"
STAMP = VENV / "overlay-setup.json"  # what is installed: the hash of each lock file
INSTALLING = VENV / "overlay-installing"  # there while pip works; left behind when it was killed
LOCK = "requirements.lock"
DEV_LOCK = "requirements-dev.lock"
STUBS = ("overlay_pb2.py", "overlay_pb2.pyi", "overlay_pb2_grpc.py")
NEEDED = ["grpc", "grpc_health", "grpc_reflection", "grpc_status", "google.protobuf"]
NEEDED += ["pydantic", "psutil", "rich", "starlette", "uvicorn"]
TO_STOP = ["grpc", "google.protobuf", "google.rpc", "pydantic", "psutil"]  # the launcher's own

PROBE = """
import importlib.util, json, sys
def has(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
def protobuf():
    try:
        import google.protobuf
        return google.protobuf.__version__
    except ImportError:
        return ""
print(json.dumps({"python": list(sys.version_info[:3]), "pip": has("pip"), "protobuf": protobuf(),
                  "tools": has("grpc_tools"), "missing": [n for n in sys.argv[1:] if not has(n)]}))
"""


class Problem(Exception):
    """Ends the command with this sentence and exit code 2."""


def main(arguments):
    stdio.complete()
    say_safely()
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("demo", [])
    if verb in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0
    if verb not in VERBS:
        known = ", ".join(VERBS)
        raise Problem("no verb '{}'; there are {} (-h explains them)".format(verb, known))
    return VERBS[verb](rest)


# The verbs.


def demo(arguments):
    python = prepare()
    with_pillow(python)
    return hand_over(python, SCRIPTS / "demo.py", arguments)


def start(arguments):
    return hand_over(prepare(), SCRIPTS / "launcher.py", ["start"] + arguments)


def stop(arguments):
    python = python_as_it_is()
    if python is None and not pid_files(arguments):
        print("nothing is set up here, so nothing is running that was started here")
        return 0
    return launch(python, "stop", arguments)


def restart(arguments):
    return hand_over(prepare(), SCRIPTS / "launcher.py", ["restart"] + arguments)


def status(arguments):
    return launch(python_as_it_is(), "status", arguments)


def setup(arguments):
    if arguments:
        raise Problem("setup takes no arguments, got {}".format(" ".join(arguments)))
    print("ready: {}".format(prepare()))
    return 0


def test(arguments):
    """Runs every check, also after one has failed, and ends with a line for each."""
    python = prepare(locks=(LOCK, DEV_LOCK))
    # Three files at once, on two cores too: a third of the time a test waits.
    at_once = ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder"]
    checks = {
        "ruff check": ["-m", "ruff", "check", "."],
        "ruff format": ["-m", "ruff", "format", "--check", "."],
        "mypy": ["-m", "mypy"],
        "imports": [
            "-c",
            "from importlinter.cli import lint_imports_command as check; check()",
        ],
        "pytest": ["-m", "pytest"] + at_once + arguments,
    }
    lines = []
    for name, command in checks.items():
        say("\n== {}".format(name))
        began = time.monotonic()
        code = subprocess.call([python] + command, cwd=str(ROOT), stdin=subprocess.DEVNULL)
        verdict = "ok" if code == 0 else "FAILED, exit code {}".format(code)
        lines.append((code, "{:<12} {}, {:.1f} s".format(name, verdict, time.monotonic() - began)))
    print("\n" + "\n".join(line for _, line in lines))
    return 1 if any(code for code, _ in lines) else 0


def lock(arguments):
    """Pins requirements*.txt with hashes for every system; uv asks PyPI's own index."""
    if arguments:
        raise Problem("lock takes no arguments, got {}".format(" ".join(arguments)))
    python = prepare(locks=(LOCK, DEV_LOCK))
    compile_pins = [python, "-m", "uv", "pip", "compile", "--universal", "--generate-hashes"]
    compile_pins += ["--python-version", "3.10", "--no-emit-index-url", "--no-emit-find-links"]
    compile_pins += ["--no-annotate", "--quiet", "--upgrade"]
    compile_pins += ["--custom-compile-command", "python3 scripts/run.py lock"]
    environment = dict(os.environ, UV_NO_CONFIG="1")
    # The second with the first as its constraint, or the two could pin different versions.
    for sources, output in (
        (["requirements.txt"], LOCK),
        (["requirements.txt", "requirements-dev.txt", "--constraint", LOCK], DEV_LOCK),
    ):
        command = compile_pins + sources + ["-o", output]
        if subprocess.call(command, cwd=str(ROOT), env=environment, stdout=subprocess.DEVNULL):
            raise Problem("uv could not make {}; its message is above".format(output))
        print("made {}".format(output))
    return 0


VERBS = {
    "demo": demo,
    "test": test,
    "start": start,
    "stop": stop,
    "restart": restart,
    "status": status,
    "setup": setup,
    "lock": lock,
}


# The set-up.


def prepare(locks=(LOCK,)):
    """The Python to run the project with, its packages and the stubs made."""
    with one_at_a_time():
        if not can_make_venv() and not VENV.exists():
            return own_python(locks)
        make_stubs(venv_python(), installed(made_venv(), locks))
    return venv_python()


def python_as_it_is():
    """The Python that can run the launcher, None when there is none; installs nothing.

    So what runs can be stopped offline too, whatever the lock file says by now.
    """
    for python in (venv_python(), sys.executable):
        facts = probe(python, *TO_STOP)
        if facts and not facts["missing"]:
            make_stubs(python, facts)
            return python
    return None


def launch(python, verb, arguments):
    if python is None:
        raise Problem(
            "nothing is set up here, or .venv was removed or spoilt since; set it up, which needs "
            "the network, and try again: {} setup".format(ROOT / "scripts" / "run.py")
        )
    return hand_over(python, SCRIPTS / "launcher.py", [verb] + arguments)


def pid_files(arguments):
    """What the start of a configuration has left in its log folders and no stop has removed."""
    named = [word for word in arguments if not word.startswith("-")][:1]
    config = ROOT / (named[0] if named else "")
    if named and Path(named[0]).exists():
        config = Path(named[0]).resolve()
    folders = {config.parent / "logs"}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        told = json.loads(config.read_text(encoding="utf-8-sig"))
        places = [told] + list(told["processes"].values())
        folders |= {config.parent / place["log_dir"] for place in places if "log_dir" in place}
    return [path for folder in folders for path in folder.glob("process_*.pid")]


def venv_python():
    return str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def can_make_venv():
    """Embedded Pythons have no venv; Debian keeps ensurepip in the package python3-venv."""
    from importlib.util import find_spec

    return find_spec("venv") is not None and find_spec("ensurepip") is not None


def own_python(locks):
    """This very Python, for those that cannot make a virtual environment."""
    needed = NEEDED + ["pytest", "xdist", "ruff", "mypy"] if DEV_LOCK in locks else NEEDED
    facts = probe(sys.executable, *needed) or {"missing": needed}
    if facts["missing"]:
        raise Problem(
            "{} cannot make a virtual environment and lacks {}; install the package python3-venv "
            "(Debian, Ubuntu: sudo apt install python3-venv) or a full Python from python.org, "
            "or install {} into it".format(
                sys.executable, ", ".join(facts["missing"]), " and ".join(locks)
            )
        )
    make_stubs(sys.executable, facts)
    return sys.executable


def made_venv():
    """Facts of a .venv that works; one that was left half made, or is too old, is made anew."""
    facts = probe(venv_python()) if VENV.exists() else None
    if facts and facts["python"] >= [3, 10] and is_whole():
        return facts
    if not can_make_venv():
        raise Problem("{} does not work and this Python cannot make another".format(VENV))
    say("making .venv ({})".format("again" if VENV.exists() else "once"))
    run([sys.executable, "-m", "venv", "--clear", str(VENV)], "could not make {}".format(VENV))
    facts = probe(venv_python())
    if not facts:
        raise Problem("{} was made but does not run".format(venv_python()))
    return facts


def is_whole():
    """Whether the last set-up came to its end. A .venv made by hand counts when its pip runs."""
    if INSTALLING.exists():
        return False
    ask = [venv_python(), "-m", "pip", "--version"]
    quiet = subprocess.DEVNULL
    return STAMP.exists() or subprocess.call(ask, stdout=quiet, stderr=quiet) == 0


def installed(facts, locks):
    """Brings the packages up to the lock files. Returns the facts as they are then."""
    done = read_stamp()
    if done.get("python") != facts["python"][:2]:
        done = {"python": facts["python"][:2]}
    wanted = {name: digest(ROOT / name) for name in locks}
    changed = [name for name in locks if done.get(name) != wanted[name]]
    if not changed:
        return facts
    for name in changed:
        say("installing {} (once; needs the network)".format(name))
        pip_install(venv_python(), ROOT / name)
        done[name] = wanted[name]
    write(STAMP, json.dumps(done))
    return probe(venv_python()) or facts


def read_stamp():
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def pip_install(python, lock_file):
    """Installs exactly what a lock file pins. A kill in between makes the next run start over."""
    command = [python, "-m", "pip", "install", "--require-hashes", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "-r", str(lock_file)]
    what = "could not install {}; {}".format(lock_file.name, install_advice())
    INSTALLING.touch()
    try:
        run(command, what)
    except Problem:
        INSTALLING.unlink()  # pip has put back what it had replaced
        raise
    INSTALLING.unlink()


def install_advice():
    if os.name == "nt" and platform.machine().upper() == "ARM64":
        return "gRPC has no package for Windows on ARM; install the 64-bit x86 Python (it runs too)"
    return (
        "needed are the network (or a mirror set in pip's configuration) and a Python that gRPC "
        "has packages for; this is {} on {}".format(platform.python_version(), platform.machine())
    )


def with_pillow(python):
    """For the demo's thumbnails; without the network it goes without them.

    Only Pillow's own lines of the long lock file are installed.
    """
    facts = probe(python, "PIL")
    if (facts and not facts["missing"]) or python != venv_python():
        return
    pins = re.findall(r"(?m)^pillow==.*(?:\n .*)*", (ROOT / DEV_LOCK).read_text(encoding="utf-8"))
    say("installing Pillow for the demo (once; needs the network)")
    with one_at_a_time(), tempfile.TemporaryDirectory() as folder:
        only_pillow = Path(folder) / "pillow.lock"
        only_pillow.write_text("\n".join(pins) + "\n", encoding="utf-8")
        try:
            pip_install(python, only_pillow)
        except Problem as problem:
            say("{}\ngoing on without thumbnails".format(problem))


# The stubs.


def make_stubs(python, facts):
    """Makes overlay_pb2*.py anew unless they are of this overlay.proto and this protobuf."""
    proto = ROOT / "overlay.proto"
    mark = "# from overlay.proto {} with protobuf {}\n".format(digest(proto), facts["protobuf"])
    if stubs_say(mark):
        return
    if not facts["tools"]:
        if all((ROOT / name).exists() for name in STUBS):
            return  # brought along by hand; wire says so if they do not fit
        raise Problem(
            "the stubs of overlay.proto are missing and {} has no grpcio-tools to make them; "
            "copy {} from another machine with the same protobuf version".format(
                python, ", ".join(STUBS)
            )
        )
    # Beside the project, then moved: who reads them meanwhile sees the old or the new, whole.
    with tempfile.TemporaryDirectory(prefix=".stubs-", dir=str(ROOT)) as folder:
        command = [python, "-m", "grpc_tools.protoc", "-I", ".", "--python_out=" + folder]
        command += ["--pyi_out=" + folder, "--grpc_python_out=" + folder, "overlay.proto"]
        run(command, "could not make the stubs of overlay.proto")
        with open(os.path.join(folder, STUBS[-1]), "a", encoding="utf-8") as last:
            last.write(mark)
        for name in STUBS:
            os.replace(os.path.join(folder, name), str(ROOT / name))
    print("made the stubs of overlay.proto")


def stubs_say(mark):
    try:
        texts = [(ROOT / name).read_text(encoding="utf-8") for name in STUBS]
    except (OSError, UnicodeDecodeError):
        return False
    return texts[-1].endswith(mark)


# Helpers.


def probe(python, *modules):
    """What a Python has, or None when it does not run."""
    try:
        done = subprocess.run(
            [python, "-c", PROBE] + list(modules),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,
        )
        return json.loads(done.stdout.decode("utf-8")) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def run(command, what):
    """Runs a step quietly. Raises Problem(what) with the end of what it said when it fails."""
    done = subprocess.run(
        command,
        cwd=str(ROOT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        last = done.stdout.decode("utf-8", "replace").strip().splitlines()[-8:]
        raise Problem("\n".join(["  " + line for line in last] + [what]))


def hand_over(python, script, arguments):
    """Becomes the script where the system can do that; elsewhere waits for its end."""
    command = [python, str(script)] + arguments
    sys.stdout.flush()
    if os.name != "nt":
        os.execv(python, command)
    child = subprocess.Popen(command)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # Ctrl-C reached the child too; its way of ending is ours


@contextlib.contextmanager
def one_at_a_time():
    """Two set-ups at once would spoil each other: the second waits. A killed one holds nothing."""
    (ROOT / "logs").mkdir(exist_ok=True)
    with open(str(ROOT / "logs" / ".setup-lock"), "a") as handle:
        if sys.platform == "win32":
            import msvcrt

            while True:
                try:
                    msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                except OSError:
                    time.sleep(0.2)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def digest(path):
    # Line endings do not count: git may change them on Windows.
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def say(text):
    """Before a long step, so that it is seen at once."""
    print(text)
    sys.stdout.flush()


def write(path, text):
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(str(beside), str(path))


def say_safely():
    """Output must not die on a console's code page."""
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure")(errors="replace")  # noqa: B009 - no TextIO has it


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Problem as problem:
        sys.stderr.write("{}\n".format(problem))
        sys.exit(2)
    except OSError as error:
        sys.stderr.write("{}: {}\n".format(error.filename or "setting up", error.strerror or error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C; run it again to go on\n")
        sys.exit(130)
