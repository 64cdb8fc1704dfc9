"""SQL of the lifecycle hooks that wait for our answer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True, slots=True)
class Hook:
    """An open hook with where its instance stands: the drain of a terminating one, the node of a launching one."""

    customer_id: UUID
    token: str
    region: str
    group_name: str
    hook_name: str
    instance_id: str
    transition: str
    received_at: datetime
    heartbeat_at: datetime | None
    interruption_state: str | None
    outcome: str | None
    instance_gone: bool
    drain: str | None
    node_status: str | None
    role_arn: str | None
    external_id: str


# A claim is a postponement: whoever dies with it is followed after the same few seconds.
_CLAIM = text("""
    WITH due AS (
        SELECT a.customer_id, a.token FROM lifecycle_actions a
        JOIN customers m ON m.id = a.customer_id AND m.status IN ('active', 'degraded')
        WHERE a.state = 'open' AND a.next_action_at <= now()
        ORDER BY a.next_action_at LIMIT :limit FOR UPDATE OF a SKIP LOCKED
    ), claimed AS (
        UPDATE lifecycle_actions a SET next_action_at = now() + make_interval(secs => :seconds)
        FROM due WHERE a.customer_id = due.customer_id AND a.token = due.token
        RETURNING a.*
    )
    SELECT a.customer_id, a.token, a.region, a.group_name, a.hook_name, a.instance_id, a.transition, a.received_at,
           a.heartbeat_at, i.state AS interruption_state, i.outcome, i.instance_gone_at IS NOT NULL AS instance_gone,
           t.state AS drain, n.status AS node_status, m.aws_role_arn AS role_arn,
           CAST(m.external_id AS text) AS external_id
    FROM claimed a
    JOIN customers m ON m.id = a.customer_id
    LEFT JOIN interruptions i ON i.id = a.interruption_id
    LEFT JOIN agent_tasks t ON t.interruption_id = a.interruption_id AND t.dedupe_key = 'drain:' || a.interruption_id
    LEFT JOIN LATERAL (
        SELECT status FROM nodes n WHERE n.customer_id = a.customer_id AND n.instance_id = a.instance_id
        ORDER BY n.terminated_at IS NULL DESC LIMIT 1
    ) n ON true
    ORDER BY a.received_at
""")


async def claim(conn: AsyncConnection, *, seconds: float, limit: int) -> list[Hook]:
    """Open hooks that are due; nobody else looks at them for ``seconds``."""
    return [Hook(**row._mapping) for row in await conn.execute(_CLAIM, {"seconds": seconds, "limit": limit})]


_BEATEN = text("""
    UPDATE lifecycle_actions SET heartbeats = heartbeats + 1, heartbeat_at = now()
    WHERE customer_id = :customer_id AND token = :token
""")
_END = text("""
    UPDATE lifecycle_actions SET state = :state, reason = :reason, ended_at = now()
    WHERE customer_id = :customer_id AND token = :token AND state = 'open'
""")
_POSTPONE = text("""
    UPDATE lifecycle_actions SET next_action_at = now() + make_interval(secs => :seconds)
    WHERE customer_id = :customer_id AND token = :token
""")
_HEALTHY = text("""
    UPDATE intake_health SET state = 'ok', reason = NULL, remedy = NULL, changed_at = now(), last_ok_at = now()
    WHERE customer_id = :customer_id AND detector = 'lifecycle' AND state = 'degraded'
""")
_ACTIVE = text("""
    UPDATE customers m SET status = 'active' WHERE m.id = :customer_id AND m.status = 'degraded'
      AND NOT EXISTS (SELECT FROM intake_health h WHERE h.customer_id = m.id AND h.state = 'degraded')
""")


async def beaten(conn: AsyncConnection, hook: Hook) -> None:
    """The group waits on."""
    await conn.execute(_BEATEN, {"customer_id": hook.customer_id, "token": hook.token})
    await _works(conn, hook)


async def end(conn: AsyncConnection, hook: Hook, *, state: str, reason: str) -> None:
    """The hook needs nothing more of us."""
    await conn.execute(
        _END, {"customer_id": hook.customer_id, "token": hook.token, "state": state, "reason": reason[:500]}
    )
    if state == "completed":
        await _works(conn, hook)


async def postpone(conn: AsyncConnection, hook: Hook, *, seconds: float) -> None:
    """Look at it again after ``seconds``."""
    await conn.execute(_POSTPONE, {"customer_id": hook.customer_id, "token": hook.token, "seconds": seconds})


async def _works(conn: AsyncConnection, hook: Hook) -> None:
    if (await conn.execute(_HEALTHY, {"customer_id": hook.customer_id})).rowcount:
        await conn.execute(_ACTIVE, {"customer_id": hook.customer_id})
