"""What the cost page reads: what runs now, the hours behind it, and the month they point to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa

from dashboards.data.nodes import PRICED_NODES
from dashboards.data.source import LIVE_SECONDS, PRODUCT, Source, hour_of

HOURS_PER_MONTH = 730


@dataclass(frozen=True, slots=True)
class LiveGroup:
    """Nodes running now with one cluster, purchase option and type; money in USD per hour, None when no price is
    known for any of them."""

    cluster_id: UUID
    cluster_name: str
    node_type: str
    instance_type: str
    nodes: int
    priced: int
    actual: Decimal | None
    b1: Decimal | None


@dataclass(frozen=True, slots=True)
class LiveCost:
    """What runs now and what it costs, beside the same machines on demand (B1 list). Nodes without a known price are
    left out of both sums and lower the coverage."""

    at: datetime
    groups: tuple[LiveGroup, ...]

    @property
    def nodes(self) -> int:
        """Nodes running now."""
        return sum(group.nodes for group in self.groups)

    @property
    def spot_nodes(self) -> int:
        """Spot nodes running now."""
        return sum(group.nodes for group in self.groups if group.node_type == "spot")

    @property
    def priced(self) -> int:
        """Nodes with a known price and list price."""
        return sum(group.priced for group in self.groups)

    @property
    def actual(self) -> Decimal | None:
        """USD per hour; None when nothing is priced."""
        return sum((group.actual or Decimal() for group in self.groups), Decimal()) if self.priced else None

    @property
    def b1(self) -> Decimal | None:
        """The same nodes on demand, USD per hour; None when nothing is priced."""
        return sum((group.b1 or Decimal() for group in self.groups), Decimal()) if self.priced else None

    @property
    def coverage(self) -> float | None:
        """Priced share of the nodes; None without nodes."""
        return self.priced / self.nodes if self.nodes else None

    @property
    def savings(self) -> Decimal | None:
        """Share of B1 saved, negative when Spot costs more; None when B1 is not known or zero."""
        return saved_share(self.b1, self.actual)

    def of(self, cluster_id: UUID | None) -> LiveCost:
        """The same for one cluster; None keeps all."""
        if cluster_id is None:
            return self
        return LiveCost(self.at, tuple(group for group in self.groups if group.cluster_id == cluster_id))


def saved_share(baseline: Decimal | None, actual: Decimal | None) -> Decimal | None:
    """(baseline - actual) / baseline, or None when the baseline is unknown or zero (FIELD.md §5.2)."""
    if not baseline or actual is None:
        return None
    return (baseline - actual) / baseline


@dataclass(frozen=True, slots=True)
class Projection:
    """Cost of a month of 730 hours, from complete hours only: mean, and the range 10 to 90 % of the hours lie in."""

    hours: int
    actual: Decimal
    low: Decimal
    high: Decimal
    b1: Decimal | None


@dataclass(frozen=True, slots=True)
class CostHour:
    """One hour of all chosen clusters, USD."""

    ts: datetime
    actual: Decimal | None
    spot: Decimal | None
    on_demand: Decimal | None
    b1: Decimal | None
    coverage: float | None
    nodes: int
    complete: bool


def project(hours: list[CostHour]) -> Projection | None:
    """The month these hours point to; None without a complete hour."""
    complete = [hour for hour in hours if hour.complete and hour.actual is not None]
    if not complete:
        return None
    costs = sorted(hour.actual for hour in complete if hour.actual is not None)
    mean = sum(costs, Decimal()) / len(costs)
    with_b1 = [hour.b1 for hour in complete if hour.b1 is not None]
    b1 = sum(with_b1, Decimal()) / len(with_b1) * HOURS_PER_MONTH if len(with_b1) == len(complete) else None
    low, high = costs[int(0.1 * (len(costs) - 1))], costs[-(-9 * (len(costs) - 1) // 10)]
    return Projection(len(costs), mean * HOURS_PER_MONTH, low * HOURS_PER_MONTH, high * HOURS_PER_MONTH, b1)


class CostData(Source):
    """Reads of the cost page."""

    def live_cost(self, customer_id: UUID) -> LiveCost:
        """What runs now at the newest known prices; Spot nodes at their own pool's price."""

        def read() -> LiveCost:
            rows = self._rows(customer_id, LIVE_COST_SQL, customer_id=customer_id, product=PRODUCT)
            return LiveCost(datetime.now(UTC), tuple(LiveGroup(**row) for row in rows))

        return self._cache.get((str(customer_id), "live cost"), LIVE_SECONDS, read)

    def cost_hours(self, customer_id: UUID, hours: int, cluster_id: UUID | None = None) -> list[CostHour]:
        """The last ``hours`` hours of all clusters or one, oldest first; hours without a row are absent."""
        until = hour_of(datetime.now(UTC))
        since = until - timedelta(hours=hours)
        rows = self._lake_table(
            customer_id,
            f"""
            SELECT ts, sum(actual_usd) AS actual, sum(spot_usd) AS spot, sum(on_demand_usd) AS on_demand,
                   sum(b1_list_usd) AS b1,
                   sum(coverage_ratio * node_minutes) / nullif(sum(node_minutes), 0) AS coverage,
                   sum(node_count)::BIGINT AS nodes, bool_and(complete) AS complete
            FROM cluster_cost_hourly
            WHERE day >= $day AND ts >= $since AND ts <= $until {"AND cluster_id = $cluster" if cluster_id else ""}
            GROUP BY ts ORDER BY ts
            """,
            day=since.date(),
            since=since,
            until=until,
            **({"cluster": str(cluster_id)} if cluster_id else {}),
        )
        return [CostHour(**row) for row in rows.to_pylist()]

    def cost_by_cluster(self, customer_id: UUID, hours: int) -> dict[str, dict[str, Any]]:
        """Cost and baseline of complete hours by cluster id: ``actual``, ``b1``, ``hours``, ``expected``."""
        until = hour_of(datetime.now(UTC))
        since = until - timedelta(hours=hours)
        rows = self._lake_table(
            customer_id,
            """
            SELECT cluster_id, sum(actual_usd) FILTER (complete) AS actual, sum(b1_list_usd) FILTER (complete) AS b1,
                   count(*) FILTER (complete) AS hours, $hours AS expected
            FROM cluster_cost_hourly WHERE day >= $day AND ts >= $since AND ts < $until GROUP BY cluster_id
            """,
            day=since.date(),
            since=since,
            until=until,
            hours=hours,
        )
        return {row["cluster_id"]: row for row in rows.to_pylist()}

    def cost_export(self, customer_id: UUID, hours: int, cluster_id: UUID | None = None) -> pa.Table:
        """The hourly rows by cluster behind the cost page."""
        until = hour_of(datetime.now(UTC))
        since = until - timedelta(hours=hours)
        return self._lake_table(
            customer_id,
            f"""
            SELECT ts AS hour_utc, cluster_id, region, actual_usd, spot_usd, on_demand_usd, b1_list_usd,
                   b1_list_usd - actual_usd AS saved_usd, node_count, node_minutes, spot_minutes, coverage_ratio,
                   complete, source
            FROM cluster_cost_hourly
            WHERE day >= $day AND ts >= $since AND ts <= $until {"AND cluster_id = $cluster" if cluster_id else ""}
            ORDER BY ts, cluster_id
            """,
            day=since.date(),
            since=since,
            until=until,
            **({"cluster": str(cluster_id)} if cluster_id else {}),
        )


LIVE_COST_SQL = f"""
    SELECT c.id AS cluster_id, c.cluster_name, n.node_type, n.instance_type, count(*) AS nodes,
           count(p.paid) FILTER (WHERE od.price_usd_per_hour IS NOT NULL) AS priced,
           sum(p.paid) FILTER (WHERE od.price_usd_per_hour IS NOT NULL) AS actual,
           sum(od.price_usd_per_hour) FILTER (WHERE p.paid IS NOT NULL) AS b1
    {PRICED_NODES}
    GROUP BY c.id, c.cluster_name, n.node_type, n.instance_type
    ORDER BY actual DESC NULLS LAST, n.instance_type
"""
