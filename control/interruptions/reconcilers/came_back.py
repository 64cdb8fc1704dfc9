"""Nodes that EC2 stopped or hibernated and brought back: they are cordoned since their drain, and take pods again."""

from __future__ import annotations

from control.agents.repository import NewTask, create_tasks
from control.interruptions.reconcilers import repository
from control.interruptions.runtime import Runtime
from warehouse.contracts import TaskType

INTERVAL_SECONDS = 10.0
LIMIT = 200


async def run_once(runtime: Runtime) -> int:
    """Give nodes back that are Ready again after their interruption was over; returns how many."""
    async with runtime.db.system() as conn:
        rows = await repository.nodes_that_came_back(conn, limit=LIMIT)
        await create_tasks(
            conn,
            [
                NewTask(
                    customer_id=row.customer_id,
                    cluster_id=row.cluster_id,
                    task_type=TaskType.UNCORDON_NODE,
                    parameters={"node_name": row.node_name, "instance_id": row.instance_id},
                    dedupe_key=f"uncordon:{row.interruption_id}",
                )
                for row in rows
            ],
        )
    for cluster_id in {row.cluster_id for row in rows}:
        await runtime.bells.ring("tasks", cluster_id)
    return len(rows)
