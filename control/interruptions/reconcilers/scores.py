"""How well rebalance recommendations announced interruptions, per pool, as metrics of every worker."""

from __future__ import annotations

from control.interruptions import metrics, views_repository
from control.interruptions.runtime import Runtime

# The question is about 30 days; minutes do not matter.
INTERVAL_SECONDS = 300.0
DAYS = 30
# Series stay bounded: the pools with the most recommendations, over all customers.
POOLS = 100


async def run_once(runtime: Runtime) -> int:
    """Set the gauges anew; returns how many pools they name."""
    async with runtime.db.system() as conn:
        rows = await views_repository.rebalance_scores(conn, customer_id=None, days=DAYS, limit=POOLS)
    metrics.REBALANCES.clear()
    for row in rows:
        followed = row.interrupted_within_30_minutes
        for label, count in (("yes", followed), ("no", row.recommendations - followed)):
            metrics.REBALANCES.labels(row.instance_type, row.availability_zone, label).set(count)
    return len(rows)
