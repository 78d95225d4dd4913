"""Measures the overlay side by side with its peers, on this machine, and writes a table and a plot.

    python3 benchmarks/run.py                            every row and peer, 10 rounds
    python3 benchmarks/run.py --quick                    the rows with a figure to reach, 3 rounds
    python3 benchmarks/run.py --only ours,nats --work window-64,bulk --rounds 5
    python3 benchmarks/run.py --all-peers                also Ray, Dramatiq, RQ, NATS with uvloop

Needs only Python: the first run makes benchmarks/.venv. All processes run on free loopback ports
and are ended, also after Ctrl-C. Results go to benchmarks/results/<date>/: results.json (raw),
table.md, plot.svg. The machine should be otherwise idle; the table says how busy it was.

Exit codes: 0 measured, 1 something failed (the table says what), 2 it could not begin.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[0] = str(ROOT)  # not this folder, whose modules are benchmarks.*
sys.path.append(str(ROOT / "scripts"))

import environment  # noqa: E402 - the project's, whose functions make this one's too

from benchmarks import peers  # noqa: E402
from benchmarks.rows import ROWS, chosen  # noqa: E402
from overlay.cli import stdio  # noqa: E402

VENV = HERE / ".venv"
STAMP = VENV / "installed.json"  # the hashes of the requirement files that are installed
REQUIREMENTS = ("requirements.txt", "requirements-all-peers.txt")
IN_VENV = "OVERLAY_BENCHMARK_VENV"


def main(arguments: list[str]) -> int:
    stdio.escape_unprintable()
    options = parse(arguments)
    if IN_VENV not in os.environ:
        python = prepare(options.all_peers or set(options.only or ()) & set(peers.EXTRA))
        os.environ[IN_VENV] = python
        return environment.hand_over(python, Path(__file__).resolve(), arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly exit, which ends the peers
    return contest_of(options, arguments)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(peers.MODULES)
    parser.add_argument("--rounds", type=positive, help="default: 10; with --quick 3")
    parser.add_argument(
        "--seconds", type=float, help="of one measurement (default: 0.6; with --quick 0.4)"
    )
    parser.add_argument("--only", type=names, metavar="PEER,...", help=known)
    parser.add_argument(
        "--work", type=names, metavar="ROW,...", default=[], help=", ".join(r.name for r in ROWS)
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write here, not to a new folder in results/"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows, rounds and items")
    parser.add_argument("--all-peers", action="store_true", help=", ".join(peers.EXTRA) + " too")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only or () if name not in peers.MODULES]
    if unknown:
        parser.error(f"no peer '{unknown[0]}'; there are {known}")
    try:
        options.rows = chosen(options.work, options.quick)
    except ValueError as error:
        parser.error(str(error))
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


# The virtual environment, made by whichever Python runs this.


def prepare(all_peers: bool) -> str:
    """The Python to measure with, after what its environment lacks is installed."""
    wanted = REQUIREMENTS if all_peers else REQUIREMENTS[:1]
    with environment.one_at_a_time():
        python = str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        if environment.probe(python) is None:
            print("making benchmarks/.venv (once)", flush=True)
            make = [sys.executable, "-m", "venv", "--clear", str(VENV)]
            environment.run(make, f"could not make {VENV}")
        install(python, [ROOT / environment.LOCK, *(HERE / name for name in wanted)])
        environment.make_stubs(python, environment.probe(python))
    return python


def install(python: str, files: list[Path]) -> None:
    done = json.loads(STAMP.read_text(encoding="utf-8")) if STAMP.exists() else {}
    for path in files:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if done.get(path.name) == digest:
            continue
        print(f"installing {path.name} (once; needs the network)", flush=True)
        if path.name == environment.LOCK:
            pip(python, "-r", str(path))
        elif not install_each(python, path):
            continue  # tried again next time
        done[path.name] = digest
        STAMP.write_text(json.dumps(done), encoding="utf-8")


def install_each(python: str, path: Path) -> bool:
    """Whether all are installed. If they cannot be installed together, each is tried alone, so that
    only the peers whose packages are missing are left out."""
    with contextlib.suppress(environment.Problem):
        pip(python, "-r", str(path))
        return True
    for line in path.read_text(encoding="utf-8").splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement:
            try:
                pip(python, requirement)
            except environment.Problem as problem:
                print(problem, file=sys.stderr)
    return False


def pip(python: str, *what: str) -> None:
    command = [python, "-m", "pip", "install", "--no-input", "--quiet", *what]
    environment.run(command, f"could not install {' '.join(what)}")


# The contest, in that environment.


def contest_of(options: argparse.Namespace, arguments: list[str]) -> int:
    from benchmarks import contest

    default = [name for name in peers.MODULES if options.all_peers or name not in peers.EXTRA]
    plan = contest.Plan(
        peers=tuple(name for name in peers.MODULES if name in (options.only or default)),
        rows=options.rows,
        rounds=options.rounds or (3 if options.quick else 10),
        seconds=options.seconds or (0.4 if options.quick else 0.6),
        share=0.2 if options.quick else 1.0,
    )
    results = contest.Results()
    about = about_run(plan, arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        try:
            contest.run(plan, Path(folder), results, say)
        except (KeyboardInterrupt, SystemExit):
            about["interrupted"] = True
            say("stopped; writing the results so far")
    about["minutes"] = (time.monotonic() - began) / 60
    write(about, results, options.out)
    failed = results.not_run or any("error" in found for found in results.measurements)
    return 1 if failed or about.get("interrupted") else 0


def about_run(plan, arguments: list[str]) -> dict:
    from benchmarks import machine

    return {
        "date": datetime.date.today().isoformat(),
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/run.py", *arguments]),
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "machine": machine.facts(),
        "versions": machine.versions(plan.peers),
    }


def write(about: dict, results, out: Path | None) -> None:
    from benchmarks import plot, report

    raw = {"about": about, "not_run": results.not_run, "measurements": results.measurements}
    before = last_results()
    folder = out or new_folder(about["date"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    try:
        drawn = plot.draw(raw, folder / "plot.svg")
    except ImportError as error:
        drawn = False
        raw["not_run"]["plot"] = f"{error}; install {REQUIREMENTS[0]}"
    page = report.page(raw, before, "plot.svg" if drawn else "")
    (folder / "table.md").write_text(page, encoding="utf-8")
    print(page)
    print(f"written to {folder}")


def new_folder(date: str) -> Path:
    """results/<date>, with a number after it from the second run of a day on."""
    for number in range(1, 1000):
        folder = HERE / "results" / (date if number == 1 else f"{date}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise OSError(f"{HERE / 'results'} has a thousand results of {date} already")


def last_results() -> dict | None:
    """The newest raw results; None when there are none."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in HERE.glob("results/*/results.json")]
    return max(found, key=lambda raw: raw["about"]["time"], default=None)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except environment.Problem as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"benchmarks/run.py: {error}", file=sys.stderr)
        sys.exit(2)
