"""Savings statements: what a customer is told, with the lake release it was computed from, so it can be told again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Connection, insert, select, text

from cloudoptim_pipelines.resources import Warehouse
from warehouse.lake.computed import load_model
from warehouse.lake.query import Snapshot
from warehouse.postgres.models import Outbox, SavingsStatement, new_id

BASELINE = "b1_list"
CENT = Decimal("0.01")
TOPIC = "savings.report.ready"
# customer_config key of our share of the net savings, 0 to 1; none agreed means no fee.
FEE_KEY = "savings_fee"

MONEY_FIELDS = (
    "baseline_usd",
    "actual_usd",
    "gross_usd",
    "overlap_usd",
    "fallback_premium_usd",
    "displaced_commitment_usd",
    "rework_usd",
    "net_usd",
)


# What no source tells is null, never zero, with the reason beside it.
NOT_MEASURED = {
    "displaced_commitment_usd": "commitments (Savings Plans, reservations) of the account are not read",
    "rework_usd": "no agent reports work that was lost with a node and done again",
}


@dataclass(frozen=True, slots=True)
class Period:
    """A statement's time: from ``start`` to ``end`` (not included)."""

    kind: Literal["day", "month"]
    start: date
    end: date

    def __str__(self) -> str:
        return f"{self.kind} {self.start.isoformat()}"


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement's content: totals and one entry per cluster. Money in USD; savings may be negative."""

    baseline_usd: Decimal
    actual_usd: Decimal
    net_usd: Decimal
    fee_usd: Decimal
    coverage: float
    body: dict[str, Any]

    def same_as(self, other: Statement) -> bool:
        """Equal in every figure that is told."""
        return self.body == other.body


def compute_statement(
    snapshot: Snapshot, customer_id: UUID, period: Period, fee_rate: Decimal, silent_days: Mapping[str, int]
) -> Statement | None:
    """A customer's statement from the pinned release; None when the lake holds nothing of the period.

    Args:
        silent_days: by cluster (UUID as text), days of the period of which the lake knows nothing, though it should.
    """
    rows = snapshot.query(
        load_model("savings_statement").sql,
        {"customer_id": customer_id, "first_day": period.start, "last_day": period.end - timedelta(days=1)},
    ).to_pylist()
    rows = [row for row in rows if row["baseline"] == BASELINE]
    if not rows:
        return None
    for row in rows:
        row["silent_days"] = silent_days.get(row["cluster_id"], 0)
        row["hours_expected"] += 24 * row["silent_days"]
    return assemble(rows, fee_rate)


_KNOWN_DAYS = """
    SELECT cluster_id, min(day) AS first_day,
           count(DISTINCT day) FILTER (WHERE day BETWEEN $first_day AND $last_day) AS known,
           max(day) FILTER (WHERE day <= $last_day) AS newest_day
    FROM savings_daily WHERE customer_id = CAST($customer_id AS VARCHAR) GROUP BY cluster_id
"""


def find_silent_days(snapshot: Snapshot, customer_id: UUID, period: Period, deleted: Collection[str]) -> dict[str, int]:
    """Days from a cluster's first on that its agent said nothing of, within a period; by cluster.

    A day without a word has no row in the lake at all. A deleted cluster (``deleted``, UUIDs as text) is expected to
    its last day only.
    """
    last_day = period.end - timedelta(days=1)
    found = snapshot.query(
        _KNOWN_DAYS, {"customer_id": customer_id, "first_day": period.start, "last_day": last_day}
    ).to_pylist()
    silent = {}
    for row in found:
        until = row["newest_day"] if row["cluster_id"] in deleted else last_day
        if until is not None and row["first_day"] <= last_day:
            expected = (until - max(row["first_day"], period.start)).days + 1
            silent[row["cluster_id"]] = max(expected - row["known"], 0)
    return silent


def assemble(rows: Sequence[dict[str, Any]], fee_rate: Decimal) -> Statement:
    """Totals and body of a statement from its rows by cluster. No fee is taken on a loss."""
    totals = {name: _sum(row[name] for row in rows) for name in MONEY_FIELDS}
    baseline, actual, net = (totals[name] or Decimal(0) for name in ("baseline_usd", "actual_usd", "net_usd"))
    expected = sum(row["hours_expected"] for row in rows)
    coverage = min(1.0, sum(row["hours_covered"] for row in rows) / expected) if expected else 0.0
    fee = (max(net, Decimal(0)) * fee_rate).quantize(CENT, ROUND_HALF_EVEN)
    body = {
        "baseline": BASELINE,
        "stage": "realised" if all(row["stage"] == "realised" for row in rows) else "estimated",
        "totals": {name: _text(value) for name, value in totals.items()},
        "savings_ratio": float(net / baseline) if baseline else None,
        "fee_rate": str(fee_rate),
        "fee_usd": str(fee),
        "coverage_ratio": round(coverage, 6),
        "clusters": [
            {
                "cluster_id": row["cluster_id"],
                **{name: _text(row[name]) for name in MONEY_FIELDS},
                "hours_covered": row["hours_covered"],
                "hours_expected": round(row["hours_expected"], 3),
                "days": row["days"],
                **({"silent_days": row["silent_days"]} if row["silent_days"] else {}),
            }
            for row in rows
        ],
    }
    if unknown := {name: reason for name, reason in NOT_MEASURED.items() if totals[name] is None}:
        body["not_measured"] = unknown
    return Statement(baseline, actual, net, fee, round(coverage, 6), body)


