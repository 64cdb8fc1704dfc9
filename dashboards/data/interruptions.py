"""What the interruptions page reads: each with its moments, and how often a pool is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import exp
from typing import Any
from uuid import UUID

import pyarrow as pa

from dashboards.data.source import LIVE_SECONDS, TIME, Source, hour_of, table_of


@dataclass(frozen=True, slots=True)
class InterruptionRow:
    """One interruption with its moments; those that have not come are None."""

    id: UUID
    cluster_id: UUID | None
    cluster_name: str | None
    node_name: str | None
    region: str
    instance_id: str
    instance_type: str | None
    availability_zone: str | None
    kind: str
    instance_action: str
    detected_by: list[str]
    state: str
    outcome: str | None
    reason: str | None
    first_notice_at: datetime | None
    notice_at: datetime
    received_at: datetime
    deadline_at: datetime
    task_created_at: datetime | None
    task_taken_at: datetime | None
    cordoned_at: datetime | None
    drained_at: datetime | None
    task_state: str | None
    launch_state: str | None
    launched_at: datetime | None
    ready_at: datetime | None
    replacement_instance_id: str | None
    replacement_type: str | None
    replacement_zone: str | None
    replacement_node_type: str | None
    attempts: int
    closed_at: datetime | None

    def after_notice(self, moment: datetime | None) -> float | None:
        """Seconds from the notice; None when the moment has not come, negative for what an earlier signal had begun."""
        return None if moment is None else (moment - self.notice_at).total_seconds()

    @property
    def margin(self) -> float | None:
        """Seconds between drained and the deadline; negative when late, None while it is not drained."""
        return None if self.drained_at is None else (self.deadline_at - self.drained_at).total_seconds()


@dataclass(frozen=True, slots=True)
class PoolRate:
    """Interruptions of a pool over the Spot instance hours in it."""

    region: str
    availability_zone: str | None
    instance_type: str | None
    hours: float
    taken: int


@dataclass(frozen=True, slots=True)
class Rate:
    """Events per 1,000 instance hours with a 95% interval."""

    per_thousand: float
    low: float
    high: float


def rate(events: int, hours: float) -> Rate | None:
    """Poisson rate per 1,000 instance hours with its exact (Garwood) interval; None without hours.

    From 200 events on Byar's approximation, which is within 0.1% there.
    """
    if hours <= 0:
        return None
    if events < 200:
        low = _solve(lambda mean: 1 - _at_most(events - 1, mean), 0.025, events + 1.0) if events else 0.0
        high = _solve(lambda mean: -_at_most(events, mean), -0.025, 2 * events + 10.0)
    else:
        low = events * (1 - 1 / (9 * events) - 1.96 / (3 * events**0.5)) ** 3
        high = (events + 1) * (1 - 1 / (9 * (events + 1)) + 1.96 / (3 * (events + 1) ** 0.5)) ** 3
    scale = 1000 / hours
    return Rate(events * scale, low * scale, high * scale)


def _at_most(events: int, mean: float) -> float:
    """Probability of at most so many events when ``mean`` are expected."""
    term = total = exp(-mean)
    for number in range(1, events + 1):
        term *= mean / number
        total += term
    return total


def _solve(rising: Callable[[float], float], wanted: float, upper: float) -> float:
    """Where a rising function takes the wanted value between 0 and ``upper``."""
    lower = 0.0
    for _ in range(60):
        middle = (lower + upper) / 2
        if rising(middle) < wanted:
            lower = middle
        else:
            upper = middle
    return upper


INTERRUPTION_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in (
            "id",
            "cluster_name",
            "node_name",
            "region",
            "availability_zone",
            "instance_type",
            "instance_id",
            "kind",
            "instance_action",
            "detected_by",
            "state",
            "outcome",
            "reason",
        )
    ]
    + [
        (name, TIME)
        for name in (
            "first_notice_at",
            "notice_at",
            "received_at",
            "task_created_at",
            "task_taken_at",
            "cordoned_at",
            "launched_at",
            "ready_at",
            "drained_at",
            "deadline_at",
            "closed_at",
        )
    ]
    + [
        ("replacement_instance_id", pa.string()),
        ("replacement_type", pa.string()),
        ("replacement_zone", pa.string()),
        ("replacement_node_type", pa.string()),
        ("attempts", pa.int64()),
    ]
)


class InterruptionData(Source):
    """Reads of the interruptions page."""

    def interruptions(
        self, customer_id: UUID, since: datetime, cluster_id: UUID | None = None, limit: int = 300
    ) -> list[InterruptionRow]:
        """Interruptions received since then with the moments of each, newest first."""

        def read() -> list[InterruptionRow]:
            rows = self._rows(
                customer_id,
                INTERRUPTIONS_SQL,
                customer_id=customer_id,
                since=since,
                cluster_id=cluster_id,
                interruption_id=None,
                limit=limit,
            )
            return [InterruptionRow(**row) for row in rows]

        key = (str(customer_id), "interruptions", since.replace(second=0, microsecond=0), cluster_id, limit)
        return self._cache.get(key, LIVE_SECONDS, read)

    def interruption(self, customer_id: UUID, interruption_id: UUID) -> InterruptionRow | None:
        """One interruption; None when this customer has none of that id."""
        rows = self._rows(
            customer_id,
            INTERRUPTIONS_SQL,
            customer_id=customer_id,
            since=datetime(2000, 1, 1, tzinfo=UTC),
            cluster_id=None,
            interruption_id=interruption_id,
            limit=1,
        )
        return InterruptionRow(**rows[0]) if rows else None

    def interruption_history(self, customer_id: UUID, interruption_id: UUID) -> list[Mapping[str, Any]]:
        """Every recorded change of one interruption: ``version``, ``at``, ``event``, ``state``."""
        return self._rows(
            customer_id,
            "SELECT version, at, event, state FROM interruption_history "
            "WHERE customer_id = :customer_id AND interruption_id = :id ORDER BY version LIMIT 200",
            customer_id=customer_id,
            id=interruption_id,
        )

    def interruption_rates(self, customer_id: UUID, since: datetime, cluster_id: UUID | None = None) -> list[PoolRate]:
        """Spot interruptions and the instance hours they happened in, by pool, most exposed first.

        Hours come from the lake, so only interruptions before the newest hour there are counted.
        """
        hours = self._lake_table(
            customer_id,
            f"""
            SELECT region, availability_zone, instance_type, sum(minutes) / 60.0 AS hours,
                   max(ts) + INTERVAL 1 HOUR AS until
            FROM node_cost_hourly
            WHERE day >= $day AND ts >= $since AND lifecycle = 'spot'
                  {"AND cluster_id = $cluster" if cluster_id else ""}
            GROUP BY ALL
            """,
            day=since.date(),
            since=hour_of(since),
            **({"cluster": str(cluster_id)} if cluster_id else {}),
        ).to_pylist()
        if not hours:
            return []
        taken = self._rows(
            customer_id,
            """
            SELECT region, availability_zone, instance_type, count(*) AS taken FROM interruptions
            WHERE customer_id = :customer_id AND kind = 'spot_interruption' AND notice_at >= :since
              AND notice_at < :until AND (CAST(:cluster_id AS uuid) IS NULL OR cluster_id = :cluster_id)
            GROUP BY region, availability_zone, instance_type
            """,
            customer_id=customer_id,
            since=hour_of(since),
            until=max(row["until"] for row in hours),
            cluster_id=cluster_id,
        )
        counts = {(row["region"], row["availability_zone"], row["instance_type"]): row["taken"] for row in taken}
        rates = []
        for row in hours:
            pool = (row["region"], row["availability_zone"], row["instance_type"])
            rates.append(PoolRate(*pool, float(row["hours"]), counts.pop(pool, 0)))
        # Interrupted in a pool without a recorded hour: counted, so that the total is not too small.
        rates += [PoolRate(*pool, 0.0, taken) for pool, taken in counts.items()]
        return sorted(rates, key=lambda rate: (-rate.hours, rate.instance_type or ""))

    def interruptions_export(self, customer_id: UUID, since: datetime, cluster_id: UUID | None = None) -> pa.Table:
        """The interruptions with every moment of their timeline."""
        rows = self.interruptions(customer_id, since, cluster_id, limit=50_000)
        return table_of(rows, INTERRUPTION_SCHEMA)


INTERRUPTIONS_SQL = """
    SELECT i.id, i.cluster_id, c.cluster_name, n.node_name, i.region, i.instance_id, i.instance_type,
           i.availability_zone, i.kind, i.instance_action, i.detected_by, i.state, i.outcome, i.reason,
           i.first_notice_at, i.notice_at, i.received_at, i.deadline_at,
           t.created_at AS task_created_at, t.first_leased_at AS task_taken_at,
           t.cordoned_at, CASE WHEN t.state = 'done' THEN t.finished_at END AS drained_at, t.state AS task_state,
           l.state AS launch_state, a.launched_at, a.ready_at, a.instance_id AS replacement_instance_id,
           a.instance_type AS replacement_type, a.availability_zone AS replacement_zone,
           a.node_type AS replacement_node_type, coalesce(a.attempt_no, 0) AS attempts, i.closed_at
    FROM interruptions i
    LEFT JOIN clusters c ON c.customer_id = i.customer_id AND c.id = i.cluster_id
    LEFT JOIN nodes n ON n.customer_id = i.customer_id AND n.id = i.node_id
    LEFT JOIN agent_tasks t ON t.customer_id = i.customer_id AND t.dedupe_key = 'drain:' || i.id
    LEFT JOIN launch_intents l ON l.customer_id = i.customer_id AND l.interruption_id = i.id
    LEFT JOIN LATERAL (
        SELECT * FROM launch_attempts a
        WHERE a.customer_id = i.customer_id AND a.intent_id = l.id ORDER BY a.attempt_no DESC LIMIT 1
    ) a ON true
    WHERE i.customer_id = :customer_id AND i.received_at >= :since
      AND (CAST(:cluster_id AS uuid) IS NULL OR i.cluster_id = :cluster_id)
      AND (CAST(:interruption_id AS uuid) IS NULL OR i.id = :interruption_id)
    ORDER BY i.received_at DESC, i.id LIMIT :limit
"""
