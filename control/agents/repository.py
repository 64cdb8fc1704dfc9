"""All SQL of the agents' task queue. Postgres is the queue; whoever creates a task rings the bell after its commit.

A lease is a promise with an epoch: every new lease adds one, a result counts only with the epoch it was leased
under, so a holder that was away cannot overwrite what another one did. All decisions about time are made by the
database's clock.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from warehouse.contracts import OptimizationTask, TaskResult, TaskType
from warehouse.postgres.models import new_id

# 30 s would be a quarter of an interruption's notice. Agents report `running` every 5 s while they work.
LEASE_SECONDS = 15
# An agent that asks again gets back a live lease it never acknowledged (its answer was lost). Not sooner than this,
# so that an agent which polls while it starts the task is not answered in a tight loop.
REOFFER_OWN_LEASE_SECONDS = 1
# What a stopped cluster's agent may still be given, besides interruption work: things that change or remove nothing.
HARMLESS_TASKS = (TaskType.COLLECT_STATE.value, TaskType.UNCORDON_NODE.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTask:
    """A task to create. ``dedupe_key`` is unique per cluster: creating it twice changes nothing.

    ``priority`` is served low to high among equal deadlines; ``deadline_at`` ends all delivery.
    """

    customer_id: UUID
    cluster_id: UUID
    task_type: TaskType | str
    parameters: dict[str, Any]
    dedupe_key: str
    priority: int = 100
    deadline_at: datetime | None = None
    interruption_id: UUID | None = None
    task_id: UUID = field(default_factory=new_id)


@dataclass(frozen=True, slots=True)
class ReportOutcome:
    """What became of a report: ``state`` is the task's state now, ``applied`` whether this report moved it.

    ``deadline_at`` is the task's as of now: it may have come nearer since the task was leased.
    """

    task_id: UUID
    interruption_id: UUID | None
    state: str
    applied: bool
    stale: bool
    lease_epoch: int
    lease_until: datetime | None
    deadline_at: datetime | None


@dataclass(frozen=True, slots=True)
class MovedTask:
    """A task that a sweep moved."""

    task_id: UUID
    customer_id: UUID
    cluster_id: UUID
    interruption_id: UUID | None


_CREATE = text("""
    WITH created AS (
        INSERT INTO agent_tasks (id, customer_id, cluster_id, interruption_id, task_type, parameters, priority,
                                 deadline_at, dedupe_key)
        SELECT id, customer_id, cluster_id, interruption_id, task_type, parameters, priority, deadline_at, dedupe_key
        FROM jsonb_to_recordset(CAST(:tasks AS jsonb)) AS t (
            id uuid, customer_id uuid, cluster_id uuid, interruption_id uuid, task_type text, parameters jsonb,
            priority integer, deadline_at timestamptz, dedupe_key text, event_id uuid)
        ORDER BY cluster_id, dedupe_key
        ON CONFLICT (customer_id, cluster_id, dedupe_key) DO NOTHING
        RETURNING id, customer_id, cluster_id, task_type, interruption_id, deadline_at
    ), told AS (
        INSERT INTO outbox (id, customer_id, topic, payload)
        SELECT t.event_id, c.customer_id, 'task.created', jsonb_build_object(
            'task_id', c.id, 'customer_id', c.customer_id, 'cluster_id', c.cluster_id, 'task_type', c.task_type,
            'interruption_id', c.interruption_id, 'deadline', c.deadline_at)
        FROM created c JOIN jsonb_to_recordset(CAST(:tasks AS jsonb)) AS t (id uuid, event_id uuid) ON t.id = c.id
    )
    SELECT id FROM created
