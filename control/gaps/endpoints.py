"""Gap filler: what is missing, and filling it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, status

from control.context import Context
from control.gaps import service
from control.gaps.schemas import FillableTable, FillList, FillOut, FillRequest, GapsAnswer
from control.gateways.dagster import DagsterGateway
from control.security.access import ADMINS, require
from control.security.principal import Principal

router = APIRouter(prefix="/admin/gap-filler", tags=["gap filler"])

Admin = Annotated[Principal, Depends(require(*ADMINS))]


async def get_dagster(context: Context) -> AsyncIterator[DagsterGateway]:
    """Dagster's webserver, for one request."""
    gateway = DagsterGateway(context.settings.dagster_url)
    try:
        yield gateway
    finally:
        await gateway.close()


Dagster = Annotated[DagsterGateway, Depends(get_dagster)]


@router.get("/gaps", response_model=GapsAnswer)
async def list_gaps(
    principal: Admin,
    context: Context,
    lookback_days: Annotated[int, Query(ge=1, le=3650)] = 90,
    model_id: UUID | None = None,
    table_name: FillableTable | None = None,
    series: Annotated[str | None, Query(max_length=128)] = None,
    state: Literal["open", "filling", "filled", "unfillable"] | None = None,
    limit: Annotated[int, Query(ge=1, le=5_000)] = 500,
) -> dict[str, Any]:
    """What is missing in the lookback, or in a model's training window, with coverage by day."""
    return await service.list_gaps(
        context.db,
        principal,
        now=service.utcnow(),
        lookback_days=lookback_days,
        model_id=model_id,
        table_name=table_name,
        series=series,
        state=state,
        limit=limit,
    )


@router.post("/fill", response_model=FillOut, status_code=status.HTTP_202_ACCEPTED)
async def start_fill(request: FillRequest, principal: Admin, context: Context, dagster: Dagster) -> dict[str, Any]:
    """Fill gaps: one run for consecutive days of one region, a Dagster backfill for any other set."""
    return await service.start_fill(
        context.db,
        dagster,
        principal,
        table_name=request.table_name,
        partitions=request.partitions,
        gap_ids=request.gap_ids,
    )


@router.get("/fills", response_model=FillList)
async def list_fills(
    principal: Admin, context: Context, limit: Annotated[int, Query(ge=1, le=500)] = 50
) -> dict[str, Any]:
    """The newest fills."""
    return {"fills": await service.list_fills(context.db, principal, limit=limit)}


@router.get("/{fill_id}", response_model=FillOut)
async def get_fill(fill_id: UUID, principal: Admin, context: Context, dagster: Dagster) -> dict[str, Any]:
    """Progress of a fill; when it has ended its summary: records filled, sources used, duration, gaps left."""
    return await service.get_fill(context.db, dagster, principal, fill_id)


@router.post("/{fill_id}/cancel", response_model=FillOut)
async def cancel_fill(fill_id: UUID, principal: Admin, context: Context, dagster: Dagster) -> dict[str, Any]:
    """Stop a fill; what it wrote stays."""
    return await service.cancel_fill(context.db, dagster, principal, fill_id)


@router.post("/{fill_id}/resume", response_model=FillOut, status_code=status.HTTP_202_ACCEPTED)
async def resume_fill(fill_id: UUID, principal: Admin, context: Context, dagster: Dagster) -> dict[str, Any]:
    """Take up a failed or cancelled fill with the partitions that are still missing."""
    return await service.resume_fill(context.db, dagster, principal, fill_id)
