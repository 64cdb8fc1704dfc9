"""/client: what agents call. Every key is bound to one cluster."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from control.agents import service
from control.agents.schemas import Events, EventsAnswer, MetricsAnswer, ResultAnswer
from control.context import Context
from control.errors import UnsupportedMedia
from control.security.access import AGENTS, require
from control.security.principal import Principal
from warehouse.contracts import TaskList, TaskResult

router = APIRouter(prefix="/client", tags=["agents"])

Agent = Annotated[Principal, Depends(require(*AGENTS))]
EventAgent = Annotated[Principal, Depends(require(*AGENTS, intake=True))]


def _agent_version(user_agent: str | None) -> str | None:
    """``cloudoptim-agent/1.2.3`` says which version asks."""
    name, _, version = (user_agent or "").partition("/")
    return version.split(" ")[0][:64] or None if name == "cloudoptim-agent" else None


@router.get("/tasks")
async def get_tasks(
    request: Request,
    principal: Agent,
    context: Context,
    cluster_id: UUID,
    wait: Annotated[float, Query(ge=0, le=service.MAX_WAIT_SECONDS, description="seconds to wait for a task")] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    understands: Annotated[
        str, Query(max_length=1000, description="task types, separated by commas; all when empty")
    ] = "",
    user_agent: Annotated[str | None, Header()] = None,
) -> TaskList:
    """Lease tasks, the earliest deadline first; a long poll of up to 25 s.

    A lease lasts 15 s and is extended by reporting `running`. One that was never reported on is given to the same key
    again after a second, under the same epoch: that is how a lost answer is made good. So is,
    once and at once, one whose deadline has come nearer: its holder takes the new deadline and goes on.
    """
    tasks = await service.wait_for_tasks(
        context,
        principal,
        cluster_id=cluster_id,
        wait=wait,
        understands=service.understood(understands),
        limit=limit,
        version=_agent_version(user_agent),
        gone=request.is_disconnected,
    )
    return TaskList(tasks=tasks)


@router.post("/tasks/{task_id}/result")
async def post_result(task_id: UUID, body: TaskResult, principal: Agent, context: Context) -> ResultAnswer:
    """Report on a task. `running` extends the lease, anything else ends the task; 409 `stale_lease` when the lease
    went to somebody else. The answer tells the task's deadline: it may be earlier than it was when leased."""
    outcome = service.refuse_stale(await service.report(context, principal, task_id, body))
    return ResultAnswer(
        task_id=task_id,
        state=outcome.state,
        applied=outcome.applied,
        lease_until=outcome.lease_until,
        deadline=outcome.deadline_at,
    )


@router.post(
    "/metrics",
    response_model=MetricsAnswer,
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "A batch of at most 5,000 samples; `Content-Encoding: zstd` or `gzip` is read.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/MetricsData"}}},
        }
    },
)
async def post_metrics(request: Request, principal: Agent, context: Context) -> Response:
    """Take in a batch; the answer is given after the commit. A repeated batch gets its first answer again."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedMedia("Content-Type: send application/json.")
    answer = await service.take_metrics(context, principal, await request.body())
    return Response(answer, media_type="application/json")


@router.post("/events")
async def post_events(body: Events, principal: EventAgent, context: Context) -> EventsAnswer:
    """Hand in events seen on nodes: interruption notices, rebalance recommendations, state changes."""
    ingested, rejected = await service.take_events(context, principal, body)
    return EventsAnswer(
        accepted=ingested.new,
        duplicate=ingested.duplicates,
        rejected=rejected,
        interruptions=sorted(ingested.interruptions),
    )
