"""Savings statements read from where the pipelines wrote them; nothing is computed here but sums of days."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import Row

from control.context import AppContext
from control.errors import NotFound
from control.reports import repository
from control.reports.schemas import ClusterSavings, Statement
from control.security import audit
from control.security.principal import Principal

CENT = Decimal("0.01")
MONEY = (
    "baseline_usd",
    "actual_usd",
    "gross_usd",
    "overlap_usd",
    "fallback_premium_usd",
    "displaced_commitment_usd",
    "rework_usd",
    "net_usd",
)


def month_of(first: date) -> tuple[date, date]:
    """First day of a month and of the following one."""
    return first, (first.replace(day=28) + timedelta(days=4)).replace(day=1)


async def savings(
    context: AppContext,
    principal: Principal,
    *,
    customer_id: UUID | None,
    month: date | None,
    day: date | None,
    kind: str,
) -> Statement:
    """The statement of a month or a day; a month that is not over is the sum of its finished days.

    Raises:
        NotFound: no such customer, or nothing was computed for the period yet.
    """
    owner = principal.customer(customer_id)
    async with principal.scope(context.db) as conn:
        customer = await repository.customer(conn, owner)
        if customer is None:
            raise NotFound("customer")
        partial = False
        if day is not None:
            rows = await repository.statements(conn, owner, "day", day, day + timedelta(days=1))
        else:
            assert month is not None
            first, end = month_of(month)
            rows = await repository.statements(conn, owner, "month", first, end)
            if not rows:
                rows, partial = await repository.statements(conn, owner, "day", first, end), True
        if not rows:
            raise NotFound("statement yet: a schedule writes one after each finished day")
        names = await repository.cluster_names(conn, owner)
        if kind != "json":
            await audit.record(
                conn,
                customer_id=owner,
                actor=principal.actor,
                action="report.exported",
                subject=f"savings {month or day}",
                detail={"format": kind},
            )
    return combine(customer, rows, names, partial=partial, period="day" if day is not None else "month")


def combine(customer: Row, rows: Sequence[Row], names: dict[UUID, Row], *, partial: bool, period: str) -> Statement:
    """One statement from one or several stored ones."""
    baseline = sum((row.baseline_usd for row in rows), Decimal(0))
    net = sum((row.net_savings_usd for row in rows), Decimal(0))
    clusters: dict[UUID, dict[str, Any]] = {}
    hours: dict[UUID, float] = {}
    expected_hours = 0.0
    for row in rows:
        for part in row.body.get("clusters", []):
            cluster_id = UUID(part["cluster_id"])
            sums = clusters.setdefault(cluster_id, dict.fromkeys(MONEY, Decimal(0)))
            for name in MONEY:
                # What is not known of one day is not known of all of them.
                known, value = sums[name], part[name]
                sums[name] = None if known is None or value is None else known + Decimal(value)
            hours[cluster_id] = hours.get(cluster_id, 0.0) + float(part["hours_covered"])
            expected_hours += float(part["hours_expected"])
    stages = {row.body.get("stage", "estimated") for row in rows}
    return Statement(
        customer_id=customer.id,
        company_name=customer.company_name,
        aws_account_id=customer.aws_account_id,
        period=period,
        period_start=min(row.period_start for row in rows),
        period_end=max(row.period_end for row in rows),
        revision=max(row.revision for row in rows),
        stage="realised" if stages == {"realised"} else "estimated",
        partial=partial,
        baseline_name=rows[0].baseline_name,
        baseline_usd=baseline,
        actual_usd=sum((row.actual_usd for row in rows), Decimal(0)),
        net_savings_usd=net,
        savings_ratio=float(net / baseline) if baseline else None,
        fee_usd=rows[0].fee_usd if len(rows) == 1 else _fee(net, rows),
        coverage=rows[0].coverage if len(rows) == 1 else min(1.0, sum(hours.values()) / max(expected_hours, 1e-9)),
        lake_release_ids=sorted({row.lake_release_id for row in rows}),
        computed_at=max(row.created_at for row in rows),
        not_measured={name: reason for row in rows for name, reason in row.body.get("not_measured", {}).items()},
        clusters=[
            ClusterSavings(
                cluster_id=cluster_id,
                cluster_name=names[cluster_id].cluster_name if cluster_id in names else "",
                region=names[cluster_id].region if cluster_id in names else "",
                hours_covered=hours[cluster_id],
                **sums,
            )
            for cluster_id, sums in sorted(clusters.items())
        ],
    )


def _fee(net: Decimal, rows: Sequence[Row]) -> Decimal:
    """The fee of the sum, at the newest rate: losing days come off before it is taken, and no fee is taken on a loss,
    as when the whole period is told at once (cloudoptim_pipelines.defs.savings.statements)."""
    rate = Decimal(rows[-1].body.get("fee_rate", "0"))
    return (max(net, Decimal(0)) * rate).quantize(CENT, ROUND_HALF_EVEN)
