"""/customers and their configuration."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse, Response

from control.context import Context
from control.customers import service
from control.customers.schemas import (
    ConfigEntry,
    ConfigList,
    ConfigValue,
    CustomerAnswer,
    CustomerChange,
    CustomerCreate,
    CustomerDetail,
    CustomerList,
    KillSwitchRequest,
    LiftAdoptOnly,
    Offboarding,
    VerifyAnswer,
)
from control.security.access import ADMINS, CUSTOMER_ADMINS, READERS, require
from control.security.principal import Principal

router = APIRouter(prefix="/customers", tags=["customers"])

Reader = Annotated[Principal, Depends(require(*READERS))]
CustomerAdmin = Annotated[Principal, Depends(require(*CUSTOMER_ADMINS))]
Admin = Annotated[Principal, Depends(require(*ADMINS))]


@router.get("")
async def list_customers(
    principal: Reader,
    context: Context,
    after: UUID | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> CustomerList:
    """Customers, in order of creation; one's own for people of a customer."""
    rows = await service.list_customers(context, principal, after, limit)
    return CustomerList(
        customers=[CustomerAnswer.model_validate(row) for row in rows], next=rows[-1].id if len(rows) == limit else None
    )


@router.post("", status_code=201)
async def create_customer(body: CustomerCreate, principal: Admin, context: Context) -> CustomerAnswer:
    """Register a customer. The answer holds the external id for its role's trust policy; see `/verify`."""
    return CustomerAnswer.model_validate(await service.create_customer(context, principal, body))


@router.get("/{customer_id}")
async def get_customer(customer_id: UUID, principal: Reader, context: Context) -> CustomerDetail:
    """One customer with the health of its event intake."""
    return await service.get_customer(context, principal, customer_id)


@router.patch("/{customer_id}")
async def change_customer(
    customer_id: UUID, body: CustomerChange, principal: Admin, context: Context
) -> CustomerAnswer:
    """Change a customer; a new role or queue has to be verified again."""
    return CustomerAnswer.model_validate(await service.change_customer(context, principal, customer_id, body))


@router.delete("/{customer_id}", status_code=204, responses={202: {"model": Offboarding}})
async def offboard_customer(
    customer_id: UUID, principal: Admin, context: Context, leave_behind: bool = False
) -> Response:
    """Off-board a customer: its secrets are destroyed and nothing more is begun, at once.

    204: done. 202: launches and replacements are in flight; they are finished or ended with the customer's role, which
    is given up after that, and `GET` shows what is left. Ask again to try at once what the account refused, or with
    `leave_behind` to give the role up whatever still bills. Ready nodes stay the customer's."""
    left = await service.offboard_customer(context, principal, customer_id, leave_behind=leave_behind)
    if left is None:
        return Response(status_code=204)
    return JSONResponse(left.model_dump(mode="json"), status_code=202)


@router.post("/{customer_id}/adopt-only/lift")
async def lift_adopt_only(customer_id: UUID, body: LiftAdoptOnly, principal: Admin, context: Context) -> CustomerDetail:
    """Terminate instances of this customer again, after its account had launches the database never heard of (it was
    restored from a backup). Those that were adopted stay."""
    return await service.lift_adopt_only(context, principal, customer_id, body)


@router.post("/{customer_id}/verify")
async def verify_customer(customer_id: UUID, principal: CustomerAdmin, context: Context) -> VerifyAnswer:
    """Probe the role with and without its external id, the queue and EC2; answers what to apply where one fails."""
    return await service.verify_customer(context, principal, customer_id)


@router.post("/{customer_id}/kill-switch")
async def kill_switch(
    customer_id: UUID, body: KillSwitchRequest, principal: CustomerAdmin, context: Context
) -> CustomerAnswer:
    """Stop plans, launches and every task that is no part of an interruption in all clusters, or allow them again."""
    return CustomerAnswer.model_validate(await service.set_kill_switch(context, principal, customer_id, body))


@router.get("/{customer_id}/config")
async def list_config(customer_id: UUID, principal: Reader, context: Context) -> ConfigList:
    """Every configuration key with its value or default, meaning and schema."""
    return ConfigList(config=await service.list_config(context, principal, customer_id))


@router.get("/{customer_id}/config/{key}")
async def get_config(customer_id: UUID, key: str, principal: Reader, context: Context) -> ConfigEntry:
    """One configuration key."""
    return await service.get_config(context, principal, customer_id, key)


@router.put("/{customer_id}/config/{key}")
async def put_config(
    customer_id: UUID, key: str, body: ConfigValue, principal: CustomerAdmin, context: Context
) -> ConfigEntry:
    """Set a configuration key."""
    return await service.put_config(context, principal, customer_id, key, body.value)


@router.delete("/{customer_id}/config/{key}", status_code=204)
async def delete_config(customer_id: UUID, key: str, principal: CustomerAdmin, context: Context) -> None:
    """Return a configuration key to its default."""
    await service.delete_config(context, principal, customer_id, key)
