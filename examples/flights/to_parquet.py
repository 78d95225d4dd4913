"""Converts a worker's CSV files to one Parquet file, which makes queries much faster.

python examples/flights/to_parquet.py CONFIG WORKER [FILE]      default: data/WORKER.parquet

Run it on the worker's machine. Rows, names and types stay the same for queries. Prints the change
to make in the configuration. Exit codes: 0 done, 2 failed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # or: pip install -e .
import duckdb
from share import Share, with_table
from sqltree import literal, quoted

from overlay.model import config as configuration
from overlay.model.errors import ConfigError


def main(arguments: list[str]) -> int:
    if len(arguments) not in (2, 3) or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    config, worker, *named = arguments
    default = Path(__file__).parent / "data" / f"{worker}.parquet"
    file = Path(named[0]).absolute() if named else default
    share = Share.of(_options(config, worker))
    if share.reader != "read_csv":
        raise ValueError(f"what {worker} has is Parquet already")
    rows = made(share, file)
    files = json.dumps({"files": [file.as_posix()]}, ensure_ascii=False)
    print(f"{rows:,} rows of {len(share.files):,} CSV files are in {file}")
    print(f"now put {files} into the options of {worker}, in place of its files, and restart it")
    return 0


def made(share: Share, file: Path) -> int:
    """Writes the file atomically; returns the number of its rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    making = file.with_name(f".making-{file.name}")
    try:
        with with_table(share, lambda: 1.0) as db:
            copied = db.execute(
                f"COPY {quoted(share.table)} TO {literal(str(making))} (FORMAT parquet)"
            ).fetchone()
        os.replace(making, file)
    finally:
        making.unlink(missing_ok=True)
    return int(copied[0]) if copied else 0


def _options(config: str, worker: str) -> dict[str, Any]:
    """The options that the worker's handler gets. Raises ConfigError."""
    topology = configuration.load(config)
    process = topology.processes.get(worker)
    if process is None:
        known = ", ".join(topology.processes)
        raise ConfigError(f"no process '{worker}' in {Path(config).name}; it has {known}")
    return {**topology.handlers[process.handler].options, **process.options}


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ValueError, ConfigError, duckdb.Error) as e:
        print(f"to_parquet.py: {e}", file=sys.stderr)
        sys.exit(2)
