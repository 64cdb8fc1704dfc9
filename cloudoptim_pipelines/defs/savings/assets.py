"""Savings of each day, and the statements that say them to customers."""

from datetime import date, timedelta
from typing import Any

import dagster as dg

from cloudoptim_pipelines.defs.costs.assets import cluster_cost_hourly, compute, parameters
from cloudoptim_pipelines.defs.events.assets import interruptions
from cloudoptim_pipelines.defs.savings.statements import Period, write_statements
from cloudoptim_pipelines.models import stage
from cloudoptim_pipelines.partitions import DayRange, by_day, days_of
from cloudoptim_pipelines.policies import OWNERS, RETRY, SINGLE_RUN
from cloudoptim_pipelines.resources import Warehouse
from warehouse.lake.query import Snapshot
from warehouse.lake.staging import Staged

# A day's savings are an estimate until so many full days later: late samples and late prices may still change them.
REALISED_AFTER_DAYS = 2
# A fallback to on-demand lasts until the pool has been quiet; older ones are no longer counted as a fallback.
INTERRUPTIONS_LOOKBACK = timedelta(days=30)

_SHARED: dict[str, Any] = {
    "partitions_def": by_day,
    "backfill_policy": SINGLE_RUN,
    "retry_policy": RETRY,
    "group_name": "savings",
    "owners": OWNERS,
    "tags": {"domain": "savings"},
}


@dg.asset(deps=[cluster_cost_hourly, interruptions], kinds={"duckdb", "deltalake"}, **_SHARED)
def savings_daily(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """Savings of every cluster and day against B1 list: gross, overlap, fallback premium, net, and their coverage."""
    now = warehouse.now()

    def staged(snapshot: Snapshot, days: DayRange) -> Staged:
        given = {
            **parameters(days, now),
            "interruptions_from": days.first - INTERRUPTIONS_LOOKBACK,
            "realised_after_days": REALISED_AFTER_DAYS,
        }
        return stage(snapshot, "savings_daily", {"day": days.days()}, given)

    return compute(context, warehouse, "savings_daily", staged)


@dg.asset(deps=[savings_daily], kinds={"duckdb", "postgres"}, **_SHARED)
def savings_statements(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """Each customer's savings report of the day, and of the month when the day ends one, with the release it read."""
    written: list[str] = []
    days = [day for days in days_of(context.partition_keys) for day in days.days()]
    for period in periods(days):
        written += write_statements(warehouse, period)
    return dg.MaterializeResult(
        metadata={"statements_written": len(written), "periods": [str(p) for p in periods(days)]}
    )


def periods(days: list[date]) -> list[Period]:
    """The periods that end with one of the days: the day itself, and its month when it is the month's last day."""
    out = [Period("day", day, day + timedelta(days=1)) for day in days]
    for day in days:
        end = day + timedelta(days=1)
        if end.day == 1:
            out.append(Period("month", day.replace(day=1), end))
    return out
