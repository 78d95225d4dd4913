"""A day is written in one way, whatever the time zone of the machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest

from overlay.model.clocks import utc_day
from tests.harness.cluster import ROOT

NEW_YEAR_S = 1_893_456_000.0  # 2030-01-01 00:00 UTC


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "America/Los_Angeles"])
def test_a_day_is_the_same_in_every_time_zone(zone: str) -> None:
    program = f"from overlay.model.clocks import utc_day; print(utc_day({NEW_YEAR_S}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TZ": zone, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.strip() == "2030-01-01"


@pytest.mark.parametrize("time_s", [1e30, -1e30, math.inf, math.nan])
def test_what_is_no_time_has_no_day(time_s: float) -> None:
    assert utc_day(time_s) == "an unknown day"
