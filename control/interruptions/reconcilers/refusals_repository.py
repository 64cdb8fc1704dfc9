"""SQL of instances that are to end and could not be ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions.repository import to_json

# Back-off of what may mend itself: 10 s, doubled with every try, ten minutes at most. What only a person can mend is
# asked again as often as its row says, and once a day when nobody has for a week (C-33): it still bills and its alarm
# stands, but twenty-four refusals a day say no more than one.
_REFUSED = text("""
    INSERT INTO refused_endings AS r
        (customer_id, instance_id, cluster_id, region, why, operation, code, message, lasting, next_at)
    SELECT :customer_id, n.instance_id, :cluster_id, :region, :why, n.operation, n.code, n.message, n.lasting,
           now() + make_interval(secs => coalesce(n.seconds, 10.0))
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS n
        (instance_id text, operation text, code text, message text, lasting boolean, seconds double precision)
    ORDER BY n.instance_id
    ON CONFLICT (customer_id, instance_id) DO UPDATE SET why = excluded.why, operation = excluded.operation,
        code = excluded.code, message = excluded.message, lasting = excluded.lasting, tries = r.tries + 1,
        last_at = now(),
        next_at = CASE WHEN excluded.lasting AND r.first_at < now() - interval '7 days' THEN now() + interval '1 day'
                       WHEN excluded.lasting THEN excluded.next_at
                       ELSE now() + make_interval(secs => least(10.0 * power(2, least(r.tries, 6)), 600.0)) END
""")


async def refused(
    conn: AsyncConnection,
    *,
    customer_id: UUID,
    cluster_id: UUID | None,
    region: str,
    why: str,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Remember what could not be ended: ``instance_id``, ``operation``, ``code``, ``message``, ``lasting`` and
    ``seconds`` until it is asked again (None: soon, and later with every try)."""
    if rows:
        values = {"customer_id": customer_id, "cluster_id": cluster_id, "region": region, "why": why}
        await conn.execute(_REFUSED, values | {"rows": to_json(rows)})


_WAITING = text("""
    SELECT instance_id FROM refused_endings
    WHERE customer_id = :customer_id AND instance_id = ANY(:instance_ids) AND next_at > now()
""")


async def waiting(conn: AsyncConnection, customer_id: UUID, instance_ids: Sequence[str]) -> set[str]:
    """Which of the instances were refused and are not asked again yet."""
    values = {"customer_id": customer_id, "instance_ids": list(instance_ids)}
    return set((await conn.execute(_WAITING, values)).scalars())


_FORGET = text("DELETE FROM refused_endings WHERE customer_id = :customer_id AND instance_id = ANY(:instance_ids)")
_FORGET_ORPHANS = text("""
    DELETE FROM refused_endings
    WHERE customer_id = :customer_id AND region = :region AND why = 'orphan' AND instance_id <> ALL(:instance_ids)
""")
# What another loop moved on: an attempt that is not ending any more, a plan that is over.
_FORGET_SETTLED = text("""
    DELETE FROM refused_endings r
    WHERE (r.why = 'replacement' AND NOT EXISTS (
              SELECT FROM launch_attempts a WHERE a.customer_id = r.customer_id AND a.instance_id = r.instance_id
                AND a.state = 'terminating'))
       OR (r.why = 'return_to_spot' AND NOT EXISTS (
              SELECT FROM plan_steps s WHERE s.customer_id = r.customer_id AND s.kind = 'terminate'
                AND s.state = 'running' AND s.parameters ->> 'instance_id' = r.instance_id))
""")
# The role works again by another call's word: no need to wait out the hour.
_ROLE_IS_BACK = text("""
    UPDATE refused_endings r SET next_at = now() FROM intake_health h
    WHERE h.customer_id = r.customer_id AND h.detector = 'poll' AND h.state = 'ok' AND h.last_ok_at > r.last_at
      AND r.operation <> 'TerminateInstances' AND r.next_at > now()
""")
_ASK_NOW = text("UPDATE refused_endings SET next_at = now() WHERE customer_id = :customer_id")


async def forget(conn: AsyncConnection, customer_id: UUID, instance_ids: Sequence[str]) -> None:
    """These have ended."""
    if instance_ids:
        await conn.execute(_FORGET, {"customer_id": customer_id, "instance_ids": list(instance_ids)})


async def forget_orphans(conn: AsyncConnection, customer_id: UUID, region: str, *, except_for: Sequence[str]) -> None:
    """All orphans of a region but these have ended, or were explained."""
    values = {"customer_id": customer_id, "region": region, "instance_ids": list(except_for)}
    await conn.execute(_FORGET_ORPHANS, values)


async def refresh(conn: AsyncConnection) -> None:
    """Forget what was settled elsewhere, and ask again at once where the role is back."""
    await conn.execute(_FORGET_SETTLED)
    await conn.execute(_ROLE_IS_BACK)


async def ask_now(conn: AsyncConnection, customer_id: UUID) -> None:
    """A person mended something: the customer's instances are ended at the next look."""
    await conn.execute(_ASK_NOW, {"customer_id": customer_id})
