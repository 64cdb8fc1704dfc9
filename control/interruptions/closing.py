"""The end of an interruption: when both branches ended, ``states`` decides its outcome, written with its history."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from control.agents.repository import NewTask, create_tasks
from control.interruptions import closing_repository, drafts_repository, metrics, repository
from control.interruptions.batch import Batch
from control.interruptions.closing_repository import Ended
from control.interruptions.drains import drain_task
from control.interruptions.messages import Ingested, told_closed
from control.interruptions.moving import apply_events
from control.interruptions.policies import SOFT_KINDS, NodeFacts
from control.interruptions.runtime import Runtime
from control.interruptions.states import (
    UNMATCHED_FOR,
    Branches,
    Cancel,
    Closing,
    IntentState,
    close_open,
    close_unmatched,
)
from warehouse.contracts import EventKind, InterruptionAction

LIMIT = 500
# A drain after its replacement is Ready has no deadline but its own.
PRE_SPIN_DRAIN_LEAD = timedelta(minutes=15)


async def close_ended(runtime: Runtime) -> int:
    """Close interruptions with nothing left to do; returns how many."""
    now = runtime.db.now()
    closed: list[tuple[Ended, Closing]] = []
    async with runtime.db.system() as conn:
        for row in await closing_repository.ended_interruptions(conn, limit=LIMIT):
            branches = Branches(
                row.drain,
                row.drained_at,
                IntentState(row.launch) if row.launch else None,
                kept=_kept(row.kind, row.launch) and row.instance_gone_at is None,
            )
            closing = close_open(branches, deadline_at=row.deadline_at)
            if closing is not None:
                closed.append((row, closing))
        await closing_repository.close(
            conn,
            [
                {
                    "id": row.id,
                    "version": row.version + 1,
                    "outcome": closing.outcome.value,
                    "reason": closing.reason,
                    "closed_at": now,
                }
                for row, closing in closed
            ],
        )
        await repository.insert_history(
            conn,
            [
                {
                    "customer_id": row.customer_id,
                    "interruption_id": row.id,
                    "version": row.version + 1,
                    "at": now,
                    "event": "closed",
                    "state": "closed",
                    "detail": {"outcome": closing.outcome.value, "reason": closing.reason},
                }
                for row, closing in closed
            ],
        )
        await closing_repository.set_replacements(
            conn,
            [
                {"interruption_id": row.id, "instance_id": row.replacement_instance_id}
                for row, _ in closed
                if row.replacement_instance_id and row.launch == "ready"
            ],
        )
        await repository.insert_outbox(
            conn, [_told(row, closing.outcome.value, closing.reason, now) for row, closing in closed]
        )
        metrics.OPEN.set(await closing_repository.open_interruptions(conn))
    for row, closing in closed:
        metrics.CLOSED.labels(closing.outcome.value).inc()
        _observe(row, now)
    if closed:
        await runtime.bells.ring("outbox")
    return len(closed)


async def cancel_unwanted(runtime: Runtime) -> int:
    """Cancel launches of interruptions that were closed before them: AWS called the maintenance off. Returns how
    many."""
    async with runtime.db.system() as conn:
        ids = await closing_repository.unwanted_intents(conn, limit=LIMIT)
    return await apply_events(runtime, dict.fromkeys(ids, Cancel("its interruption was called off")))


def _told(row: Ended, outcome: str, reason: str | None, now: datetime) -> dict[str, Any]:
    return told_closed(
        customer_id=row.customer_id,
        cluster_id=row.cluster_id,
        interruption_id=row.id,
        instance_id=row.instance_id,
        outcome=outcome,
        reason=reason,
        closed_at=now,
        replacement_instance_id=row.replacement_instance_id if row.launch == "ready" else None,
    )


def _observe(row: Ended, now: datetime) -> None:
    steps = {
        "task_created": row.task_created_at,
        "task_in_agents_hands": row.leased_at,
        "cordoned": row.cordoned_at,
        "replacement_launched": row.launched_at,
        "replacement_ready": row.ready_at,
        "drained": row.drained_at if row.drain == "done" else None,
        "closed": now,
    }
    for step, at in steps.items():
        # What a recommendation had begun before the warning came was no answer to the warning.
        if at is not None and (row.first_notice_at is None or at >= row.notice_at):
            metrics.STEP_SECONDS.labels(step).observe(max((at - row.notice_at).total_seconds(), 0.0))
            metrics.STEP_LEFT_SECONDS.labels(step).observe((row.deadline_at - at).total_seconds())


async def begin_waiting_drains(runtime: Runtime) -> int:
    """Drain nodes whose replacement is Ready (policy ``pre_spin``); returns how many."""
    now = runtime.db.now()
    tasks: list[NewTask] = []
    async with runtime.db.system() as conn:
        rows = await closing_repository.waiting_drains(conn, limit=LIMIT)
        changes: list[dict[str, Any]] = []
        history: list[dict[str, Any]] = []
        for row in rows:
            # An announced end does not move; only a node that may live on gets the time it needs.
            soft = EventKind(row.kind) in SOFT_KINDS
            deadline = max(row.deadline_at, now + PRE_SPIN_DRAIN_LEAD) if soft else row.deadline_at
            changes.append({"id": row.id, "version": row.version + 1, "deadline_at": deadline})
            kept = _kept(row.kind, row.launch)
            alive = row.node_id is not None and row.terminated_at is None and not kept
            history.append(
                {
                    "customer_id": row.customer_id,
                    "interruption_id": row.id,
                    "version": row.version + 1,
                    "at": now,
                    "event": "drain_begun" if alive else "node_kept" if kept else "drain_not_needed",
                    "state": "open",
                    "detail": {"deadline_at": deadline},
                }
            )
            if alive:
                tasks.append(drain_task(row.id, _node(row), deadline, InterruptionAction(row.instance_action), now=now))
        await closing_repository.begin_drains(conn, changes)
        await repository.insert_history(conn, history)
        # A drain that failed before it was to wait may be tried again.
        await drafts_repository.retire_drains(conn, [task.interruption_id for task in tasks if task.interruption_id])
        await create_tasks(conn, tasks)
    for cluster_id in {task.cluster_id for task in tasks}:
        await runtime.bells.ring("tasks", cluster_id)
    return len(rows)


def _kept(kind: str, launch: str | None) -> bool:
    """A recommendation is a rumour: without a Ready replacement the node stays. What EC2 announced comes true."""
    return kind == EventKind.REBALANCE_RECOMMENDATION and launch != "ready"


def _node(row: Any) -> NodeFacts:
    return NodeFacts(
        customer_id=row.customer_id,
        cluster_id=row.cluster_id,
        node_id=row.node_id,
        node_name=row.node_name,
        instance_id=row.instance_id,
        instance_type=row.instance_type,
        availability_zone=row.availability_zone,
        node_type=row.node_type,
        region=row.region,
        last_seen_at=row.last_seen_at,
        terminated_at=row.terminated_at,
    )


async def settle_unmatched(runtime: Runtime) -> int:
    """Match warnings with nodes that registered since; close those nobody claimed within ten minutes."""
    now = runtime.db.now()
    async with runtime.db.system() as conn:
        rows = await repository.unmatched_to_settle(
            conn, closes_after_seconds=UNMATCHED_FOR.total_seconds(), limit=LIMIT
        )
        customers: dict[UUID, list[repository.InterruptionRow]] = defaultdict(list)
        for row in rows:
            customers[row.customer_id].append(row)
    settled = 0
    for customer_id, group in customers.items():
        settled += await _settle(runtime, customer_id, [row.id for row in group], now)
    return settled


async def _settle(runtime: Runtime, customer_id: UUID, ids: list[UUID], now: datetime) -> int:
    async with runtime.db.system() as conn:
        facts = await repository.customer_facts(conn, customer_id)
        if facts is None:
            return 0
        rows = await repository.lock_unmatched(conn, ids)
        batch = Batch(facts, now)
        done: Ingested = await batch.rematch(conn, rows)
        matched = set(batch.drafts.matched)
        over = [row for row in rows if row.id not in matched and close_unmatched(row.received_at, now)]
        await _close_unmatched(conn, customer_id, [row.id for row in over], now)
    await done.ring(runtime.bells)
    if over:
        metrics.CLOSED.labels("unmatched").inc(len(over))
        metrics.QUARANTINED.labels("unowned").inc(len(over))
    return done.new + len(over)


async def _close_unmatched(conn: AsyncConnection, customer_id: UUID, ids: list[UUID], now: datetime) -> None:
    if not ids:
        return
    reason = "no cluster has registered this instance within ten minutes"
    closed = await closing_repository.close_unmatched(conn, ids, reason=reason)
    await repository.insert_history(
        conn,
        [
            {
                "customer_id": row.customer_id,
                "interruption_id": row.id,
                "version": row.version,
                "at": now,
                "event": "closed",
                "state": "closed",
                "detail": {"outcome": "unmatched", "reason": reason},
            }
            for row in closed
        ],
    )
    await repository.release_waiting(
        conn, customer_id, ids, outcome="quarantined", reason=f"unowned: {reason}; replay it once the node is known"
    )
