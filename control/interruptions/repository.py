"""All SQL of the interruption path's intake: inbox, events, interruptions with their history.

Statements take any number of rows as one JSON array, so that a receive batch costs the same round trips as a single
message and its text is prepared once. Rows are inserted in key order: two batches that overlap wait for each other
instead of deadlocking.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions.merging import Known, Word, words_with
from control.interruptions.parsing import remembered
from control.interruptions.policies import NodeFacts
from warehouse.contracts import EventKind, InterruptionAction


@lru_cache(maxsize=64)
def _insert_statement(table: str, columns: tuple[str, ...], order: str, conflict: str, returning: str) -> TextClause:
    names = ", ".join(columns)
    return text(
        f"INSERT INTO {table} ({names}) SELECT {names} "
        f"FROM jsonb_populate_recordset(CAST(NULL AS {table}), CAST(:rows AS jsonb)) ORDER BY {order}"
        + (f" ON CONFLICT {conflict}" if conflict else "")
        + (f" RETURNING {returning}" if returning else "")
    )


async def insert_rows(
    conn: AsyncConnection,
    table: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    order: str,
    conflict: str = "",
    returning: str = "",
) -> list[Any]:
    """Insert rows that all have the first one's columns; columns left out get their defaults.

    Table, order, conflict and returning are ours, never a caller's input.
    """
    if not rows:
        return []
    statement = _insert_statement(table, tuple(rows[0]), order, conflict, returning)
    result = await conn.execute(statement, {"rows": to_json(rows)})
    return list(result.all()) if returning else []


def to_json(value: Any) -> str:
    """JSON as Postgres reads it back; ids, times and enums included."""
    return msgspec.json.encode(value).decode()


# --- what is known before a decision ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CustomerFacts:
    """What the intake needs to know of a customer."""

    customer_id: UUID
    status: str
    account_id: str | None
    regions: frozenset[str]
    event_policies: Any


_CUSTOMER = text("""
    SELECT m.id, m.status, m.aws_account_id,
           ARRAY(SELECT DISTINCT c.region FROM clusters c WHERE c.customer_id = m.id) AS regions,
           (SELECT config_value FROM customer_config k
            WHERE k.customer_id = m.id AND k.config_key = 'event_policies') AS event_policies
    FROM customers m WHERE m.id = :customer_id
""")


async def customer_facts(conn: AsyncConnection, customer_id: UUID) -> CustomerFacts | None:
    """Status, account, regions of its clusters and event policies."""
    row = (await conn.execute(_CUSTOMER, {"customer_id": customer_id})).one_or_none()
    if row is None:
        return None
    return CustomerFacts(row.id, row.status, row.aws_account_id, frozenset(row.regions), row.event_policies)


_NODES_SQL = """
    SELECT n.customer_id, n.cluster_id, n.id AS node_id, n.node_name, n.instance_id, n.instance_type,
           n.availability_zone, n.node_type, c.region, n.last_seen_at, n.terminated_at, c.status AS cluster_status,
           EXISTS (SELECT FROM launch_attempts a
                   WHERE a.customer_id = n.customer_id AND a.instance_id = n.instance_id
                     AND a.state IN ('terminating', 'terminated'))
           OR EXISTS (SELECT FROM plan_steps p
                      WHERE p.customer_id = n.customer_id AND p.kind = 'terminate'
                        AND p.state IN ('running', 'done')
                        AND p.parameters ->> 'instance_id' = n.instance_id) AS ours_ending
    FROM nodes n JOIN clusters c ON c.id = n.cluster_id
    WHERE n.instance_id = ANY(:instance_ids)
    UNION ALL
    SELECT a.customer_id, b.cluster_id, NULL, NULL, a.instance_id, a.instance_type, a.availability_zone,
           a.node_type, b.region, a.launched_at, NULL, c.status, a.state IN ('terminating', 'terminated')
    FROM launch_attempts a
    JOIN launch_batches b ON b.id = a.batch_id
    JOIN clusters c ON c.id = b.cluster_id
    WHERE a.customer_id = :customer_id AND a.instance_id = ANY(:instance_ids)
      AND NOT EXISTS (SELECT FROM nodes n WHERE n.instance_id = a.instance_id AND n.customer_id = a.customer_id)