""")


async def create_tasks(conn: AsyncConnection, tasks: Sequence[NewTask]) -> list[UUID]:
    """Create tasks and their ``task.created`` events in one statement; returns the ids that are new.

    Ring ``tasks:<cluster_id>`` after the commit.
    """
    if not tasks:
        return []
    rows = [
        {
            "id": str(task.task_id),
            "event_id": str(new_id()),
            "customer_id": str(task.customer_id),
            "cluster_id": str(task.cluster_id),
            "interruption_id": str(task.interruption_id) if task.interruption_id else None,
            "task_type": str(task.task_type),
            "parameters": task.parameters,
            "priority": task.priority,
            "deadline_at": task.deadline_at.isoformat() if task.deadline_at else None,
            "dedupe_key": task.dedupe_key,
        }
        for task in tasks
    ]
    result = await conn.execute(_CREATE, {"tasks": json.dumps(rows)})
    return [row.id for row in result]


# The stop switches are read once, and the chosen ids go in as an array: both are index look-ups whatever the planner
# believes about a queue that was empty when it was last analysed.
_LEASE = text("""
    WITH due AS (
        SELECT t.id
        FROM agent_tasks t
        WHERE t.cluster_id = :cluster_id
          AND t.state IN ('queued', 'leased')
          AND (t.deadline_at IS NULL OR t.deadline_at > now())
          AND t.task_type = ANY(:understands)
          AND (t.interruption_id IS NOT NULL OR t.task_type = ANY(:harmless)
               OR NOT (SELECT c.kill_switch OR m.kill_switch FROM clusters c JOIN customers m ON m.id = c.customer_id
                       WHERE c.id = :cluster_id))
          AND (
              t.state = 'queued'
              OR t.lease_until <= now()
              OR (t.leased_by = :agent AND t.deadline_at < t.offered_deadline_at)
              OR (t.leased_by = :agent
                  AND t.lease_until <= now() + make_interval(secs => :lease_seconds - :reoffer_seconds)
                  AND t.id <> ALL(:holding)
                  AND NOT EXISTS (SELECT FROM task_reports r
                                  WHERE r.task_id = t.id AND r.lease_epoch = t.lease_epoch))
          )
        ORDER BY t.deadline_at NULLS LAST, t.priority, t.id
        LIMIT :limit
        FOR UPDATE OF t SKIP LOCKED
    )
    UPDATE agent_tasks t
    SET state = 'leased',
        leased_by = :agent,
        lease_epoch = t.lease_epoch + CASE WHEN t.state = 'leased' AND t.lease_until > now() THEN 0 ELSE 1 END,
        attempts = t.attempts + CASE WHEN t.state = 'leased' AND t.lease_until > now() THEN 0 ELSE 1 END,
        lease_until = now() + make_interval(secs => :lease_seconds),
        offered_deadline_at = t.deadline_at,
        first_leased_at = coalesce(t.first_leased_at, clock_timestamp())
    WHERE t.id = ANY(ARRAY(SELECT id FROM due))
    RETURNING t.id, t.cluster_id, t.task_type, t.parameters, t.priority, t.deadline_at, t.lease_epoch, t.lease_until
""")


async def lease_tasks(
    conn: AsyncConnection,
    *,
    cluster_id: UUID,
    agent: str,
    limit: int,
    understands: Sequence[str],
    reoffer_seconds: float = REOFFER_OWN_LEASE_SECONDS,
    holding: Sequence[UUID] = (),
) -> list[OptimizationTask]:
    """Lease up to ``limit`` tasks of a cluster for one agent, the earliest deadline first.

    Never returns a task past its deadline or of a type the agent does not understand. A live lease of the same agent
    that it never reported on is returned again under the same epoch when it is older than ``reoffer_seconds`` and not
    among those the agent says it is ``holding``, and once more when its deadline has come nearer since it was offered;
    any other lease adds one to the epoch.
    """
    result = await conn.execute(
        _LEASE,
        {
            "cluster_id": cluster_id,
            "agent": agent,
            "limit": limit,
            "understands": list(understands),
            "harmless": list(HARMLESS_TASKS),
            "lease_seconds": LEASE_SECONDS,
            "reoffer_seconds": reoffer_seconds,
            "holding": list(holding),
        },
    )
    rows = sorted(result.all(), key=lambda row: (row.deadline_at is None, row.deadline_at, row.priority, row.id))
    return [
        OptimizationTask(
            task_id=row.id,
            cluster_id=row.cluster_id,
            task_type=row.task_type,
            parameters=row.parameters,
            priority=row.priority,
            deadline=row.deadline_at,
            lease_epoch=row.lease_epoch,
            lease_until=row.lease_until,
        )
        for row in rows
    ]


_LOCK_TASK = text("""
    SELECT id, customer_id, interruption_id, task_type, state, lease_epoch, lease_until, result_epoch, deadline_at
    FROM agent_tasks WHERE id = :task_id AND cluster_id = :cluster_id
    FOR UPDATE
""")

_STORE_REPORT = text("""
    INSERT INTO task_reports (customer_id, task_id, lease_epoch, report_id, status, detail, applied, started_at,
                              finished_at)
    VALUES (:customer_id, :task_id, :lease_epoch, :report_id, :status, CAST(:detail AS jsonb), :applied, :started_at,
            :finished_at)
    ON CONFLICT (task_id, lease_epoch, report_id) DO NOTHING
    RETURNING applied
