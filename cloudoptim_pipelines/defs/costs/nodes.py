"""When did each node run? Pure rules over rows of ``nodes``, and the query that reads them."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import polars as pl
from sqlalchemy import Connection, text

# A node whose agent has not confirmed it for this long is not counted beyond its last sign of life: what nobody saw is
# a gap, not a cost. Agents report every few seconds; five minutes is the metric grid.
SILENT_AFTER = timedelta(minutes=15)
# Spot sells by product; the fleets are Linux (FIELD.md: the VPC name is the same price).
PRODUCT = "Linux/UNIX"
UNKNOWN_ZONE = "unknown"

_NODES = text(
    """
    SELECT n.customer_id::text, n.cluster_id::text, n.node_name, n.instance_id, n.zone_id, n.availability_zone,
           n.instance_type, n.node_type, n.cpu_cores, n.memory_bytes, n.created_at, n.last_seen_at, n.terminated_at,
           c.region
    FROM nodes n JOIN clusters c ON c.id = n.cluster_id
    WHERE n.created_at < :end AND (n.terminated_at IS NULL OR n.terminated_at > :start)
    """
)
_SCHEMA: dict[str, Any] = {
    "customer_id": pl.String,
    "cluster_id": pl.String,
    "node_name": pl.String,
    "instance_id": pl.String,
    "zone_id": pl.String,
    "availability_zone": pl.String,
    "instance_type": pl.String,
    "lifecycle": pl.String,
    "cpu_cores": pl.Float64,
    "memory_bytes": pl.Int64,
    "created_at": pl.Datetime("us", "UTC"),
    "last_seen_at": pl.Datetime("us", "UTC"),
    "terminated_at": pl.Datetime("us", "UTC"),
    "region": pl.String,
}


def read_nodes(connection: Connection, start: datetime, end: datetime) -> pl.DataFrame:
    """Nodes of all customers that ran at some time from ``start`` to ``end``."""
    rows = connection.execute(_NODES, {"start": start, "end": end}).all()
    return pl.DataFrame([tuple(row) for row in rows], schema=_SCHEMA, orient="row")


def run_times(nodes: pl.DataFrame, now: datetime) -> pl.DataFrame:
    """The nodes with ``run_from`` and ``run_until`` (UTC), ``silent`` where the end is the last sign of life.

    A node runs from its row's creation until its termination, else until now, but not past its last sign of life when
    that is older than ``SILENT_AFTER``. A zone id is never guessed from a zone name: names differ between accounts.
    """
    silent = pl.col("terminated_at").is_null() & (pl.lit(now) - pl.col("last_seen_at") > SILENT_AFTER)
    until = (
        pl.when(pl.col("terminated_at").is_not_null())
        .then(pl.min_horizontal("terminated_at", pl.lit(now)))
        .when(silent)
        .then(pl.col("last_seen_at"))
        .otherwise(pl.lit(now))
    )
    return (
        nodes.with_columns(
            run_from=pl.col("created_at"),
            run_until=until.dt.cast_time_unit("us"),
            silent=silent,
            product=pl.lit(PRODUCT),
            zone_id=pl.col("zone_id").fill_null(UNKNOWN_ZONE),
        )
        .filter(pl.col("run_until") > pl.col("run_from"))
        .drop("created_at", "last_seen_at", "terminated_at")
    )
