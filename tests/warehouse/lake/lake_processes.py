"""Writers and readers in processes of their own, for the tests that let them collide and die.

    python -m tests.warehouse.lake.lake_processes write ROOT SECONDS SEED     # until killed when SECONDS is 0
    python -m tests.warehouse.lake.lake_processes read ROOT SECONDS SEED
    python -m tests.warehouse.lake.lake_processes die ROOT POINT 0

The database's address is in DATABASE_URL. Every release replaces one day of two tables with rows that carry the same
stamp, so a reader can tell a torn read (two stamps in a day) and a disagreement (another stamp in the other table).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import polars as pl

from tests.warehouse.lake.lake_rows import CUSTOMER_A, node_costs, node_hours
from warehouse.lake.query import LakeReader, Limits
from warehouse.lake.releases import Releases
from warehouse.lake.store import Lake, PartitionWrite

DAYS = (1, 2, 3)
STAMPS = """
SELECT h.day, h.low, h.high, h.n, c.low AS other_low, c.high AS other_high, c.n AS other_n
FROM (SELECT day, min(minutes) AS low, max(minutes) AS high, count(*) AS n FROM node_hours GROUP BY day) h
FULL JOIN (
    SELECT day, min(price_usd_per_hour) AS low, max(price_usd_per_hour) AS high, count(*) AS n
    FROM node_cost_hourly GROUP BY day
) c USING (day)
ORDER BY 1
"""


def say(line: str) -> None:
    """One line for the test that started this process."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def stamped(stamp: int, day: int) -> list[PartitionWrite]:
    """One day of two tables, both with this stamp."""
    partition = {"day": f"2024-01-0{day}", "region": "us-east-1"}
    rows = 1 + stamp % 24
    hours = node_hours(CUSTOMER_A, day, rows).with_columns(minutes=pl.lit(float(stamp)))
    costs = node_costs(CUSTOMER_A, day, rows, price=str(stamp))
    return [PartitionWrite("node_hours", partition, hours), PartitionWrite("node_cost_hourly", partition, costs)]


def disagreements(rows: list[tuple[Any, ...]]) -> list[str]:
    """What is wrong with an answer to ``STAMPS``."""
    wrong = []
    for day, low, high, n, other_low, other_high, other_n in rows:
        if low != high or other_low != other_high:
            wrong.append(f"{day}: torn, {low}..{high} and {other_low}..{other_high}")
        elif Decimal(low) != other_low or n != other_n or n != 1 + int(low) % 24:
            wrong.append(f"{day}: tables disagree, {low} x {n} and {other_low} x {other_n}")
    return wrong


def write(lake: Lake, seconds: float, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    ends = time.monotonic() + seconds if seconds else float("inf")
    releases = 0
    while time.monotonic() < ends:
        lake.publish(stamped(rng.randrange(1, 100_000), rng.choice(DAYS)), run_id=f"writer-{seed}")
        releases += 1
        if releases == 1:
            say("writing")
    return {"releases": releases}


def read(lake: Lake, seconds: float, seed: int) -> dict[str, Any]:
    reader = LakeReader(lake, Limits(memory="256MB", threads=1))
    ends = time.monotonic() + seconds
    reads, wrong, newest = 0, [], 0
    while time.monotonic() < ends:
        page = reader.pin()
        if page.release.id < newest:
            wrong.append(f"release went back from {newest} to {page.release.id}")
        newest = page.release.id
        wrong += disagreements(page.frame(STAMPS, all_customers=True).rows())
        reads += 1
    reader.close()
    return {"reads": reads, "wrong": wrong}


def die(lake: Lake, point: float, _: int) -> dict[str, Any]:
    """Publish, and be killed after staging (0), one table's commit (1), both commits (2), or the release row (3)."""

    def killed_after(owner: type, name: str, calls: int) -> None:
        real: Callable[..., Any] = getattr(owner, name)
        seen = 0

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            result = real(*args, **kwargs)
            seen += 1
            if seen == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, wrapper)

    points: list[tuple[type, str, int]] = [
        (Lake, "stage", 2),
        (Lake, "_commit_table", 1),
        (Lake, "_commit_table", 2),
        (Releases, "add", 1),
    ]
    killed_after(*points[int(point)])
    lake.publish(stamped(77, 1), run_id="dies")
    return {"survived": True}


if __name__ == "__main__":
    command, root, number, seed = sys.argv[1:5]
    with Lake(root, os.environ["DATABASE_URL"]) as opened:
        outcome = {"write": write, "read": read, "die": die}[command](opened, float(number), int(seed))
    say(json.dumps(outcome))
