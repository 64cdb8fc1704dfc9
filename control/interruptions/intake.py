"""Reading customers' queues: one idle long poll each, more receivers while a queue is full, one commit at a time.

Every worker polls every queue. SQS shares messages out between consumers by itself, so nothing has to be leased, a
dead worker leaves no gap, and the price is 4,320 idle requests a queue and day and worker. Messages of one customer
that arrive together are committed together, large bodies apart from the others; otherwise a customer's commits never
overlap, so its batches do not meet on a row, and one customer's flood holds two connections.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from control.gateways.aws import (
    OWN_CREDENTIALS,
    RECEIVE_BATCH,
    THROTTLE_CODES,
    AwsError,
    QueueAddress,
    Role,
    SqsMessage,
)
from control.interruptions import answers, intake_repository, metrics
from control.interruptions.buffer import MAX_HELD_BYTES, Buffer, Held, Lane
from control.interruptions.runtime import Runtime
from control.interruptions.service import Facts, Received, UnknownCustomer, ingest
from control.interruptions.taking import ALONE_TRIES, AWAY_STATES, lies_in_the_content, set_aside, sqlstate
from warehouse.contracts import EventSource

log = structlog.get_logger(__name__)

# Customers added, changed or removed are noticed within this time.
CUSTOMERS_SECONDS = 5.0
# A queue that answers full gets more receivers, up to this many; each ends with its first empty answer.
MAX_RECEIVERS = 8
STORM_WAIT_SECONDS = 0
# Above this, one receiver is enough: bodies are large.
LARGE_RECEIVE_BYTES = MAX_HELD_BYTES // MAX_RECEIVERS
# Connections the worker reserves for the intake (control.worker).
COMMITS_AT_ONCE = 5
# A broken queue is asked again after 1 s, then later and later, at most every minute.
BACKOFF_SECONDS = (1.0, 60.0)
# What may be over by itself is told to the customer only after this long; a refusal at once. An idle long poll answers
# every 20 s, so a queue that said nothing for twice as long is not read, and is told of within the minute.
DEGRADED_AFTER_SECONDS = 40.0
HEALTHY_SECONDS = 30.0
# Leaving: a receive that finds messages answers at once, an idle long poll is cut off after this long. What SQS hands
# to a connection in the moment it is cut comes back only after its visibility timeout (C-01).
CUT_SECONDS = 1.0
# What was received is committed and deleted within this long, or given back (the worker has 3 s for all of it).
CLOSE_SECONDS = 1.5
GIVE_BACK_SECONDS = 0.4
# While Postgres is away: first success within 5 s of its return.
DATABASE_BACKOFF_SECONDS = (0.2, 2.0)
# A batch that fails this often while Postgres answers is taken in one by one: what is refused may be one message.
TOGETHER_TRIES = 5


@dataclass(frozen=True, slots=True)
class Source:
    """One customer's queue and the role it is read with."""

    customer_id: UUID
    queue_url: str
    role: Role


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong with a queue and how a person mends it; ``lasting``: it stays so until somebody does."""

    reason: str
    remedy: str
    lasting: bool = True


@dataclass(slots=True)
class Health:
    """What the last calls to a queue said. Receiving and deleting are judged apart: a role may lack either right."""

    heard_at: float
    receiving: Trouble | None = None
    deleting: Trouble | None = None
    answered: bool = False
    told: Trouble | None = None

    def trouble(self, now: float) -> Trouble | None:
        """What the customer should be told by now, or None."""
        silent_seconds = now - self.heard_at
        if self.receiving and (self.receiving.lasting or silent_seconds > DEGRADED_AFTER_SECONDS):
            return self.receiving
        if silent_seconds > DEGRADED_AFTER_SECONDS:
            return Trouble(
                f"ReceiveMessage: no answer for more than {DEGRADED_AFTER_SECONDS:.0f} s",
                "check that the server reaches AWS in the queue's region; it is tried again with growing pauses",
                lasting=False,
            )
        return self.deleting


class Intake:
    """All queues of one worker process."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.facts = Facts(runtime.intake_db)
        self.readers: dict[UUID, QueueReader] = {}
        # First come, first served between customers, each with one batch at most: waiting for the pool itself would
        # end in time-outs that send a customer back to the end of the line.
        self.turns = asyncio.Semaphore(COMMITS_AT_ONCE)
        self.held = Held()

    async def run(self, stop: asyncio.Event) -> None:
        """Read until ``stop`` is set; customers come and go meanwhile."""
        delay = DATABASE_BACKOFF_SECONDS[0]
        try:
            while not stop.is_set():
                try:
                    await self._follow_customers()
                    delay = DATABASE_BACKOFF_SECONDS[0]
                    pause = CUSTOMERS_SECONDS
                except Exception as error:
                    metrics.LOOP_FAILURES.labels("customers", type(error).__name__).inc()
                    expected = isinstance(error, SQLAlchemyError | OSError)
                    log.warning("intake.database_away", error=type(error).__name__, exc_info=not expected)
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
        leaving = {
            customer_id: reader
            for customer_id, reader in self.readers.items()
            if wanted.get(customer_id) != reader.source
        }
        for customer_id in leaving:
            del self.readers[customer_id]
        try:
            self._start_readers({id: source for id, source in wanted.items() if id not in leaving})
            await self._tell()
        finally:
            # Each may take seconds; nobody else waits for them.
            await asyncio.gather(*(reader.close() for reader in leaving.values()))
        # A customer's new reader only now: its commits never overlap.
        self._start_readers(wanted)

    def _start_readers(self, wanted: dict[UUID, Source]) -> None:
        for customer_id, source in wanted.items():
            if customer_id not in self.readers:
                self.readers[customer_id] = QueueReader(self.runtime, self.facts, source, self.turns, self.held)

    async def _tell(self) -> None:
        """Write down which queues work and which do not, whatever their readers are waiting for."""
        now = time.monotonic()
        troubles = {reader: reader.trouble(now) for reader in self.readers.values()}
        degraded = sum(trouble is not None for trouble in troubles.values())
        metrics.QUEUES.labels("ok").set(len(troubles) - degraded)
        metrics.QUEUES.labels("degraded").set(degraded)
        metrics.RECEIVERS.set(sum(reader.receivers for reader in self.readers.values()))
        for reader, trouble in troubles.items():
            if trouble is not None:
                await reader.tell(trouble)
        well = [
            reader
            for reader, trouble in troubles.items()
            if trouble is None
            and reader.health.answered
            and (reader.health.told is not None or now - reader.written > HEALTHY_SECONDS)
        ]
        if not well:
            return
        async with self.runtime.db.system() as conn:
            ids = [reader.source.customer_id for reader in well]
            await intake_repository.mark_healthy(conn, ids, detector="sqs")
        for reader in well:
            if reader.health.told is not None:
                log.info("intake.recovered", customer_id=str(reader.source.customer_id))
            reader.written, reader.health.told = now, None