"""
_NODES = text(_NODES_SQL)


async def nodes_of_instances(
    conn: AsyncConnection, customer_id: UUID, instance_ids: Iterable[str]
) -> dict[str, NodeFacts]:
    """Nodes by instance id, of any customer (system scope): another tenant's instance must be seen to be refused.

    A customer's own node wins, then the newest. Instances of ours that have not joined yet are included.
    """
    result = await conn.execute(_NODES, {"customer_id": customer_id, "instance_ids": list(instance_ids)})
    return best_nodes([NodeFacts(**row._mapping) for row in result], customer_id)


def best_nodes(facts: Iterable[NodeFacts], customer_id: UUID) -> dict[str, NodeFacts]:
    """One node per instance id: the customer's own wins, then the living one."""
    found: dict[str, NodeFacts] = {}
    for node in facts:
        known = found.get(node.instance_id)
        if known is None or _preference(node, customer_id) > _preference(known, customer_id):
            found[node.instance_id] = node
    return found


def _preference(facts: NodeFacts, customer_id: UUID) -> tuple[bool, bool]:
    return facts.customer_id == customer_id, facts.terminated_at is None


class Said(msgspec.Struct):
    """An event as it is kept; of its payload, what was asked for."""

    occurred_at: datetime
    received_at: datetime
    payload: dict[str, Any]


@dataclass(slots=True)
class InterruptionRow:
    """An interruption under a row lock."""

    id: UUID
    customer_id: UUID
    cluster_id: UUID | None
    instance_id: str
    interruption_key: str
    state: str
    outcome: str | None
    kind: str
    instance_action: str
    received_at: datetime
    deadline_at: datetime
    detected_by: list[str]
    drain_pending: bool
    instance_gone_at: datetime | None
    notice_at: datetime
    first_notice_at: datetime | None
    region: str
    account_id: str | None
    reason: str | None
    closed_at: datetime | None
    version: int
    # What was said of its instance's maintenances, where that was read.
    said: list[Said] | None = None

    def known(self) -> Known:
        """What later signals depend on."""
        return Known(
            key=self.interruption_key,
            kind=EventKind(self.kind),
            action=InterruptionAction(self.instance_action),
            state=self.state,
            notice_at=self.notice_at,
            received_at=self.received_at,
            deadline_at=self.deadline_at,
            detected_by=tuple(self.detected_by),
            drain_pending=self.drain_pending,
            first_notice_at=self.first_notice_at,
            outcome=self.outcome,
            reason=self.reason,
            gone_at=self.instance_gone_at,
            closed_at=self.closed_at,
            words=self._words(),
        )

    def _words(self) -> tuple[Word, ...]:
        words: tuple[Word, ...] = ()
        for said in self.said or ():
            event = remembered(
                EventKind.SCHEDULED_CHANGE,
                self.instance_id,
                action=InterruptionAction.TERMINATE,
                region=self.region,
                account_id=self.account_id,
                occurred_at=said.occurred_at,
                received_at=said.received_at,
                detail=said.payload,
            )
            words = words_with(words, event, said.received_at)
        return words


_COLUMNS = """id, customer_id, cluster_id, instance_id, interruption_key, state, outcome, kind, instance_action,
    received_at, deadline_at, detected_by, drain_pending, instance_gone_at,
    notice_at, first_notice_at, region, account_id, reason, closed_at, version"""

_CONTEXT = text(f"""
    WITH locked AS (
        SELECT {_COLUMNS} FROM interruptions
        WHERE customer_id = :customer_id AND instance_id = ANY(:instance_ids)
          AND (state <> 'closed' OR split_part(interruption_key, '#', 1) = ANY(:keys)
               OR closed_at > now() - interval '1 hour' OR instance_action = 'terminate')
        ORDER BY id FOR UPDATE
    ), nodes_found AS ({_NODES_SQL}
    ), earlier AS (
        SELECT instance_id, array_agg(DISTINCT event_type) AS kinds, array_agg(DISTINCT id) AS event_ids
        FROM spot_events
        WHERE customer_id = :customer_id AND instance_id = ANY(:instance_ids) AND interruption_id IS NULL
          AND received_at > now() - interval '1 hour'
        GROUP BY instance_id
    ), known AS (
        SELECT m.source, m.dedupe_key FROM inbox_messages m
        JOIN unnest(CAST(:sources AS text[]), CAST(:dedupe_keys AS text[])) AS k (source, dedupe_key)
            USING (source, dedupe_key)
        WHERE m.customer_id = :customer_id
    )
    SELECT CAST(jsonb_build_object(
        'nodes', (SELECT coalesce(jsonb_agg(to_jsonb(n)), '[]') FROM nodes_found n),
        'locked', (SELECT coalesce(jsonb_agg(to_jsonb(l) || jsonb_build_object('said', (
            SELECT jsonb_agg(jsonb_build_object(
                'occurred_at', e.occurred_at, 'received_at', e.received_at,
                'payload', jsonb_build_object('eventArn', e.payload -> 'eventArn',
                                              'startTime', e.payload -> 'startTime',
                                              'statusCode', e.payload -> 'statusCode')) ORDER BY e.received_at, e.id)
            FROM spot_events e
            WHERE l.kind = 'scheduled_change' AND l.state <> 'closed'
              AND e.interruption_id = l.id AND e.event_type = 'scheduled_change'))), '[]') FROM locked l),
        'earlier', (SELECT coalesce(jsonb_agg(to_jsonb(e)), '[]') FROM earlier e),
        'known', (SELECT coalesce(jsonb_agg(jsonb_build_array(k.source, k.dedupe_key)), '[]') FROM known k)
    ) AS text)
""")


