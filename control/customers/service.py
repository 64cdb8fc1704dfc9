"""Onboarding, verification, configuration and off-boarding of customers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from control.clusters import repository as cluster_repository
from control.context import AppContext
from control.customers import registry, repository, templates, verification
from control.customers.schemas import (
    AdoptOnly,
    ConfigEntry,
    CustomerChange,
    CustomerCreate,
    CustomerDetail,
    InFlight,
    IntakeState,
    KillSwitchRequest,
    LiftAdoptOnly,
    Offboarding,
    VerifyAnswer,
)
from control.errors import Conflict, Forbidden, Invalid, NotFound
from control.interruptions.reconcilers import leaving_repository, refusals_repository
from control.security import audit
from control.security.outbound import check_url, parse_networks
from control.security.principal import Principal, Role
from warehouse.postgres.codec import Codec
from warehouse.postgres.models import new_id

DEFAULT_QUEUE_NAME = "cloudoptim-events"
SHOWN_CHARACTERS = 4


async def _require(conn: AsyncConnection, customer_id: UUID) -> Row:
    customer = await repository.get_customer(conn, customer_id)
    if customer is None:
        raise NotFound("customer")
    return customer


async def list_customers(context: AppContext, principal: Principal, after: UUID | None, limit: int) -> Sequence[Row]:
    """All customers, or the caller's own."""
    async with principal.scope(context.db) as conn:
        return await repository.list_customers(conn, after, limit)


async def get_customer(context: AppContext, principal: Principal, customer_id: UUID) -> CustomerDetail:
    """One customer with the health of its intake."""
    principal.customer(customer_id)
    async with principal.scope(context.db) as conn:
        customer = await _require(conn, customer_id)
        intake = await repository.intake_of(conn, customer_id)
        adopt_only = await repository.adopt_only_of(conn, customer_id)
        leaving = customer.status == "offboarding"
        in_flight = await leaving_repository.in_flight(conn, customer_id) if leaving else None
    return CustomerDetail(
        **customer._mapping,
        intake=[IntakeState.model_validate(detector) for detector in intake],
        adopt_only=AdoptOnly.model_validate(adopt_only) if adopt_only else None,
        in_flight=InFlight.model_validate(in_flight) if in_flight else None,
    )


async def _account(
    conn: AsyncConnection, context: AppContext, role_arn: str | None, queue_url: str | None, customer_id: UUID | None
) -> str | None:
    """The AWS account of a role, after checking that it may be this customer's.

    Raises:
        Invalid: our own account, or a queue of another account.
        Conflict: the account belongs to another customer.
    """
    account = verification.account_of(role_arn) if role_arn else None
    if queue_url is not None:
        try:
            queue = context.aws.queue(queue_url)
        except ValueError as error:
            raise Invalid(str(error)) from None
        if account is not None and queue.account_id != account:
            raise Invalid(
                "sqs_queue_url: belongs to another AWS account than aws_role_arn; register the account's own."
            )
    if account is None:
        return None
    if account == context.settings.aws_account_id:
        raise Invalid("aws_role_arn: is a role of this server's own account; give a role of the customer's account.")
    if await repository.account_taken(conn, account, customer_id):
        raise Conflict("aws_role_arn: this AWS account is registered already; an account belongs to one customer.")
    return account


async def create_customer(context: AppContext, principal: Principal, body: CustomerCreate) -> Row:
    """Register a customer. Its external id is random and never changes.

    Raises:
        Invalid, Conflict: as of the account check.
    """
    customer_id = new_id()
    async with context.db.system() as conn:
        account = await _account(conn, context, body.aws_role_arn, body.sqs_queue_url, None)
        customer = await repository.insert_customer(
            conn,
            {
                **body.model_dump(),
                "id": customer_id,
                "aws_account_id": account,
                "external_id": uuid4(),
                "data_key": context.codec.new_data_key(customer_id),
            },
        )
        await audit.record(
            conn,
            customer_id=customer_id,
            actor=principal.actor,
            action="customer.created",
            subject=str(customer_id),
            detail={"company_name": body.company_name, "aws_role_arn": body.aws_role_arn},
        )
    return customer


