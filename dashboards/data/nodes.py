"""What the nodes page reads: clusters, and the nodes that run now with their prices."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pyarrow as pa

from dashboards.data.source import LIVE_SECONDS, PRODUCT, TIME, Source, hour_of

NODE_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in ("cluster_name", "node_name", "instance_id", "instance_type", "availability_zone", "zone_id")
    ]
    + [
        ("node_type", pa.string()),
        ("status", pa.string()),
        ("cpu_cores", pa.float64()),
        ("memory_bytes", pa.int64()),
        ("price_usd_per_hour", pa.decimal128(18, 8)),
        ("on_demand_usd_per_hour", pa.decimal128(18, 8)),
        ("created_at", TIME),
        ("ready_at", TIME),
        ("last_seen_at", TIME),
    ]
)


class NodeData(Source):
    """Reads of the nodes page."""

    def cluster_states(self, customer_id: UUID) -> list[Mapping[str, Any]]:
        """Clusters with what their agents last said."""

        def read() -> list[Mapping[str, Any]]:
            return self._rows(customer_id, CLUSTERS_SQL, customer_id=customer_id)

        return self._cache.get((str(customer_id), "cluster states"), LIVE_SECONDS, read)

    def nodes(
        self, customer_id: UUID, cluster_id: UUID | None = None, node_type: str | None = None
    ) -> list[Mapping[str, Any]]:
        """Nodes running now with the price of each, most expensive first."""

        def read() -> list[Mapping[str, Any]]:
            return self._rows(
                customer_id,
                NODES_SQL,
                customer_id=customer_id,
                product=PRODUCT,
                cluster_id=cluster_id,
                node_type=node_type,
            )

        return self._cache.get((str(customer_id), "nodes", cluster_id, node_type), LIVE_SECONDS, read)

    def node_counts(self, customer_id: UUID, hours: int, cluster_id: UUID | None = None) -> pa.Table:
        """Nodes in each hour, Spot and on demand: ``ts``, ``spot``, ``on_demand`` (mean number in the hour).

        The running hour is the last one: its mean is over the minutes that were computed of it.
        """
        running = hour_of(datetime.now(UTC))
        since = running - timedelta(hours=hours)
        of_cluster = "AND cluster_id = $cluster" if cluster_id else ""
        return self._lake_table(
            customer_id,
            f"""
            WITH computed AS (
                SELECT greatest(max(minutes), 1) AS minutes FROM node_cost_hourly
                WHERE day = $today AND ts = $running {of_cluster}
            ),
            hours AS (
                SELECT ts, sum(spot_minutes) AS spot, sum(node_minutes - spot_minutes) AS on_demand,
                       CASE WHEN ts = $running THEN (SELECT minutes FROM computed) ELSE 60.0 END AS minutes
                FROM cluster_cost_hourly
                WHERE day >= $day AND ts >= $since AND ts <= $running {of_cluster}
                GROUP BY ts
            )
            SELECT ts, spot / minutes AS spot, on_demand / minutes AS on_demand FROM hours ORDER BY ts
            """,
            day=since.date(),
            today=running.date(),
            since=since,
            running=running,
            **({"cluster": str(cluster_id)} if cluster_id else {}),
        )

    def nodes_export(self, customer_id: UUID, cluster_id: UUID | None, node_type: str | None) -> pa.Table:
        """The nodes running now."""
        return pa.Table.from_pylist(
            [dict(row) for row in self.nodes(customer_id, cluster_id, node_type)], schema=NODE_SCHEMA
        )


PRICED_NODES = """
    FROM nodes n
    JOIN clusters c ON c.customer_id = n.customer_id AND c.id = n.cluster_id
    LEFT JOIN on_demand_price od
           ON od.region = c.region AND od.instance_type = n.instance_type AND od.product = :product
    LEFT JOIN LATERAL (
        SELECT s.price_usd_per_hour FROM spot_price_current s
        WHERE s.region = c.region AND s.instance_type = n.instance_type AND s.product = :product
          AND (s.zone_id = n.zone_id OR (n.zone_id IS NULL AND s.availability_zone = n.availability_zone))
        ORDER BY s.effective_at DESC LIMIT 1
    ) spot ON n.node_type = 'spot'
    CROSS JOIN LATERAL (
        SELECT CASE n.node_type WHEN 'spot' THEN spot.price_usd_per_hour ELSE od.price_usd_per_hour END AS paid
    ) p
    WHERE n.customer_id = :customer_id AND n.terminated_at IS NULL AND c.status <> 'deleted'
"""

NODES_SQL = f"""
    SELECT c.cluster_name, n.node_name, n.instance_id, n.instance_type, n.availability_zone, n.zone_id, n.node_type,
           n.status, n.cpu_cores, n.memory_bytes, p.paid AS price_usd_per_hour,
           od.price_usd_per_hour AS on_demand_usd_per_hour, n.created_at, n.ready_at, n.last_seen_at
    {PRICED_NODES}
      AND (CAST(:cluster_id AS uuid) IS NULL OR n.cluster_id = :cluster_id)
      AND (CAST(:node_type AS text) IS NULL OR n.node_type = :node_type)
    ORDER BY p.paid DESC NULLS LAST, n.node_name
"""

CLUSTERS_SQL = """
    SELECT c.id, c.cluster_name, c.region, c.status, c.kill_switch, c.agent_version, c.last_seen_at,
           count(n.id) AS nodes, count(n.id) FILTER (WHERE n.node_type = 'spot') AS spot_nodes,
           count(n.id) FILTER (WHERE n.status <> 'ready') AS not_ready,
           coalesce(sum(n.cpu_cores), 0) AS cpu_cores, coalesce(sum(n.memory_bytes), 0)::bigint AS memory_bytes
    FROM clusters c
    LEFT JOIN nodes n ON n.customer_id = c.customer_id AND n.cluster_id = c.id AND n.terminated_at IS NULL
    WHERE c.customer_id = :customer_id AND c.status <> 'deleted'
    GROUP BY c.id ORDER BY c.cluster_name
"""
