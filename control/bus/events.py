"""Every event on the bus, typed. A topic is a Redis stream of the same name; payloads are these models as JSON.

Delivery is at least once and in no promised order: consumers keep ``event_id`` or compare states.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from warehouse.contracts import Prediction, UtcDatetime


class Event(BaseModel):
    """Base of all events. ``event_id`` is the same in every delivery of one event."""

    model_config = ConfigDict(extra="allow", frozen=True)

    event_id: UUID
    customer_id: UUID | None = None


class InterruptionDetected(Event):
    """An instance of a cluster is being interrupted."""

    interruption_id: UUID
    cluster_id: UUID
    instance_id: str
    instance_type: str
    availability_zone: str
    kind: str
    instance_action: str
    notice_at: UtcDatetime
    deadline_at: UtcDatetime


class InterruptionClosed(Event):
    """An interruption is over; ``replacement_instance_id`` when a replacement became Ready."""

    interruption_id: UUID
    cluster_id: UUID | None
    instance_id: str
    outcome: str
    reason: str | None = None
    replacement_instance_id: str | None = None
    closed_at: UtcDatetime


class TaskCreated(Event):
    """A task waits for an agent."""

    task_id: UUID
    cluster_id: UUID
    task_type: str
    interruption_id: UUID | None = None
    deadline: UtcDatetime | None = None


class TaskFinished(Event):
    """A task ended: done, failed, refused or expired."""

    task_id: UUID
    cluster_id: UUID
    task_type: str
    interruption_id: UUID | None = None
    state: str


class OptimizationStarted(Event):
    """A plan began to run."""

    optimization_id: UUID
    cluster_id: UUID


class OptimizationCompleted(Event):
    """A plan ended."""

    optimization_id: UUID
    cluster_id: UUID
    status: str


class ClusterStateChanged(Event):
    """Nodes came, went or changed their readiness."""

    cluster_id: UUID


class GapFilled(Event):
    """A gap in the data was filled."""

    fill_id: UUID


class ModelActivated(Event):
    """Another model is in use."""

    model_id: UUID


class SavingsReportReady(Event):
    """A savings statement can be read."""

    month: str | None = None


class ClientMetricsUpdated(Event):
    """Consumed: metrics of a cluster were stored by somebody else than the API."""

    cluster_id: UUID


class PredictionReady(Event):
    """Consumed: the ML server finished predictions; they are stored once per ``event_id``."""

    predictions: list[Prediction] = Field(max_length=10_000)


PUBLISHED: dict[str, type[Event]] = {
    "optimization.started": OptimizationStarted,
    "optimization.completed": OptimizationCompleted,
    "spot.interruption.detected": InterruptionDetected,
    "spot.interruption.closed": InterruptionClosed,
    "cluster.state.changed": ClusterStateChanged,
    "task.created": TaskCreated,
    "task.finished": TaskFinished,
    "gap.filled": GapFilled,
    "model.activated": ModelActivated,
    "savings.report.ready": SavingsReportReady,
}
CONSUMED: dict[str, type[Event]] = {
    "client.metrics.updated": ClientMetricsUpdated,
    "ml.prediction.ready": PredictionReady,
}


def typed(topic: str, event_id: UUID, payload: dict[str, Any]) -> Event:
    """An outbox row as its event.

    Raises:
        KeyError: nobody declared the topic.
        pydantic.ValidationError: the payload is not the topic's.
    """
    return PUBLISHED[topic].model_validate(payload | {"event_id": event_id})