async def change_customer(context: AppContext, principal: Principal, customer_id: UUID, body: CustomerChange) -> Row:
    """Change a customer. A new role or queue makes it ``pending`` until it is verified."""
    changes: dict[str, Any] = body.model_dump(exclude_none=True, exclude={"suspended"})
    async with context.db.system() as conn:
        customer = await _require(conn, customer_id)
        if body.aws_role_arn or body.sqs_queue_url:
            role_arn = body.aws_role_arn or customer.aws_role_arn
            queue_url = body.sqs_queue_url or customer.sqs_queue_url
            changes["aws_account_id"] = await _account(conn, context, role_arn, queue_url, customer_id)
            changes["status"] = "pending"
        if customer.status == "offboarding":
            # A role that works again may help to end what is left; nothing else begins anew.
            if body.suspended is not None:
                raise Conflict("The customer is being off-boarded.")
            changes.pop("status", None)
            await refusals_repository.ask_now(conn, customer_id)
        elif body.suspended is not None:
            changes["status"] = "suspended" if body.suspended else "pending"
        if not changes:
            return customer
        changed = await repository.update_customer(conn, customer_id, changes)
        await audit.record(
            conn,
            customer_id=customer_id,
            actor=principal.actor,
            action="customer.changed",
            subject=str(customer_id),
            detail={"fields": sorted(changes), "aws_role_arn": body.aws_role_arn},
        )
    context.authenticator.forget()
    assert changed is not None
    return changed


async def offboard_customer(
    context: AppContext, principal: Principal, customer_id: UUID, *, leave_behind: bool = False
) -> Offboarding | None:
    """Destroy the customer's secrets and begin nothing more for it; None when nothing is in flight (any more).

    What is in flight is finished or ended first, with the customer's role: unanswered launches, replacements that are
    no Ready node yet, running plans. Asked again, what was refused is tried at once. With ``leave_behind`` the role is
    given up whatever is left; the audit log names it.
    """
    async with context.db.system() as conn:
        customer = await _require(conn, customer_id)
        if customer.status != "offboarding":
            await repository.begin_offboarding(conn, customer_id)
        await refusals_repository.ask_now(conn, customer_id)
        await leaving_repository.stop_plans(conn)
        left = await leaving_repository.in_flight(conn, customer_id)
        finished = left.nothing or leave_behind
        if finished:
            await leaving_repository.give_up_role(conn, customer_id)
        await audit.record(
            conn,
            customer_id=customer_id,
            actor=principal.actor,
            action="customer.offboarded" if finished else "customer.offboarding",
            subject=str(customer_id),
            detail={"company_name": customer.company_name}
            | ({} if left.nothing else {"left_behind" if finished else "in_flight": left.as_dict()}),
        )
    context.authenticator.forget()
    return None if finished else Offboarding(status="offboarding", in_flight=InFlight.model_validate(left))


async def lift_adopt_only(
    context: AppContext, principal: Principal, customer_id: UUID, body: LiftAdoptOnly
) -> CustomerDetail:
    """Allow terminations again for a customer whose launches the database had not heard of.

    Raises:
        Conflict: they are allowed.
    """
    async with context.db.system() as conn:
        await _require(conn, customer_id)
        await lift(conn, customer_id, actor=principal.actor, reason=body.reason)
    return await get_customer(context, principal, customer_id)


async def lift(conn: AsyncConnection, customer_id: UUID, *, actor: str, reason: str) -> None:
    """Lift a customer's adopt-only state, with who did it and why in its audit log.

    Raises:
        Conflict: it is not in that state.
    """
    found = await repository.adopt_only_of(conn, customer_id)
    if found is None or not await repository.lift_adopt_only(conn, customer_id):
        raise Conflict("Nothing is held back: instances of this customer are terminated as usual.")
    await audit.record(
        conn,
        customer_id=customer_id,
        actor=actor,
        action="customer.adopt_only_lifted",
        subject=str(customer_id),
        detail={"reason": reason, "was": found.reason, "since": found.since.isoformat(), "adopted": found.instances},
    )


