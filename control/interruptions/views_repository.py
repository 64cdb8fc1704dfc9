"""SQL of what people see of interruptions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

_LIST = text("""
    SELECT i.id, i.customer_id, i.cluster_id, i.region, i.instance_id, i.instance_type, i.availability_zone, i.kind,
           i.instance_action, coalesce(i.first_notice_at, i.notice_at) AS first_notice_at, i.notice_at, i.received_at,
           i.deadline_at, i.detected_by, i.state, i.outcome, i.reason, i.instance_gone_at, i.closed_at,
           t.id AS task_id, t.state AS drain_state, t.created_at AS task_created_at, t.first_leased_at,
           t.cordoned_at, t.finished_at AS drain_finished_at,
           l.state AS launch_state, l.reason AS launch_reason, l.decided_by,
           a.instance_id AS replacement_instance_id, a.instance_type AS replacement_instance_type,
           a.availability_zone AS replacement_zone, a.node_type AS replacement_node_type,
           CAST(a.price_usd_per_hour AS double precision) AS replacement_price, a.launched_at, a.ready_at,
           (SELECT count(*) FROM launch_attempts x WHERE x.intent_id = l.id) AS attempts
    FROM interruptions i
    LEFT JOIN agent_tasks t ON t.interruption_id = i.id AND t.dedupe_key = 'drain:' || i.id
    LEFT JOIN launch_intents l ON l.customer_id = i.customer_id AND l.interruption_id = i.id
    LEFT JOIN LATERAL (SELECT * FROM launch_attempts a WHERE a.intent_id = l.id ORDER BY attempt_no DESC LIMIT 1) a
        ON true
    WHERE (CAST(:id AS uuid) IS NULL OR i.id = :id)
      AND (CAST(:customer_id AS uuid) IS NULL OR i.customer_id = :customer_id)
      AND (CAST(:cluster_id AS uuid) IS NULL OR i.cluster_id = :cluster_id)
      AND (CAST(:state AS text) IS NULL OR i.state = :state)
      AND (CAST(:before AS uuid) IS NULL OR i.id < :before)
      AND (CAST(:since AS timestamptz) IS NULL OR i.received_at >= :since)
    ORDER BY i.id DESC LIMIT :limit
""")


async def list_interruptions(
    conn: AsyncConnection,
    *,
    id: UUID | None = None,
    customer_id: UUID | None = None,
    cluster_id: UUID | None = None,
    state: str | None = None,
    before: UUID | None = None,
    since: datetime | None = None,
    limit: int = 100,
) -> Sequence[Row]:
    """Interruptions the scope shows, newest first, each with its drain and its newest launch attempt."""
    values = {
        "id": id,
        "customer_id": customer_id,
        "cluster_id": cluster_id,
        "state": state,
        "before": before,
        "since": since,
        "limit": limit,
    }
    return (await conn.execute(_LIST, values)).all()


_HISTORY = text("""
    SELECT version, at, event, state, detail FROM interruption_history WHERE interruption_id = :id ORDER BY version
""")
_ATTEMPTS = text("""
    SELECT a.attempt_no, a.instance_type, a.availability_zone, a.node_type,
           CAST(a.price_usd_per_hour AS double precision) AS price_usd_per_hour, a.state,
           a.instance_id, a.failure, a.created_at, a.launched_at, a.ready_at, a.ended_at
    FROM launch_attempts a JOIN launch_intents l ON l.id = a.intent_id
    WHERE l.interruption_id = :id ORDER BY a.attempt_no
""")
_DRAINS = text("""
    SELECT id AS task_id, state, created_at, first_leased_at, cordoned_at, finished_at, deadline_at FROM agent_tasks
    WHERE interruption_id = :id AND task_type = 'drain_node' ORDER BY created_at, id
""")
_EVENTS = text("""
    SELECT id, event_type, source, occurred_at, received_at, action_taken FROM spot_events
    WHERE interruption_id = :id ORDER BY received_at
