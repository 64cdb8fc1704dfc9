"""The agents' task queue. Postgres is the queue: rows are claimed with SKIP LOCKED and leased with an epoch."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from warehouse.postgres.models.base import Base, HasCreatedAt, HasId, one_of


class AgentTask(HasId, HasCreatedAt, Base):
    """One task for one cluster's agent; ``dedupe_key`` makes creating it twice harmless."""

    __tablename__ = "agent_tasks"
    __table_args__ = (
        UniqueConstraint("customer_id", "cluster_id", "dedupe_key"),
        UniqueConstraint("customer_id", "id"),
        ForeignKeyConstraint(
            ["customer_id", "cluster_id"], ["clusters.customer_id", "clusters.id"], ondelete="CASCADE"
        ),
        CheckConstraint(
            one_of("state", "queued", "leased", "done", "failed", "refused", "expired", "superseded"), name="state"
        ),
        Index(
            "ix_agent_tasks_work",
            "cluster_id",
            "deadline_at",
            "priority",
            postgresql_where=text("state IN ('queued', 'leased')"),
        ),
        Index("ix_agent_tasks_interruption", "interruption_id"),
    )

    customer_id: Mapped[UUID]
    cluster_id: Mapped[UUID]
    interruption_id: Mapped[UUID | None]
    task_type: Mapped[str]
    parameters: Mapped[dict[str, Any]]
    priority: Mapped[int] = mapped_column(server_default="100")
    deadline_at: Mapped[datetime | None]
    state: Mapped[str] = mapped_column(server_default="queued")
    dedupe_key: Mapped[str]
    lease_epoch: Mapped[int] = mapped_column(server_default="0")
    lease_until: Mapped[datetime | None]
    leased_by: Mapped[str | None]
    attempts: Mapped[int] = mapped_column(server_default="0")
    first_leased_at: Mapped[datetime | None]
    offered_deadline_at: Mapped[datetime | None]
    cordoned_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    result: Mapped[dict[str, Any] | None]
    result_epoch: Mapped[int | None]


class TaskReport(Base):
    """Every report of an agent, also late and repeated ones: evidence, append-only."""

    __tablename__ = "task_reports"
    __table_args__ = (
        ForeignKeyConstraint(
            ["customer_id", "task_id"], ["agent_tasks.customer_id", "agent_tasks.id"], ondelete="CASCADE"
        ),
    )

    customer_id: Mapped[UUID]
    task_id: Mapped[UUID] = mapped_column(primary_key=True)
    lease_epoch: Mapped[int] = mapped_column(primary_key=True)
    report_id: Mapped[UUID] = mapped_column(primary_key=True)
    status: Mapped[str]
    detail: Mapped[dict[str, Any]]
    applied: Mapped[bool]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    received_at: Mapped[datetime] = mapped_column(server_default=func.now())
