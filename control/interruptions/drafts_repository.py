"""SQL of one transaction's writing: a batch's rows in one statement, and what its signals mean for drains, hooks and
launches that exist already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions.repository import insert_rows, to_json


def _insertion(table: str, columns: str, parameter: str, order: str, conflict: str = "", where: str = "true") -> str:
    return (
        f"INSERT INTO {table} ({columns}) SELECT {columns} "
        f"FROM jsonb_populate_recordset(CAST(NULL AS {table}), CAST(:{parameter} AS jsonb)) WHERE {where} "
        f"ORDER BY {order}" + (f" ON CONFLICT {conflict}" if conflict else "")
    )


_INBOX_COLUMNS = """customer_id, source, dedupe_key, sqs_message_id, receive_count, body_sha256, event_type, outcome,
    reason, body, sent_at, received_at"""
_INTERRUPTION_COLUMNS = """id, customer_id, cluster_id, node_id, region, interruption_key, account_id, instance_id,
    instance_type, availability_zone, instance_action, kind, notice_at, first_notice_at, received_at, deadline_at,
    detected_by, state, outcome, reason, drain_pending, instance_gone_at, closed_at, version"""
_EVENT_COLUMNS = """id, customer_id, cluster_id, event_type, instance_id, received_at, occurred_at, source, dedupe_key,
    interruption_id, action_taken, payload"""
_INTENT_COLUMNS = "id, customer_id, cluster_id, interruption_id, requirements, state, deadline_at, next_action_at"

# One statement for all that a batch writes: a batch costs the same round trips whatever it holds. The counts tell
# whether somebody else wrote one of the rows in the meantime, or began another interruption of an instance; what refers
# to an interruption that was not written is not written either, so that giving way is no error to Postgres.
_WRITE = text(f"""
    WITH inbox AS (
        {
    _insertion(
        "inbox_messages", _INBOX_COLUMNS, "inbox", "source, dedupe_key", "(customer_id, source, dedupe_key) DO NOTHING"
    )
} RETURNING 1
    ), fresh AS (
        {
    _insertion(
        "interruptions",
        _INTERRUPTION_COLUMNS,
        "fresh",
        "region, interruption_key",
        "DO NOTHING",
    )
} RETURNING id
    ), changed AS (
        UPDATE interruptions i SET
            cluster_id = coalesce(r.cluster_id, i.cluster_id),
            node_id = coalesce(r.node_id, i.node_id),
            instance_type = coalesce(r.instance_type, i.instance_type),
            availability_zone = coalesce(r.availability_zone, i.availability_zone),
            kind = r.kind, instance_action = r.instance_action, notice_at = r.notice_at,
            first_notice_at = r.first_notice_at, received_at = r.received_at, deadline_at = r.deadline_at,
            detected_by = r.detected_by, state = r.state, outcome = r.outcome, reason = r.reason,
            drain_pending = r.drain_pending, instance_gone_at = r.instance_gone_at, closed_at = r.closed_at,
            version = r.version
        FROM jsonb_populate_recordset(CAST(NULL AS interruptions), CAST(:changed AS jsonb)) r
        WHERE i.id = r.id AND i.version = r.version - 1
        RETURNING i.id
    ), written AS (
        SELECT id FROM fresh UNION ALL SELECT id FROM changed
    ), told AS (
        {
    _insertion(
        "interruption_history",
        "customer_id, interruption_id, version, at, event, state, detail",
        "history",
        "interruption_id, version",
        where="interruption_id IN (SELECT id FROM written)",
    )
}
    ), intents AS (
        {
    _insertion(
        "launch_intents",
        _INTENT_COLUMNS,
        "intents",
        "interruption_id",
        "(customer_id, interruption_id) DO NOTHING",
        where="interruption_id IN (SELECT id FROM written)",
    )
}
    ), events AS (
        {
    _insertion("spot_events", _EVENT_COLUMNS, "events", "dedupe_key", "(customer_id, source, dedupe_key) DO NOTHING")
}
    ), linked AS (
        UPDATE spot_events e SET interruption_id = r.interruption_id
        FROM jsonb_to_recordset(CAST(:links AS jsonb)) AS r (id uuid, interruption_id uuid) WHERE e.id = r.id
    ), gone AS (
        UPDATE nodes n SET status = 'terminated', terminated_at = coalesce(n.terminated_at, r.at)
        FROM jsonb_to_recordset(CAST(:gone AS jsonb)) AS r (instance_id text, at timestamptz)
        WHERE n.customer_id = :customer_id AND n.instance_id = r.instance_id AND n.terminated_at IS NULL
    ), outboxed AS (
        {_insertion("outbox", "id, customer_id, topic, payload", "outbox", "id")}
    )
    SELECT (SELECT count(*) FROM inbox) AS inbox, (SELECT count(*) FROM fresh) AS fresh,
           (SELECT count(*) FROM changed) AS changed