class QueueReader:
    """One customer's queue: its receivers, its buffer and its commits."""

    def __init__(
        self, runtime: Runtime, facts: Facts, source: Source, turns: asyncio.Semaphore, held_of_all: Held
    ) -> None:
        self.runtime, self.facts, self.source, self.turns = runtime, facts, source, turns
        self.buffer = Buffer(held_of_all)
        self.health = Health(heard_at=time.monotonic())
        self.written = 0.0
        self.receivers = 0
        self._queue: QueueAddress | None = None
        self._closing = False
        # Whether the last commit failed because Postgres was away, and since when it refuses what it is given.
        self._away = False
        self._refused_since: float | None = None
        self._receiving: set[asyncio.Task[None]] = set()
        self._finishing: set[asyncio.Task[None]] = set()
        self._start(self._poll(), self._receiving)
        for lane in self.buffer.lanes:
            self._start(self._commit(lane), self._finishing)

    def _start(self, work: Coroutine[Any, Any, None], group: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work, name=f"queue {self.source.customer_id}")
        group.add(task)
        task.add_done_callback(group.discard)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """None of the tasks ends with an error of its own will: an operator is told of one that does."""
        if not task.cancelled() and (error := task.exception()) is not None:
            metrics.LOOP_FAILURES.labels("intake", type(error).__name__).inc()
            log.error("intake.task_ended", customer_id=str(self.source.customer_id), exc_info=error)

    async def close(self) -> None:
        """Receive no more, commit and delete what was received, and give back what could not be: others get it at
        once, not after its visibility timeout."""
        self._closing = True
        await _end(self._receiving, CUT_SECONDS)
        # Wakes the takers, which leave when nothing is left.
        for lane in self.buffer.lanes:
            lane.filled.set()
        await _end(self._finishing, CLOSE_SECONDS)
        await self._give_back(self.buffer.empty())

    async def _give_back(self, messages: list[SqsMessage]) -> None:
        if not messages or self._queue is None:
            return
        handles = [message.receipt_handle for message in messages]
        try:
            async with asyncio.timeout(GIVE_BACK_SECONDS):
                credentials = await self.runtime.aws.assume(self.source.role)
                for start in range(0, len(handles), RECEIVE_BATCH):
                    await self.runtime.aws.give_back(
                        self._queue, handles[start : start + RECEIVE_BATCH], credentials=credentials
                    )
        except Exception as error:
            # They come back by themselves when their visibility timeout is over.
            log.info("intake.not_given_back", customer_id=str(self.source.customer_id), error=str(error)[:200])

    # --- receiving

    async def _poll(self) -> None:
        """The one receiver that is always there."""
        self.receivers += 1
        delay = BACKOFF_SECONDS[0]
        while not self._closing:
            try:
                await self.buffer.room()
                full = await self._receive(long=True)
                delay = BACKOFF_SECONDS[0]
                self.health.receiving, self.health.answered = None, True
                while full and self.receivers < MAX_RECEIVERS and not self._closing:
                    self.receivers += 1
                    self._start(self._help(), self._receiving)
            except Exception as error:
                # Whatever it is: the queue is asked again, later and later.
                await self._failed(error)
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(delay * 2, BACKOFF_SECONDS[1])

    async def _help(self) -> None:
        """A receiver for a storm; ends when the queue is not full any more, or when anything fails."""
        try:
            while not self._closing and await self._receive(long=False):
                await self.buffer.room()
        except Exception as error:
            log.info("intake.helper_ended", customer_id=str(self.source.customer_id), error=str(error)[:200])
        finally:
            self.receivers -= 1

    async def _receive(self, *, long: bool) -> bool:
        """Whether the queue has more, and more receivers may ask for it."""
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
        self.health.heard_at = time.monotonic()
        size = self.buffer.add(messages)
        return len(messages) == RECEIVE_BATCH and size < LARGE_RECEIVE_BYTES

    # --- committing

    async def _commit(self, lane: Lane) -> None:
        while lane.waiting or not self._closing:
            await lane.filled.wait()
            if lane is self.buffer.large and not self._closing:
                await self.buffer.quiet()
            batch = lane.next_batch()
            if not batch:
                continue
            try:
                await self._take_in_somehow(batch)
            except UnknownCustomer:
                return
            self.buffer.taken_in(lane)

    async def _take_in_somehow(self, batch: list[SqsMessage]) -> None:
        """Together; one by one when the content of one of them is, or may be, what fails.

        Raises:
            UnknownCustomer: there is nobody to take them in for.
        """
        delay, refused = DATABASE_BACKOFF_SECONDS[0], 0
        while True:
            try:
                await self._take_in(batch)
                return
            except UnknownCustomer:
                raise
            except Exception as error:
                if not lies_in_the_content(error):
                    # Nothing was taken in; the messages are still in the queue, but trying again is faster.
                    metrics.LOOP_FAILURES.labels("intake", type(error).__name__).inc()
                    refused += await self._refuses(error, len(batch))
                    if refused < TOGETHER_TRIES:
                        await asyncio.sleep(delay)
                        delay = min(delay * 2, DATABASE_BACKOFF_SECONDS[1])
                        continue
            await self._take_in_one_by_one(batch)
            return

    async def _refuses(self, error: Exception, messages: int) -> bool:
        """Whether Postgres answers and yet takes nothing in; otherwise it is away, and comes back by itself."""
        self._away = sqlstate(error).startswith(AWAY_STATES) or not await self._database_answers()
        log.warning(
            "intake.commit_failed",
            customer_id=str(self.source.customer_id),
            error=type(error).__name__,
            sqlstate=sqlstate(error),
            messages=messages,
            database="away" if self._away else "answers",
        )
        if not self._away and self._refused_since is None:
            self._refused_since = time.monotonic()
        return not self._away

    async def _database_answers(self) -> bool:
        try:
            # Taking a role is a statement of its own.
            async with self.turns, self.runtime.intake_db.system():
                return True
        except Exception:
            return False

    async def _take_in(self, batch: list[SqsMessage]) -> None:
        assert self._queue is not None
        async with self.turns:
            facts = await self.facts.of(self.source.customer_id)
            done = await ingest(
                self.runtime.intake_db,
                facts,
                [
                    Received(message.body, EventSource.SQS, message.message_id, message.sent_at, message.receive_count)
                    for message in batch
                ],
                queue_region=self._queue.region,
            )
        self._away, self._refused_since = False, None
        # Only now, after the commit; and the next batch waits for neither AWS nor Redis.
        self._start(self._delete([message.receipt_handle for message in batch]), self._finishing)
        self._start(done.ring(self.runtime.bells), self._finishing)

    async def _take_in_one_by_one(self, batch: list[SqsMessage]) -> None:
        """One of them cannot be taken in, whatever is tried: it is set aside, and its neighbours go on."""
        for message in batch:
            for attempt in range(ALONE_TRIES):
                try:
                    await self._take_in([message])
                    break
                except UnknownCustomer:
                    raise
                except Exception as error:
                    if not lies_in_the_content(error):
                        # It comes again, and is taken apart again.
                        await self._refuses(error, 1)
                        break
                    if not isinstance(error, IntegrityError) or attempt == ALONE_TRIES - 1:
                        await self._set_aside(message, error)
                        break
                    # Another writer may be why.
                    await asyncio.sleep(DATABASE_BACKOFF_SECONDS[0])

    async def _set_aside(self, message: SqsMessage, error: Exception) -> None:
        """To quarantine, to be replayed when it can be taken in."""
        received = Received(message.body, EventSource.SQS, message.message_id, message.sent_at, message.receive_count)
        try:
            await set_aside(self.runtime.intake_db, await self.facts.of(self.source.customer_id), received, error)
        except Exception as failure:
            # Not even that: it stays in the queue, for its dead letters.
            await self._refuses(failure, 1)
            return
        self._away, self._refused_since = False, None
        self._start(self._delete([message.receipt_handle]), self._finishing)

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
            self.health.deleting = None
        except Exception as error:
            undeleted = [error.code if isinstance(error, AwsError) else type(error).__name__]
            # Only the right to delete has to be mended by a person.
            if isinstance(error, AwsError) and (trouble := explain(error)).lasting:
                self.health.deleting = trouble
        if undeleted:
            # They come again and are recognised.
            metrics.UNDELETED.inc(len(undeleted))
            log.warning("intake.not_deleted", customer_id=str(self.source.customer_id), codes=sorted(set(undeleted)))

    # --- health

    def trouble(self, now: float) -> Trouble | None:
        """What is wrong with this queue, or None. While our own database keeps us from reading, AWS is not to blame."""
        if self.buffer.full and self._away:
            self.health.heard_at = now
        stuck_since = self._refused_since
        if stuck_since is None and self.buffer.full:
            stuck_since = self.health.heard_at
        if not self._away and stuck_since is not None and now - stuck_since > DEGRADED_AFTER_SECONDS:
            return Trouble(
                f"messages were received but could not be taken in for more than {DEGRADED_AFTER_SECONDS:.0f} s",
                "the worker's log says why (intake.commit_failed); they stay in the queue and are tried again",
                lasting=False,
            )
        return self.health.trouble(now)

    async def _failed(self, error: Exception) -> None:
        if not isinstance(error, AwsError | ValueError):
            metrics.LOOP_FAILURES.labels("poll", type(error).__name__).inc()
            log.warning("intake.poll_failed", customer_id=str(self.source.customer_id), exc_info=error)
        elif isinstance(error, AwsError) and error.operation == OWN_CREDENTIALS:
            log.warning("intake.own_credentials", error=repr(error.__cause__)[:500])
        self.health.receiving = explain(error)
        trouble = self.health.trouble(time.monotonic())
        if trouble is not None:
            await self.tell(trouble)

    async def tell(self, trouble: Trouble) -> None:
        """Mark the customer degraded, once per reason."""
        if self.health.told is not None and self.health.told.reason == trouble.reason:
            return
        log.warning("intake.degraded", customer_id=str(self.source.customer_id), reason=trouble.reason)
        try:
            async with self.runtime.db.system() as conn:
                await intake_repository.mark_degraded(
                    conn, self.source.customer_id, detector="sqs", reason=trouble.reason, remedy=trouble.remedy
                )
            self.health.told = trouble
        except Exception as away:
            log.warning("intake.health_not_written", error=type(away).__name__)


