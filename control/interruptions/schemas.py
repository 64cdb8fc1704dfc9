"""Requests and answers about interruptions. Times in UTC, durations in seconds, money in USD per hour."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """Base of answers read from rows."""

    model_config = ConfigDict(from_attributes=True)


class Step(Answer):
    """One step of an interruption. ``seconds_left`` counts to the deadline; negative is late. ``seconds_after_notice``
    is negative for what an earlier signal had begun before the warning came."""

    step: str
    at: datetime | None
    seconds_after_notice: float | None = None
    seconds_left: float | None = None


class Replacement(Answer):
    """The newest launch for an interruption."""

    state: str
    reason: str | None = None
    decided_by: str | None = None
    attempts: int
    instance_id: str | None = None
    instance_type: str | None = None
    availability_zone: str | None = None
    node_type: str | None = None
    price_usd_per_hour: float | None = None


class InterruptionAnswer(Answer):
    """One interruption with its timeline: warning, task created, task in the agent's hands, cordoned, replacement
    launched, replacement Ready, drained, closed.

    ``notice_at`` is the notice of ``kind``, the sharpest signal, and what the timeline counts from; steps that an
    earlier one had begun lie before it. ``first_notice_at`` is the first word about it.
    """

    id: UUID
    customer_id: UUID
    cluster_id: UUID | None
    region: str
    instance_id: str
    instance_type: str | None
    availability_zone: str | None
    kind: str
    instance_action: str
    first_notice_at: datetime
    notice_at: datetime
    received_at: datetime
    deadline_at: datetime
    detected_by: list[str]
    state: str
    outcome: str | None
    reason: str | None
    instance_gone_at: datetime | None
    closed_at: datetime | None
    drain_state: str | None
    replacement: Replacement | None
    timeline: list[Step]


class InterruptionList(BaseModel):
    """Newest first; ``next`` goes into ``before`` for older ones."""

    interruptions: list[InterruptionAnswer]
    next: UUID | None


class HistoryEntry(Answer):
    """One version of an interruption, or of a plan."""

    version: int
    at: datetime
    event: str
    state: str
    detail: dict[str, Any]


class AttemptAnswer(Answer):
    """One try to launch."""

    attempt_no: int
    instance_type: str
    availability_zone: str
    node_type: str
    price_usd_per_hour: float | None
    state: str
    instance_id: str | None
    failure: str | None
    created_at: datetime
    launched_at: datetime | None
    ready_at: datetime | None
    ended_at: datetime | None


class DrainAnswer(Answer):
    """One try to drain the node. The timeline is of the newest one."""

    task_id: UUID
    state: str
    created_at: datetime
    first_leased_at: datetime | None
    cordoned_at: datetime | None
    finished_at: datetime | None
    deadline_at: datetime | None


class SignalAnswer(Answer):
    """One event that was about an interruption."""

    id: UUID
    event_type: str
    source: str
    occurred_at: datetime
    received_at: datetime
    action_taken: str | None


class InterruptionDetail(InterruptionAnswer):
    """An interruption with all that is known of it."""

    history: list[HistoryEntry]
    attempts: list[AttemptAnswer]
    drains: list[DrainAnswer]
    events: list[SignalAnswer]


class QuarantinedMessage(Answer):
    """A message that was not acted on. ``id`` is what replay takes. ``body`` is what came, secrets hidden, of
    ``body_bytes`` bytes; a list shows its first 4,096 characters."""

    id: str
    customer_id: UUID
    source: str
    event_type: str | None
    reason: str | None
    body: str | None
    body_bytes: int | None
    receive_count: int
    sent_at: datetime | None
    received_at: datetime
    replayed_at: datetime | None


class QuarantineList(BaseModel):
    """Newest first; ``next`` goes into ``before`` for older ones."""

    messages: list[QuarantinedMessage]
    next: str | None


class Replayed(BaseModel):
    """What became of a message that was read again: handled, waiting, dropped or quarantined."""

    outcome: str
    reason: str | None
    interruptions: list[UUID] = Field(default_factory=list)


class ReplayMany(BaseModel):
    """Which messages to read again. ``reason`` is the word before the colon of the reasons listed."""

    model_config = ConfigDict(extra="forbid")

    reason: Annotated[str, Field(min_length=1, max_length=100, pattern="^[a-z0-9_]+$")]
    customer_id: UUID | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class ReplayedMany(BaseModel):
    """How many messages became what, and how many of the same reason were not read again yet: call again for them."""

    outcomes: dict[str, int]
    interruptions: list[UUID]
    left: int


class Pushed(BaseModel):
    """What became of a pushed event. ``duplicate``: it was known already."""

    outcome: str


class ReturnCheck(Answer):
    """One condition of the rule for a return to Spot."""

    name: str
    ok: bool
    found: str
    needed: str


class StandInAnswer(Answer):
    """An On-Demand node in the place of an interrupted Spot node: where it would go, and what still keeps it."""

    customer_id: UUID
    cluster_id: UUID
    instance_id: str
    instance_type: str
    availability_zone: str
    usd_per_hour: float | None
    ready_at: datetime
    spot_instance_type: str | None
    spot_usd_per_hour: float | None
    goes: bool
    checks: list[ReturnCheck]


class ReturnStep(Answer):
    """One step of a return: launch, drain, terminate."""

    step_no: int
    kind: str
    state: str
    started_at: datetime | None
    finished_at: datetime | None


class ReturnPlan(Answer):
    """One return to Spot with the evidence it was begun on. ``estimated_savings`` in USD a month."""

    id: UUID
    customer_id: UUID
    cluster_id: UUID
    status: str
    reason: str | None
    decided_by: str | None
    estimated_savings: float | None
    instance_id: str
    spot_instance_type: str
    spot_availability_zone: str
    spot_instance_id: str | None
    created_at: datetime
    finished_at: datetime | None
    steps: list[ReturnStep]
    history: list[HistoryEntry]
    evidence: list[ReturnCheck]


class Returns(BaseModel):
    """Nodes that wait for their return, each with every condition as it stands now; and plans, newest first."""

    waiting: list[StandInAnswer]
    plans: list[ReturnPlan]


class RebalanceScore(Answer):
    """How well a pool's rebalance recommendations announced interruptions. Recommendations younger than 30 minutes
    are not counted yet."""

    instance_type: str
    availability_zone: str
    recommendations: int
    interrupted_within_30_minutes: int
    precision: float


class RebalanceScores(BaseModel):
    """Per pool, most recommendations first."""

    days: int
    pools: list[RebalanceScore]