def _sum(values: Iterable[Decimal | None]) -> Decimal | None:
    """None when one of them is not known: a sum of the others would pass for the whole."""
    total = Decimal(0)
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _text(value: Decimal | None) -> str | None:
    return None if value is None else str(value)


def write_statements(warehouse: Warehouse, period: Period) -> list[str]:
    """Write the period's statement of every customer; returns the ids written.

    One whose figures did not change since its newest revision is not written again: what was sent stays the newest.
    The release it read is kept for good, and `savings.report.ready` goes to the outbox in the same transaction.
    """
    written: list[str] = []
    snapshot = warehouse.reader.pin()
    with warehouse.database.system() as connection:
        customers = connection.execute(
            text("SELECT id FROM customers WHERE status <> 'offboarded' ORDER BY id")
        ).scalars()
        ids = list(customers)
    for customer_id in ids:
        with warehouse.database.system() as connection:
            if statement_id := _write(connection, snapshot, customer_id, period):
                written.append(str(statement_id))
    return written


def _write(connection: Connection, snapshot: Snapshot, customer_id: UUID, period: Period) -> UUID | None:
    silent = find_silent_days(snapshot, customer_id, period, _deleted_clusters(connection, customer_id))
    statement = compute_statement(snapshot, customer_id, period, _fee_rate(connection, customer_id), silent)
    if statement is None:
        return None
    # Two runs of one period must not both find revision n: the second waits here.
    connection.execute(
        text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))"), {"key": f"statement/{customer_id}/{period}"}
    )
    newest = connection.execute(
        select(SavingsStatement.revision, SavingsStatement.body)
        .where(
            SavingsStatement.customer_id == customer_id,
            SavingsStatement.period == period.kind,
            SavingsStatement.period_start == period.start,
        )
        .order_by(SavingsStatement.revision.desc())
        .limit(1)
    ).one_or_none()
    if newest is not None and newest.body == statement.body:
        return None
    # Kept before anything refers to it: a statement without its release could never be told again.
    if not snapshot.reader.lake.release(snapshot.release.id).kept:
        snapshot.reader.lake.keep(snapshot.release.id)
    statement_id = new_id()
    revision = newest.revision + 1 if newest else 1
    connection.execute(
        insert(SavingsStatement).values(
            id=statement_id,
            customer_id=customer_id,
            period=period.kind,
            period_start=period.start,
            period_end=period.end,
            revision=revision,
            baseline_name=BASELINE,
            baseline_usd=statement.baseline_usd,
            actual_usd=statement.actual_usd,
            net_savings_usd=statement.net_usd,
            fee_usd=statement.fee_usd,
            coverage=statement.coverage,
            lake_release_id=snapshot.release.id,
            body=statement.body,
        )
    )
    connection.execute(
        insert(Outbox).values(
            id=new_id(),
            customer_id=customer_id,
            topic=TOPIC,
            payload={
                "statement_id": str(statement_id),
                "customer_id": str(customer_id),
                "period": period.kind,
                "period_start": period.start.isoformat(),
                "revision": revision,
                "baseline": BASELINE,
                "net_savings_usd": str(statement.net_usd),
                "coverage_ratio": statement.coverage,
            },
        )
    )
    return statement_id


def _fee_rate(connection: Connection, customer_id: UUID) -> Decimal:
    value = connection.execute(
        text("SELECT config_value FROM customer_config WHERE customer_id = :id AND config_key = :key"),
        {"id": customer_id, "key": FEE_KEY},
    ).scalar_one_or_none()
    if isinstance(value, dict):
        value = value.get("rate", value.get("value"))
    return Decimal(str(value)) if value is not None else Decimal(0)


def _deleted_clusters(connection: Connection, customer_id: UUID) -> set[str]:
    query = text("SELECT id::text FROM clusters WHERE customer_id = :id AND status = 'deleted'")
    return set(connection.execute(query, {"id": customer_id}).scalars())


def recompute(warehouse: Warehouse, statement_id: UUID) -> Statement:
    """The same statement computed anew from the release it read; identical to what was stored, to the cent.

    Raises:
        LookupError: there is no such statement.
        LakeReleaseError: its release is gone.
    """
    with warehouse.database.system() as connection:
        row = connection.execute(
            select(SavingsStatement.__table__).where(SavingsStatement.id == statement_id)
        ).one_or_none()
    if row is None:
        raise LookupError(f"there is no savings statement {statement_id}")
    period = Period(row.period, row.period_start, row.period_end)
    snapshot = warehouse.reader.pin(row.lake_release_id)
    # Which clusters were there is not the lake's to say: what was expected then is part of the statement.
    silent = {cluster["cluster_id"]: cluster.get("silent_days", 0) for cluster in row.body["clusters"]}
    again = compute_statement(snapshot, row.customer_id, period, Decimal(row.body["fee_rate"]), silent)
    if again is None:
        raise LookupError(f"release {row.lake_release_id} holds nothing of {period} of statement {statement_id}")
    return again
