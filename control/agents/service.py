"""What agents may ask: tasks, reports, metrics and events of their own cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from uuid import UUID

from control.agents import repository, samples
from control.agents.repository import ReportOutcome
from control.agents.schemas import Events, RejectedEvent
from control.context import AppContext
from control.errors import Conflict, Invalid, NotFound
from control.interruptions.service import Ingested, UnknownCustomer
from control.interruptions.taking import accept_agent_events, why_no_event
from control.observability import TASK_REPORTS, TASKS_LEASED
from control.security.principal import Principal
from warehouse.contracts import TASK_TYPE_ALIASES, OptimizationTask, TaskResult, TaskType

MAX_WAIT_SECONDS = 25.0
SEEN_EVERY_SECONDS = 15.0
# A note about a task is no log file.
MAX_DETAIL_BYTES = 64 * 1024


def bound_cluster(principal: Principal, asked: UUID | None = None) -> tuple[UUID, UUID]:
    """(customer_id, cluster_id) of the agent's key.

    Raises:
        NotFound: another cluster was named.
    """
    if principal.cluster_id is None or principal.customer_id is None or asked not in (None, principal.cluster_id):
        raise NotFound("cluster")
    return principal.customer_id, principal.cluster_id


def understood(text: str) -> list[str]:
    """Task types of a comma-separated list, aliases by their proper names; empty means all.

    Raises:
        Invalid: a name that is no task type.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {kind.value for kind in TaskType}
    types = []
    for name in names:
        proper = TASK_TYPE_ALIASES.get(name, name)
        if proper not in known:
            raise Invalid(f"understands: {name[:50]!r} is no task type; known are {', '.join(sorted(known))}.")
        types.append(str(proper))
    return types or sorted(known)


class Seen:
    """When this process last noted that a cluster's agent asked, so that it is written every 15 s and not always."""

    def __init__(self) -> None:
        self._noted: dict[UUID, tuple[float, tuple[str, ...], str | None]] = {}

    def is_news(self, cluster_id: UUID, understands: Sequence[str], version: str | None) -> bool:
        """Whether to write it now."""
        now, said = time.monotonic(), tuple(understands)
        known = self._noted.get(cluster_id)
        if known and now - known[0] < SEEN_EVERY_SECONDS and known[1:] == (said, version):
            return False
        if len(self._noted) > 10_000:
            self._noted.clear()
        self._noted[cluster_id] = (now, said, version)
        return True


_seen = Seen()


async def lease(
    context: AppContext,
    principal: Principal,
    *,
    understands: Sequence[str],
    limit: int,
    version: str | None = None,
    resume_without: Sequence[UUID] | None = None,
) -> list[OptimizationTask]:
    """Lease what there is now. ``resume_without`` is given on a new connection: what the agent leased before, never
    reported on and does not hold comes back at once.

    Raises:
        NotFound: the cluster was deleted.
    """
    customer_id, cluster_id = bound_cluster(principal)
    async with context.db.tenant(customer_id) as conn:
        if _seen.is_news(cluster_id, understands, version):
            region = await repository.agent_seen(conn, cluster_id=cluster_id, understands=understands, version=version)
            if region is None:
                raise NotFound("cluster")
        tasks = await repository.lease_tasks(
            conn,
            cluster_id=cluster_id,
            agent=principal.actor,
            limit=limit,
            understands=understands,
            reoffer_seconds=0.0 if resume_without is not None else repository.REOFFER_OWN_LEASE_SECONDS,
            holding=resume_without or (),
        )
    for task in tasks:
        TASKS_LEASED.labels(task.task_type.value).inc()
    return tasks


