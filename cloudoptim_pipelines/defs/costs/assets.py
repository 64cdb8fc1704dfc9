"""Cost of every node and cluster and hour, computed in the lake from node hours and prices as of the hour."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import dagster as dg

from cloudoptim_pipelines import stale
from cloudoptim_pipelines.coverage import partition_locks
from cloudoptim_pipelines.defs.costs import gaps
from cloudoptim_pipelines.defs.costs.nodes import read_nodes, run_times
from cloudoptim_pipelines.defs.on_demand_prices.assets import on_demand_prices
from cloudoptim_pipelines.defs.spot_prices.assets import spot_prices
from cloudoptim_pipelines.models import stage
from cloudoptim_pipelines.partitions import DayRange, by_day, days_of
from cloudoptim_pipelines.policies import OWNERS, RETRY, SINGLE_RUN
from cloudoptim_pipelines.resources import Warehouse
from warehouse.lake.query import Snapshot
from warehouse.lake.staging import Staged

# A price holds until the next change, and one pool in ten does not change for a month; an older one is not believed.
PRICE_LOOKBACK = timedelta(days=180)
CHUNK_DAYS = 31
_PRICES_OF_THE_DAY = dg.MultiToSingleDimensionPartitionMapping("day")
_SHARED: dict[str, Any] = {
    "partitions_def": by_day,
    "backfill_policy": SINGLE_RUN,
    "retry_policy": RETRY,
    "group_name": "costs",
    "owners": OWNERS,
    "kinds": {"duckdb", "deltalake"},
    "tags": {"domain": "costs"},
}


def parameters(days: DayRange, now: datetime) -> dict[str, Any]:
    """What the cost and savings models may ask for."""
    return {
        "start": days.start,
        "end": days.end,
        "first_day": days.first,
        "last_day": days.last,
        "as_of": now,
        "prices_from": days.first - PRICE_LOOKBACK,
        "price_age_days": PRICE_LOOKBACK.days,
    }


def compute(
    context: dg.AssetExecutionContext,
    warehouse: Warehouse,
    table: str,
    stage_days: Callable[[Snapshot, DayRange], Staged],
) -> dg.MaterializeResult:
    """Replace the run's days of one table, a month at a time: pin a release, run the model, publish."""
    reader = warehouse.reader
    rows = partitions = 0
    release_id = 0
    for part in (chunk for days in days_of(context.partition_keys) for chunk in days.chunks(CHUNK_DAYS)):
        with partition_locks(warehouse.database, table, [day.isoformat() for day in part.days()]):
            staged = stage_days(reader.pin(), part)
            release = warehouse.publish([staged], context.run.run_id)
        rows += staged.rows
        partitions += len(part.days())
        release_id = release.id
    return dg.MaterializeResult(
        metadata={"dagster/partition_row_count": rows, "partitions": partitions, "lake_release": release_id}
    )


@dg.asset(**_SHARED)
def node_hours(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """How many minutes of each hour every node ran, with its type, zone and lifecycle."""
    now = warehouse.now()

    def staged(snapshot: Snapshot, days: DayRange) -> Staged:
        with warehouse.database.system() as connection:
            nodes = run_times(read_nodes(connection, days.start, days.end), now)
        inputs = {"nodes": nodes.to_arrow()}
        return stage(snapshot, "node_hours", {"day": days.days()}, parameters(days, now), inputs)

    return compute(context, warehouse, "node_hours", staged)


@dg.asset(
    deps=[
        node_hours,
        dg.AssetDep(spot_prices, partition_mapping=_PRICES_OF_THE_DAY),
        dg.AssetDep(on_demand_prices, partition_mapping=_PRICES_OF_THE_DAY),
    ],
    **_SHARED,
)
def node_cost_hourly(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """What every node cost in each hour at the price of that hour, beside the same minutes on demand (B1 list)."""
    now = warehouse.now()
    # Read before the prices: a mark made after this is for the next run.
    with warehouse.database.system() as connection:
        marks = stale.marks(connection, stale.COSTS, context.partition_keys)

    def staged(snapshot: Snapshot, days: DayRange) -> Staged:
        return stage(snapshot, "node_cost_hourly", {"day": days.days()}, parameters(days, now))

    result = compute(context, warehouse, "node_cost_hourly", staged)
    with warehouse.database.system() as connection:
        stale.settle(connection, stale.COSTS, marks)
    return result


@dg.asset(deps=[node_cost_hourly], **_SHARED)
def cluster_cost_hourly(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """What every cluster cost in each hour, its baseline B1 list, and how much of the hour is covered by data."""
    now = warehouse.now()

    def staged(snapshot: Snapshot, days: DayRange) -> Staged:
        with warehouse.database.system() as connection:
            inputs = {
                "agent_gaps": gaps.agent_gaps(connection, days, now),
                "price_gaps": gaps.price_gaps(connection, days, now),
            }
        return stage(snapshot, "cluster_cost_hourly", {"day": days.days()}, parameters(days, now), inputs)

    return compute(context, warehouse, "cluster_cost_hourly", staged)
