"""Answers and messages of the agents' API; requests are the shared contracts."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from warehouse.contracts import AgentEvent, OptimizationTask, TaskResult, TaskType
from warehouse.contracts import UtcDatetime as Utc


class ResultAnswer(BaseModel):
    """What became of a report. ``lease_until`` is the extended lease after ``running``; ``deadline`` the task's as of
    now, which a sharper notice may have brought nearer since it was leased."""

    task_id: UUID
    state: str
    applied: bool
    lease_until: Utc | None
    deadline: Utc | None


class RejectedSample(BaseModel):
    """A sample that was not stored, by its place in the batch."""

    index: int
    reason: str


class MetricsAnswer(BaseModel):
    """A batch, after its commit. ``rejected`` lists the first 1,000 of ``rejected_count``."""

    accepted: int
    duplicate: int
    late: int
    rejected: list[RejectedSample]
    rejected_count: int
    warnings: list[str]


class Events(BaseModel):
    """What agents report: AgentEvents, but one event that is none does not refuse its neighbours."""

    model_config = ConfigDict(extra="forbid")

    cluster_id: UUID
    events: Annotated[
        list[Annotated[AgentEvent | Any, Field(union_mode="left_to_right")]],
        Field(
            max_length=1000, description="AgentEvent each; what is none is kept in quarantine and listed as rejected"
        ),
    ]


class RejectedEvent(BaseModel):
    """An event that is none by the contract, by its place in the body. It is kept in quarantine."""

    index: int
    reason: str


class EventsAnswer(BaseModel):
    """Events, after their commit: ``accepted`` were new, ``duplicate`` known. ``rejected`` ones are among them."""

    accepted: int
    duplicate: int
    rejected: list[RejectedEvent]
    interruptions: list[UUID]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Held(_Message):
    """A lease the agent still holds."""

    task_id: UUID
    lease_epoch: int


class Hello(_Message):
    """First message of an agent on the stream, within five seconds.

    ``authorization`` is for clients that cannot set headers. ``holding`` is the cursor: leases the agent still works
    on; whatever else it leased and never reported on is pushed again at once.
    """

    type: Literal["hello"]
    authorization: str | None = Field(None, max_length=4096)
    understands: Annotated[list[str], Field(max_length=64)] = Field(default_factory=lambda: [t.value for t in TaskType])
    holding: Annotated[list[Held], Field(max_length=1000)] = Field(default_factory=list)
    limit: Annotated[int, Field(ge=1, le=100)] = 10
    agent_version: Annotated[str, Field(max_length=64)] | None = None


class StreamResult(_Message):
    """A task's report on the stream; answered by an ``ack`` with its ``report_id``."""

    type: Literal["result"]
    task_id: UUID
    report: TaskResult


class Ping(_Message):
    """Keeps idle connections open."""

    type: Literal["ping"]


class TasksMessage(BaseModel):
    """Server to agent: tasks, leased."""

    type: Literal["tasks"] = "tasks"
    tasks: list[OptimizationTask]


class AckMessage(BaseModel):
    """Server to agent: the report is stored. ``stale`` says that the lease was no longer the agent's; ``deadline`` is
    the task's as of now."""

    type: Literal["ack"] = "ack"
    task_id: UUID
    report_id: UUID
    applied: bool
    stale: bool
    state: str | None
    lease_until: Utc | None = None
    deadline: Utc | None = None


class ErrorMessage(BaseModel):
    """Server to agent: a message that could not be taken."""

    type: Literal["error"] = "error"
    code: str
    detail: str
    extra: dict[str, Any] = Field(default_factory=dict)
