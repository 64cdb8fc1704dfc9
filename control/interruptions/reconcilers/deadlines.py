"""Leases that ran out go back to the queue; tasks and launches past their deadline end (C-18, C-23)."""

from __future__ import annotations

from control.agents.repository import expire_overdue_tasks, requeue_expired_leases
from control.interruptions.moving import apply_events
from control.interruptions.reconcilers import replacements_repository
from control.interruptions.runtime import Runtime
from control.interruptions.states import NoCandidate

# A lease is 15 s; takeover within 20 s needs a look every 5.
INTERVAL_SECONDS = 5.0
LIMIT = 1000


async def run_once(runtime: Runtime) -> int:
    """One sweep; returns how many rows moved."""
    async with runtime.db.system() as conn:
        requeued = await requeue_expired_leases(conn, limit=LIMIT)
        expired = await expire_overdue_tasks(conn, limit=LIMIT)
        overdue = await replacements_repository.overdue_intents(conn, limit=LIMIT)
    for cluster_id in {task.cluster_id for task in requeued}:
        await runtime.bells.ring("tasks", cluster_id)
    if expired:
        await runtime.bells.ring("interruptions")
    late = {
        intent_id: NoCandidate(
            "the window for a replacement closed before one was launched" + (f"; {reason}" if reason else "")
        )
        for intent_id, reason in overdue.items()
    }
    return len(requeued) + len(expired) + await apply_events(runtime, late)
