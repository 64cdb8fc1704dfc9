"""Reading customers' queues: one idle long poll each, more receivers while a queue is full, one commit at a time each.

Every worker polls every queue. SQS shares messages out between consumers by itself, so nothing has to be leased, a
dead worker leaves no gap, and the price is 4,320 idle requests a queue and day and worker. Messages of one customer
that arrive together are committed together; a customer's commits never overlap, so its batches cannot deadlock, and
one customer's flood holds one connection.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError

from control.gateways.aws import RECEIVE_BATCH, AwsError, QueueAddress, Role, SqsMessage
from control.interruptions import answers, intake_repository, metrics
from control.interruptions.runtime import Runtime
from control.interruptions.service import Facts, Received, UnknownCustomer, ingest
from warehouse.contracts import EventSource

log = structlog.get_logger(__name__)

# Customers added, changed or removed are noticed within this time.
CUSTOMERS_SECONDS = 5.0
# A queue that answers full gets more receivers, up to this many; each ends with its first empty answer.
MAX_RECEIVERS = 8
STORM_WAIT_SECONDS = 0
# What is received must be committed well within the visibility timeout of 20 s.
MAX_BUFFERED = 400
COMMIT_LIMIT = 200
# A broken queue is asked again after 1 s, then later and later, at most every minute.
BACKOFF_SECONDS = (1.0, 60.0)
# What may be over by itself is told to the customer only after this long; a refusal at once.
DEGRADED_AFTER_SECONDS = 30.0
HEALTHY_SECONDS = 30.0
# While Postgres is away: first success within 5 s of its return.
DATABASE_BACKOFF_SECONDS = (0.2, 2.0)


@dataclass(frozen=True, slots=True)
class Source:
    """One customer's queue and the role it is read with."""

    customer_id: UUID
    queue_url: str
    role: Role


@dataclass(slots=True)
class Health:
    """What the last calls to a queue said."""

    ok: bool = True
    failing_since: float | None = None
    told: str | None = None
    last_ok: float = 0.0


class Intake:
    """All queues of one worker process."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.facts = Facts(runtime.intake_db)
        self.readers: dict[UUID, QueueReader] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Read until ``stop`` is set; customers come and go meanwhile."""
        delay = DATABASE_BACKOFF_SECONDS[0]
        try:
            while not stop.is_set():
                try:
                    await self._follow_customers()
                    delay = DATABASE_BACKOFF_SECONDS[0]
                    pause = CUSTOMERS_SECONDS
                except (SQLAlchemyError, OSError) as error:
                    metrics.LOOP_FAILURES.labels("customers", type(error).__name__).inc()
                    log.warning("intake.database_away", error=type(error).__name__)
                    pause, delay = delay, min(delay * 2, DATABASE_BACKOFF_SECONDS[1])
                await _sleep(stop, pause)
        finally:
            await asyncio.gather(*(reader.close() for reader in self.readers.values()))
            self.readers.clear()

    async def _follow_customers(self) -> None:
        async with self.runtime.db.system() as conn:
            wanted = {
                row.id: Source(row.id, row.sqs_queue_url, Role(row.id, row.aws_role_arn, row.external_id))
                for row in await intake_repository.sources(conn)
            }
        for customer_id, reader in list(self.readers.items()):
            if wanted.get(customer_id) != reader.source:
                del self.readers[customer_id]
                await reader.close()
        for customer_id, source in wanted.items():
            if customer_id not in self.readers:
                self.readers[customer_id] = QueueReader(self.runtime, self.facts, source)
        states = [reader.health.ok for reader in self.readers.values()]
        metrics.QUEUES.labels("ok").set(sum(states))
        metrics.QUEUES.labels("degraded").set(len(states) - sum(states))
        metrics.RECEIVERS.set(sum(reader.receivers for reader in self.readers.values()))
        await self._write_healthy()

    async def _write_healthy(self) -> None:
        due = [
            reader
            for reader in self.readers.values()
            if reader.health.ok and reader.health.last_ok and time.monotonic() - reader.written > HEALTHY_SECONDS
        ]
        if not due:
            return
        async with self.runtime.db.system() as conn:
            ids = [reader.source.customer_id for reader in due]
            await intake_repository.mark_healthy(conn, ids, detector="sqs")
        for reader in due:
            reader.written = time.monotonic()


