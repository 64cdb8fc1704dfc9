"""SQL of replacements after their launch: Ready, never Ready, to be ended, too late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

_READY = text("""
    SELECT a.intent_id, a.id AS attempt_id, a.instance_id, n.ready_at FROM launch_attempts a
    JOIN nodes n ON n.customer_id = a.customer_id AND n.instance_id = a.instance_id
    WHERE a.state IN ('launched', 'adopted') AND n.status IN ('ready', 'cordoned') AND n.terminated_at IS NULL
    LIMIT :limit
""")


async def ready_attempts(conn: AsyncConnection, *, limit: int) -> list[Any]:
    """Running replacements whose node is Ready by its agent's word."""
    return list(await conn.execute(_READY, {"limit": limit}))


_NEVER_READY = text("""
    SELECT a.intent_id FROM launch_attempts a
    JOIN launch_batches b ON b.id = a.batch_id
    JOIN clusters c ON c.id = b.cluster_id
    WHERE a.state IN ('launched', 'adopted') AND a.launched_at < now() - make_interval(secs => :seconds)
      -- Who did not hear from the agent does not know that the node is not Ready.
      AND c.last_seen_at > now() - interval '2 minutes'
      AND NOT EXISTS (SELECT FROM nodes n WHERE n.customer_id = a.customer_id AND n.instance_id = a.instance_id
                        AND n.status IN ('ready', 'cordoned') AND n.terminated_at IS NULL)
    ORDER BY a.launched_at LIMIT :limit
""")


async def never_ready_intents(conn: AsyncConnection, *, seconds: float, limit: int) -> list[UUID]:
    """Intents whose replacement ran this long without becoming a Ready node."""
    return [row.intent_id for row in await conn.execute(_NEVER_READY, {"seconds": seconds, "limit": limit})]


_ENDING = text("""
    SELECT * FROM (
        SELECT a.intent_id, a.instance_id, a.customer_id, b.cluster_id, b.region, a.failure, a.launched_at,
               row_number() OVER (PARTITION BY b.cluster_id ORDER BY a.id) AS place
        FROM launch_attempts a
        JOIN launch_batches b ON b.id = a.batch_id
        JOIN customers m ON m.id = a.customer_id AND m.adopt_only_since IS NULL
        LEFT JOIN refused_endings r ON r.customer_id = a.customer_id AND r.instance_id = a.instance_id
        WHERE a.state = 'terminating' AND a.instance_id IS NOT NULL AND (r.next_at IS NULL OR r.next_at <= now())
          AND b.cluster_id <> ALL(:busy)
    ) due WHERE place <= :share ORDER BY place, instance_id LIMIT :limit
""")


async def ending_attempts(conn: AsyncConnection, *, share: int, limit: int, busy: Sequence[UUID] = ()) -> list[Any]:
    """Instances of ours that are to be ended now, at most ``share`` of a cluster: what was refused waits its time, and
    holds up nobody else. Not of the clusters ``busy``."""
    values = {"share": share, "limit": limit, "busy": list(busy)}
    return list(await conn.execute(_ENDING, values))


_NODES_OF = text("""
    SELECT i.instance_id,
           EXISTS (SELECT FROM nodes n WHERE n.customer_id = :customer_id AND n.instance_id = i.instance_id
                     AND n.status IN ('ready', 'cordoned') AND n.terminated_at IS NULL) AS ready,
           coalesce(c.last_seen_at > now() - interval '2 minutes', false) AS agent_heard
    FROM unnest(CAST(:instance_ids AS text[])) AS i (instance_id) CROSS JOIN clusters c WHERE c.id = :cluster_id
""")


async def nodes_of(
    conn: AsyncConnection, customer_id: UUID, cluster_id: UUID, instance_ids: Sequence[str]
) -> dict[str, Any]:
    """Of instances of a cluster: whether each is a Ready node by its agent's word, and whether that agent is heard."""
    values = {"customer_id": customer_id, "cluster_id": cluster_id, "instance_ids": list(instance_ids)}
    return {row.instance_id: row for row in await conn.execute(_NODES_OF, values)}


_OVERDUE = text("""
    SELECT id, reason FROM launch_intents i
    WHERE deadline_at < now() AND (state IN ('planned', 'blocked')
          OR (state = 'launched' AND EXISTS (SELECT FROM launch_attempts a
                                             WHERE a.intent_id = i.id AND a.state = 'terminating')))
    LIMIT :limit
""")


async def overdue_intents(conn: AsyncConnection, *, limit: int) -> dict[UUID, str | None]:
    """Intents whose window closed without an instance that is wanted, each with what kept it."""
    return {row.id: row.reason for row in await conn.execute(_OVERDUE, {"limit": limit})}
