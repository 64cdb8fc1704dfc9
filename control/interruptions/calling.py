"""Frozen RunInstances calls: sent, repeated with the same token, and their answers recorded.

What an answer means is decided by ``answers`` and ``states``; this module sends, applies and commits.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from control.gateways.aws import AwsError, Credentials, Role
from control.interruptions import answers, launch_repository, metrics, pools, repository, wanted_repository
from control.interruptions.accounts import Accounts
from control.interruptions.answers import Meaning, Reading
from control.interruptions.launch_repository import BatchRow, ClusterFacts
from control.interruptions.moving import Moves, intent_of
from control.interruptions.runtime import Runtime
from control.interruptions.states import (
    Abandoned,
    Denied,
    InstanceEnded,
    Launched,
    LaunchEvent,
    Mismatched,
    Refused,
    Unanswered,
    Withdrawn,
)
from control.interruptions.templates import is_alive

log = structlog.get_logger(__name__)

# The same token again after this long (RELIABILITY §2.5), and never after ``REPEATED_FOR``.
RETRY_SECONDS = 20.0
THROTTLED_SECONDS = (1.0, 3.0)
# What Describe does not show this long after the call does not exist; before, it may only not be visible yet (C-10).
SHOWN_AFTER = timedelta(minutes=5)


@asynccontextmanager
async def heartbeat(runtime: Runtime, keep: Callable[[AsyncConnection], Awaitable[bool]]) -> AsyncIterator[None]:
    """Keep leases alive until the block ends: slow work is not dead work."""
    task = asyncio.create_task(_beat(runtime, keep), name="heartbeat")
    try:
        yield
    finally:
        task.cancel()


async def _beat(runtime: Runtime, keep: Callable[[AsyncConnection], Awaitable[bool]]) -> None:
    while True:
        await asyncio.sleep(launch_repository.HEARTBEAT_SECONDS)
        try:
            async with runtime.db.system() as conn:
                if not await keep(conn):
                    return
        except (SQLAlchemyError, OSError) as error:
            log.warning("launch.heartbeat_failed", error=type(error).__name__)


class Calls:
    """The calls of one worker process; those under way are in ``under_way``."""

    def __init__(self, runtime: Runtime, accounts: Accounts) -> None:
        self.runtime, self.accounts = runtime, accounts
        self.under_way: set[asyncio.Task[None]] = set()

    def call_soon(self, batch: BatchRow, cluster: ClusterFacts) -> None:
        """Make a committed call in the background; a crash leaves it to the launch reconciler."""
        self.in_background(self.call(batch, cluster), f"launch {batch.id}")

    def in_background(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Do something about one batch without waiting for it; what fails is told and harms no other."""
        task = asyncio.create_task(self._guarded(work, name), name=name)
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)
        return task

    async def _guarded(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except Exception as error:
            # The batch keeps its lease and is repeated with the same token when it ends.
            metrics.LOOP_FAILURES.labels("launch_call", type(error).__name__).inc()
            log.warning("launch.call_interrupted", call=name, error=str(error)[:300])

    def holding(self, batch: BatchRow) -> AbstractAsyncContextManager[None]:
        """Keep a claimed batch for as long as the block takes."""
        return heartbeat(self.runtime, partial(launch_repository.keep_batch, batch=batch))

    async def call(self, batch: BatchRow, cluster: ClusterFacts) -> None:
        """Send a frozen request, once, and record what became of it; or withdraw it, when it was never sent and is not
        to be any more."""
        async with self.holding(batch):
            credentials, refused = None, None
            try:
                credentials = await self.accounts.credentials(cluster)
            except AwsError as error:
                self._forget(error, cluster)
                refused = answers.of_a_retry(answers.read(error)) if batch.calls else answers.of_no_call(error)
            held_at = time.monotonic()
            # Only now: the account may have taken its time.
            async with self.runtime.db.system() as conn:
                withheld = await wanted_repository.withheld(conn, batch)
                calls = await launch_repository.note_call(conn, batch) if credentials and not withheld else 0
            if withheld:
                await self.record(batch, Reading(Meaning.WITHDRAWN, "Withdrawn", withheld))
            elif refused:
                await self.record(batch, refused)
            elif credentials and calls:
                await self._call(batch, cluster, credentials, first=calls == 1, held_at=held_at)
            else:
                log.warning("launch.not_ours_any_more", batch_id=str(batch.id), epoch=batch.lease_epoch)

    async def _call(
        self, batch: BatchRow, cluster: ClusterFacts, credentials: Credentials, *, first: bool, held_at: float
    ) -> None:
        # Who was away for a lease, frozen, may have been followed by one whose call was refused and who went on to
        # another pool: the same token would launch now, beside that.
        while time.monotonic() - held_at > launch_repository.LEASE_SECONDS / 2:
            held_at = time.monotonic()
            async with self.runtime.db.system() as conn:
                if not await launch_repository.keep_batch(conn, batch):
                    log.warning("launch.not_ours_any_more", batch_id=str(batch.id), epoch=batch.lease_epoch)
                    return
        try:
            answer = await self.runtime.aws.call(
                "ec2",
                "RunInstances",
                json.loads(batch.request_json),
                region=batch.region,
                credentials=credentials,
            )
        except AwsError as error:
            self._forget(error, cluster)
            reading = answers.read(error)
            if reading.meaning is Meaning.ENDED and batch.size > 1:
                await self._some_ended(batch, cluster, reading)
                return
            await self.record(batch, reading if first else answers.of_a_retry(reading))
            return
        instances = sorted(
            answer.get("Instances", []), key=lambda item: (item.get("AmiLaunchIndex", 0), item["InstanceId"])
        )
        await self.record(
            batch, Reading(Meaning.LAUNCHED, "", ""), instance_ids=[item["InstanceId"] for item in instances]
        )

    def _forget(self, error: AwsError, cluster: ClusterFacts) -> None:
        if error.code in answers.EXPIRED_CODES and cluster.role_arn:
            self.runtime.aws.forget(Role(cluster.customer_id, cluster.role_arn, cluster.external_id))

    async def _some_ended(self, batch: BatchRow, cluster: ClusterFacts, reading: Reading) -> None:
        """EC2 says "an instance" of this token was terminated, and not which of several: the living are adopted, the
        others ended. Where one may only be invisible yet, all of them wait."""
        since = batch.first_called_at or batch.created_at
        try:
            found = await self.accounts.launched_by(batch, await self.accounts.credentials(cluster))
            shown = len(found) == batch.size or self.runtime.db.now() - since > SHOWN_AFTER
        except AwsError as error:
            log.warning("launch.ended_unseen", batch_id=str(batch.id), code=error.code)
            shown = False
        if not shown:
            await self.record(batch, Reading(Meaning.UNKNOWN, reading.code, reading.message))
            return
        living = [instance["InstanceId"] for instance in found if is_alive(instance)]
        await self.record(batch, reading, instance_ids=living, adopted=True)

    async def record(
        self,
        batch: BatchRow,
        reading: Reading,
        *,
        instance_ids: Sequence[str] = (),
        adopted: bool = False,
        abandoned: bool = False,
    ) -> None:
        """Apply one answer to a batch and all its slots in one transaction; a second answer changes nothing."""
        metrics.LAUNCH_CALLS.labels(reading.code or reading.meaning.value).inc()
        moves = Moves(self.runtime.db.now())
        async with self.runtime.db.system() as conn:
            locked = await launch_repository.lock_batch(conn, batch.id)
            if locked is None or locked[0].state not in ("calling", "unknown"):
                return
            if locked[0].lease_epoch != batch.lease_epoch:
                # We were away for longer than a lease. Whoever has it now gets the same answer with the same token.
                log.warning("launch.stale_answer", batch_id=str(batch.id), epoch=batch.lease_epoch)
                return
            _, slots = locked
            intents = await launch_repository.lock_intents(conn, [slot.intent_id for slot in slots])
            attempts = await launch_repository.attempts_of(conn, list(intents))
            signals: list[tuple[str, str, str, str]] = []
            for slot in slots:
                event = event_of(reading, slot.slot, instance_ids, adopted=adopted, abandoned=abandoned)
                if event is None:
                    continue
                row = intents[slot.intent_id]
                moves.move(row, attempts[row.id], intent_of(row, attempts[row.id]), event)
                if isinstance(event, Refused) and event.code in answers.POOL_CODES and not signals:
                    signals.append((batch.region, slot.availability_zone, slot.instance_type, "refusal"))
            state, retry = batch_after(reading, abandoned=abandoned)
            await launch_repository.update_batch(
                conn,
                batch.id,
                state=state or locked[0].state,
                error_code=reading.code or None,
                error_message=reading.message or None,
                retry_seconds=retry,
            )
            await moves.save(conn)
            await repository.add_penalties(
                conn,
                pools.penalties(batch.customer_id, signals),
                half_life_seconds=pools.HALF_LIFE_SECONDS,
                ceiling=pools.CEILING,
            )
        if instance_ids:
            metrics.LAUNCHED.labels("adopted" if adopted else "answered").inc(len(instance_ids))
        if reading.meaning is Meaning.MISMATCH:
            metrics.LAUNCH_MISMATCHES.inc()
        log.info(
            "launch.answered",
            batch_id=str(batch.id),
            customer_id=str(batch.customer_id),
            answer=reading.meaning.value,
            code=reading.code or None,
            instance_ids=list(instance_ids),
            size=batch.size,
        )
        moves.report()
        await moves.ring(self.runtime)


def event_of(
    reading: Reading, slot: int, instance_ids: Sequence[str], *, adopted: bool, abandoned: bool
) -> LaunchEvent | None:
    if abandoned:
        return Abandoned()
    match reading.meaning:
        case Meaning.LAUNCHED if slot < len(instance_ids):
            return Launched(instance_ids[slot], adopted)
        case Meaning.LAUNCHED:
            return Refused("PartialFill")
        case Meaning.REFUSED:
            return Refused(reading.code)
        case Meaning.DENIED:
            return Denied(f"{reading.code}: {reading.message}"[:300])
        case Meaning.MISMATCH:
            return Mismatched()
        case Meaning.ENDED:
            return Launched(instance_ids[slot], adopted) if slot < len(instance_ids) else InstanceEnded()
        case Meaning.UNKNOWN:
            return Unanswered()
        case Meaning.THROTTLED:
            return None
        case Meaning.WITHDRAWN:
            return Withdrawn(reading.message)


def batch_after(reading: Reading, *, abandoned: bool) -> tuple[str | None, float]:
    """The batch's next state (None: as it was) and the seconds until it is repeated."""
    if abandoned:
        return "abandoned", 0.0
    match reading.meaning:
        case Meaning.LAUNCHED | Meaning.ENDED:
            return "answered", 0.0
        case Meaning.REFUSED | Meaning.DENIED | Meaning.WITHDRAWN:
            return "failed", 0.0
        case Meaning.THROTTLED:
            return None, random.uniform(*THROTTLED_SECONDS)
        case _:
            return "unknown", RETRY_SECONDS