class QueueReader:
    """One customer's queue: its receivers, its buffer and its commits."""

    def __init__(self, runtime: Runtime, facts: Facts, source: Source) -> None:
        self.runtime, self.facts, self.source = runtime, facts, source
        self.health = Health()
        self.written = 0.0
        self.receivers = 0
        self._queue: QueueAddress | None = None
        self._buffer: deque[SqsMessage] = deque()
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._start(self._poll())
        self._start(self._commit())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"queue {self.source.customer_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop at once. What was received and not committed comes back after its visibility timeout."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- receiving

    async def _poll(self) -> None:
        """The one receiver that is always there."""
        self.receivers += 1
        delay = BACKOFF_SECONDS[0]
        while True:
            try:
                await self._room.wait()
                full = await self._receive(long=True)
                delay = BACKOFF_SECONDS[0]
                await self._is_ok()
                while full and self.receivers < MAX_RECEIVERS:
                    self.receivers += 1
                    self._start(self._help())
            except (AwsError, ValueError) as error:
                await self._failed(error)
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(delay * 2, BACKOFF_SECONDS[1])

    async def _help(self) -> None:
        """A receiver for a storm; ends when the queue is not full any more, or when anything fails."""
        try:
            while await self._receive(long=False):
                await self._room.wait()
        except (AwsError, ValueError) as error:
            log.info("intake.helper_ended", customer_id=str(self.source.customer_id), error=str(error)[:200])
        finally:
            self.receivers -= 1

    async def _receive(self, *, long: bool) -> bool:
        if self._queue is None:
            self._queue = self.runtime.aws.queue(self.source.queue_url)
        credentials = await self.runtime.aws.assume(self.source.role)
        try:
            if long:
                messages = await self.runtime.aws.receive(self._queue, credentials=credentials)
            else:
                messages = await self.runtime.aws.receive(
                    self._queue, credentials=credentials, wait_seconds=STORM_WAIT_SECONDS
                )
        except AwsError as error:
            if error.code in answers.EXPIRED_CODES | {"InvalidClientTokenId", "AccessDenied", "AccessDeniedException"}:
                self.runtime.aws.forget(self.source.role)
            raise
        if messages:
            self._buffer.extend(messages)
            self._filled.set()
            if len(self._buffer) >= MAX_BUFFERED:
                self._room.clear()
        return len(messages) == RECEIVE_BATCH

    # --- committing

    async def _commit(self) -> None:
        delay = DATABASE_BACKOFF_SECONDS[0]
        while True:
            await self._filled.wait()
            batch = [self._buffer.popleft() for _ in range(min(len(self._buffer), COMMIT_LIMIT))]
            if not self._buffer:
                self._filled.clear()
            while True:
                try:
                    await self._take_in(batch)
                    delay = DATABASE_BACKOFF_SECONDS[0]
                    break
                except UnknownCustomer:
                    return
                except (SQLAlchemyError, OSError, RuntimeError) as error:
                    # Nothing was taken in; the messages are still in the queue, but trying again is faster.
                    metrics.LOOP_FAILURES.labels("intake", type(error).__name__).inc()
                    log.warning("intake.commit_failed", error=type(error).__name__, messages=len(batch))
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, DATABASE_BACKOFF_SECONDS[1])
            if len(self._buffer) < MAX_BUFFERED:
                self._room.set()

    async def _take_in(self, batch: list[SqsMessage]) -> None:
        assert self._queue is not None
        facts = await self.facts.of(self.source.customer_id)
        done = await ingest(
            self.runtime.intake_db,
            facts,
            [
                Received(message.body, EventSource.SQS, message.message_id, message.sent_at, message.receive_count)
                for message in batch
            ],
            queue_regions=(self._queue.region,),
        )
        # Only now, after the commit.
        self._start(self._delete([message.receipt_handle for message in batch]))
        await done.ring(self.runtime.bells)

    async def _delete(self, handles: list[str]) -> None:
        assert self._queue is not None
        try:
            credentials = await self.runtime.aws.assume(self.source.role)
            failed = await asyncio.gather(
                *(
                    self.runtime.aws.delete(
                        self._queue, handles[start : start + RECEIVE_BATCH], credentials=credentials
                    )
                    for start in range(0, len(handles), RECEIVE_BATCH)
                )
            )
            undeleted = [code for codes in failed for code in codes]
        except AwsError as error:
            undeleted = [error.code]
        if undeleted:
            # They come again and are recognised; only the right to delete has to be mended by a person.
            metrics.UNDELETED.inc(len(undeleted))
            log.warning("intake.not_deleted", customer_id=str(self.source.customer_id), codes=sorted(set(undeleted)))

    # --- health

    async def _is_ok(self) -> None:
        self.health.last_ok = time.monotonic()
        if not self.health.ok:
            log.info("intake.recovered", customer_id=str(self.source.customer_id))
            self.written = 0.0
        self.health.ok, self.health.failing_since, self.health.told = True, None, None

    async def _failed(self, error: AwsError | ValueError) -> None:
        now = time.monotonic()
        self.health.failing_since = self.health.failing_since or now
        reason, remedy, lasting = explain(error)
        if not lasting and now - self.health.failing_since < DEGRADED_AFTER_SECONDS:
            return
        self.health.ok = False
        if self.health.told == reason:
            return
        log.warning("intake.degraded", customer_id=str(self.source.customer_id), reason=reason)
        try:
            async with self.runtime.db.system() as conn:
                await intake_repository.mark_degraded(
                    conn, self.source.customer_id, detector="sqs", reason=reason, remedy=remedy
                )
            self.health.told = reason
        except (SQLAlchemyError, OSError) as trouble:
            log.warning("intake.health_not_written", error=type(trouble).__name__)


