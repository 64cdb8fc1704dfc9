"""What happens to events: one transaction per receive batch, whatever brought them.

SQS, the push endpoint, agents and the poll of instance states all end in ``ingest_outcomes``. The message may be
deleted, and bells rung, only after it returned.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError

from control.interruptions import metrics, repository
from control.interruptions.batch import Batch
from control.interruptions.drafts import Raced
from control.interruptions.messages import Ingested, Received
from control.interruptions.parsing import (
    Outcome,
    QueueOwner,
    parse,
)
from control.interruptions.repository import CustomerFacts
from warehouse.postgres.session import Database

log = structlog.get_logger(__name__)

FACTS_SECONDS = 5.0
# Characters parsed without a pause: a customer's large bodies must not hold up the others of this process.
PARSED_AT_ONCE = 256 * 1024
# Two batches may still meet on one row; Postgres picks the victim, which starts again. A cluster that was deleted since
# it was read shows as a foreign key violation, a key that another writer gave away as a unique violation.
RETRIES = 5
RETRIED_STATES = {"40001", "40P01", "23503", "23505"}


class UnknownCustomer(LookupError):
    """No customer has this id."""


class Facts:
    """Customers' facts, read again every five seconds."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._known: dict[UUID, tuple[float, CustomerFacts]] = {}

    async def of(self, customer_id: UUID) -> CustomerFacts:
        """Facts of one customer.

        Raises:
            UnknownCustomer: there is no such customer.
        """
        known = self._known.get(customer_id)
        if known and time.monotonic() - known[0] < FACTS_SECONDS:
            return known[1]
        async with self._db.tenant(customer_id) as conn:
            facts = await repository.customer_facts(conn, customer_id)
        if facts is None:
            raise UnknownCustomer(f"no customer {customer_id}")
        self._known[customer_id] = (time.monotonic(), facts)
        return facts


async def ingest(
    db: Database,
    facts: CustomerFacts,
    messages: Sequence[Received],
    *,
    queue_region: str = "",
    now: datetime | None = None,
) -> Ingested:
    """Take a batch of raw messages of one customer in: parsed, judged and committed in one transaction.

    Args:
        facts: the customer the queue belongs to; never taken from the body.
        queue_region: where the queue is; events may come from there besides the regions of the customer's clusters.
    """
    now = now or db.now()
    owner = queue_owner(facts, queue_region)
    outcomes: list[tuple[Received, Outcome]] = []
    parsed = 0
    for message in messages:
        outcomes.append((message, parse(message.body, owner=owner, received_at=now, sent_at=message.sent_at)))
        parsed += len(message.body)
        if parsed > PARSED_AT_ONCE:
            parsed = 0
            await asyncio.sleep(0)
    return await ingest_outcomes(db, facts, outcomes, now=now)


def queue_owner(facts: CustomerFacts, queue_region: str = "") -> QueueOwner:
    """Whose message it is, before its body is read. A customer without clusters may be told of any region."""
    regions = facts.regions | {queue_region} if facts.regions and queue_region else facts.regions
    return QueueOwner(facts.account_id, regions, queue_region)


async def ingest_outcomes(
    db: Database, facts: CustomerFacts, outcomes: Sequence[tuple[Received, Outcome]], *, now: datetime
) -> Ingested:
    """Commit what messages mean. Safe to call again with the same messages, from any number of processes.

    Raises:
        sqlalchemy.exc.DBAPIError: Postgres is away; nothing was taken in and the messages must stay where they are.
    """
    if not outcomes:
        return Ingested()
    started = time.perf_counter()
    for attempt in range(RETRIES):
        try:
            async with db.tenant(facts.customer_id) as conn:
                batch = Batch(facts, now)
                done = await batch.commit(conn, outcomes)
            break
        except Raced:
            continue
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) not in RETRIED_STATES or attempt == RETRIES - 1:
                raise
            await asyncio.sleep(0.01 * (attempt + 1))
    else:
        raise RuntimeError(f"a batch met other writers {RETRIES} times; it stays in its queue")
    metrics.COMMIT_SECONDS.observe(time.perf_counter() - started)
    batch.observe()
    return done
