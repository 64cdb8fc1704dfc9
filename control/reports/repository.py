"""SQL of savings statements."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from uuid import UUID

from sqlalchemy import Row, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from warehouse.postgres.models import Cluster, Customer

# The newest revision of each period.
_STATEMENTS = text("""
    SELECT DISTINCT ON (period_start) id, period, period_start, period_end, revision, baseline_name, baseline_usd,
           actual_usd, net_savings_usd, fee_usd, coverage, lake_release_id, body, created_at
    FROM savings_statements
    WHERE customer_id = :customer_id AND period = :period AND period_start >= :first AND period_start < :end
    ORDER BY period_start, revision DESC
""")


async def statements(conn: AsyncConnection, customer_id: UUID, period: str, first: date, end: date) -> Sequence[Row]:
    """Newest statements of periods that start from ``first`` to before ``end``."""
    values = {"customer_id": customer_id, "period": period, "first": first, "end": end}
    return (await conn.execute(_STATEMENTS, values)).all()


async def customer(conn: AsyncConnection, customer_id: UUID) -> Row | None:
    """Name and account of a customer."""
    query = select(Customer.id, Customer.company_name, Customer.aws_account_id).where(Customer.id == customer_id)
    return (await conn.execute(query)).one_or_none()


async def cluster_names(conn: AsyncConnection, customer_id: UUID) -> dict[UUID, Row]:
    """Name and region of the customer's clusters, deleted ones included."""
    query = select(Cluster.id, Cluster.cluster_name, Cluster.region).where(Cluster.customer_id == customer_id)
    return {row.id: row for row in await conn.execute(query)}
