"""The interruption path: inbox, events, interruptions with their history, and launches.

The guarantees are the unique keys: a message is handled once per (customer, source, dedupe key), an instance is
interrupted once per (customer, region, key), an intent has at most one live attempt, and a batch's ClientToken and
frozen request are stored before EC2 is called.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.types import Text

from warehouse.postgres.models.base import Base, HasCreatedAt, HasId, one_of

LIVE_ATTEMPT_STATES = ("planned", "calling", "unknown", "launched", "adopted", "ready")


class InboxMessage(Base):
    """A message of any source, once. ``dedupe_key`` is the EventBridge id, else the SHA-256 of the canonical body."""

    __tablename__ = "inbox_messages"
    __table_args__ = (
        CheckConstraint(one_of("outcome", "handled", "dropped", "quarantined", "waiting"), name="outcome"),
        Index(
            "ix_inbox_messages_quarantine",
            "customer_id",
            "received_at",
            postgresql_where=text("outcome = 'quarantined'"),
        ),
        Index("ix_inbox_messages_received_at", "received_at"),
        Index("ix_inbox_messages_waiting", "received_at", postgresql_where=text("outcome = 'waiting'")),
    )

    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"), primary_key=True)
    source: Mapped[str] = mapped_column(primary_key=True)
    dedupe_key: Mapped[str] = mapped_column(primary_key=True)
    sqs_message_id: Mapped[str | None]
    receive_count: Mapped[int] = mapped_column(server_default="1")
    body_sha256: Mapped[str]
    event_type: Mapped[str | None]
    outcome: Mapped[str]
    reason: Mapped[str | None]
    body: Mapped[str | None]
    sent_at: Mapped[datetime | None]
    received_at: Mapped[datetime] = mapped_column(server_default=func.now())
    replayed_at: Mapped[datetime | None]


class SpotEventRecord(HasId, Base):
    """One row per distinct event received, from any source: what happened and what was done about it."""

    __tablename__ = "spot_events"
    __table_args__ = (
        UniqueConstraint("customer_id", "source", "dedupe_key"),
        Index("ix_spot_events_cluster", "customer_id", "cluster_id", "received_at"),
        Index("ix_spot_events_instance", "customer_id", "instance_id"),
        Index("ix_spot_events_interruption", "interruption_id"),
        Index("ix_spot_events_received_at", "received_at", postgresql_using="brin"),
    )

    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    cluster_id: Mapped[UUID | None]
    event_type: Mapped[str]
    instance_id: Mapped[str | None]
    received_at: Mapped[datetime] = mapped_column(server_default=func.now())
    occurred_at: Mapped[datetime]
    source: Mapped[str]
    dedupe_key: Mapped[str]
    interruption_id: Mapped[UUID | None]
    action_taken: Mapped[str | None]
    replacement_instance_id: Mapped[str | None]
    payload: Mapped[dict[str, Any]]


class Interruption(HasId, HasCreatedAt, Base):
    """One interruption of one instance, whoever told us; one of an instance is under way at a time.

    ``interruption_key`` is the instance id for ``terminate``, the instance id and the notice's minute for ``stop`` and
    ``hibernate``, which can recur. Recommendations and maintenances carry their kind, maintenances also the name AWS
    gives them (else their minute), from the second on with ``#2``.
    ``notice_at`` is the notice of ``kind``, the sharpest signal; ``first_notice_at`` the first word about it where that
    was another.
    """

    __tablename__ = "interruptions"
    __table_args__ = (
        UniqueConstraint("customer_id", "region", "interruption_key"),
        UniqueConstraint("customer_id", "id"),
        CheckConstraint(one_of("state", "unmatched", "open", "closed"), name="state"),
        CheckConstraint(
            one_of("outcome", "handled", "handled_late", "missed", "cancelled", "unmatched"), name="outcome"
        ),
        CheckConstraint("(state = 'closed') = (outcome IS NOT NULL)", name="closed_has_outcome"),
        Index(
            "uq_interruptions_under_way",
            "customer_id",
            "instance_id",
            unique=True,
            postgresql_where=text("state <> 'closed'"),
        ),
        Index("ix_interruptions_open", "deadline_at", postgresql_where=text("state <> 'closed'")),
        Index("ix_interruptions_cluster", "customer_id", "cluster_id", "notice_at"),
        Index("ix_interruptions_instance", "customer_id", "instance_id"),
        Index("ix_interruptions_received_at", "received_at", postgresql_using="brin"),
    )

    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    cluster_id: Mapped[UUID | None]
    node_id: Mapped[UUID | None]
    region: Mapped[str]
    interruption_key: Mapped[str]
    account_id: Mapped[str | None]
    instance_id: Mapped[str]
    instance_type: Mapped[str | None]
    availability_zone: Mapped[str | None]
    instance_action: Mapped[str]
    kind: Mapped[str]
    notice_at: Mapped[datetime]
    first_notice_at: Mapped[datetime | None]
    received_at: Mapped[datetime]
    deadline_at: Mapped[datetime]
    detected_by: Mapped[list[str]] = mapped_column(ARRAY(Text))
    state: Mapped[str]
    outcome: Mapped[str | None]
    reason: Mapped[str | None]
    version: Mapped[int] = mapped_column(server_default="1")
    # A drain follows once the replacement is Ready (policy pre_spin).
    drain_pending: Mapped[bool] = mapped_column(server_default="false")
    instance_gone_at: Mapped[datetime | None]
    closed_at: Mapped[datetime | None]


class InterruptionHistory(Base):
    """Every change of an interruption, versions 1..n without a hole, written with the change."""

    __tablename__ = "interruption_history"
    __table_args__ = (
        ForeignKeyConstraint(
            ["customer_id", "interruption_id"], ["interruptions.customer_id", "interruptions.id"], ondelete="CASCADE"
        ),
    )

    customer_id: Mapped[UUID]
    interruption_id: Mapped[UUID] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    event: Mapped[str]
    state: Mapped[str]
    detail: Mapped[dict[str, Any]]


class LaunchIntent(HasId, HasCreatedAt, Base):
    """That one replacement is wanted, once per interruption or plan step."""

    __tablename__ = "launch_intents"
    __table_args__ = (
        UniqueConstraint("customer_id", "interruption_id"),
        UniqueConstraint("customer_id", "plan_id", "step_no"),
        UniqueConstraint("customer_id", "id"),
        ForeignKeyConstraint(
            ["customer_id", "cluster_id"], ["clusters.customer_id", "clusters.id"], ondelete="CASCADE"
        ),
        CheckConstraint(
            one_of("state", "planned", "launching", "launched", "ready", "exhausted", "cancelled", "blocked"),
            name="state",
        ),
        CheckConstraint("(interruption_id IS NULL) <> (plan_id IS NULL)", name="one_origin"),
        Index(
            "ix_launch_intents_work",
            "next_action_at",
            postgresql_where=text("state IN ('planned', 'launching', 'launched', 'blocked')"),
        ),
        # What replaced an instance before.
        Index("ix_launch_intents_lost", "customer_id", text("(requirements ->> 'instance_id')")),
    )

    customer_id: Mapped[UUID]
    cluster_id: Mapped[UUID]
    interruption_id: Mapped[UUID | None]
    plan_id: Mapped[UUID | None]
    step_no: Mapped[int | None]
    requirements: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(server_default="planned")
    reason: Mapped[str | None]
    decided_by: Mapped[str | None]
    deadline_at: Mapped[datetime]
    version: Mapped[int] = mapped_column(server_default="1")
    lease_epoch: Mapped[int] = mapped_column(server_default="0")
    lease_until: Mapped[datetime | None]
    leased_by: Mapped[str | None]
    next_action_at: Mapped[datetime] = mapped_column(server_default=func.now())


class LaunchTemplate(HasId, Base):
    """How nodes of a cluster are launched: image, subnet per zone, security groups, profile, user data.

    Derived from running instances, because EC2 forgets the subnet and groups of a terminated one within minutes.
    ``fingerprint`` is the SHA-256 of the content; ``instance_ids`` are those last seen launched this way.
    """

    __tablename__ = "launch_templates"
    __table_args__ = (
        UniqueConstraint("cluster_id", "fingerprint"),
        ForeignKeyConstraint(
            ["customer_id", "cluster_id"], ["clusters.customer_id", "clusters.id"], ondelete="CASCADE"
        ),
        Index("ix_launch_templates_instances", "instance_ids", postgresql_using="gin"),
    )

    customer_id: Mapped[UUID]
    cluster_id: Mapped[UUID]
    fingerprint: Mapped[str]
    template: Mapped[dict[str, Any]]
    instance_ids: Mapped[list[str]] = mapped_column(ARRAY(Text))
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


class PoolStanding(Base):
    """How a pool has treated one customer: every interruption and refused launch adds to ``penalty``, which halves
    with time (control.interruptions.pools). ``zone_wide`` rows (instance_type ``*``) hold a whole zone back."""

    __tablename__ = "pool_standings"

    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"), primary_key=True)
    region: Mapped[str] = mapped_column(primary_key=True)
    availability_zone: Mapped[str] = mapped_column(primary_key=True)
    instance_type: Mapped[str] = mapped_column(primary_key=True)
    penalty: Mapped[float]
    updated_at: Mapped[datetime]
    interruptions: Mapped[int] = mapped_column(server_default="0")
    refusals: Mapped[int] = mapped_column(server_default="0")
    rebalances: Mapped[int] = mapped_column(server_default="0")
    last_reason: Mapped[str | None]


class RefusedEnding(Base):
    """An instance of ours that is to end and that EC2, or the account, would not end; it bills meanwhile.

    ``lasting``: AWS said no, and will until a person changes something. Asked again at ``next_at``.
    """

    __tablename__ = "refused_endings"
    __table_args__ = (CheckConstraint(one_of("why", "replacement", "orphan", "return_to_spot"), name="why"),)

    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"), primary_key=True)
    instance_id: Mapped[str] = mapped_column(primary_key=True)
    cluster_id: Mapped[UUID | None]
    region: Mapped[str]
    why: Mapped[str]
    operation: Mapped[str]
    code: Mapped[str]
    message: Mapped[str]
    lasting: Mapped[bool]
    tries: Mapped[int] = mapped_column(server_default="1")
    first_at: Mapped[datetime] = mapped_column(server_default=func.now())
    last_at: Mapped[datetime] = mapped_column(server_default=func.now())
    next_at: Mapped[datetime]


class RoundClaim(Base):
    """Which worker does a round of a reconciler that asks the cloud; the others leave it to that one."""

    __tablename__ = "round_claims"

    name: Mapped[str] = mapped_column(primary_key=True)
    claimed_until: Mapped[datetime]
    claimed_by: Mapped[str]
    rounds: Mapped[int] = mapped_column(BigInteger, server_default="1")


class AdoptedInstance(Base):
    """An instance with our tags that we may not end.

    ``reason``: the database knew nothing of it, because it was ``restored`` from before its launch; it is or was a
    Ready ``node`` and no launch waits for it any more; or its tags were ``copied`` by whoever launched it.
    ``ended_at``: EC2 does not show it running with our tags any more.
    """

    __tablename__ = "adopted_instances"
    __table_args__ = (CheckConstraint(one_of("reason", "restored", "node", "copied"), name="reason"),)

    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"), primary_key=True)
    instance_id: Mapped[str] = mapped_column(primary_key=True)
    cluster_id: Mapped[UUID | None]
    region: Mapped[str]
    batch_id: Mapped[UUID | None]
    launched_at: Mapped[datetime | None]
    adopted_at: Mapped[datetime] = mapped_column(server_default=func.now())
    reason: Mapped[str] = mapped_column(server_default="restored")
    instance_type: Mapped[str | None]
    ended_at: Mapped[datetime | None]


class LifecycleAction(Base):
    """A lifecycle hook of an Auto Scaling group that waits for our answer. ``token`` is the group's own name of it.

    ``left``: nobody's, or too late; the group's time-out decides.
    """

    __tablename__ = "lifecycle_actions"
    __table_args__ = (
        CheckConstraint(one_of("transition", "launching", "terminating"), name="transition"),
        CheckConstraint(one_of("state", "open", "completed", "left"), name="state"),
        Index("ix_lifecycle_actions_open", "next_action_at", postgresql_where=text("state = 'open'")),
        Index("ix_lifecycle_actions_interruption", "interruption_id"),
    )

    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"), primary_key=True)
    token: Mapped[str] = mapped_column(primary_key=True)
    region: Mapped[str]
    group_name: Mapped[str]
    hook_name: Mapped[str]
    instance_id: Mapped[str]
    transition: Mapped[str]
    interruption_id: Mapped[UUID | None]
    state: Mapped[str] = mapped_column(server_default="open")
    reason: Mapped[str | None]
    heartbeats: Mapped[int] = mapped_column(server_default="0")
    heartbeat_at: Mapped[datetime | None]
    received_at: Mapped[datetime] = mapped_column(server_default=func.now())
    next_action_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]


class LaunchBatch(HasId, HasCreatedAt, Base):
    """One RunInstances call, frozen before it is made: the ClientToken and the request are re-sent byte for byte."""

    __tablename__ = "launch_batches"
    __table_args__ = (
        UniqueConstraint("client_token"),
        UniqueConstraint("customer_id", "id"),
        ForeignKeyConstraint(
            ["customer_id", "cluster_id"], ["clusters.customer_id", "clusters.id"], ondelete="CASCADE"
        ),
        CheckConstraint("length(client_token) BETWEEN 1 AND 64", name="client_token_length"),
        CheckConstraint(one_of("state", "calling", "unknown", "answered", "failed", "abandoned"), name="state"),
        Index("ix_launch_batches_work", "next_action_at", postgresql_where=text("state IN ('calling', 'unknown')")),
        Index("ix_launch_batches_recent", "customer_id", "created_at"),
    )

    customer_id: Mapped[UUID]
    cluster_id: Mapped[UUID]
    region: Mapped[str]
    client_token: Mapped[str]
    request_json: Mapped[str]
    size: Mapped[int]
    state: Mapped[str] = mapped_column(server_default="calling")
    calls: Mapped[int] = mapped_column(server_default="0")
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    first_called_at: Mapped[datetime | None]
    version: Mapped[int] = mapped_column(server_default="1")
    lease_epoch: Mapped[int] = mapped_column(server_default="0")
    lease_until: Mapped[datetime | None]
    leased_by: Mapped[str | None]
    next_action_at: Mapped[datetime] = mapped_column(server_default=func.now())


class LaunchAttempt(HasId, HasCreatedAt, Base):
    """One try to satisfy an intent: one slot of one batch. Two live attempts of an intent cannot exist."""

    __tablename__ = "launch_attempts"
    __table_args__ = (
        UniqueConstraint("intent_id", "attempt_no"),
        UniqueConstraint("batch_id", "slot"),
        UniqueConstraint("customer_id", "instance_id"),
        Index(
            "uq_launch_attempts_live",
            "intent_id",
            unique=True,
            postgresql_where=text(one_of("state", *LIVE_ATTEMPT_STATES)),
        ),
        Index(
            "ix_launch_attempts_running",
            "state",
            postgresql_where=text("state IN ('launched', 'adopted', 'terminating')"),
        ),
        Index(
            "ix_launch_attempts_recent", "customer_id", "created_at", postgresql_where=text("instance_id IS NOT NULL")
        ),
        ForeignKeyConstraint(
            ["customer_id", "intent_id"], ["launch_intents.customer_id", "launch_intents.id"], ondelete="CASCADE"
        ),
        ForeignKeyConstraint(
            ["customer_id", "batch_id"], ["launch_batches.customer_id", "launch_batches.id"], ondelete="CASCADE"
        ),
        CheckConstraint(
            one_of("state", *LIVE_ATTEMPT_STATES, "failed", "terminating", "terminated", "abandoned"), name="state"
        ),
        CheckConstraint(one_of("node_type", "spot", "on-demand"), name="node_type"),
    )

    customer_id: Mapped[UUID]
    intent_id: Mapped[UUID]
    attempt_no: Mapped[int]
    batch_id: Mapped[UUID]
    slot: Mapped[int]
    instance_type: Mapped[str]
    availability_zone: Mapped[str]
    node_type: Mapped[str]
    price_usd_per_hour: Mapped[Decimal | None]
    state: Mapped[str] = mapped_column(server_default="planned")
    instance_id: Mapped[str | None]
    failure: Mapped[str | None]
    launched_at: Mapped[datetime | None]
    ready_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    version: Mapped[int] = mapped_column(server_default="1")
