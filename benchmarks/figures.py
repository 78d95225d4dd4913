"""The statistics, without I/O: medians, paired ratios, bootstrap intervals, rotation.

A round gives each peer one figure for a row, all taken within seconds. Only figures of the same
round are compared, so a machine that slows down slows both sides of a ratio.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

RESAMPLES = 5000  # with these, the ends of an interval differ by less than 1 % between two seeds
SEED = 20  # so that the same raw figures always give the same table


@dataclass(frozen=True)
class Estimate:
    """A median and its 95 % interval, over `count` rounds."""

    median: float
    low: float
    high: float
    count: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """The median with a percentile bootstrap interval; None without values."""
    if not values:
        return None
    draw = random.Random(SEED)
    n = len(values)
    medians = [statistics.median(draw.choices(values, k=n)) for _ in range(RESAMPLES)]
    low, high = quantile(medians, 0.025), quantile(medians, 0.975)
    return Estimate(statistics.median(values), low, high, n)


def paired_ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Ours over theirs, for each round that both have, in the order of the rounds."""
    return [ours[r] / theirs[r] for r in sorted(ours.keys() & theirs.keys()) if theirs[r] > 0]


def quantile(values: Sequence[float], share: float) -> float:
    """With linear interpolation; `share` from 0 to 1. Raises ValueError without values."""
    if not values:
        raise ValueError("no values to take a quantile of")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def unevenness(by_worker: Mapping[str, int], workers: Sequence[str]) -> float:
    """How far any worker's share is from an even one, at most: 0 is even, 0.1 within 10 %."""
    even = sum(by_worker.values()) / len(workers)
    if even == 0:
        return 0.0
    return max(abs(by_worker.get(worker, 0) / even - 1) for worker in workers)


def rotated(peers: Sequence[T], number: int) -> list[T]:
    """The order of a round: each peer begins in its turn, and every other cycle runs backwards.

    Without the backward cycles a peer would always be measured right after the same other one.
    """
    if not peers:
        return []
    cycle, start = divmod(number, len(peers))
    order = list(peers[start:]) + list(peers[:start])
    return order[::-1] if cycle % 2 else order