""")

_KNOWN_REPORT = text("""
    SELECT applied FROM task_reports
    WHERE task_id = :task_id AND lease_epoch = :lease_epoch AND report_id = :report_id
""")

_PROGRESS = text("""
    UPDATE agent_tasks
    SET state = 'leased',
        lease_until = now() + make_interval(secs => :lease_seconds),
        cordoned_at = CASE WHEN :cordoned THEN coalesce(cordoned_at, now()) ELSE cordoned_at END
    WHERE id = :task_id AND lease_epoch = :lease_epoch AND state IN ('leased', 'queued')
    RETURNING state, lease_until
""")

_FINISH = text("""
    WITH finished AS (
        UPDATE agent_tasks
        SET state = :status,
            result = CAST(:detail AS jsonb),
            result_epoch = lease_epoch,
            finished_at = now(),
            lease_until = NULL,
            cordoned_at = CASE WHEN :cordoned THEN coalesce(cordoned_at, now()) ELSE cordoned_at END
        WHERE id = :task_id AND lease_epoch = :lease_epoch AND state IN ('leased', 'queued')
        RETURNING id, customer_id, cluster_id, task_type, interruption_id, state, lease_until
    ), told AS (
        INSERT INTO outbox (id, customer_id, topic, payload)
        SELECT :event_id, customer_id, 'task.finished', jsonb_build_object(
            'task_id', id, 'customer_id', customer_id, 'cluster_id', cluster_id, 'task_type', task_type,
            'interruption_id', interruption_id, 'state', state)
        FROM finished
    )
    SELECT state, lease_until FROM finished
""")


async def record_report(
    conn: AsyncConnection, *, cluster_id: UUID, task_id: UUID, report: TaskResult
) -> ReportOutcome | None:
    """Store a report and, where its epoch is the task's own, apply it. None when the cluster has no such task.

    ``running`` extends the lease; any other status ends the task. A report under an old epoch, or on a task that has
    ended, is kept as evidence and changes nothing (``stale``). The same report sent again gets the same outcome.
    A lease that ran out but was taken by nobody else still belongs to its holder.

    When ``interruption_id`` is set and the report was applied, ring ``interruptions`` after the commit.
    """
    task = (await conn.execute(_LOCK_TASK, {"task_id": task_id, "cluster_id": cluster_id})).one_or_none()
    if task is None:
        return None
    key = {"task_id": task_id, "lease_epoch": report.lease_epoch, "report_id": report.report_id}

    def outcome(*, applied: bool, stale: bool, state: str, lease_until: datetime | None) -> ReportOutcome:
        return ReportOutcome(
            task_id, task.interruption_id, state, applied, stale, task.lease_epoch, lease_until, task.deadline_at
        )

    known = (await conn.execute(_KNOWN_REPORT, key)).one_or_none()
    if known is not None:
        return outcome(applied=known.applied, stale=not known.applied, state=task.state, lease_until=task.lease_until)

    applies = report.lease_epoch == task.lease_epoch and task.state in ("leased", "queued")
    detail = json.dumps(report.detail)
    cordoned = report.detail.get("progress") == "cordoned" or bool(report.detail.get("cordoned"))
    state, lease_until = task.state, task.lease_until
    if applies and report.status == "running":
        moved = await conn.execute(
            _PROGRESS,
            {
                "task_id": task_id,
                "lease_epoch": report.lease_epoch,
                "lease_seconds": LEASE_SECONDS,
                "cordoned": cordoned,
            },
        )
        state, lease_until = moved.one()
    elif applies:
        moved = await conn.execute(
            _FINISH,
            {
                "task_id": task_id,
                "lease_epoch": report.lease_epoch,
                "status": report.status.value,
                "detail": detail,
                "cordoned": cordoned,
                "event_id": new_id(),
            },
        )
        state, lease_until = moved.one()
    await conn.execute(
        _STORE_REPORT,
        key
        | {
            "customer_id": task.customer_id,
            "status": report.status.value,
            "detail": detail,
            "applied": applies,
            "started_at": report.started_at,
            "finished_at": report.finished_at,
        },
    )
    # The same end told twice with a new report id is no news, but no conflict either.
    repeated = report.lease_epoch == task.result_epoch and report.status == task.state
    return outcome(applied=applies, stale=not (applies or repeated), state=state, lease_until=lease_until)


_REQUEUE = text("""
    WITH over AS (
        SELECT id FROM agent_tasks
        WHERE state = 'leased' AND lease_until <= now() AND (deadline_at IS NULL OR deadline_at > now())
        ORDER BY deadline_at NULLS LAST LIMIT :limit FOR UPDATE SKIP LOCKED
    )
    UPDATE agent_tasks t SET state = 'queued', lease_until = NULL, leased_by = NULL
    FROM over WHERE t.id = over.id
    RETURNING t.id, t.customer_id, t.cluster_id, t.interruption_id
