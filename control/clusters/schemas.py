"""Requests and answers about clusters. CPU in cores, memory in bytes, money in USD."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints

from control.security.schemas import Request, Text
from warehouse.contracts import ClusterState

Region = Annotated[str, StringConstraints(pattern=r"^[a-z]{2}(-[a-z]+)+-\d$", max_length=32)]
Url = Annotated[str, StringConstraints(strip_whitespace=True, min_length=8, max_length=2048)]


class ClusterCreate(Request):
    """A new cluster. Only endpoint, CA and token of the Kubernetes API are taken, never a kubeconfig: those can name
    programs to run."""

    customer_id: UUID | None = None
    cluster_name: Text
    region: Region
    k8s_api_endpoint: Url | None = None
    k8s_ca: Annotated[str, Field(max_length=16_384, pattern=r"^-----BEGIN CERTIFICATE-----")] | None = None
    k8s_token: Annotated[SecretStr, Field(max_length=8192)] | None = None


class ClusterChange(Request):
    """What may change. ``null`` leaves a field as it is."""

    cluster_name: Text | None = None
    k8s_api_endpoint: Url | None = None
    k8s_ca: Annotated[str, Field(max_length=16_384, pattern=r"^-----BEGIN CERTIFICATE-----")] | None = None
    k8s_token: Annotated[SecretStr, Field(max_length=8192)] | None = None


class ClusterAnswer(BaseModel):
    """A cluster. The token is never shown, only whether there is one."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    customer_id: UUID
    cluster_name: str
    region: str
    k8s_api_endpoint: str | None
    has_k8s_token: bool
    node_count: int
    status: str
    kill_switch: bool
    agent_version: str | None
    agent_understands: list[str] | None
    last_seen_at: datetime | None
    created_at: datetime


class NewClusterAnswer(ClusterAnswer):
    """A new cluster with its agent's key, which is shown this once."""

    agent_key: str


class ClusterList(BaseModel):
    """A page of clusters; pass ``next`` as ``after`` for the following one."""

    clusters: list[ClusterAnswer]
    next: UUID | None


class StateAnswer(BaseModel):
    """The newest state the agent sent; ``age_seconds`` is how old it is, null when there is none yet."""

    cluster_id: UUID
    status: str
    last_seen_at: datetime | None
    age_seconds: float | None
    state: ClusterState | None


class NodeAnswer(BaseModel):
    """A node, live or ended, with today's price per hour where it is known."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    cluster_id: UUID
    node_name: str
    instance_id: str
    instance_type: str
    availability_zone: str
    zone_id: str | None
    node_type: Literal["spot", "on-demand"]
    status: str
    cpu_cores: float
    memory_bytes: int
    created_at: datetime
    ready_at: datetime | None
    last_seen_at: datetime
    terminated_at: datetime | None
    price_usd_per_hour: float | None
    on_demand_usd_per_hour: float | None


class NodeList(BaseModel):
    """A page of nodes; pass ``next`` as ``after`` for the following one."""

    nodes: list[NodeAnswer]
    next: UUID | None


class EventAnswer(BaseModel):
    """An event about the cluster, and what was done about it."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    event_type: str
    instance_id: str | None
    received_at: datetime
    occurred_at: datetime
    source: str
    interruption_id: UUID | None
    action_taken: str | None
    replacement_instance_id: str | None
    payload: dict[str, Any]


class EventList(BaseModel):
    """A page of events, newest first; pass ``next`` as ``before`` for older ones."""

    events: list[EventAnswer]
    next: UUID | None


class CurrentCost(BaseModel):
    """What the live nodes cost per hour at the newest known prices. ``priced_nodes`` of ``nodes`` have a price."""

    at: datetime
    nodes: int
    priced_nodes: int
    spot_nodes: int
    actual_usd_per_hour: float
    on_demand_usd_per_hour: float
    savings_ratio: float | None


class CostHour(BaseModel):
    """One hour of the lake's cost table. Baseline B1: the same machines on demand. Coverage is 0 to 1."""

    ts: datetime
    actual_usd: float | None
    spot_usd: float | None
    on_demand_usd: float | None
    b1_list_usd: float | None
    coverage_ratio: float
    complete: bool


class CostAnswer(BaseModel):
    """Cost now and by hour, with the lake release it was read from (null while the lake holds no cost yet)."""

    cluster_id: UUID
    now: CurrentCost
    hours: list[CostHour]
    lake_release_id: int | None


class KillSwitch(Request):
    """``engaged`` stops plans, launches and every task that is no part of an interruption, within five seconds."""

    engaged: bool
    reason: Text