async def set_kill_switch(context: AppContext, principal: Principal, customer_id: UUID, body: KillSwitchRequest) -> Row:
    """Stop, or allow again, everything but interruption work in all clusters of a customer."""
    principal.customer(customer_id)
    async with principal.scope(context.db) as conn:
        await _require(conn, customer_id)
        changed = await repository.update_customer(conn, customer_id, {"kill_switch": body.engaged})
        await audit.record(
            conn,
            customer_id=customer_id,
            actor=principal.actor,
            action="customer.kill_switch",
            subject=str(customer_id),
            detail={"engaged": body.engaged, "reason": body.reason},
        )
    await context.bells.ring("plans")
    assert changed is not None
    return changed


async def verify_customer(context: AppContext, principal: Principal, customer_id: UUID) -> VerifyAnswer:
    """Probe role and queue; all well makes the customer ``active``.

    Anything else leaves it ``pending``, or makes it ``degraded`` when it was verified before: its queue is read on and
    its instances are watched on, for the trouble may be over by itself. Only a new role or queue makes it ``pending``.
    """
    principal.customer(customer_id)
    async with principal.scope(context.db) as conn:
        customer = await _require(conn, customer_id)
    if customer.status == "suspended":
        raise Conflict("The customer is suspended; lift the suspension before verifying.")
    # No transaction is held while AWS is asked.
    checks = await verification.probe(
        context.aws,
        customer_id=customer_id,
        role_arn=customer.aws_role_arn,
        external_id=customer.external_id,
        queue_url=customer.sqs_queue_url,
        region=context.settings.aws_region,
    )
    ok = all(check.ok for check in checks)
    async with principal.scope(context.db) as conn:
        current = await _require(conn, customer_id)
        unchanged = (current.aws_role_arn, current.sqs_queue_url) == (customer.aws_role_arn, customer.sqs_queue_url)
        if not unchanged:
            raise Conflict("The customer's role or queue was changed meanwhile; verify again.")
        if current.status == "suspended":
            raise Conflict("The customer was suspended meanwhile; lift the suspension before verifying.")
        failed_status = "degraded" if current.status in ("active", "degraded") else "pending"
        status = "active" if ok else failed_status
        if current.status == "offboarding":
            status = "offboarding"
        if ok:
            # What the account refused is asked for again at once.
            await refusals_repository.ask_now(conn, customer_id)
        await repository.update_customer(conn, customer_id, {"status": status})
        await audit.record(
            conn,
            customer_id=customer_id,
            actor=principal.actor,
            action="customer.verified",
            subject=str(customer_id),
            detail={"ok": ok, "failed": [check.name for check in checks if not check.ok]},
        )
    queue_name = customer.sqs_queue_url.rstrip("/").rsplit("/", 1)[-1] if customer.sqs_queue_url else DEFAULT_QUEUE_NAME
    trust = templates.trust_policy(context.settings.aws_account_id, customer.external_id)
    permissions = templates.iam_policy(customer.aws_account_id, queue_name, context.settings.deployment_id)
    return VerifyAnswer(
        ok=ok,
        status=status,
        checks=checks,
        trust_policy=trust,
        iam_policy=permissions,
        cloudformation=templates.cloudformation(trust, permissions, queue_name),
        terraform=templates.terraform(trust, permissions, queue_name),
    )


# --- configuration


async def list_config(context: AppContext, principal: Principal, customer_id: UUID) -> list[ConfigEntry]:
    """Every key with the customer's value or the default."""
    principal.customer(customer_id)
    async with principal.scope(context.db) as conn:
        await _require(conn, customer_id)
        rows = await repository.list_config(conn, customer_id)
    return [_entry(key, rows.get(key.name)) for key in registry.REGISTRY.values()]


