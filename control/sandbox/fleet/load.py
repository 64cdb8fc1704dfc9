"""How much a pod uses at a moment: a pure function of workload, pod and time, so that nothing is stored or stepped.

    cpu(t)    = requests * cpu_use * day(t) * week(t) * noise(t)
    memory(t) = requests * memory_use * (1 + 0.1 * (day(t) - 1)) * noise'(t)

`day` swings around 1 with its peak at the workload's hour, `week` is 0.75 at weekends, `noise` is value noise with one
knot a minute: random levels per pod and minute, joined smoothly.
"""

from __future__ import annotations

import math
import zlib
from datetime import datetime

from control.sandbox.fleet.plan import Workload

WEEKEND = 0.75
CPU_NOISE = 0.25
MEMORY_NOISE = 0.05
KNOT_SECONDS = 60


def _level(seed: str, knot: int) -> float:
    """A uniform number in [-1, 1) that is always the same for a seed and a knot."""
    return zlib.crc32(f"{seed}/{knot}".encode()) / 2**31 - 1.0


def noise(seed: str, epoch_seconds: float) -> float:
    """Smooth noise in [-1, 1]."""
    knot, rest = divmod(epoch_seconds, KNOT_SECONDS)
    share = rest / KNOT_SECONDS
    smooth = share * share * (3 - 2 * share)
    left, right = _level(seed, int(knot)), _level(seed, int(knot) + 1)
    return left + (right - left) * smooth


def day(workload: Workload, now: datetime) -> float:
    """The daily curve, mean 1, between 1 - daily and 1 + daily."""
    hour = now.hour + now.minute / 60 + now.second / 3600
    return 1.0 + workload.daily * math.cos((hour - workload.peak_hour) / 24 * 2 * math.pi)


def usage(
    workload: Workload, pod_uid: str, cpu_requested: float, memory_requested: float, now: datetime
) -> tuple[float, float]:
    """(cores, bytes) in use now. Memory stays below its request, which is also its limit; cpu may exceed it."""
    epoch = now.timestamp()
    curve = day(workload, now)
    week = WEEKEND if now.weekday() >= 5 else 1.0
    cpu = workload.cpu_use * curve * week * (1 + CPU_NOISE * noise(pod_uid, epoch))
    memory = workload.memory_use * (1 + 0.1 * (curve - 1)) * (1 + MEMORY_NOISE * noise(pod_uid + "m", epoch))
    return cpu_requested * max(0.005, cpu), memory_requested * min(0.97, max(0.05, memory))
