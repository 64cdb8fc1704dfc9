"""SQL of the dashboards' stream."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

_EVENTS = text("""
    SELECT id, customer_id, cluster_id, event_type, instance_id, received_at, occurred_at, source, action_taken,
           interruption_id
    FROM spot_events
    WHERE id > :after AND received_at > now() - interval '10 minutes'
      AND (CAST(:customer_id AS uuid) IS NULL OR customer_id = CAST(:customer_id AS uuid))
    ORDER BY id LIMIT 200
""")


async def events_after(conn: AsyncConnection, after: UUID, customer_id: UUID | None) -> Sequence[Row]:
    """Events newer than ``after`` (ids are ordered by time), at most 200."""
    return (await conn.execute(_EVENTS, {"after": after, "customer_id": customer_id})).all()