""")


async def write_batch(
    conn: AsyncConnection,
    customer_id: UUID,
    *,
    inbox: Sequence[Mapping[str, Any]],
    fresh: Sequence[Mapping[str, Any]],
    changed: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    intents: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    links: Sequence[Mapping[str, Any]],
    gone: Sequence[Mapping[str, Any]],
    outbox: Sequence[Mapping[str, Any]],
) -> bool:
    """Write all of a batch; False when another consumer wrote one of its messages or interruptions first, and the
    transaction must be given up and begun again."""
    rows = {
        "inbox": inbox,
        "fresh": fresh,
        "changed": changed,
        "history": history,
        "intents": intents,
        "events": events,
        "links": links,
        "gone": gone,
        "outbox": outbox,
    }
    if not any(rows.values()):
        return True
    values: dict[str, Any] = {name: to_json(value) for name, value in rows.items()}
    written = (await conn.execute(_WRITE, values | {"customer_id": customer_id})).one()
    return (written.inbox, written.fresh, written.changed) == (len(inbox), len(fresh), len(changed))


_RETIRE = text("""
    UPDATE agent_tasks SET dedupe_key = dedupe_key || ':' || id
    WHERE interruption_id = ANY(:ids) AND dedupe_key = 'drain:' || interruption_id
      AND state IN ('failed', 'refused', 'expired')
""")


async def retire_drains(conn: AsyncConnection, interruption_ids: Sequence[UUID]) -> None:
    """Give up the keys of drains that failed, so that a more urgent word about their nodes may try again."""
    if interruption_ids:
        await conn.execute(_RETIRE, {"ids": list(interruption_ids)})


_SHORTEN = text("""
    UPDATE agent_tasks t SET deadline_at = r.deadline_at,
        parameters = t.parameters || jsonb_build_object(
            'grace_seconds', least(CAST(t.parameters ->> 'grace_seconds' AS integer), r.grace_seconds))
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS r
        (interruption_id uuid, deadline_at timestamptz, grace_seconds integer)
    WHERE t.interruption_id = r.interruption_id AND t.dedupe_key = 'drain:' || r.interruption_id
      AND t.state IN ('queued', 'leased') AND t.deadline_at > r.deadline_at
""")


async def shorten_deadlines(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bring forward the deadline of drains whose notice turned out to be more urgent; whoever holds one is
    offered it again, and learns of it with the answer to its next report at the latest. Ring ``tasks:<cluster_id>``
    after the commit."""
    if rows:
        await conn.execute(_SHORTEN, {"rows": to_json(rows)})


async def insert_hooks(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Lifecycle hooks that wait for our answer; one told of twice is known."""
    await insert_rows(conn, "lifecycle_actions", rows, order="token", conflict="(customer_id, token) DO NOTHING")


_HASTEN = text("""
    UPDATE launch_intents l SET next_action_at = r.at
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS r (interruption_id uuid, at timestamptz)
    WHERE l.interruption_id = r.interruption_id AND l.state = 'planned' AND l.next_action_at > r.at
""")


async def hasten_launches(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replacements planned for later are wanted at the moment ``at``."""
    if rows:
        await conn.execute(_HASTEN, {"rows": to_json(rows)})


_POSTPONE = text("""
    UPDATE launch_intents l SET deadline_at = greatest(l.deadline_at, r.deadline_at),
        next_action_at = CASE
            WHEN l.state = 'planned' AND l.next_action_at >= r.was_at
                 AND NOT EXISTS (SELECT FROM launch_attempts a WHERE a.intent_id = l.id)
            THEN r.at ELSE l.next_action_at END
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS r
        (interruption_id uuid, was_at timestamptz, at timestamptz, deadline_at timestamptz)
    WHERE l.interruption_id = r.interruption_id AND l.state NOT IN ('ready', 'exhausted', 'cancelled')
""")


async def postpone_launches(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replacements have until the new day; those planned for the day that was said before, or a later one, and not
    begun, are launched for the new one."""
    if rows:
        await conn.execute(_POSTPONE, {"rows": to_json(rows)})