""")


async def history(conn: AsyncConnection, interruption_id: UUID) -> Sequence[Row]:
    """Every version of an interruption."""
    return (await conn.execute(_HISTORY, {"id": interruption_id})).all()


async def attempts(conn: AsyncConnection, interruption_id: UUID) -> Sequence[Row]:
    """Every try to replace its instance."""
    return (await conn.execute(_ATTEMPTS, {"id": interruption_id})).all()


async def drains(conn: AsyncConnection, interruption_id: UUID) -> Sequence[Row]:
    """Every try to drain its node."""
    return (await conn.execute(_DRAINS, {"id": interruption_id})).all()


async def events(conn: AsyncConnection, interruption_id: UUID) -> Sequence[Row]:
    """Every event that was about it."""
    return (await conn.execute(_EVENTS, {"id": interruption_id})).all()


# Bodies may have 1 MiB each: a list shows how they begin.
BODY_SHOWN_CHARACTERS = 4096
_QUARANTINE = text(f"""
    SELECT customer_id, source, dedupe_key, event_type, reason, left(body, {BODY_SHOWN_CHARACTERS}) AS body,
           octet_length(body) AS body_bytes, receive_count, sent_at, received_at, replayed_at
    FROM inbox_messages
    WHERE outcome = 'quarantined'
      AND (CAST(:customer_id AS uuid) IS NULL OR customer_id = :customer_id)
      AND (CAST(:before AS timestamptz) IS NULL OR received_at < :before
           OR (received_at = :before AND (customer_id, source, dedupe_key)
                   > (CAST(:after_customer AS uuid), CAST(:after_source AS text), CAST(:after_key AS text))))
    ORDER BY received_at DESC, customer_id, source, dedupe_key LIMIT :limit
""")


async def list_quarantine(
    conn: AsyncConnection,
    *,
    customer_id: UUID | None,
    before: datetime | None,
    after: tuple[UUID, str, str] | None,
    limit: int,
) -> Sequence[Row]:
    """Messages in quarantine, newest first.

    Args:
        before: only what was received earlier, and with ``after`` also what was received in that moment (one commit's
            messages share it) and comes after that key of customer, source and dedupe key.
    """
    after_customer, after_source, after_key = after or (None, None, None)
    values = {
        "customer_id": customer_id,
        "before": before,
        "after_customer": after_customer,
        "after_source": after_source,
        "after_key": after_key,
        "limit": limit,
    }
    return (await conn.execute(_QUARANTINE, values)).all()


_WHOLE = text("""
    SELECT customer_id, source, dedupe_key, event_type, reason, body, octet_length(body) AS body_bytes, receive_count,
           sent_at, received_at, replayed_at
    FROM inbox_messages
    WHERE customer_id = :customer_id AND source = :source AND dedupe_key = :dedupe_key AND outcome = 'quarantined'
""")


async def quarantined(conn: AsyncConnection, customer_id: UUID, source: str, dedupe_key: str) -> Row | None:
    """One message in quarantine with its whole body."""
    values = {"customer_id": customer_id, "source": source, "dedupe_key": dedupe_key}
    return (await conn.execute(_WHOLE, values)).one_or_none()


_LOCK_MESSAGE = text("""
    SELECT body, sent_at, received_at, receive_count, sqs_message_id, event_type, outcome, reason, replayed_at
    FROM inbox_messages
    WHERE customer_id = :customer_id AND source = :source AND dedupe_key = :dedupe_key FOR UPDATE
""")


async def lock_message(conn: AsyncConnection, customer_id: UUID, source: str, dedupe_key: str) -> Row | None:
    """One message whatever became of it, locked."""
    values = {"customer_id": customer_id, "source": source, "dedupe_key": dedupe_key}
    return (await conn.execute(_LOCK_MESSAGE, values)).one_or_none()


_QUARANTINED_FOR = text("""
    SELECT source, dedupe_key, count(*) OVER () AS total FROM inbox_messages
    WHERE customer_id = :customer_id AND outcome = 'quarantined' AND split_part(reason, ':', 1) = :reason
    ORDER BY replayed_at NULLS FIRST, received_at, source, dedupe_key LIMIT :limit
