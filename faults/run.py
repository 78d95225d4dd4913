"""Injects faults into a real overlay under load, and checks its promises.

    python3 faults/run.py --freeze-s 30                      every scenario, about 15 minutes
    python3 faults/run.py --only kill-worker,vanish --seconds 10 --seed 7
    python3 faults/run.py --seeded                           tests the checker with injected bugs
    python3 faults/run.py --figures                          overload and recovery, 25 minutes
    python3 faults/run.py --figures --only overload --runs 1 --seconds 5
    python3 faults/run.py --check FOLDER/kill-worker/history.jsonl

Needs only the project's own environment, and creates it if missing. All processes run on free
loopback ports or in their own network namespaces, and are stopped, also after Ctrl-C. A scenario
that cannot run on this machine is skipped, and the report says why. Results go to
faults/results/<date>/: for each scenario a folder with history.jsonl and the logs; table.md and
plot.svg; or figures.md and figures.json.

Exit codes: 0 no violation, 1 a violation, a missed target or an invalid run, 2 it could not start.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[0] = str(ROOT)  # not this folder, whose modules are faults.*

SECONDS = 6.0
IN_ENVIRONMENT = "OVERLAY_FAULTS_ENVIRONMENT"
NEEDED = ("grpc", "grpc_health", "google.protobuf", "psutil", "pydantic", "overlay_pb2")


def today_and_here() -> str:
    cores, grpc = os.cpu_count(), importlib.metadata.version("grpcio")
    versions = f"{platform.platform()}, Python {platform.python_version()}, grpcio {grpc}"
    return f"{datetime.date.today()}, {cores} cores, {versions}."


def main(arguments: Sequence[str]) -> int:
    if not has_environment() and IN_ENVIRONMENT not in os.environ:
        return in_environment(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are stopped
    allow_many_files()
    options = parse(arguments)
    if options.check:
        return check(options.check)
    if options.figures:
        return figures(options)
    return seeded(options) if options.seeded else bench(options)


def allow_many_files() -> None:
    """A thousand clients need more than the usual limit; child processes inherit it."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows, macOS
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def has_environment() -> bool:
    def there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ImportError:
            return False

    return all(map(there, NEEDED))