""")

_EXPIRE = text("""
    WITH over AS (
        SELECT id FROM agent_tasks
        WHERE deadline_at <= now() AND (state = 'queued' OR (state = 'leased' AND lease_until <= now()))
        ORDER BY deadline_at LIMIT :limit FOR UPDATE SKIP LOCKED
    ), expired AS (
        UPDATE agent_tasks t SET state = 'expired', finished_at = now(), lease_until = NULL
        FROM over WHERE t.id = over.id
        RETURNING t.id, t.customer_id, t.cluster_id, t.interruption_id, t.task_type
    ), told AS (
        INSERT INTO outbox (id, customer_id, topic, payload)
        SELECT gen_random_uuid(), customer_id, 'task.finished', jsonb_build_object(
            'task_id', id, 'customer_id', customer_id, 'cluster_id', cluster_id, 'task_type', task_type,
            'interruption_id', interruption_id, 'state', 'expired')
        FROM expired
    )
    SELECT id, customer_id, cluster_id, interruption_id FROM expired
""")


async def requeue_expired_leases(conn: AsyncConnection, *, limit: int = 1000) -> list[MovedTask]:
    """Put tasks whose holder went silent back into the queue; ring ``tasks:<cluster_id>`` of each after the commit."""
    return [MovedTask(*row) for row in await conn.execute(_REQUEUE, {"limit": limit})]


async def expire_overdue_tasks(conn: AsyncConnection, *, limit: int = 1000) -> list[MovedTask]:
    """End tasks whose deadline passed and that nobody holds; ring ``interruptions`` after the commit.

    A holder that keeps its lease alive by reporting may finish late: its end is reported, not guessed.
    """
    return [MovedTask(*row) for row in await conn.execute(_EXPIRE, {"limit": limit})]


_WITH_WORK = text("""
    SELECT DISTINCT cluster_id FROM agent_tasks
    WHERE cluster_id = ANY(:clusters) AND state IN ('queued', 'leased')
      AND (deadline_at IS NULL OR deadline_at > now())
      AND (state = 'queued' OR lease_until <= now() OR deadline_at < offered_deadline_at
           OR lease_until <= now() + make_interval(secs => :lease_seconds - :reoffer_seconds))
""")


async def clusters_with_work(conn: AsyncConnection, clusters: Sequence[UUID]) -> list[UUID]:
    """Those of the clusters whose agents should ask now."""
    result = await conn.execute(
        _WITH_WORK,
        {
            "clusters": list(clusters),
            "lease_seconds": LEASE_SECONDS,
            "reoffer_seconds": REOFFER_OWN_LEASE_SECONDS,
        },
    )
    return list(result.scalars())


async def lately_revoked_keys(conn: AsyncConnection) -> frozenset[UUID]:
    """Keys revoked within the last minutes: long enough for every open socket to have asked."""
    result = await conn.execute(text("SELECT id FROM api_keys WHERE revoked_at > now() - interval '5 minutes'"))
    return frozenset(result.scalars())


_SEEN = text("""
    UPDATE clusters
    SET last_seen_at = now(),
        status = CASE WHEN status IN ('pending', 'away') THEN 'active' ELSE status END,
        agent_understands = CAST(:understands AS jsonb),
        agent_version = coalesce(:version, agent_version)
    WHERE id = :cluster_id AND status <> 'deleted'
    RETURNING region
""")


async def agent_seen(
    conn: AsyncConnection, *, cluster_id: UUID, understands: Sequence[str], version: str | None
) -> str | None:
    """Note that a cluster's agent asked, and what it understands; returns the region, None for no such cluster."""
    result = await conn.execute(
        _SEEN, {"cluster_id": cluster_id, "understands": json.dumps(list(understands)), "version": version}
    )
    return result.scalar_one_or_none()


async def cluster_region(conn: AsyncConnection, cluster_id: UUID) -> str | None:
    """Region of a cluster that is not deleted."""
    result = await conn.execute(
        text("SELECT region FROM clusters WHERE id = :id AND status <> 'deleted'"), {"id": cluster_id}
    )
    return result.scalar_one_or_none()
