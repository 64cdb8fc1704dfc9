"""Replay of messages in quarantine: read again with what is known by now, under the checks of their first reading.

Each message is a transaction of its own: what it means is done, written down and audited together, once, however often
it is asked for; and one that still cannot be taken in costs the others nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from control.agents.repository import cluster_region
from control.bus.bells import Bells
from control.errors import NotFound, Unavailable
from control.gateways.aws import AwsGateway
from control.interruptions import repository, views_repository
from control.interruptions.parsing import Drop, Outcome, ParsedEvent, Quarantine, from_agent, parse
from control.interruptions.repository import CustomerFacts
from control.interruptions.schemas import Replayed, ReplayedMany
from control.interruptions.service import (
    RETRIED_STATES,
    RETRIES,
    Batch,
    Ingested,
    Raced,
    Received,
    queue_owner,
)
from control.interruptions.taking import lies_in_the_content, sqlstate, unprocessable
from control.security import audit
from warehouse.contracts import AgentEvents, EventSource
from warehouse.postgres.session import Database

Key = tuple[UUID, str, str]


async def replay(db: Database, bells: Bells | None, aws: AwsGateway, actor: str, key: Key) -> Replayed:
    """Read one message again. One that was replayed with success before is not acted on again: its answer is told.

    Raises:
        NotFound: it is not in quarantine, and never was.
        Unavailable: other writers were first, again and again.
    """
    for attempt in range(RETRIES):
        try:
            async with db.tenant(key[0]) as conn:
                answer, done = await _replay(conn, db, aws, actor, key)
            await done.ring(bells)
            return answer
        except Raced:
            continue
        except DBAPIError as error:
            if sqlstate(error) not in RETRIED_STATES:
                raise
            await asyncio.sleep(0.01 * (attempt + 1))
    raise Unavailable("Others were writing about the same instance all the time; replay it again.")


async def replay_many(
    db: Database, bells: Bells | None, aws: AwsGateway, actor: str, customer_id: UUID, reason: str, limit: int
) -> ReplayedMany:
    """Read again what is in quarantine for one reason, those first that were not replayed yet, then the oldest."""
    async with db.tenant(customer_id) as conn:
        keys, total = await views_repository.quarantined_for(conn, customer_id, reason, limit)
    outcomes: Counter[str] = Counter()
    interruptions: list[UUID] = []
    for source, dedupe_key in keys:
        try:
            answer = await replay(db, bells, aws, actor, (customer_id, source, dedupe_key))
        except NotFound:
            # Off-boarded in the meantime.
            continue
        outcomes[answer.outcome] += 1
        interruptions += answer.interruptions
    return ReplayedMany(outcomes=dict(outcomes), interruptions=sorted(set(interruptions)), left=total - len(keys))


async def _replay(
    conn: AsyncConnection, db: Database, aws: AwsGateway, actor: str, key: Key
) -> tuple[Replayed, Ingested]:
    customer_id, source, dedupe_key = key
    now = db.now()
    facts = await repository.customer_facts(conn, customer_id)
    row = await views_repository.lock_message(conn, customer_id, source, dedupe_key)
    if facts is None or row is None or (row.outcome != "quarantined" and row.replayed_at is None):
        raise NotFound("message")
    if row.outcome != "quarantined":
        known = await views_repository.interruptions_of(conn, customer_id, source, dedupe_key)
        return Replayed(outcome=row.outcome, reason=row.reason, interruptions=known), Ingested()
    message = Received(
        row.body or "", EventSource(source), row.sqs_message_id, row.sent_at or row.received_at, row.receive_count
    )
    event_type: str | None = row.event_type
    state, reason, done = "quarantined", row.reason, Ingested()
    # A body that was not kept cannot be read.
    if row.body is not None:
        try:
            async with conn.begin_nested():
                message, outcome = await _read(conn, facts, aws, message, now)
                # The event keeps the key its message is stored under.
                outcome = replace(outcome, dedupe_key=dedupe_key)
                state, reason, done = await Batch(facts, now).replay(conn, message, outcome)
                event_type = outcome.kind.value if isinstance(outcome, ParsedEvent) else outcome.event_type
        except Raced:
            raise
        except Exception as error:
            if not lies_in_the_content(error) or sqlstate(error) in RETRIED_STATES:
                raise
            still = unprocessable(message, error)
            state, reason, done = "quarantined", f"{still.reason}: {still.detail}", Ingested()
    await views_repository.mark_replayed(
        conn, customer_id, source, dedupe_key, outcome=state, reason=reason, event_type=event_type
    )
    await audit.record(
        conn,
        customer_id=customer_id,
        actor=actor,
        action="quarantine.replayed",
        subject=f"{source}:{dedupe_key}",
        detail={"was": row.reason, "outcome": state, "reason": reason, "interruptions": done.interruptions},
    )
    return Replayed(outcome=state, reason=reason, interruptions=done.interruptions), done


async def _read(
    conn: AsyncConnection, facts: CustomerFacts, aws: AwsGateway, message: Received, now: datetime
) -> tuple[Received, Outcome]:
    """What a kept message means, for whom it spoke when it came: an agent for its cluster, a queue for its region.

    A notice keeps its age, so that what is old by now is judged by the cluster's state of now.
    """
    if message.source is EventSource.AGENT:
        return await _read_notice(conn, facts, message, now)
    region = ""
    if message.source is EventSource.SQS:
        region = _queue_region(aws, await views_repository.queue_url(conn, facts.customer_id))
    owner = queue_owner(facts, region)
    return message, parse(message.body, owner=owner, received_at=now, sent_at=message.sent_at)


async def _read_notice(
    conn: AsyncConnection, facts: CustomerFacts, message: Received, now: datetime
) -> tuple[Received, Outcome]:
    try:
        told = AgentEvents.model_validate_json(message.body)
        (event,) = told.events
    except ValueError:
        return message, Quarantine("unreadable_notice", "it is none that an agent sends today", "")
    region = await cluster_region(conn, told.cluster_id)
    if region is None:
        return message, Drop("cluster_deleted", "", event.event_type.value)
    return (
        replace(message, cluster_id=told.cluster_id),
        from_agent(event, region=region, account_id=facts.account_id, received_at=now),
    )


def _queue_region(aws: AwsGateway, url: str | None) -> str:
    try:
        return aws.queue(url).region if url else ""
    except ValueError:
        return ""