async def get_config(context: AppContext, principal: Principal, customer_id: UUID, name: str) -> ConfigEntry:
    """One key with the customer's value or the default."""
    principal.customer(customer_id)
    key = registry.find(name)
    async with principal.scope(context.db) as conn:
        await _require(conn, customer_id)
        rows = await repository.list_config(conn, customer_id)
    return _entry(key, rows.get(name))


async def put_config(
    context: AppContext, principal: Principal, customer_id: UUID, name: str, value: Any
) -> ConfigEntry:
    """Set a key after validation.

    Raises:
        Invalid: an unknown key or a value of the wrong shape; says which part and why.
        Forbidden: a key that only the platform sets.
    """
    principal.customer(customer_id)
    key = _settable(principal, name)
    stored = key.validate(value)
    if key.secret:
        for channel in stored:
            if channel["url"].startswith(("http://", "https://")):
                await check_url(channel["url"], field=name, allow=parse_networks(context.settings.outbound_allow))
    async with principal.scope(context.db) as conn:
        await _require(conn, customer_id)
        if key.secret:
            stored = await _seal_channels(conn, context, customer_id, stored)
        row = await repository.put_config(conn, customer_id, name, stored)
        await audit.record(
            conn,
            customer_id=customer_id,
            actor=principal.actor,
            action="config.changed",
            subject=name,
            detail={} if key.secret else {"value": stored},
        )
    return _entry(key, row)


async def delete_config(context: AppContext, principal: Principal, customer_id: UUID, name: str) -> None:
    """Return a key to its default."""
    principal.customer(customer_id)
    _settable(principal, name)
    async with principal.scope(context.db) as conn:
        await _require(conn, customer_id)
        if not await repository.delete_config(conn, customer_id, name):
            raise NotFound("configured value")
        await audit.record(
            conn,
            customer_id=customer_id,
            actor=principal.actor,
            action="config.removed",
            subject=name,
        )


def _settable(principal: Principal, name: str) -> registry.Key:
    key = registry.find(name)
    if name in registry.PLATFORM_KEYS and principal.role != Role.PLATFORM_ADMIN:
        raise Forbidden(f"{name}: is set by the platform only.")
    return key


def _entry(key: registry.Key, row: Row | None) -> ConfigEntry:
    value = key.default if row is None else row.config_value
    if key.secret and row is not None:
        value = [
            {"name": channel["name"], "url": f"…{channel['shown']}", "kinds": channel["kinds"]} for channel in value
        ]
    return ConfigEntry(
        key=key.name,
        value=value,
        configured=row is not None,
        updated_at=row.updated_at if row is not None else None,
        description=key.description,
        value_schema=key.adapter.json_schema(),
    )


async def _seal_channels(
    conn: AsyncConnection, context: AppContext, customer_id: UUID, channels: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    data_key = await cluster_repository.data_key_of(conn, customer_id)
    if data_key is None:
        await cluster_repository.set_data_key(conn, customer_id, context.codec.new_data_key(customer_id))
        data_key = await cluster_repository.data_key_of(conn, customer_id)
        assert data_key is not None
    return [
        {
            "name": channel["name"],
            "kinds": channel["kinds"],
            "shown": channel["url"][-SHOWN_CHARACTERS:],
            "sealed": base64.b64encode(
                context.codec.encrypt(
                    channel["url"], data_key=bytes(data_key), customer_id=customer_id, **_place(channel["name"])
                )
            ).decode(),
        }
        for channel in channels
    ]


def _place(channel: str) -> dict[str, str]:
    return {"table": "customer_config", "column": "notification_channels", "row": channel}


def open_channels(
    codec: Codec, *, customer_id: UUID, data_key: bytes, value: list[dict[str, Any]]
) -> list[registry.Channel]:
    """The channels of a stored ``notification_channels`` value with their addresses, for whoever delivers."""
    return [
        registry.Channel(
            name=channel["name"],
            kinds=channel["kinds"],
            url=codec.decrypt(
                base64.b64decode(channel["sealed"]),
                data_key=data_key,
                customer_id=customer_id,
                **_place(channel["name"]),
            ),
        )
        for channel in value
    ]
