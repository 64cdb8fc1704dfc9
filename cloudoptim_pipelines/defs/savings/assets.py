"""Savings of each day, and the statements that say them to customers."""

from datetime import date, timedelta
from typing import Any

import dagster as dg
import polars as pl
from sqlalchemy import text

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
# A fallback to on-demand lasts until the pool has been quiet; from so many days on it is no longer counted as one.
FALLBACK_DAYS = 30

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
            "fallback_days": FALLBACK_DAYS,
            "realised_after_days": REALISED_AFTER_DAYS,
        }
        with warehouse.database.system() as connection:
            rows = connection.execute(_RETURNS, {"start": days.start, "end": days.end}).all()
        returns = pl.DataFrame([tuple(row) for row in rows], schema=_RETURN_COLUMNS, orient="row")
        return stage(snapshot, "savings_daily", {"day": days.days()}, given, {"returns": returns.to_arrow()})

    return compute(context, warehouse, "savings_daily", staged)


# A node that went back to Spot, and how long the one it replaces ran beside it: until it was terminated, or on and on
# where its drain failed and both were kept.
_RETURNS = text("""
    SELECT l.customer_id::text, a.instance_id, n.created_at, coalesce(o.terminated_at, :end)
    FROM launch_intents l
    JOIN launch_attempts a ON a.customer_id = l.customer_id AND a.intent_id = l.id AND a.instance_id IS NOT NULL
    JOIN nodes n ON n.customer_id = a.customer_id AND n.instance_id = a.instance_id
    JOIN nodes o ON o.customer_id = l.customer_id AND o.cluster_id = l.cluster_id
        AND o.instance_id = l.requirements ->> 'instance_id'
    WHERE l.plan_id IS NOT NULL AND n.created_at < :end AND (o.terminated_at IS NULL OR o.terminated_at > :start)
""")
_RETURN_COLUMNS: dict[str, Any] = {
    "customer_id": pl.String,
    "instance_id": pl.String,
    "started_at": pl.Datetime("us", "UTC"),
    "replaced_until": pl.Datetime("us", "UTC"),
}


@dg.asset(deps=[savings_daily], kinds={"duckdb", "postgres"}, **_SHARED)
def savings_statements(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """Each customer's savings report of the day, and of the month when the day ends one, with the release it read."""
    written: list[str] = []
    days = [day for days in days_of(context.partition_keys) for day in days.days()]
    told = periods(days, warehouse.now().date())
    for period in told:
        written += write_statements(warehouse, period)
    return dg.MaterializeResult(
        metadata={"statements_written": len(written), "periods": [str(period) for period in told]}
    )


def periods(days: list[date], today: date) -> list[Period]:
    """The days, and the months that one of them ends or changes afterwards.

    A month is told with its last day, and again (as a revision, where a figure differs) with any day of it from the
    second day after it on: on the first one its last day may not be closed yet.
    """
    months = {}
    for day in days:
        first = day.replace(day=1)
        end = (first + timedelta(days=31)).replace(day=1)
        if day + timedelta(days=1) == end or end < today:
            months[first] = end
    return [Period("day", day, day + timedelta(days=1)) for day in days] + [
        Period("month", first, end) for first, end in sorted(months.items())
    ]
