"""Schemas shared by server, agents, pipelines and the ML server (exported as JSON Schema by ``json_schemas``).

Times are timezone-aware and in UTC. CPU is in cores, memory in bytes, money in USD, rates in USD per hour.
Unknown fields are refused so that a typing error in a client is an answer, not a silence.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


def _to_utc(value: datetime) -> datetime:
    return value.astimezone(UTC)


UtcDatetime = Annotated[AwareDatetime, AfterValidator(_to_utc)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[^\x00-\x1f]+$")]
# AWS's own samples carry non-hex ids, so only the shape that is safe to log and to send on is checked.
InstanceId = Annotated[str, Field(pattern=r"^i-[0-9A-Za-z]{4,32}$")]


class Contract(BaseModel):
    """Base of every shared schema: unknown fields are an error, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NodeType(StrEnum):
    """Purchase option of a node."""

    SPOT = "spot"
    ON_DEMAND = "on-demand"


class NodeState(Contract):
    """One node as the agent sees it."""

    node_name: Name
    instance_id: InstanceId
    instance_type: Name
    availability_zone: Name
    zone_id: str | None = None
    node_type: NodeType
    ready: bool
    schedulable: bool = True
    cpu_cores: NonNegative
    memory_bytes: Annotated[int, Field(ge=0)]
    pod_count: Annotated[int, Field(ge=0)] = 0
    cpu_requested_cores: NonNegative = 0.0
    memory_requested_bytes: Annotated[int, Field(ge=0)] = 0
    labels: dict[str, str] = Field(default_factory=dict)
    created_at: UtcDatetime | None = None


class ClusterState(Contract):
    """A cluster at one moment. ``state_hash`` covers nodes and schedulability; plans are refused when it moved."""

    cluster_id: UUID
    node_count: Annotated[int, Field(ge=0)]
    total_cpu: NonNegative
    total_memory: Annotated[int, Field(ge=0)]
    pod_count: Annotated[int, Field(ge=0)]
    spot_node_count: Annotated[int, Field(ge=0)]
    on_demand_node_count: Annotated[int, Field(ge=0)]
    current_cost_per_hour: NonNegative = 0.0
    nodes: list[NodeState] = Field(default_factory=list)
    captured_at: UtcDatetime
    state_hash: str = ""


class SampleColumns(Contract):
    """Samples in columns (the agent's form): four lists of one length; units are the metric's base unit."""

    metric: list[str]
    subject: list[str]
    ts: list[UtcDatetime]
    value: list[Finite]


class SampleRow(Contract):
    """One sample as a row (for people)."""

    metric: Name
    subject: Name
    ts: UtcDatetime
    value: Finite


class MetricsData(Contract):
    """A batch of metrics. ``batch_id`` is made once and kept over retries; ``seq`` counts a client's batches."""

    schema_version: int = SCHEMA_VERSION
    batch_id: UUID
    seq: Annotated[int, Field(ge=0)]
    cluster_id: UUID
    sent_at: UtcDatetime
    agent_version: str | None = None
    state: ClusterState | None = None
    samples: SampleColumns | list[SampleRow] = Field(
        default_factory=lambda: SampleColumns(metric=[], subject=[], ts=[], value=[])
    )


# Metrics an agent may send, with unit and meaning of `subject`. A unit mistake is the most common wrong number,
# so the name carries the unit.
METRICS: dict[str, str] = {
    "node_cpu_usage_cores": "cores used, subject is the node name",
    "node_memory_usage_bytes": "bytes used, subject is the node name",
    "node_cpu_requested_cores": "cores requested by pods, subject is the node name",
    "node_memory_requested_bytes": "bytes requested by pods, subject is the node name",
    "node_cpu_capacity_cores": "allocatable cores, subject is the node name",
    "node_memory_capacity_bytes": "allocatable bytes, subject is the node name",
    "node_pod_count": "pods on the node, subject is the node name",
    "workload_cpu_usage_cores": "cores used, subject is namespace/kind/name",
    "workload_memory_usage_bytes": "bytes used, subject is namespace/kind/name",
    "workload_cpu_requested_cores": "cores requested, subject is namespace/kind/name",
    "workload_memory_requested_bytes": "bytes requested, subject is namespace/kind/name",
    "workload_replicas": "running replicas, subject is namespace/kind/name",
    "cluster_pending_pods": "pods waiting for a node, subject is the cluster name",
}


class EventSource(StrEnum):
    """Who told us."""

    SQS = "sqs"
    PUSH = "push"
    AGENT = "agent"
    POLL = "poll"


class EventKind(StrEnum):
    """Kinds of events the interruption path acts on (EventBridge detail types under our names)."""

    SPOT_INTERRUPTION = "spot_interruption"
    REBALANCE_RECOMMENDATION = "rebalance_recommendation"
    INSTANCE_STATE_CHANGE = "instance_state_change"
    CAPACITY_RESERVATION_INTERRUPTION = "capacity_reservation_interruption"
    SCHEDULED_CHANGE = "scheduled_change"
    ASG_TERMINATE = "asg_terminate_lifecycle"
    ASG_LAUNCH = "asg_launch_lifecycle"
    LAUNCH_UNSUCCESSFUL = "launch_unsuccessful"


