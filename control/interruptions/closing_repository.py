"""SQL of the end of interruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions.repository import to_json


@dataclass(frozen=True, slots=True)
class Ended:
    """An open interruption whose branches have ended, locked, with the moments of its steps."""

    id: UUID
    customer_id: UUID
    cluster_id: UUID | None
    instance_id: str
    notice_at: datetime
    first_notice_at: datetime | None
    deadline_at: datetime
    detected_by: list[str]
    kind: str
    instance_action: str
    instance_gone_at: datetime | None
    version: int
    drain: str | None
    task_created_at: datetime | None
    leased_at: datetime | None
    cordoned_at: datetime | None
    drained_at: datetime | None
    launch: str | None
    launched_at: datetime | None
    ready_at: datetime | None
    replacement_instance_id: str | None


_ENDED = text("""
    SELECT i.id, i.customer_id, i.cluster_id, i.instance_id, i.notice_at, i.first_notice_at, i.deadline_at,
           i.detected_by, i.kind, i.instance_action, i.instance_gone_at, i.version,
           t.state AS drain, t.created_at AS task_created_at, t.first_leased_at AS leased_at, t.cordoned_at,
           t.finished_at AS drained_at, l.state AS launch, a.launched_at, a.ready_at,
           a.instance_id AS replacement_instance_id
    FROM interruptions i
    LEFT JOIN agent_tasks t ON t.interruption_id = i.id AND t.dedupe_key = 'drain:' || i.id
    LEFT JOIN launch_intents l ON l.customer_id = i.customer_id AND l.interruption_id = i.id
    LEFT JOIN LATERAL (SELECT * FROM launch_attempts a WHERE a.intent_id = l.id ORDER BY attempt_no DESC LIMIT 1) a
        ON true
    WHERE i.state = 'open' AND NOT i.drain_pending
      AND (t.id IS NULL OR t.state IN ('done', 'failed', 'refused', 'expired', 'superseded'))
      AND (l.id IS NULL OR l.state IN ('ready', 'exhausted', 'cancelled'))
    ORDER BY i.id LIMIT :limit
    FOR UPDATE OF i SKIP LOCKED
""")


async def ended_interruptions(conn: AsyncConnection, *, limit: int) -> list[Ended]:
    """Open interruptions with nothing left to do."""
    return [Ended(**row._mapping) for row in await conn.execute(_ENDED, {"limit": limit})]


_UNWANTED = text("""
    SELECT l.id FROM launch_intents l
    JOIN interruptions i ON i.customer_id = l.customer_id AND i.id = l.interruption_id
    WHERE l.state IN ('planned', 'launching', 'launched', 'blocked') AND i.state = 'closed' AND i.outcome = 'cancelled'
    ORDER BY l.id LIMIT :limit
""")


async def unwanted_intents(conn: AsyncConnection, *, limit: int) -> list[UUID]:
    """Launches under way whose interruption was closed without waiting for them."""
    return list((await conn.execute(_UNWANTED, {"limit": limit})).scalars())


_CLOSE = text("""
    UPDATE interruptions i SET state = 'closed', outcome = r.outcome, reason = r.reason, closed_at = r.closed_at,
        version = r.version
    FROM jsonb_populate_recordset(CAST(NULL AS interruptions), CAST(:rows AS jsonb)) r
    WHERE i.id = r.id AND i.version = r.version - 1
""")


async def close(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write outcomes of locked interruptions."""
    if rows:
        await conn.execute(_CLOSE, {"rows": to_json(rows)})


_REPLACED = text("""
    UPDATE spot_events e SET replacement_instance_id = r.instance_id
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS r (interruption_id uuid, instance_id text)
    WHERE e.interruption_id = r.interruption_id
""")


async def set_replacements(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Tell events which instance took over."""
    if rows:
        await conn.execute(_REPLACED, {"rows": to_json(rows)})


_WAITING = text("""
    SELECT i.id, i.customer_id, i.version, i.kind, i.instance_action, i.deadline_at, l.state AS launch, n.cluster_id,
           n.id AS node_id, n.node_name, n.instance_id, n.instance_type, n.availability_zone, n.node_type, c.region,
           n.last_seen_at, n.terminated_at
    FROM interruptions i
    JOIN launch_intents l ON l.customer_id = i.customer_id AND l.interruption_id = i.id
    JOIN clusters c ON c.id = i.cluster_id
    LEFT JOIN nodes n ON n.cluster_id = i.cluster_id AND n.instance_id = i.instance_id
    WHERE i.state = 'open' AND i.drain_pending
      AND (l.state IN ('ready', 'cancelled')
           OR (l.state = 'exhausted'
               AND (i.kind <> 'scheduled_change' OR now() > i.deadline_at - interval '45 minutes'))
           OR now() > i.deadline_at - CASE i.kind WHEN 'scheduled_change' THEN interval '15 minutes'
                                                  WHEN 'rebalance_recommendation' THEN NULL
                                                  ELSE interval '1 minute' END)
    ORDER BY i.id LIMIT :limit
    FOR UPDATE OF i SKIP LOCKED
""")


async def waiting_drains(conn: AsyncConnection, *, limit: int) -> list[Any]:
    """Interruptions under policy ``pre_spin`` whose replacement is Ready or will not come; locked. A minute before an
    announced end, or when the maintenance begins, the drain waits no longer; without a replacement, half an hour before
    the maintenance."""
    return list(await conn.execute(_WAITING, {"limit": limit}))


_BEGIN_DRAIN = text("""
    UPDATE interruptions i SET drain_pending = false, deadline_at = r.deadline_at, version = r.version
    FROM jsonb_populate_recordset(CAST(NULL AS interruptions), CAST(:rows AS jsonb)) r
    WHERE i.id = r.id AND i.version = r.version - 1
""")


async def begin_drains(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """The drain of locked interruptions is wanted now."""
    if rows:
        await conn.execute(_BEGIN_DRAIN, {"rows": to_json(rows)})


_CLOSE_UNMATCHED = text("""
    UPDATE interruptions SET state = 'closed', outcome = 'unmatched', reason = :reason, closed_at = now(),
        version = version + 1
    WHERE id = ANY(:ids) RETURNING customer_id, id, version
""")


async def close_unmatched(conn: AsyncConnection, ids: Sequence[UUID], *, reason: str) -> list[Any]:
    """Close locked interruptions that nobody owns."""
    return list(await conn.execute(_CLOSE_UNMATCHED, {"ids": list(ids), "reason": reason}))


_OPEN = text("SELECT count(*) FROM interruptions WHERE state <> 'closed'")


async def open_interruptions(conn: AsyncConnection) -> int:
    """How many interruptions are not closed."""
    return (await conn.execute(_OPEN)).scalar_one()
