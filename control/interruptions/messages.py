"""Messages as they come in, and what a batch of them became."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from control.bus.bells import Bells
from warehouse.contracts import EventKind, EventSource
from warehouse.postgres.models import new_id


@dataclass(frozen=True, slots=True)
class Received:
    """A message as it came. ``sent_at`` is when the queue got it."""

    body: str | bytes
    source: EventSource
    sqs_message_id: str | None = None
    sent_at: datetime | None = None
    receive_count: int = 1
    # Whoever told us may speak for this cluster only (an agent's key).
    cluster_id: UUID | None = None


@dataclass(slots=True)
class Ingested:
    """What a batch became. ``clusters`` have new tasks, or some that end earlier: ring their bells, now that it is
    committed."""

    new: int = 0
    duplicates: int = 0
    handled: int = 0
    waiting: int = 0
    dropped: int = 0
    quarantined: int = 0
    interruptions: list[UUID] = field(default_factory=list)
    clusters: set[UUID] = field(default_factory=set)
    launches: bool = False

    def add(self, other: Ingested) -> None:
        """Count another batch in."""
        for name in ("new", "duplicates", "handled", "waiting", "dropped", "quarantined"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.interruptions += other.interruptions
        self.clusters |= other.clusters
        self.launches |= other.launches

    async def ring(self, bells: Bells | None) -> None:
        """Wake agents, launchers and the outbox."""
        if bells is None or not self.new:
            return
        for cluster_id in self.clusters:
            await bells.ring("tasks", cluster_id)
        if self.launches:
            await bells.ring("launches")
        await bells.ring("outbox")


def label_of(source: EventSource, kind: EventKind) -> str:
    """How a detector is named in ``detected_by``: warnings by who told us, other signals by what they are."""
    if kind is EventKind.SPOT_INTERRUPTION or source in (EventSource.AGENT, EventSource.POLL):
        return source.value
    return kind.value


def told_closed(
    *,
    customer_id: UUID,
    cluster_id: UUID | None,
    interruption_id: UUID,
    instance_id: str,
    outcome: str | None,
    reason: str | None,
    closed_at: datetime,
    replacement_instance_id: str | None = None,
) -> dict[str, Any]:
    """The outbox's row that tells the bus of an interruption's end."""
    return {
        "id": new_id(),
        "customer_id": customer_id,
        "topic": "spot.interruption.closed",
        "payload": {
            "interruption_id": interruption_id,
            "customer_id": customer_id,
            "cluster_id": cluster_id,
            "instance_id": instance_id,
            "outcome": outcome,
            "reason": reason,
            "replacement_instance_id": replacement_instance_id,
            "closed_at": closed_at,
        },
    }


def sha256(body: str | bytes) -> str:
    """Hex digest of a body of any content."""
    return hashlib.sha256(body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")).hexdigest()
