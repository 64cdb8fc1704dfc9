"""The clock of a replay: it stands while nothing runs, and goes on where it stood, also after kill -9.

What is kept on disk is the list of stretches in which the replay ran. Between them recorded time stands still, so the
mapping from real to recorded time is piecewise linear and never goes back, and a record of the past keeps the real
moment at which it appeared whatever was stopped and started since.
"""

from __future__ import annotations

import json
import math
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt

from control.sandbox.identity import write_private
from control.sandbox.market.interface import microseconds

RESERVED_US = 2_000_000
"""How far ahead of the real time the file says the replay runs: what a kill -9 skips at most."""
KEPT_US = 100 * 86_400 * 1_000_000
"""Stretches older than any price history that can be asked for are forgotten."""


@dataclass(slots=True)
class Stretch:
    """From `real_us` on (since the epoch) recorded time went from `recorded_us` at `speed`, certainly to `until_us`."""

    real_us: int
    recorded_us: int
    speed: float
    until_us: int

    def at(self, real_us: int) -> int:
        """Recorded time at a real time of this stretch (or before, as if it had always run)."""
        return self.recorded_us + math.floor((min(real_us, self.until_us) - self.real_us) * self.speed)


class ReplayClock:
    """Real time to recorded time and back. Thread-safe.

    Args:
        start: recorded time at the first start.
        end: recorded time that is not passed.
        speed: seconds of the recording per second; a restart may change it.
        file: where the stretches are kept; None keeps nothing.
        recording: the name of what is replayed; another one, or another `start`, begins anew.
        now: real time, seconds since the epoch.
    """

    def __init__(
        self,
        start: datetime,
        end: datetime,
        *,
        speed: float,
        file: Path | None = None,
        recording: str = "",
        now: Callable[[], float] = time.time,
    ) -> None:
        self.speed, self._file, self._now = speed, file, now
        self._identity = {"recording": recording, "start": start.isoformat()}
        self._start_us = microseconds(start)
        self._end_us = microseconds(end)
        self._lock = threading.Lock()
        if not 0 <= speed < math.inf:
            raise ValueError(f"speed {speed} must be a number of seconds of the recording per second, 0 or more")
        real = self._real()
        self._stretches = self._kept()
        if not self._stretches:
            self._stretches = [Stretch(real, self._start_us, speed, real)]
        elif self._stretches[-1].speed != speed or real > self._stretches[-1].until_us:
            last = self._stretches[-1]
            begins = max(real, last.until_us)
            self._stretches.append(Stretch(begins, self._capped(last.at(last.until_us)), speed, begins))
            while len(self._stretches) > 1 and self._stretches[1].real_us < real - KEPT_US:
                del self._stretches[0]
        self._reserve(real)

    def _real(self) -> int:
        return int(self._now() * 1_000_000)

    def _capped(self, recorded_us: int) -> int:
        """Not beyond the end (a start beyond it stays where it is), nor before anything could be recorded."""
        return max(0, min(recorded_us, max(self._start_us, self._end_us)))

    def _kept(self) -> list[Stretch]:
        if self._file is None or not self._file.exists():
            return []
        document = json.loads(self._file.read_text())
        if {name: document.get(name) for name in self._identity} != self._identity:
            return []
        return [Stretch(**row) for row in document["stretches"]]

    def _save(self) -> None:
        if self._file is not None:
            rows = [asdict(stretch) for stretch in self._stretches]
            write_private(self._file, json.dumps({**self._identity, "stretches": rows}))

    def _reserve(self, real: int) -> None:
        last = self._stretches[-1]
        if real + RESERVED_US // 2 > last.until_us:
            last.until_us = max(real, last.real_us) + RESERVED_US
            self._save()

    def now(self) -> datetime:
        """Recorded time now."""
        real = self._real()
        with self._lock:
            self._reserve(real)
        return self.recorded(moment(real))

    @property
    def ended(self) -> bool:
        """Whether the end of the recording is reached."""
        return microseconds(self.now()) >= self._end_us

    def recorded(self, real: datetime) -> datetime:
        """Recorded time at a real time; before the first start as if it had always run."""
        real_us = microseconds(real)
        with self._lock:
            index = max(0, bisect_right(self._stretches, real_us, key=lambda s: s.real_us) - 1)
            return moment(self._capped(self._stretches[index].at(real_us)))

    def real(self, recorded: datetime) -> datetime:
        """When a recorded time was or will be reached (at the present speed)."""
        return moment(int(self.real_us(np.array([microseconds(recorded)], dtype=np.int64))[0]))

    def real_us(self, recorded_us: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The first real moments at which recorded time was that far; speeds of 0 have none (ZeroDivisionError)."""
        with self._lock:
            # of stretches that begin at one recorded time, all but the last had no duration
            begins = np.array([s.recorded_us for s in self._stretches], dtype=np.int64)
            reals = np.array([s.real_us for s in self._stretches], dtype=np.int64)
            speeds = np.array([s.speed for s in self._stretches])
        index = np.maximum(np.searchsorted(begins, recorded_us, side="left") - 1, 0)
        if not speeds.all():
            raise ZeroDivisionError("a replay that stands still reaches no other moment")
        result: npt.NDArray[np.int64] = reals[index] + np.ceil((recorded_us - begins[index]) / speeds[index]).astype(
            np.int64
        )
        return result

    def close(self) -> None:
        """The replay stops now."""
        real = self._real()
        with self._lock:
            last = self._stretches[-1]
            last.until_us = max(min(last.until_us, real), last.real_us)
            self._save()


def moment(at_us: int) -> datetime:
    """The inverse of `microseconds`."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at_us)
