"""What people see of interruptions, and the replay of messages in quarantine."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row

from control.bus.bells import Bells
from control.errors import Invalid, NotFound
from control.gateways.aws import AwsGateway
from control.interruptions import replaying, return_repository, returning, service, taking, views_repository
from control.interruptions.schemas import (
    AttemptAnswer,
    DrainAnswer,
    HistoryEntry,
    InterruptionAnswer,
    InterruptionDetail,
    QuarantinedMessage,
    RebalanceScore,
    Replacement,
    Replayed,
    ReplayedMany,
    ReplayMany,
    ReturnCheck,
    ReturnPlan,
    Returns,
    SignalAnswer,
    StandInAnswer,
    Step,
)
from control.security.principal import Principal
from warehouse.postgres.session import Database


async def list_interruptions(db: Database, principal: Principal, **filters: Any) -> list[InterruptionAnswer]:
    """Interruptions the caller may see, newest first.

    Raises:
        NotFound: the filter names another customer.
    """
    if filters.get("customer_id") is not None:
        principal.customer(filters["customer_id"])
    async with principal.scope(db) as conn:
        rows = await views_repository.list_interruptions(conn, **filters)
    return [_answer(row) for row in rows]


async def get_interruption(db: Database, principal: Principal, interruption_id: UUID) -> InterruptionDetail:
    """One interruption with its history.

    Raises:
        NotFound: none, or another customer's.
    """
    async with principal.scope(db) as conn:
        rows = await views_repository.list_interruptions(conn, id=interruption_id, limit=1)
        if not rows:
            raise NotFound("interruption")
        history = await views_repository.history(conn, interruption_id)
        attempts = await views_repository.attempts(conn, interruption_id)
        drains = await views_repository.drains(conn, interruption_id)
        events = await views_repository.events(conn, interruption_id)
    return InterruptionDetail(
        **_answer(rows[0]).model_dump(),
        history=[HistoryEntry.model_validate(row) for row in history],
        attempts=[AttemptAnswer.model_validate(row) for row in attempts],
        drains=[DrainAnswer.model_validate(row) for row in drains],
        events=[SignalAnswer.model_validate(row) for row in events],
    )


def timeline(notice_at: datetime, deadline_at: datetime, steps: Sequence[tuple[str, datetime | None]]) -> list[Step]:
    """Steps with their distance from the notice and to the deadline, in the order given."""
    return [
        Step(
            step=name,
            at=at,
            seconds_after_notice=(at - notice_at).total_seconds() if at else None,
            seconds_left=(deadline_at - at).total_seconds() if at else None,
        )
        for name, at in steps
    ]


def _answer(row: Row) -> InterruptionAnswer:
    values = dict(row._mapping)
    replacement = None
    if row.launch_state is not None:
        replacement = Replacement(
            state=row.launch_state,
            reason=row.launch_reason,
            decided_by=row.decided_by,
            attempts=row.attempts,
            instance_id=row.replacement_instance_id,
            instance_type=row.replacement_instance_type,
            availability_zone=row.replacement_zone,
            node_type=row.replacement_node_type,
            price_usd_per_hour=row.replacement_price,
        )
    steps = [
        ("warning", row.notice_at),
        ("task_created", row.task_created_at),
        ("task_in_agents_hands", row.first_leased_at),
        ("cordoned", row.cordoned_at),
        ("replacement_launched", row.launched_at),
        ("replacement_ready", row.ready_at),
        ("drained", row.drain_finished_at if row.drain_state == "done" else None),
        ("closed", row.closed_at),
    ]
    known = {name: values[name] for name in InterruptionAnswer.model_fields if name in values}
    return InterruptionAnswer(
        **known, replacement=replacement, timeline=timeline(row.notice_at, row.deadline_at, steps)
    )


async def rebalance_scores(
    db: Database, principal: Principal, *, customer_id: UUID | None, days: int
) -> list[RebalanceScore]:
    """How often a rebalance recommendation was followed by an interruption within 30 minutes, per pool."""
    if customer_id is not None:
        principal.customer(customer_id)
    async with principal.scope(db) as conn:
        rows = await views_repository.rebalance_scores(conn, customer_id=customer_id, days=days, limit=500)
    return [
        RebalanceScore(**row._mapping, precision=row.interrupted_within_30_minutes / row.recommendations)
        for row in rows
    ]


async def returns_to_spot(db: Database, principal: Principal, *, customer_id: UUID | None, limit: int) -> Returns:
    """Stand-ins with the rule's verdict as of now, and the plans so far."""
    if customer_id is not None:
        principal.customer(customer_id)
    async with principal.scope(db) as conn:
        found = await returning.judged(conn, db.now(), customer_id=customer_id)
        plans = await return_repository.plans(conn, customer_id=customer_id, limit=limit)
    return Returns(
        waiting=[
            StandInAnswer(
                customer_id=one.row.customer_id,
                cluster_id=one.row.id,
                instance_id=one.node.instance_id,
                instance_type=one.node.instance_type,
                availability_zone=one.node.availability_zone,
                usd_per_hour=one.node.usd_per_hour,
                ready_at=one.node.ready_at,
                spot_instance_type=one.verdict.pool.instance_type if one.verdict.pool else None,
                spot_usd_per_hour=one.verdict.pool.price_usd_per_hour if one.verdict.pool else None,
                goes=one.verdict.go,
                checks=[ReturnCheck.model_validate(check) for check in one.verdict.checks],
            )
            for one in found
        ],
        plans=[
            ReturnPlan(**{name: row._mapping[name] for name in _PLAN_FIELDS}, evidence=row.safety_report or [])
            for row in plans
        ],
    )