class InterruptionAction(StrEnum):
    """What EC2 does with the instance. Hibernation begins at once; the other two leave two minutes."""

    TERMINATE = "terminate"
    STOP = "stop"
    HIBERNATE = "hibernate"


class SpotEvent(Contract):
    """One event about one instance, from any source, as agents report it."""

    event_type: EventKind
    instance_id: InstanceId
    occurred_at: UtcDatetime
    source: EventSource = EventSource.AGENT
    instance_action: InterruptionAction | None = None
    node_name: Name | None = None
    detail: dict[str, Any] = Field(default_factory=dict)


# What shows on a node or in its cluster. The rest only AWS tells, with what its answer takes (a hook's token).
AgentEventKind = Literal[
    EventKind.SPOT_INTERRUPTION, EventKind.REBALANCE_RECOMMENDATION, EventKind.INSTANCE_STATE_CHANGE
]


class AgentEvent(SpotEvent):
    """An event of a kind that an agent can know of."""

    event_type: AgentEventKind


class AgentEvents(Contract):
    """Body of POST /client/events."""

    cluster_id: UUID
    events: Annotated[list[AgentEvent], Field(max_length=1000)]


class TaskType(StrEnum):
    """Tasks an agent can be asked to do. ``drain_nodes`` and ``resize`` are accepted aliases on input."""

    LAUNCH_NODES = "launch_nodes"
    CORDON_NODE = "cordon_node"
    DRAIN_NODE = "drain_node"
    UNCORDON_NODE = "uncordon_node"
    UPDATE_LABELS = "update_labels"
    DELETE_NODE = "delete_node"
    RESIZE_WORKLOAD = "resize_workload"
    COLLECT_STATE = "collect_state"


TASK_TYPE_ALIASES = {"drain_nodes": TaskType.DRAIN_NODE, "resize": TaskType.RESIZE_WORKLOAD}


class OptimizationTask(Contract):
    """A leased task in an agent's hands. A result counts only with the ``lease_epoch`` it was leased under.

    ``parameters`` of drain_node and cordon_node: ``node_name``, ``instance_id`` (both must match the live node),
    ``grace_seconds`` (cap of pods' own grace periods), ``force_at_deadline`` (delete what is left at the deadline).
    """

    task_id: UUID
    cluster_id: UUID
    task_type: TaskType
    parameters: dict[str, Any]
    priority: int = 100
    deadline: UtcDatetime | None = None
    lease_epoch: int
    lease_until: UtcDatetime


class TaskList(Contract):
    """Answer of GET /client/tasks."""

    tasks: list[OptimizationTask]


class TaskStatus(StrEnum):
    """What an agent reports. ``running`` extends the lease and marks progress; the others end the task."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    REFUSED = "refused"


class TaskResult(Contract):
    """Body of POST /client/tasks/{task_id}/result. ``detail['progress']`` may say ``cordoned`` on a running report."""

    lease_epoch: int
    report_id: UUID
    status: TaskStatus
    detail: dict[str, Any] = Field(default_factory=dict)
    started_at: UtcDatetime | None = None
    finished_at: UtcDatetime | None = None


class DecisionType(StrEnum):
    """What the ML server or the embedded advisor decides."""

    SPOT_OPTIMIZE = "spot_optimize"
    BIN_PACK = "bin_pack"
    RIGHTSIZE = "rightsize"


class DecisionRequest(Contract):
    """A question to the decision maker."""

    request_id: UUID
    cluster_id: UUID
    decision_type: DecisionType
    requirements: dict[str, Any] = Field(default_factory=dict)
    constraints: dict[str, Any] = Field(default_factory=dict)


class DecisionResponse(Contract):
    """The answer, with who gave it."""

    request_id: UUID
    decision_type: DecisionType
    recommendations: list[dict[str, Any]]
    confidence: Annotated[float, Field(ge=0, le=1)]
    estimated_savings_usd_per_hour: Finite
    execution_plan: list[dict[str, Any]]
    made_by: Literal["ml_server", "advisor"]
    model_version: str | None = None


class Prediction(Contract):
    """What was predicted for a subject over a window, with an interval."""

    kind: str
    subject: str
    window_start: UtcDatetime
    window_end: UtcDatetime
    value: Finite
    lower: Finite | None = None
    upper: Finite | None = None
    model_version: str
    made_at: UtcDatetime
    made_by: Literal["ml_server", "advisor"]


CONTRACTS: tuple[type[Contract], ...] = (
    ClusterState,
    MetricsData,
    SpotEvent,
    AgentEvent,
    AgentEvents,
    OptimizationTask,
    TaskResult,
    DecisionRequest,
    DecisionResponse,
    Prediction,
)


def json_schemas() -> dict[str, dict[str, Any]]:
    """JSON Schema of every contract, by name."""
    return {contract.__name__: contract.model_json_schema() for contract in CONTRACTS}