class Earlier(msgspec.Struct):
    """Signals about an instance that belong to no interruption yet."""

    instance_id: str
    kinds: list[str]
    event_ids: list[UUID]


class Context(msgspec.Struct):
    """All that a batch's decisions need, read by one statement. ``locked`` interruptions stay locked."""

    nodes: list[NodeFacts]
    locked: list[InterruptionRow]
    earlier: list[Earlier]
    known: list[tuple[str, str]]


async def read_context(
    conn: AsyncConnection,
    customer_id: UUID,
    *,
    instance_ids: Sequence[str],
    keys: Sequence[str],
    messages: Sequence[tuple[str, str]],
) -> Context:
    """The customer's nodes of these instances, their interruptions (locked), earlier signals, and which of the
    messages (source, dedupe_key) are known."""
    row = (
        await conn.execute(
            _CONTEXT,
            {
                "customer_id": customer_id,
                "instance_ids": list(instance_ids),
                "keys": list(keys),
                "sources": [source for source, _ in messages],
                "dedupe_keys": [key for _, key in messages],
            },
        )
    ).scalar_one()
    return msgspec.json.decode(row, type=Context)


# --- the inbox --------------------------------------------------------------------------------------------------


_SEEN_AGAIN = text("""
    WITH again AS (
        SELECT source, dedupe_key, count(*) AS times, max(receive_count) AS most
        FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS t (source text, dedupe_key text, receive_count integer)
        GROUP BY source, dedupe_key
    ), locked AS (
        SELECT m.source, m.dedupe_key, r.times, r.most FROM inbox_messages m JOIN again r USING (source, dedupe_key)
        WHERE m.customer_id = :customer_id ORDER BY m.source, m.dedupe_key FOR UPDATE OF m
    )
    UPDATE inbox_messages m SET receive_count = greatest(m.receive_count + r.times, r.most)
    FROM locked r
    WHERE m.customer_id = :customer_id AND m.source = r.source AND m.dedupe_key = r.dedupe_key
""")


async def count_again(conn: AsyncConnection, customer_id: UUID, rows: Sequence[Mapping[str, Any]]) -> None:
    """Count further deliveries of messages that are known."""
    if rows:
        await conn.execute(_SEEN_AGAIN, {"customer_id": customer_id, "rows": to_json(rows)})


# --- interruptions ----------------------------------------------------------------------------------------------