def explain(error: Exception) -> Trouble:
    """What is wrong with a queue, how to mend it, and whether it will stay so until somebody does."""
    if isinstance(error, ValueError):
        return Trouble(str(error), "correct the customer's sqs_queue_url")
    if not isinstance(error, AwsError):
        return Trouble(
            f"the server failed to read the queue: {type(error).__name__}",
            "the worker's log says why (intake.poll_failed); it is tried again with growing pauses",
            lasting=False,
        )
    reason = f"{error.operation}: {error.code}: {error.message}"[:500]
    code = error.code
    if code == "NoCredentials":
        return Trouble(reason, "give the server AWS credentials of its own and restart it")
    if error.operation == OWN_CREDENTIALS:
        return Trouble(
            reason,
            "check the server's profile, sign-in, or instance or task role; the worker's log says what failed "
            "(intake.own_credentials), and it is tried again with growing pauses",
            lasting=False,
        )
    if error.operation == "AssumeRole" and code in answers.DENIED_CODES:
        return Trouble(
            reason,
            "let the role's trust policy name this server's account and the customer's external id "
            "(POST /api/v1/customers/{id}/verify shows both)",
        )
    if "NonExistentQueue" in code or code == "QueueDoesNotExist":
        return Trouble(reason, "create the queue in that account and region, or correct the customer's sqs_queue_url")
    if code.startswith("KMS"):
        return Trouble(reason, "let the role use kms:Decrypt on the key the queue is encrypted with")
    if code in ("InvalidClientTokenId", "UnrecognizedClientException", "OptInRequired"):
        return Trouble(
            reason, "enable the queue's region in the customer's account, or correct the customer's sqs_queue_url"
        )
    if code in answers.DENIED_CODES:
        return Trouble(
            reason,
            "let the role use sqs:ReceiveMessage and sqs:DeleteMessage on the queue; check the queue's own policy too",
        )
    if code in ("UnknownRegion", "InvalidAddress", "InvalidSecurity"):
        return Trouble(reason, "correct the region in the customer's sqs_queue_url")
    if code in THROTTLE_CODES:
        return Trouble(reason, "AWS throttles the account; it is tried again with growing pauses", lasting=False)
    return Trouble(reason, "AWS cannot be reached or fails; it is tried again with growing pauses", lasting=False)


async def _end(tasks: set[asyncio.Task[None]], seconds: float) -> None:
    """Let tasks end, and those they start; cancel what is left after ``seconds``."""
    ends = time.monotonic() + seconds
    while tasks and (left := ends - time.monotonic()) > 0:
        await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        # Done callbacks take the tasks out of the group.
        await asyncio.sleep(0)
    # An answer that is here already is read before anybody is cut off, however busy the loop was.
    for _ in range(5):
        await asyncio.sleep(0)
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _sleep(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
