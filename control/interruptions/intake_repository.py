"""SQL of the intake's own bookkeeping: which queues to read, and what is known of their health."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions.repository import insert_rows

_SOURCES = text("""
    SELECT id, sqs_queue_url, aws_role_arn, CAST(external_id AS text) AS external_id FROM customers
    WHERE status IN ('active', 'degraded') AND sqs_queue_url IS NOT NULL AND aws_role_arn IS NOT NULL
""")


async def sources(conn: AsyncConnection) -> list[Any]:
    """Customers with a queue and a role that were verified: id, sqs_queue_url, aws_role_arn, external_id."""
    return list(await conn.execute(_SOURCES))


_HEALTHY = text("""
    INSERT INTO intake_health (customer_id, detector, state, last_ok_at)
    SELECT id, :detector, 'ok', now() FROM customers WHERE id = ANY(:customer_ids) ORDER BY id
    ON CONFLICT (customer_id, detector) DO UPDATE SET
        changed_at = CASE WHEN intake_health.state = 'ok' THEN intake_health.changed_at ELSE now() END,
        state = 'ok', reason = NULL, remedy = NULL, last_ok_at = now()
""")
_RECOVERED = text("""
    UPDATE customers m SET status = 'active' WHERE m.id = ANY(:customer_ids) AND m.status = 'degraded'
      AND NOT EXISTS (SELECT FROM intake_health h WHERE h.customer_id = m.id AND h.state = 'degraded')
""")
_DEGRADED = text("UPDATE customers SET status = 'degraded' WHERE id = :customer_id AND status = 'active'")


async def mark_healthy(conn: AsyncConnection, customer_ids: Sequence[UUID], *, detector: str) -> None:
    """A detector works for these customers; those it was the last trouble of are active again."""
    if customer_ids:
        await conn.execute(_HEALTHY, {"customer_ids": list(customer_ids), "detector": detector})
        await conn.execute(_RECOVERED, {"customer_ids": list(customer_ids)})


async def mark_degraded(conn: AsyncConnection, customer_id: UUID, *, detector: str, reason: str, remedy: str) -> None:
    """A detector does not work for a customer, why, and what a person can do about it."""
    row = {
        "customer_id": customer_id,
        "detector": detector,
        "state": "degraded",
        "reason": reason,
        "remedy": remedy,
    }
    await insert_rows(
        conn,
        "intake_health",
        [row],
        order="customer_id",
        conflict="(customer_id, detector) DO UPDATE SET reason = excluded.reason, remedy = excluded.remedy, "
        "changed_at = CASE WHEN intake_health.state = excluded.state THEN intake_health.changed_at ELSE now() END, "
        "state = excluded.state",
    )
    await conn.execute(_DEGRADED, {"customer_id": customer_id})
