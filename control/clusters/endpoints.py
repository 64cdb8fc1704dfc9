"""/clusters."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Response

from control.clusters import service
from control.clusters.schemas import (
    ClusterAnswer,
    ClusterChange,
    ClusterCreate,
    ClusterList,
    CostAnswer,
    CostHour,
    EventAnswer,
    EventList,
    KillSwitch,
    NewClusterAnswer,
    NodeAnswer,
    NodeList,
    StateAnswer,
)
from control.context import Context
from control.security.access import CUSTOMER_ADMINS, READERS, require
from control.security.principal import Principal

router = APIRouter(prefix="/clusters", tags=["clusters"])

Reader = Annotated[Principal, Depends(require(*READERS))]
Admin = Annotated[Principal, Depends(require(*CUSTOMER_ADMINS))]
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("")
async def list_clusters(
    principal: Reader, context: Context, customer_id: UUID | None = None, after: UUID | None = None, limit: Limit = 100
) -> ClusterList:
    """Clusters, in order of creation."""
    rows = await service.list_clusters(context, principal, customer_id, after, limit)
    return ClusterList(
        clusters=[ClusterAnswer.model_validate(row) for row in rows], next=rows[-1].id if len(rows) == limit else None
    )


@router.post("", status_code=201)
async def create_cluster(
    body: ClusterCreate, principal: Admin, context: Context, response: Response
) -> NewClusterAnswer:
    """Register a cluster. The answer holds its agent's key, this once."""
    response.headers["Cache-Control"] = "no-store"
    return await service.create_cluster(context, principal, body)


@router.get("/{cluster_id}")
async def get_cluster(cluster_id: UUID, principal: Reader, context: Context) -> ClusterAnswer:
    """One cluster."""
    return ClusterAnswer.model_validate(await service.get_cluster(context, principal, cluster_id))


@router.patch("/{cluster_id}")
async def change_cluster(cluster_id: UUID, body: ClusterChange, principal: Admin, context: Context) -> ClusterAnswer:
    """Change a cluster's name, Kubernetes endpoint, CA or token."""
    return ClusterAnswer.model_validate(await service.change_cluster(context, principal, cluster_id, body))


@router.delete("/{cluster_id}", status_code=204)
async def delete_cluster(cluster_id: UUID, principal: Admin, context: Context) -> None:
    """Take a cluster out of service: its secrets are destroyed, its agent's key is revoked, its history stays."""
    await service.delete_cluster(context, principal, cluster_id)


@router.get("/{cluster_id}/state")
async def get_state(cluster_id: UUID, principal: Reader, context: Context) -> StateAnswer:
    """The newest state its agent sent."""
    row = await service.get_state(context, principal, cluster_id)
    answer = StateAnswer.model_validate(
        {
            "cluster_id": row.id,
            "status": row.status,
            "last_seen_at": row.last_seen_at,
            "age_seconds": None,
            "state": row.state,
        }
    )
    if answer.state is not None:
        answer.age_seconds = (row.now - answer.state.captured_at).total_seconds()
    return answer


@router.get("/{cluster_id}/nodes")
async def list_nodes(
    cluster_id: UUID,
    principal: Reader,
    context: Context,
    ended: Annotated[bool, Query(description="also nodes that are gone")] = False,
    after: UUID | None = None,
    limit: Limit = 500,
) -> NodeList:
    """Its nodes with the newest known prices."""
    rows = await service.list_nodes(context, principal, cluster_id, ended=ended, after=after, limit=limit)
    return NodeList(
        nodes=[NodeAnswer.model_validate(row) for row in rows], next=rows[-1].id if len(rows) == limit else None
    )


@router.get("/{cluster_id}/events")
async def list_events(
    cluster_id: UUID, principal: Reader, context: Context, before: UUID | None = None, limit: Limit = 100
) -> EventList:
    """Events about it, newest first."""
    rows = await service.list_events(context, principal, cluster_id, before, limit)
    return EventList(
        events=[EventAnswer.model_validate(row) for row in rows], next=rows[-1].id if len(rows) == limit else None
    )


@router.get("/{cluster_id}/cost")
async def get_cost(
    cluster_id: UUID,
    principal: Reader,
    context: Context,
    hours: Annotated[int, Query(ge=1, le=24 * 92, description="how far back")] = 24,
) -> CostAnswer:
    """What it costs now, and what it cost by hour with its baseline."""
    now, rows, release = await service.get_cost(context, principal, cluster_id, hours)
    return CostAnswer(
        cluster_id=cluster_id, now=now, hours=[CostHour.model_validate(row) for row in rows], lake_release_id=release
    )


@router.post("/{cluster_id}/kill-switch")
async def kill_switch(cluster_id: UUID, body: KillSwitch, principal: Admin, context: Context) -> ClusterAnswer:
    """Stop plans, launches and every task that is no part of an interruption, or allow them again."""
    return ClusterAnswer.model_validate(await service.set_kill_switch(context, principal, cluster_id, body))
