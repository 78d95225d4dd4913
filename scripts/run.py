# ruff: noqa: UP032, UP036, RUF005 - even Python 2 must be able to read this file
"""Everything from one command; needs only Python.

    python3 scripts/run.py                     the demo: six processes here, real requests
    python3 scripts/run.py demo --once         the same, and stops after the requests
    python3 scripts/run.py test [ARGS]         lint, types and tests; ARGS go to pytest
    python3 scripts/run.py start CONFIG [IDS]  starts this machine's processes of a configuration
    python3 scripts/run.py stop CONFIG [IDS]   stops what start started
    python3 scripts/run.py restart CONFIG [IDS]  restarts them one by one; no request is lost
    python3 scripts/run.py status CONFIG       which processes serve, with their pids
    python3 scripts/run.py init                asks for the addresses of your machines
    python3 scripts/run.py secure CONFIG       certificates for them, on the leader's machine
    python3 scripts/run.py join LINE           on another machine, with a line that secure printed
    python3 scripts/run.py setup               only the set-up
    python3 scripts/run.py lock                makes the lock files again from requirements*.txt

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
import json
import os
import subprocess
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
sys.path.insert(0, str(SCRIPTS))
sys.path.append(str(ROOT))

from environment import (  # noqa: E402 - found through the lines above; needs no package
    DEV_LOCK,
    LOCK,
    NATS_LOCK,
    Problem,
    add_pillow,
    hand_over,
    prepare,
    python_as_it_is,
)

from overlay.cli import stdio  # noqa: E402 - needs no package either


def main(arguments):
    stdio.complete()
    stdio.escape_unprintable()
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("demo", [])
    if verb in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0
    if verb not in VERBS:
        known = ", ".join(VERBS)
        raise Problem("no verb '{}'; there are {} (-h explains them)".format(verb, known))
    if verb in ("setup", "lock") and rest:
        raise Problem("{} takes no arguments, got {}".format(verb, " ".join(rest)))
    return VERBS[verb](rest)


def demo(arguments):
    python = prepare()
    add_pillow(python)
    return hand_over(python, SCRIPTS / "demo.py", arguments)


def start(arguments):
    return hand_over(prepare(locks_for(arguments)), SCRIPTS / "launcher.py", ["start"] + arguments)


def restart(arguments):
    locks = locks_for(arguments)
    return hand_over(prepare(locks), SCRIPTS / "launcher.py", ["restart"] + arguments)


def locks_for(arguments):
    """With what keeps jobs on NATS servers, if the configuration asks for it."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        written = json.loads(config_of(arguments).read_text(encoding="utf-8-sig"))
        if written["journal"].startswith("nats://"):
            return (LOCK, NATS_LOCK)
    return (LOCK,)


def client(verb):
    """A verb of client.py, for a machine on which nothing is set up yet."""

    def hand(arguments):
        return hand_over(prepare(), ROOT / "client.py", [verb] + arguments)

    return hand


def stop(arguments):
    python = python_as_it_is()
    if python is None and not pid_files(arguments):
        print("nothing is set up here, so nothing is running that was started here")
        return 0
    return launch(python, "stop", arguments)


def status(arguments):
    return launch(python_as_it_is(), "status", arguments)


def launch(python, verb, arguments):
    if python is None:
        raise Problem(
            "nothing is set up here, or .venv was removed or damaged since; set it up, which needs "
            "the network, and try again: {} setup".format(SCRIPTS / "run.py")
        )
    return hand_over(python, SCRIPTS / "launcher.py", [verb] + arguments)


def config_of(arguments):
    named = [word for word in arguments if not word.startswith("-")][:1]
    if named and Path(named[0]).exists():
        return Path(named[0]).resolve()
    return ROOT / (named[0] if named else "")


def pid_files(arguments):
    """What the start of a configuration has left in its log folders and no stop has removed."""
    config = config_of(arguments)
    folders = {config.parent / "logs"}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        written = json.loads(config.read_text(encoding="utf-8-sig"))
        places = [written] + list(written["processes"].values())
        folders |= {config.parent / place["log_dir"] for place in places if "log_dir" in place}
    return [path for folder in folders for path in folder.glob("process_*.pid")]


def setup(arguments):
    print("ready: {}".format(prepare()))
    return 0


def test(arguments):
    """Runs every check, also after one has failed, and ends with a line for each."""
    python = prepare(locks=(LOCK, DEV_LOCK))
    # Four files at once, on two cores too: tests wait for more than they compute.
    at_once = ["-n", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
    imports = "from importlinter.cli import lint_imports_command as check; check()"
    checks = {
        "ruff check": ["-m", "ruff", "check", "."],
        "ruff format": ["-m", "ruff", "format", "--check", "."],
        "mypy": ["-m", "mypy"],
        "imports": ["-c", imports],
        "pytest": ["-m", "pytest"] + at_once + arguments,
    }
    codes, lines = [], []
    for name, command in checks.items():
        print("\n== {}".format(name))
        sys.stdout.flush()
        began = time.monotonic()
        codes.append(subprocess.call([python] + command, cwd=str(ROOT), stdin=subprocess.DEVNULL))
        verdict = "FAILED, exit code {}".format(codes[-1]) if codes[-1] else "ok"
        lines.append("{:<12} {}, {:.1f} s".format(name, verdict, time.monotonic() - began))
    print("\n" + "\n".join(lines))
    return 1 if any(codes) else 0


def lock(arguments):
    """Pins requirements*.txt with hashes for every system; uv asks PyPI's own index."""
    python = prepare(locks=(LOCK, DEV_LOCK))
    compile_pins = [python, "-m", "uv", "pip", "compile", "--universal", "--generate-hashes"]
    compile_pins += ["--python-version", "3.10", "--no-emit-index-url", "--no-emit-find-links"]
    compile_pins += ["--no-annotate", "--quiet", "--upgrade"]
    compile_pins += ["--custom-compile-command", "python3 scripts/run.py lock"]
    environment = dict(os.environ, UV_NO_CONFIG="1")
    # The second with the first as its constraint, or the two could pin different versions.
    dev_sources = ["requirements.txt", "requirements-dev.txt", "--constraint", LOCK]
    made = ((["requirements.txt"], LOCK), (["requirements-nats.txt"], NATS_LOCK))
    for sources, output in (*made, (dev_sources, DEV_LOCK)):
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
    "init": client("init"),
    "secure": client("secure"),
    "join": client("join"),
    "setup": setup,
    "lock": lock,
}


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