async def insert_history(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row per version of an interruption, in the transaction that made the version."""
    await insert_rows(conn, "interruption_history", rows, order="interruption_id, version")


# A message about many instances waits until none of them does any more. Its events carry its key, with the instance
# behind a "#" where they are many.
_RELEASE = text("""
    UPDATE inbox_messages m SET outcome = :outcome, reason = :reason,
        body = CASE WHEN :outcome = 'quarantined' THEN m.body END
    FROM spot_events e
    WHERE e.customer_id = :customer_id AND e.interruption_id = ANY(:interruption_ids)
      AND m.customer_id = e.customer_id AND m.source = e.source
      AND m.dedupe_key IN (e.dedupe_key, regexp_replace(e.dedupe_key, '#[^#]*$', ''))
      AND m.outcome = 'waiting'
      AND (:outcome <> 'handled' OR NOT EXISTS (
          SELECT FROM interruptions i JOIN spot_events other ON other.interruption_id = i.id
          WHERE i.customer_id = :customer_id AND i.state = 'unmatched' AND other.source = m.source
            AND m.dedupe_key IN (other.dedupe_key, regexp_replace(other.dedupe_key, '#[^#]*$', ''))))
""")


async def release_waiting(
    conn: AsyncConnection, customer_id: UUID, interruption_ids: Sequence[UUID], *, outcome: str, reason: str | None
) -> None:
    """Messages that waited for a node got one, each of its instances (``handled``), or one never did (``quarantined``,
    to be replayed)."""
    if interruption_ids:
        await conn.execute(
            _RELEASE,
            {
                "customer_id": customer_id,
                "interruption_ids": list(interruption_ids),
                "outcome": outcome,
                "reason": reason,
            },
        )


_SIGNALS = text("""
    SELECT interruption_id, event_type, occurred_at, received_at, payload FROM spot_events
    WHERE customer_id = :customer_id AND interruption_id = ANY(:interruption_ids)
    ORDER BY received_at, id
""")


async def signals_of(
    conn: AsyncConnection, customer_id: UUID, interruption_ids: Sequence[UUID]
) -> dict[UUID, list[Any]]:
    """All that was said about interruptions, in the order it came."""
    values = {"customer_id": customer_id, "interruption_ids": list(interruption_ids)}
    found: dict[UUID, list[Any]] = {}
    for row in await conn.execute(_SIGNALS, values):
        found.setdefault(row.interruption_id, []).append(row)
    return found


_UNMATCHED = text(f"""
    SELECT {_COLUMNS} FROM interruptions
    WHERE state = 'unmatched'
      AND (received_at < now() - make_interval(secs => :closes_after_seconds)
           OR EXISTS (SELECT FROM nodes n
                      WHERE n.instance_id = interruptions.instance_id AND n.customer_id = interruptions.customer_id))
    ORDER BY customer_id, id LIMIT :limit
""")
_LOCK_UNMATCHED = text(f"""
    SELECT {_COLUMNS} FROM interruptions WHERE id = ANY(:ids) AND state = 'unmatched'
    ORDER BY id FOR UPDATE SKIP LOCKED
""")


async def unmatched_to_settle(
    conn: AsyncConnection, *, closes_after_seconds: float, limit: int
) -> list[InterruptionRow]:
    """Unmatched interruptions whose node has registered by now, or whose time is over."""
    result = await conn.execute(_UNMATCHED, {"closes_after_seconds": closes_after_seconds, "limit": limit})
    return [InterruptionRow(**row._mapping) for row in result]


async def lock_unmatched(conn: AsyncConnection, ids: Sequence[UUID]) -> list[InterruptionRow]:
    """Those of the interruptions that are still unmatched and that nobody else is settling; locked."""
    result = await conn.execute(_LOCK_UNMATCHED, {"ids": list(ids)})
    return [InterruptionRow(**row._mapping) for row in result]


async def insert_outbox(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Events for the bus, told after the commit."""
    await insert_rows(conn, "outbox", rows, order="id")


_RECENT_QUARANTINE = text("""
    SELECT count(*) FROM inbox_messages
    WHERE customer_id = :customer_id AND outcome = 'quarantined' AND received_at > now() - interval '1 hour'
""")


async def quarantined_last_hour(conn: AsyncConnection, customer_id: UUID) -> int:
    """How many messages of a customer went to quarantine within the last hour."""
    return (await conn.execute(_RECENT_QUARANTINE, {"customer_id": customer_id})).scalar_one()


_ADD_PENALTIES = text("""
    INSERT INTO pool_standings AS p (customer_id, region, availability_zone, instance_type, penalty, updated_at,
                                     interruptions, refusals, rebalances, last_reason)
    SELECT customer_id, region, availability_zone, instance_type, least(:ceiling, penalty), now(), interruptions,
           refusals, rebalances, last_reason
    FROM jsonb_populate_recordset(CAST(NULL AS pool_standings), CAST(:rows AS jsonb))
    ORDER BY region, availability_zone, instance_type
    ON CONFLICT (customer_id, region, availability_zone, instance_type) DO UPDATE SET
        penalty = least(:ceiling, excluded.penalty + p.penalty
                        * power(0.5, extract(epoch FROM now() - p.updated_at) / :half_life_seconds)),
        updated_at = now(),
        interruptions = p.interruptions + excluded.interruptions,
        refusals = p.refusals + excluded.refusals,
        rebalances = p.rebalances + excluded.rebalances,
        last_reason = excluded.last_reason
""")


async def add_penalties(
    conn: AsyncConnection, rows: Sequence[Mapping[str, Any]], *, half_life_seconds: float, ceiling: float
) -> None:
    """Lower pools' standing; what was there before has decayed by its age."""
    if rows:
        await conn.execute(
            _ADD_PENALTIES, {"rows": to_json(rows), "half_life_seconds": half_life_seconds, "ceiling": ceiling}
        )