async def wait_for_tasks(
    context: AppContext,
    principal: Principal,
    *,
    cluster_id: UUID,
    wait: float,
    understands: Sequence[str],
    limit: int,
    version: str | None,
    gone: Callable[[], Awaitable[bool]],
) -> list[OptimizationTask]:
    """Lease tasks, waiting up to ``wait`` seconds for the first. No database connection is held while waiting, and
    nothing is leased for a caller that hung up (``gone``)."""
    _, own = bound_cluster(principal, cluster_id)
    ends = time.monotonic() + min(wait, MAX_WAIT_SECONDS)
    async with context.watch.tasks_of(own) as bell:
        while True:
            tasks = await lease(context, principal, understands=understands, limit=limit, version=version)
            left = ends - time.monotonic()
            # Also of one that came when the bells had rung for the end already.
            if tasks or left <= 0 or context.watch.stopping:
                return tasks
            # The watch rings every bell whose cluster has work at least every two seconds.
            if not await bell.wait(left) or await gone() or context.watch.is_revoked(principal.id):
                return []
            if context.watch.stopping:
                return []


async def report(context: AppContext, principal: Principal, task_id: UUID, body: TaskResult) -> ReportOutcome:
    """Store an agent's report and apply it where its lease still holds. Stale ones are kept and say so.

    Raises:
        NotFound: no such task of this cluster.
        Invalid: a detail of more than 64 KiB.
    """
    if len(str(body.detail)) > MAX_DETAIL_BYTES:
        raise Invalid("detail: more than 64 KiB; send the end of the log only.")
    customer_id, cluster_id = bound_cluster(principal)
    async with context.db.tenant(customer_id) as conn:
        outcome = await repository.record_report(conn, cluster_id=cluster_id, task_id=task_id, report=body)
    if outcome is None:
        raise NotFound("task")
    TASK_REPORTS.labels(body.status.value, str(outcome.applied).lower()).inc()
    if outcome.applied:
        await asyncio.gather(
            *([context.bells.ring("interruptions")] if outcome.interruption_id else []),
            *([context.bells.ring("plans")] if not outcome.interruption_id else []),
            context.bells.ring("outbox"),
        )
    return outcome


def refuse_stale(outcome: ReportOutcome) -> ReportOutcome:
    """The outcome, unless the lease was lost.

    Raises:
        Conflict: ``stale_lease``; the report is kept as evidence and must not be sent again.
    """
    if outcome.stale:
        raise Conflict(
            f"The lease was lost: the task is {outcome.state} under epoch {outcome.lease_epoch}. "
            "The report is kept as evidence; do not send it again.",
            code="stale_lease",
            state=outcome.state,
            lease_epoch=outcome.lease_epoch,
        )
    return outcome


async def take_metrics(context: AppContext, principal: Principal, body: bytes) -> bytes:
    """Judge and commit a batch; returns the answer's JSON after the commit.

    Raises:
        NotFound: another cluster's id.
        AppError: as of ``samples.parse`` and ``Ingest.commit``.
    """
    assert principal.cluster_id is not None
    batch = samples.parse(
        body,
        customer_id=principal.customer_id,  # type: ignore[arg-type]
        now=datetime.now(UTC),
        capacities=context.ingest.capacities.get(principal.cluster_id),
    )
    bound_cluster(principal, batch.cluster_id)
    return await context.ingest.commit(batch)


async def take_events(context: AppContext, principal: Principal, body: Events) -> tuple[Ingested, list[RejectedEvent]]:
    """Hand what an agent saw on its nodes to the interruption path, on its reserved connections; also says which are
    set aside, because they are no events.

    Raises:
        NotFound: another cluster's id, or a deleted cluster.
        Unavailable: some of them must be sent again; all others were taken in.
    """
    customer_id, cluster_id = bound_cluster(principal, body.cluster_id)
    async with context.intake_db.tenant(customer_id) as conn:
        region = await repository.cluster_region(conn, cluster_id)
    if region is None:
        raise NotFound("cluster")
    try:
        ingested = await accept_agent_events(
            context.intake_db,
            context.bells,
            customer_id=customer_id,
            cluster_id=cluster_id,
            region=region,
            events=body.events,
        )
    except UnknownCustomer:
        raise NotFound("customer") from None
    reasons = ((index, why_no_event(event)) for index, event in enumerate(body.events))
    return ingested, [RejectedEvent(index=index, reason=reason) for index, reason in reasons if reason]
