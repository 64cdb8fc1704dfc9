"""Messages to dashboards."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from control.clusters.schemas import CurrentCost


class Subscribe(BaseModel):
    """First message where no header can be set, within five seconds; ``customer_id`` is for platform admins."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["subscribe"]
    authorization: Annotated[str, Field(max_length=4096)] | None = None
    customer_id: UUID | None = None


class ClusterCost(CurrentCost):
    """One cluster's cost now."""

    cluster_id: UUID
    customer_id: UUID
    cluster_name: str
    status: str


class CostMessage(BaseModel):
    """Cost of every cluster now, at least every 15 s."""

    type: Literal["cost"] = "cost"
    at: datetime
    clusters: list[ClusterCost]


class EventsMessage(BaseModel):
    """Events received since the message before."""

    type: Literal["events"] = "events"
    events: list[dict[str, Any]]