_PLAN_FIELDS = [name for name in ReturnPlan.model_fields if name != "evidence"]


# --- quarantine -------------------------------------------------------------------------------------------------


_PLACE_SEPARATOR = "~"


def message_id(customer_id: UUID, source: str, dedupe_key: str) -> str:
    """A message's key as one opaque piece of a URL."""
    return base64.urlsafe_b64encode(f"{customer_id}\n{source}\n{dedupe_key}".encode()).decode().rstrip("=")


def read_message_id(value: str) -> tuple[UUID, str, str]:
    """The key behind an id of ``message_id``.

    Raises:
        NotFound: it is none.
    """
    try:
        padded = value + "=" * (-len(value) % 4)
        customer, source, dedupe_key = base64.urlsafe_b64decode(padded.encode()).decode().split("\n", 2)
        return UUID(customer), source, dedupe_key
    except (ValueError, binascii.Error):
        raise NotFound("message") from None


def place(message: QuarantinedMessage) -> str:
    """Where a page that ends with this message ends: ``before`` of the next one."""
    return f"{message.received_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}{_PLACE_SEPARATOR}{message.id}"


def _read_place(value: datetime | str | None) -> tuple[datetime | None, tuple[UUID, str, str] | None]:
    if value is None or isinstance(value, datetime):
        return value, None
    moment, separator, last = value.partition(_PLACE_SEPARATOR)
    try:
        received_at = datetime.fromisoformat(moment)
        return received_at if received_at.tzinfo else received_at.replace(tzinfo=UTC), (
            read_message_id(last) if separator else None
        )
    except (ValueError, NotFound):
        raise Invalid("before: is neither a time nor the next of a page; take it as it was given.") from None


async def list_quarantine(
    db: Database, principal: Principal, *, customer_id: UUID | None, before: datetime | str | None, limit: int
) -> list[QuarantinedMessage]:
    """Messages that were not acted on, with the reason, newest first.

    Args:
        before: a time, or the ``place`` of the message the page before ended with, which skips nothing.

    Raises:
        Invalid: ``before`` is neither.
    """
    if customer_id is not None:
        principal.customer(customer_id)
    moment, after = _read_place(before)
    async with principal.scope(db) as conn:
        rows = await views_repository.list_quarantine(
            conn, customer_id=customer_id, before=moment, after=after, limit=limit
        )
    return [_quarantined(row) for row in rows]


async def get_quarantined(db: Database, principal: Principal, quarantined_id: str) -> QuarantinedMessage:
    """One message in quarantine with its whole body.

    Raises:
        NotFound: it is not in quarantine, or another customer's.
    """
    key = read_message_id(quarantined_id)
    principal.customer(key[0], what="message")
    async with db.tenant(key[0]) as conn:
        row = await views_repository.quarantined(conn, *key)
    if row is None:
        raise NotFound("message")
    return _quarantined(row)


def _quarantined(row: Row) -> QuarantinedMessage:
    return QuarantinedMessage(
        id=message_id(row.customer_id, row.source, row.dedupe_key),
        **{name: value for name, value in row._mapping.items() if name != "dedupe_key"},
    )


async def replay(
    db: Database, bells: Bells | None, aws: AwsGateway, principal: Principal, quarantined_id: str
) -> Replayed:
    """Read a message in quarantine again, with what is known by now; what it means is done in the same transaction.

    Raises:
        NotFound: it was never in quarantine, or is another customer's.
    """
    key = read_message_id(quarantined_id)
    principal.customer(key[0], what="message")
    return await replaying.replay(db, bells, aws, principal.actor, key)


async def replay_many(
    db: Database, bells: Bells | None, aws: AwsGateway, principal: Principal, body: ReplayMany
) -> ReplayedMany:
    """The same for what is in quarantine for one reason.

    Raises:
        NotFound: another customer's id, or none where the caller belongs to none.
    """
    customer_id = principal.customer(body.customer_id)
    return await replaying.replay_many(db, bells, aws, principal.actor, customer_id, body.reason, body.limit)


async def push(db: Database, bells: Bells | None, principal: Principal, body: bytes) -> str:
    """One event by HTTP from a customer's API destination: the customer is the key's, the rest is the queue's path.

    Raises:
        Invalid: the key belongs to no customer.
        Unavailable: it must be delivered again.
    """
    if principal.customer_id is None:
        raise Invalid(
            "events are pushed with a key of the customer they belong to; make one with POST /api/v1/api-keys"
        )
    facts = await service.Facts(db).of(principal.customer_id)
    done = await taking.accept_pushed(db, bells, facts, body)
    if done.duplicates:
        return "duplicate"
    return next(name for name in ("handled", "waiting", "dropped", "quarantined") if getattr(done, name))
