"""The drain of an interrupted node, as a task for its agent."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from control.agents.repository import NewTask
from control.interruptions.policies import NodeFacts
from warehouse.contracts import InterruptionAction, TaskType

# Interruption work is served before everything else of equal deadline.
DRAIN_PRIORITY = 0
# Pods get their own grace up to here; what is left of the two minutes is for what ignores it.
GRACE_MARGIN_SECONDS = 20
MIN_GRACE_SECONDS = 5


def grace_seconds(deadline_at: datetime, action: InterruptionAction, *, now: datetime) -> int:
    """What pods get at most to end by themselves. Hibernation begins at once: hardly anything."""
    if action is InterruptionAction.HIBERNATE:
        return MIN_GRACE_SECONDS
    return int(max((deadline_at - now).total_seconds() - GRACE_MARGIN_SECONDS, MIN_GRACE_SECONDS))


def drain_task(
    interruption_id: UUID, node: NodeFacts, deadline_at: datetime, action: InterruptionAction, *, now: datetime
) -> NewTask:
    """The drain of an interrupted node: one per interruption, with what the agent must find there."""
    assert node.node_name is not None
    return NewTask(
        customer_id=node.customer_id,
        cluster_id=node.cluster_id,
        task_type=TaskType.DRAIN_NODE,
        parameters={
            "node_name": node.node_name,
            "instance_id": node.instance_id,
            "grace_seconds": grace_seconds(deadline_at, action, now=now),
            "force_at_deadline": True,
        },
        dedupe_key=f"drain:{interruption_id}",
        priority=DRAIN_PRIORITY,
        deadline_at=deadline_at,
        interruption_id=interruption_id,
    )
