"""Taking in what senders hand us themselves (events by HTTP, agents' notices), so that no message costs another.

A sender delivers until it is told 2xx, and everything of one body together. So a message that cannot be taken in must
be neither refused for ever nor hold up what came with it: it is set aside, in quarantine, with the reason. What says
nothing of the content (Postgres is away, busy, or fails on it) stays with its sender, who is told to come again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

import structlog
from pydantic import ValidationError
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError, StatementError

from control.bus.bells import Bells
from control.errors import Unavailable
from control.interruptions import metrics, repository
from control.interruptions.parsing import Outcome, Quarantine, body_digest, from_agent, parse
from control.interruptions.repository import CustomerFacts
from control.interruptions.service import Ingested, Received, UnknownCustomer, ingest_outcomes, queue_owner
from warehouse.contracts import AgentEvent, EventSource
from warehouse.postgres.session import Database

log = structlog.get_logger(__name__)

# A message that contradicts a constraint is set aside after this many tries: another writer may be why.
ALONE_TRIES = 3
PAUSE_SECONDS = 0.2
# program_limit_exceeded and its kin: psycopg calls them operational, but the row is too large and stays so.
_CONTENT_CLASS = "54"
# Postgres is there but cannot write, whatever it is given: full, starting, stopping, a standby.
AWAY_STATES = ("08", "25006", "53", "57P", "58")
# It may be over at the next try: a deadlock, a lock or statement that took too long.
_BUSY_STATES = ("40", "55P03", "57014")

Message = tuple[Received, Callable[[], Outcome]]


def sqlstate(error: Exception) -> str:
    """The SQLSTATE of an error, or nothing."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""


def lies_in_the_content(error: Exception) -> bool:
    """Whether trying the same messages again cannot help: their content is what our code or Postgres cannot take."""
    if isinstance(error, StatementError):
        return (
            not isinstance(error, DBAPIError)
            or isinstance(error, DataError | IntegrityError)
            or sqlstate(error).startswith(_CONTENT_CLASS)
        )
    return isinstance(error, RecursionError) or not isinstance(error, SQLAlchemyError | OSError | RuntimeError)


def cause_of(error: Exception) -> str:
    """How a reason names an error."""
    return type(error.orig if isinstance(error, DBAPIError) else error).__name__


def _concerns_everything(error: Exception) -> bool:
    """Whether no other message would fare better right now."""
    if isinstance(error, DBAPIError) and not lies_in_the_content(error):
        return not sqlstate(error) or sqlstate(error).startswith(AWAY_STATES + _BUSY_STATES)
    # The pool's own time-out, and sockets.
    return isinstance(error, OSError) or (isinstance(error, SQLAlchemyError) and not isinstance(error, StatementError))


async def set_aside(db: Database, facts: CustomerFacts, message: Received, error: Exception) -> Ingested:
    """Quarantine a message that could not be taken in, to be replayed when it can. A defect of ours, so an operator is
    alarmed.

    Raises:
        sqlalchemy.exc.DBAPIError: not even its body can be kept, or Postgres is away.
    """
    metrics.ALARMS.labels("unprocessable").inc()
    log.error("intake.unprocessable", source=message.source.value, message_id=message.sqs_message_id, exc_info=error)
    return await ingest_outcomes(db, facts, [(message, unprocessable(message, error))], now=db.now())


def unprocessable(message: Received, error: Exception) -> Quarantine:
    """What becomes of a message that cannot be taken in."""
    return Quarantine("unprocessable", f"{cause_of(error)} while it was taken in", body_digest(message.body))


async def take_in(
    db: Database, bells: Bells | None, facts: CustomerFacts, messages: Sequence[Message], *, now: datetime
) -> Ingested:
    """Commit what messages mean, and ring: together, and in halves of halves as far as one of them is what fails.

    Raises:
        Unavailable: some of them could not be taken in for a reason that may be over; all others were, and those that
            cannot be taken in at all were set aside.
    """
    done = Ingested()
    waiting = [messages] if messages else []
    failed: Exception | None = None
    while waiting:
        some = waiting.pop()
        try:
            done.add(await _together(db, facts, some, now))
        except Exception as error:
            if _concerns_everything(error):
                failed = error
                break
            if len(some) > 1:
                half = len(some) // 2
                waiting += [some[half:], some[:half]]
            elif lies_in_the_content(error):
                done.add(await set_aside(db, facts, some[0][0], error))
            else:
                failed = error
    await done.ring(bells)
    if failed is not None:
        log.warning(
            "intake.not_taken_in",
            customer_id=str(facts.customer_id),
            error=cause_of(failed),
            sqlstate=sqlstate(failed),
            messages=len(messages),
        )
        raise Unavailable("It could not be taken in right now; send it again, what was taken in is known.") from failed
    return done


async def _together(db: Database, facts: CustomerFacts, messages: Sequence[Message], now: datetime) -> Ingested:
    tries = 1 if len(messages) > 1 else ALONE_TRIES
    while True:
        tries -= 1
        try:
            outcomes = [(message, judge()) for message, judge in messages]
            return await ingest_outcomes(db, facts, outcomes, now=now)
        except IntegrityError:
            if not tries:
                raise
            await asyncio.sleep(PAUSE_SECONDS)


# --- by HTTP, from AWS


async def accept_pushed(db: Database, bells: Bells | None, facts: CustomerFacts, body: bytes) -> Ingested:
    """Take in one event from a customer's API destination, read like one from its queue.

    Raises:
        Unavailable: it must be delivered again.
    """
    message, now = Received(body, EventSource.PUSH), db.now()
    judge = partial(parse, body, owner=queue_owner(facts), received_at=now)
    return await take_in(db, bells, facts, [(message, judge)], now=now)


# --- from agents


async def accept_agent_events(
    db: Database,
    bells: Bells | None,
    *,
    customer_id: UUID,
    cluster_id: UUID,
    region: str,
    events: Sequence[Any],
) -> Ingested:
    """Take in what an agent saw on its nodes. The cluster is the key's; what is no event by the contract is set aside.

    Raises:
        UnknownCustomer: no customer has this id.
        Unavailable: some must be sent again.
    """
    async with db.tenant(customer_id) as conn:
        facts = await repository.customer_facts(conn, customer_id)
    if facts is None:
        raise UnknownCustomer(f"no customer {customer_id}")
    now = db.now()
    messages: list[Message] = []
    for event in events:
        message = Received(_body(cluster_id, event), EventSource.AGENT, cluster_id=cluster_id)
        judge: Callable[[], Outcome] = partial(_no_event, event, message)
        if isinstance(event, AgentEvent):
            judge = partial(from_agent, event, region=region, account_id=facts.account_id, received_at=now)
        messages.append((message, judge))
    return await take_in(db, bells, facts, messages, now=now)


def why_no_event(event: Any) -> str | None:
    """Why something is no event of an agent, by the contract and without what it holds; None for one that is."""
    if isinstance(event, AgentEvent):
        return None
    try:
        AgentEvent.model_validate(event)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return f"{'.'.join(str(part)[:60] for part in first['loc']) or 'event'}: {first['msg'][:300]}"
    return None


def _no_event(event: Any, message: Received) -> Quarantine:
    return Quarantine("unreadable_notice", why_no_event(event) or "", body_digest(message.body))


def _body(cluster_id: UUID, event: Any) -> str:
    """One event as its agent might have sent it. In ASCII, because a detail may hold what no encoding takes."""
    content = event.model_dump() if isinstance(event, AgentEvent) else event
    return json.dumps({"cluster_id": str(cluster_id), "events": [content]}, default=str)
