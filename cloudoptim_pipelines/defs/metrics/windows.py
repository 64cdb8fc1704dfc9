"""The five-minute grid of a cluster's metrics: which windows should be there, which are. Pure rules."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

from cloudoptim_pipelines.partitions import DAY, day_start

WINDOW = timedelta(minutes=5)
WINDOWS_PER_DAY = DAY // WINDOW
# An agent posts every few seconds; the window that just ended may still be on its way.
SETTLING = timedelta(minutes=5)


def window_start(at: datetime) -> datetime:
    """Start of the window a moment lies in."""
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    return at - (at - epoch) % WINDOW


def expected_windows(day: date, *, first_seen: datetime, now: datetime) -> tuple[int, int]:
    """Windows of the day that should hold samples, as numbers from midnight: from (included), to (not included).

    Nothing is expected before the cluster's first sign of life, nor of windows that are not over and settled.
    """
    start, end = day_start(day), day_start(day) + DAY
    begin = max(start, window_start(first_seen))
    until = min(end, window_start(now - SETTLING))
    return (min(begin, end) - start) // WINDOW, max(until - start, timedelta(0)) // WINDOW


def missing_runs(expected: tuple[int, int], present: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of missing windows: from (included), to (not included)."""
    there = set(present)
    runs: list[tuple[int, int]] = []
    for window in range(*expected):
        if window in there:
            continue
        if runs and runs[-1][1] == window:
            runs[-1] = (runs[-1][0], window + 1)
        else:
            runs.append((window, window + 1))
    return runs


def encode(windows: Iterable[int]) -> str:
    """Window numbers as ranges in text, ``0-12,14-287``: kilobytes a year for each cluster."""
    ranges: list[list[int]] = []
    for window in sorted(set(windows)):
        if ranges and ranges[-1][1] + 1 == window:
            ranges[-1][1] = window
        else:
            ranges.append([window, window])
    return ",".join(f"{first}-{last}" for first, last in ranges)


def decode(text: str) -> list[int]:
    """The inverse of ``encode``."""
    windows: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        windows.extend(range(int(first), int(last) + 1))
    return windows