def in_environment(arguments: Sequence[str]) -> int:
    """Runs this program with the project's Python, which scripts/run.py sets up."""
    spec = importlib.util.spec_from_file_location("project", ROOT / "scripts" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    project = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(project)
    try:
        python = project.prepare()
    except project.Problem as problem:
        print(problem, file=sys.stderr)
        return 2
    os.environ[IN_ENVIRONMENT] = python
    return int(project.hand_over(python, Path(__file__).resolve(), list(arguments)))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    from faults import scenarios, seeded, trials

    parser = argparse.ArgumentParser(
        prog="faults/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", type=names, default=[], metavar="NAME,...", help="run only these")
    parser.add_argument("--seconds", type=float, help="of load (6; with --figures 10)")
    parser.add_argument("--freeze-s", type=float, help="of a freeze (5, or half of the load)")
    parser.add_argument("--seed", type=int, default=1, help="of the calls and the faults (1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the results")
    parser.add_argument("--seeded", action="store_true", help="run with injected bugs")
    parser.add_argument("--figures", action="store_true", help="measure overload and recovery")
    parser.add_argument("--runs", type=int, default=3, help="of each figure (3)")
    parser.add_argument(
        "--overload-seconds", type=float, default=60.0, help="of overload before a recovery (60)"
    )
    parser.add_argument("--check", type=Path, metavar="HISTORY", help="only check a history")
    parser.add_argument("--list", action="store_true", help="list scenarios, bugs and figures")
    options = parser.parse_args(arguments)
    if options.list:
        for name, about in [(each.name, each.about) for each in scenarios.SCENARIOS] + [
            (bug.name, bug.about) for bug in seeded.BUGS
        ]:
            print(f"{name:<20} {about}")
        print(f"{'--figures':<20} {', '.join(trials.NAMES)}")
        parser.exit()
    if options.seconds is None:
        options.seconds = trials.SECONDS if options.figures else SECONDS
    for name in ("seconds", "runs", "overload_seconds"):
        if not 0 < getattr(options, name) < math.inf:
            option = f"--{name.replace('_', '-')} {getattr(options, name):g}"
            parser.error(f"{option} is not a number above 0")
    if options.freeze_s is not None and not options.freeze_s > 0:
        parser.error(f"--freeze-s {options.freeze_s:g} is not above 0")
    try:
        tables = seeded if options.seeded else trials if options.figures else scenarios
        choose: Any = tables.chosen
        options.chosen = choose(options.only)
    except ValueError as error:
        parser.error(str(error))
    return options


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def bench(options: argparse.Namespace) -> int:
    from faults import bench, plot, report
    from tests.harness.hosts import CannotBuild

    folder = options.out or new_folder()
    outcomes, not_run = [], {}
    with stopped_by_ctrl_c():
        for scenario in options.chosen:
            inside = fresh(folder, scenario.name)
            try:
                if scenario.why_not:
                    raise CannotBuild(scenario.why_not)
                outcome = bench.run(
                    scenario, inside, options.seconds, options.seed, freeze_s=options.freeze_s
                )
            except CannotBuild as why:
                not_run[scenario.name] = str(why)
                print(f"{scenario.name:<20} not run: {why}", flush=True)
                continue
            outcomes.append(outcome)
            print(report.line(outcome), flush=True)
    page = report.page(outcomes, not_run, options.seconds, options.seed, today_and_here())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(page, encoding="utf-8")
    (folder / "plot.svg").write_text(plot.drawn(outcomes), encoding="utf-8")
    print(f"\n{page}\nwritten to {folder}")
    complete = len(outcomes) + len(not_run) == len(options.chosen)
    return 0 if complete and not any(o.violations or o.invalid for o in outcomes) else 1


def seeded(options: argparse.Namespace) -> int:
    """Whether the checker finds each injected bug with one of the expected rules."""
    from faults import seeded

    folder = options.out or new_folder()
    missed = list(options.chosen)
    with stopped_by_ctrl_c():
        for bug in options.chosen:
            trial = seeded.try_out(bug, fresh(folder, bug.name), options.seconds, options.seed)
            if trial.found:
                missed.remove(bug)
            print(trial.sentence, flush=True)
    print(f"{len(options.chosen) - len(missed)} of {len(options.chosen)} found; {folder}")
    return 1 if missed else 0


def figures(options: argparse.Namespace) -> int:
    """Writes the results after each trial, so that Ctrl-C loses only the last one."""
    from faults import figures, trials
    from tests.harness.hosts import CannotBuild
    from tests.harness.machine import NotReached

    sys.setswitchinterval(0.0005)  # otherwise arriving answers delay the calls
    folder = options.out or new_folder()
    asked = trials.Asked(options.seconds, options.overload_seconds)
    samples: list[figures.Sample] = []
    not_run = {name: why for name in options.chosen if (why := trials.why_not(name))}
    missing = [f"{name} was not measured: {why}" for name, why in not_run.items()]
    here = [name for name in options.chosen if name not in not_run]
    runs = [(run, name) for run in range(1, options.runs + 1) for name in here]
    with stopped_by_ctrl_c():
        for run, name in runs:
            try:
                for sample in trials.measure(name, run, fresh(folder, f"{name}-{run}"), asked):
                    samples.append(sample)
                    print(figures.line(sample), flush=True)
            except (NotReached, CannotBuild) as error:
                missing.append(f"{name}, run {run}, got stuck: {error}")
                print(missing[-1], flush=True)
            write_figures(folder, samples, missing, asked)
    print(f"\n{write_figures(folder, samples, missing, asked)}\nwritten to {folder}")
    return 0 if not missing and figures.all_reached(samples) else 1


def write_figures(folder: Path, samples: list[Any], missing: list[str], asked: Any) -> str:
    """Writes figures.md and figures.json; returns the page."""
    from faults import figures

    how = f"{asked.seconds:g} s of each load, {asked.overload_s:g} s before a recovery."
    page = figures.page(samples, missing, f"{today_and_here()} {how}")
    raw = {"where": today_and_here(), **dataclasses.asdict(asked), "missing": missing}
    raw["samples"] = [
        {**dataclasses.asdict(s), "value": s.value if math.isfinite(s.value) else None}
        for s in samples
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.md").write_text(page, encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    return page


def check(path: Path) -> int:
    from faults import checker, history

    try:
        found = checker.check(history.read(path))
    except (OSError, ValueError) as error:
        print(f"faults/run.py: {error}", file=sys.stderr)
        return 2
    for violation in found:
        print(f"{violation.rule}: {violation.sentence}")
    print(f"{len(found)} violations")
    return 1 if found else 0


@contextlib.contextmanager
def stopped_by_ctrl_c() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the results so far follow", file=sys.stderr)


def new_folder() -> Path:
    """results/<date>, with a number from the second run of a day on."""
    date = datetime.date.today().isoformat()
    for number in range(1, 1000):
        folder = HERE / "results" / (date if number == 1 else f"{date}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise OSError(f"{HERE / 'results'} already has 999 results of {date}")


def fresh(folder: Path, name: str) -> Path:
    """A folder for one run; removes that of an earlier run."""
    inside = folder / name
    if (inside / "overlay.json").exists():
        shutil.rmtree(inside)
    return inside


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        print(f"faults/run.py: {error}", file=sys.stderr)
        sys.exit(2)
