"""/interruptions, /quarantine and /events/aws."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request

from control.context import Context
from control.interruptions import views
from control.interruptions.schemas import (
    InterruptionDetail,
    InterruptionList,
    Pushed,
    QuarantinedMessage,
    QuarantineList,
    RebalanceScores,
    Replayed,
    ReplayedMany,
    ReplayMany,
    Returns,
)
from control.security.access import CUSTOMER_ADMINS, PUSHERS, READERS, require
from control.security.principal import Principal

router = APIRouter(tags=["interruptions"])

Reader = Annotated[Principal, Depends(require(*READERS))]
Admin = Annotated[Principal, Depends(require(*CUSTOMER_ADMINS))]
Pusher = Annotated[Principal, Depends(require(*PUSHERS, intake=True))]
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("/interruptions")
async def list_interruptions(
    principal: Reader,
    context: Context,
    customer_id: UUID | None = None,
    cluster_id: UUID | None = None,
    state: Literal["unmatched", "open", "closed"] | None = None,
    since: datetime | None = None,
    before: UUID | None = None,
    limit: Limit = 100,
) -> InterruptionList:
    """Interruptions with their timelines against the deadline, newest first."""
    found = await views.list_interruptions(
        context.db,
        principal,
        customer_id=customer_id,
        cluster_id=cluster_id,
        state=state,
        since=since,
        before=before,
        limit=limit,
    )
    return InterruptionList(interruptions=found, next=found[-1].id if len(found) == limit else None)


@router.get("/interruptions/rebalance-scores")
async def rebalance_scores(
    principal: Reader,
    context: Context,
    customer_id: UUID | None = None,
    days: Annotated[int, Query(ge=1, le=365)] = 30,
) -> RebalanceScores:
    """Per pool: of the rebalance recommendations, how many an interruption followed within 30 minutes."""
    pools = await views.rebalance_scores(context.db, principal, customer_id=customer_id, days=days)
    return RebalanceScores(days=days, pools=pools)


@router.get("/interruptions/returns-to-spot")
async def returns_to_spot(
    principal: Reader, context: Context, customer_id: UUID | None = None, limit: Limit = 100
) -> Returns:
    """On-Demand nodes in the place of interrupted Spot nodes, with what keeps each of them from going back; and the
    returns so far with the evidence they were begun on."""
    return await views.returns_to_spot(context.db, principal, customer_id=customer_id, limit=limit)


@router.get("/interruptions/{interruption_id}")
async def get_interruption(interruption_id: UUID, principal: Reader, context: Context) -> InterruptionDetail:
    """One interruption: timeline, history, launch attempts and the events that were about it."""
    return await views.get_interruption(context.db, principal, interruption_id)


@router.get("/quarantine")
async def list_quarantine(
    principal: Reader,
    context: Context,
    customer_id: UUID | None = None,
    before: str | None = None,
    limit: Limit = 100,
) -> QuarantineList:
    """Messages that were not acted on, each with the reason, newest first. ``before`` is a time, or the ``next`` of the
    page before."""
    found = await views.list_quarantine(context.db, principal, customer_id=customer_id, before=before, limit=limit)
    return QuarantineList(messages=found, next=views.place(found[-1]) if len(found) == limit else None)


@router.get("/quarantine/{message_id}")
async def get_quarantined(message_id: str, principal: Reader, context: Context) -> QuarantinedMessage:
    """One message in quarantine with its whole body."""
    return await views.get_quarantined(context.db, principal, message_id)


@router.post("/quarantine/replay")
async def replay_many(body: ReplayMany, principal: Admin, context: Context) -> ReplayedMany:
    """Read again what is in quarantine for one reason, those first that were not replayed yet, then the oldest; each
    message for itself. A platform key says whose."""
    return await views.replay_many(context.intake_db, context.bells, context.aws, principal, body)


@router.post("/quarantine/{message_id}/replay")
async def replay(message_id: str, principal: Admin, context: Context) -> Replayed:
    """Read a message in quarantine again, with what is known by now and under the checks of its first reading. A
    second call for a message that was replayed with success changes nothing and answers the same."""
    return await views.replay(context.intake_db, context.bells, context.aws, principal, message_id)


@router.post("/events/aws", status_code=202)
async def push_event(request: Request, principal: Pusher, context: Context) -> Pushed:
    """One EventBridge event from an API destination: the same intake as the customer's queue. A key of the role
    `event_pusher` may do this and nothing else. Deliver it again until
    the answer is 2xx; a second delivery changes nothing."""
    return Pushed(outcome=await views.push(context.intake_db, context.bells, principal, await request.body()))