def explain(error: AwsError | ValueError) -> tuple[str, str, bool]:
    """What is wrong with a queue, how to mend it, and whether it will stay so until somebody does."""
    if isinstance(error, ValueError):
        return str(error), "correct the customer's sqs_queue_url", True
    reason = f"{error.operation}: {error.code}: {error.message}"[:500]
    code = error.code
    if code == "NoCredentials":
        return reason, "give the server AWS credentials of its own and restart it", True
    if error.operation == "AssumeRole" and code in answers.DENIED_CODES:
        return (
            reason,
            "let the role's trust policy name this server's account and the customer's external id "
            "(POST /api/v1/customers/{id}/verify shows both)",
            True,
        )
    if "NonExistentQueue" in code or code == "QueueDoesNotExist":
        return reason, "create the queue in that account and region, or correct the customer's sqs_queue_url", True
    if code.startswith("KMS"):
        return reason, "let the role use kms:Decrypt on the key the queue is encrypted with", True
    if code in answers.DENIED_CODES:
        return (
            reason,
            "let the role use sqs:ReceiveMessage and sqs:DeleteMessage on the queue; check the queue's own policy too",
            True,
        )
    if code in ("UnknownRegion", "InvalidAddress", "InvalidSecurity"):
        return reason, "correct the region in the customer's sqs_queue_url", True
    if code in answers.THROTTLE_CODES:
        return reason, "AWS throttles the account; it is tried again with growing pauses", False
    return reason, "AWS cannot be reached or fails; it is tried again with growing pauses", False


async def _sleep(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
