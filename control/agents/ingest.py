"""Metrics into Postgres: concurrent requests share transactions, an answer is given after its commit.

One transaction holds any number of batches: the batch keys first (a batch that was counted before gets its stored
answer), then one binary COPY per day into the day's partition, the marks of late days, and the cluster states.
Postgres does not COPY into a table with row-level security; partitions carry none, are readable by nobody, and only
the system role may insert into them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from control.agents import metrics_repository as repository
from control.agents.samples import Batch
from control.bus.bells import Bells
from control.errors import Invalid, NotFound, TooMany, Unavailable
from control.observability import BATCHES, SAMPLES
from warehouse.postgres.session import Database

# Two: while one commits, the other's group fills. More make smaller groups and more work per sample.
WRITERS = 2
MAX_GROUP = 64
MAX_WAITING = 512
SERIES_LIMIT = 50_000
SEEN_EVERY_SECONDS = 5.0
# Slots of the linear counter: four times the limit keeps its error below one per cent.
_SLOTS = 1 << 18

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Waiting:
    batch: Batch
    answer: asyncio.Future[bytes]


class SeriesCounter:
    """About how many distinct series a cluster sent today, in 32 KiB per cluster (linear counting)."""

    def __init__(self, limit: int = SERIES_LIMIT) -> None:
        self._limit = limit
        self._day: date | None = None
        self._bits: dict[UUID, bytearray] = {}
        self._occupied: dict[UUID, int] = {}

    def check(self, cluster_id: UUID, series: Sequence[tuple[str, str]], today: date) -> None:
        """Count a batch's series.

        Raises:
            TooMany: new series, and the cluster has its 50,000.
        """
        if today != self._day:
            self._day = today
            self._bits.clear()
            self._occupied.clear()
        bits = self._bits.setdefault(cluster_id, bytearray(_SLOTS // 8))
        slots = {hash(pair) & (_SLOTS - 1) for pair in series}
        fresh = [slot for slot in slots if not bits[slot >> 3] & (1 << (slot & 7))]
        if not fresh:
            return
        occupied = self._occupied.get(cluster_id, 0) + len(fresh)
        if occupied >= _SLOTS or -_SLOTS * math.log1p(-occupied / _SLOTS) > self._limit:
            raise TooMany(
                f"This cluster sends more than {self._limit:,} distinct series; drop high-cardinality subjects.",
                retry_after=3600,
                code="series_limit",
            )
        self._occupied[cluster_id] = occupied
        for slot in fresh:
            bits[slot >> 3] |= 1 << (slot & 7)


class Ingest:
    """Group commit for the process; rings the bells of clusters whose nodes changed, after the commit."""

    def __init__(self, database_url: str, bells: Bells, *, writers: int = WRITERS) -> None:
        self._db = Database(database_url, pool_size=writers, max_overflow=1)
        self._bells = bells
        self._writers = writers
        self._waiting: list[_Waiting] = []
        self._work = asyncio.Event()
        self._stopping = False
        self._days: set[date] = set()
        self._seen: dict[UUID, tuple[float, str | None]] = {}
        self._days_lock = asyncio.Lock()
        self.series = SeriesCounter()
        self.capacities: dict[UUID, dict[str, tuple[float, float]]] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the writers; on leaving, everything accepted is committed first."""
        tasks = [asyncio.create_task(self._write(), name=f"ingest-{number}") for number in range(self._writers)]
        try:
            yield
        finally:
            self._stopping = True
            self._work.set()
            _, late = await asyncio.wait(tasks, timeout=10)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._db.close()

    async def commit(self, batch: Batch) -> bytes:
        """Commit a batch and return its answer (the stored one when the batch was counted before).

        Raises:
            Invalid: the id was used for another body.
            NotFound: the cluster is gone.
            TooMany: the cluster's series limit.
            Unavailable: too much is waiting already, or the database is away.
        """
        if self._stopping or len(self._waiting) >= MAX_WAITING:
            raise Unavailable("Too many batches are waiting to be written; send this one again.", retry_after=1)
        self.series.check(batch.cluster_id, batch.series, datetime.now(UTC).date())
        waiting = _Waiting(batch, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._work.set()
        answer = await waiting.answer
        if batch.state is not None:
            self.capacities[batch.cluster_id] = {
                node.node_name: (node.cpu_cores, float(node.memory_bytes)) for node in batch.state.nodes
            }
        return answer

    async def _write(self) -> None:
        while True:
            while not self._waiting:
                if self._stopping:
                    return
                self._work.clear()
                await self._work.wait()
            group, self._waiting = self._waiting[:MAX_GROUP], self._waiting[MAX_GROUP:]
            await self._settle(group)

    async def _settle(self, group: list[_Waiting]) -> None:
        try:
            await self._commit_group(group)
        except (OperationalError, InterfaceError, OSError) as error:
            log.warning("ingest.database_away", error=type(error).__name__, batches=len(group))
            self._fail(group, Unavailable("The database does not answer right now; send the batch again."))
        except Exception as error:
            if len(group) > 1:
                # One of them cannot be stored; the others must not suffer for it.
                for waiting in group:
                    await self._settle([waiting])
                return
            if isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) == "23503":
                self._fail(group, NotFound("cluster"))
                return
            log.exception("ingest.failed", cluster_id=str(group[0].batch.cluster_id))
            self._fail(group, Invalid("The batch cannot be stored. It was logged; quote the request id."))
        except BaseException:
            self._fail(group, Unavailable("The server is stopping; send the batch again."))
            raise

    @staticmethod
    def _fail(group: Sequence[_Waiting], error: Exception) -> None:
        for waiting in group:
            if not waiting.answer.done():
                waiting.answer.set_exception(error)

    async def _commit_group(self, group: list[_Waiting]) -> None:
        first: dict[tuple[UUID, UUID], _Waiting] = {}
        for waiting in group:
            first.setdefault((waiting.batch.cluster_id, waiting.batch.batch_id), waiting)
        batches = sorted((waiting.batch for waiting in first.values()), key=lambda batch: batch.cluster_id)
        await self._ensure_days({day for batch in batches for day in batch.rows})
        started = time.perf_counter()
        async with self._db.system() as conn:
            stored = await repository.claim_batches(conn, batches)
            new = [batch for batch in batches if (batch.cluster_id, batch.batch_id) not in stored]
            await repository.copy_samples(conn, new)
            await repository.mark_late_days(conn, {day for batch in new for day in batch.late_days})
            await repository.mark_seen(conn, self._unseen(new))
            changed = await repository.apply_states(conn, new)
        log.debug("ingest.committed", batches=len(new), seconds=round(time.perf_counter() - started, 4))
        for batch in new:
            SAMPLES.labels("accepted").inc(batch.accepted)
            SAMPLES.labels("rejected").inc(len(batch.rejected))
            SAMPLES.labels("duplicate").inc(batch.duplicate)
        BATCHES.labels("new").inc(len(new))
        BATCHES.labels("repeated").inc(len(group) - len(new))
        if changed:
            # A replacement may have become Ready, a late node may be the owner of an unmatched event.
            await asyncio.gather(
                self._bells.ring("interruptions"),
                self._bells.ring("outbox"),
                *(self._bells.ring("clusters", cluster_id) for _, cluster_id in changed),
            )
        for waiting in group:
            batch = waiting.batch
            key = (batch.cluster_id, batch.batch_id)
            primary = first[key].batch
            sha256, answer = stored.get(key, (primary.body_sha256, primary.answer()))
            if waiting.answer.done():
                continue
            if sha256 == batch.body_sha256:
                waiting.answer.set_result(answer)
            else:
                waiting.answer.set_exception(
                    Invalid(
                        "batch_id: was used for another body before; make a new id for a new batch and keep an id "
                        "only for repetitions of the same bytes.",
                        code="batch_id_reused",
                    )
                )

    def _unseen(self, batches: Sequence[Batch]) -> dict[UUID, str | None]:
        """Clusters, with their agents' versions, that were not noted as seen within the last seconds."""
        now, news = time.monotonic(), {}
        for batch in batches:
            noted, version = self._seen.get(batch.cluster_id, (0.0, None))
            if now - noted > SEEN_EVERY_SECONDS or version != batch.agent_version:
                news[batch.cluster_id] = batch.agent_version
                self._seen[batch.cluster_id] = (now, batch.agent_version)
        return news

    async def _ensure_days(self, days: set[date]) -> None:
        if days <= self._days:
            return
        # In a transaction of its own: making a partition locks the parent table.
        async with self._days_lock:
            if missing := days - self._days:
                async with self._db.system() as conn:
                    await repository.ensure_partitions(conn, min(missing), max(missing))
                self._days |= missing