""")


async def quarantined_for(
    conn: AsyncConnection, customer_id: UUID, reason: str, limit: int
) -> tuple[list[tuple[str, str]], int]:
    """Keys of a customer's messages in quarantine for one reason, and how many there are in all."""
    rows = (await conn.execute(_QUARANTINED_FOR, {"customer_id": customer_id, "reason": reason, "limit": limit})).all()
    return [(row.source, row.dedupe_key) for row in rows], rows[0].total if rows else 0


_INTERRUPTIONS_OF = text("""
    SELECT DISTINCT interruption_id FROM spot_events
    WHERE customer_id = :customer_id AND source = :source AND interruption_id IS NOT NULL
      AND (dedupe_key = :dedupe_key OR starts_with(dedupe_key, :dedupe_key || '#'))
    ORDER BY interruption_id
""")


async def interruptions_of(conn: AsyncConnection, customer_id: UUID, source: str, dedupe_key: str) -> list[UUID]:
    """The interruptions a message was about."""
    values = {"customer_id": customer_id, "source": source, "dedupe_key": dedupe_key}
    return [row.interruption_id for row in await conn.execute(_INTERRUPTIONS_OF, values)]


async def queue_url(conn: AsyncConnection, customer_id: UUID) -> str | None:
    """The customer's queue."""
    statement = text("SELECT sqs_queue_url FROM customers WHERE id = :customer_id")
    return (await conn.execute(statement, {"customer_id": customer_id})).scalar_one_or_none()


_REPLAYED = text("""
    UPDATE inbox_messages SET outcome = :outcome, reason = :reason, event_type = coalesce(:event_type, event_type),
        replayed_at = now(), body = CASE WHEN :outcome IN ('quarantined', 'waiting') THEN body END
    WHERE customer_id = :customer_id AND source = :source AND dedupe_key = :dedupe_key
""")


async def mark_replayed(
    conn: AsyncConnection,
    customer_id: UUID,
    source: str,
    dedupe_key: str,
    *,
    outcome: str,
    reason: str | None,
    event_type: str | None,
) -> None:
    """What became of a message that was read again."""
    await conn.execute(
        _REPLAYED,
        {
            "customer_id": customer_id,
            "source": source,
            "dedupe_key": dedupe_key,
            "outcome": outcome,
            "reason": reason,
            "event_type": event_type,
        },
    )


_REBALANCE = text("""
    SELECT n.instance_type, n.availability_zone, count(*) AS recommendations,
           count(*) FILTER (WHERE EXISTS (
               SELECT FROM interruptions i
               WHERE i.customer_id = e.customer_id AND i.instance_id = e.instance_id
                 AND i.kind IN ('spot_interruption', 'instance_state_change')
                 AND i.notice_at BETWEEN e.occurred_at - interval '1 minute' AND e.occurred_at + interval '30 minutes'
           )) AS interrupted_within_30_minutes
    FROM spot_events e
    JOIN nodes n ON n.customer_id = e.customer_id AND n.instance_id = e.instance_id
    WHERE e.event_type = 'rebalance_recommendation'
      AND e.received_at > now() - make_interval(days => :days)
      AND e.received_at < now() - interval '30 minutes'
      AND (CAST(:customer_id AS uuid) IS NULL OR e.customer_id = :customer_id)
    GROUP BY n.instance_type, n.availability_zone
    ORDER BY recommendations DESC, n.instance_type, n.availability_zone LIMIT :limit
""")


async def rebalance_scores(conn: AsyncConnection, *, customer_id: UUID | None, days: int, limit: int) -> Sequence[Row]:
    """Per pool: rebalance recommendations whose half hour is over, and how many an interruption followed."""
    values = {"customer_id": customer_id, "days": days, "limit": limit}
    return (await conn.execute(_REBALANCE, values)).all()
