"""What is missing in prices and metrics, as a table people and the API read, and as history in the lake."""

from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import polars as pl
from sqlalchemy import text

from cloudoptim_pipelines.coverage import partition_locks
from cloudoptim_pipelines.defs.gaps import ledger
from cloudoptim_pipelines.defs.metrics.assets import metric_5m
from cloudoptim_pipelines.defs.spot_prices.assets import spot_prices
from cloudoptim_pipelines.policies import OWNERS, RETRY
from cloudoptim_pipelines.resources import Warehouse
from warehouse.lake.staging import ALL
from warehouse.lake.store import PartitionWrite

WATCHED = ("spot_prices", "metric_5m")

_TIME = pl.Datetime("us", "UTC")
_LEDGER: dict[str, Any] = {
    "ts": _TIME,
    "gap_id": pl.String,
    "customer_id": pl.String,
    "cluster_id": pl.String,
    "series": pl.String,
    "gap_end": _TIME,
    "reason": pl.String,
    "expected_points": pl.Int64,
    "filled_points": pl.Int64,
    "fill_run_id": pl.String,
    "filled_at": _TIME,
    "found_at": _TIME,
}
_GAPS = text(
    """
    SELECT g.gap_start, g.id::text, g.customer_id::text, CASE WHEN g.customer_id IS NOT NULL THEN g.series END,
           g.table_name || '/' || g.series, g.gap_end, g.reason, g.expected_points,
           CASE WHEN g.state = 'filled' THEN g.missing_points ELSE 0 END,
           coalesce(f.dagster_run_id, f.dagster_backfill_id), g.filled_at, g.found_at
    FROM data_gaps g LEFT JOIN gap_fills f ON f.id = g.fill_id
    ORDER BY g.gap_start, g.id
    """
)


@dg.asset(
    deps=[spot_prices, metric_5m],
    retry_policy=RETRY,
    group_name="gaps",
    owners=OWNERS,
    kinds={"postgres", "deltalake"},
    tags={"domain": "gaps"},
)
def data_gaps(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """What is missing in prices and metrics and why: the expected grid minus what is there, by series and partition."""
    now = warehouse.now()
    found: dict[str, int] = {}
    for table in WATCHED:
        with warehouse.database.system() as connection:
            found[table] = len(ledger.sync(connection, table, now=now))
    with partition_locks(warehouse.database, "gap_ledger", ["all"]):
        with warehouse.database.system() as connection:
            rows = [tuple(row) for row in connection.execute(_GAPS)]
        frame = pl.DataFrame(rows, schema=_LEDGER, orient="row")
        warehouse.publish([PartitionWrite("gap_ledger", {"day": ALL}, frame)], context.run.run_id)
    return dg.MaterializeResult(
        metadata={"dagster/row_count": frame.height, **{f"open_{table}": count for table, count in found.items()}}
    )


def recent_gaps(warehouse: Warehouse, table: str, *, days: int = 90, limit: int = 100) -> list[dict[str, Any]]:
    """Open gaps of a table, newest first, for checks."""
    since = datetime.now(UTC) - timedelta(days=days) if not warehouse.as_of else warehouse.now() - timedelta(days=days)
    with warehouse.database.system() as connection:
        rows = connection.execute(
            text(
                "SELECT partition_key, series, gap_start, gap_end, missing_points, reason, state FROM data_gaps "
                "WHERE table_name = :t AND state IN ('open', 'filling') AND gap_end >= :since "
                "ORDER BY gap_start DESC LIMIT :n"
            ),
            {"t": table, "since": since, "n": limit},
        ).mappings()
        return [dict(row) for row in rows]
