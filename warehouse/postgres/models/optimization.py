"""Optimisation plans and their steps."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from warehouse.postgres.models.base import Base, HasCreatedAt, HasId, one_of


class OptimizationHistory(HasId, HasCreatedAt, Base):
    """A plan from draft to its realised saving. At most one runs per cluster."""

    __tablename__ = "optimization_history"
    __table_args__ = (
        UniqueConstraint("customer_id", "id"),
        UniqueConstraint("customer_id", "idempotency_key"),
        ForeignKeyConstraint(
            ["customer_id", "cluster_id"], ["clusters.customer_id", "clusters.id"], ondelete="CASCADE"
        ),
        CheckConstraint(
            one_of(
                "status",
                "draft",
                "refused",
                "validated",
                "approved",
                "running",
                "succeeded",
                "compensating",
                "rolled_back",
                "stuck",
                "stopped",
            ),
            name="status",
        ),
        Index(
            "uq_optimization_history_running",
            "customer_id",
            "cluster_id",
            unique=True,
            postgresql_where=text("status IN ('running', 'compensating')"),
        ),
    )

    customer_id: Mapped[UUID]
    cluster_id: Mapped[UUID]
    optimization_type: Mapped[str]
    dry_run: Mapped[bool] = mapped_column(server_default="false")
    idempotency_key: Mapped[str | None]
    recommendations: Mapped[list[Any] | None]
    execution_plan: Mapped[list[Any] | None]
    safety_report: Mapped[list[Any] | None]
    state_hash: Mapped[str | None]
    decided_by: Mapped[str | None]
    estimated_savings: Mapped[Decimal | None]
    actual_savings: Mapped[Decimal | None]
    status: Mapped[str] = mapped_column(server_default="draft")
    reason: Mapped[str | None]
    requested_by: Mapped[str]
    approved_by: Mapped[str | None]
    stop_requested_at: Mapped[datetime | None]
    executed_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    version: Mapped[int] = mapped_column(server_default="1")


class PlanHistory(Base):
    """Every change of a plan, versions 1..n without a hole, written with the change."""

    __tablename__ = "plan_history"
    __table_args__ = (
        ForeignKeyConstraint(
            ["customer_id", "plan_id"],
            ["optimization_history.customer_id", "optimization_history.id"],
            ondelete="CASCADE",
        ),
    )

    customer_id: Mapped[UUID]
    plan_id: Mapped[UUID] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    event: Mapped[str]
    status: Mapped[str]
    detail: Mapped[dict[str, Any]]


class PlanStep(Base):
    """One step with its effect key, written before its effect; negative numbers are compensations."""

    __tablename__ = "plan_steps"
    __table_args__ = (
        UniqueConstraint("customer_id", "effect_key"),
        ForeignKeyConstraint(
            ["customer_id", "plan_id"],
            ["optimization_history.customer_id", "optimization_history.id"],
            ondelete="CASCADE",
        ),
        CheckConstraint(
            one_of("state", "pending", "running", "done", "failed", "skipped", "superseded", "compensated"),
            name="state",
        ),
    )

    customer_id: Mapped[UUID]
    plan_id: Mapped[UUID] = mapped_column(primary_key=True)
    step_no: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    parameters: Mapped[dict[str, Any]]
    effect_key: Mapped[str]
    compensation: Mapped[dict[str, Any] | None]
    before_snapshot: Mapped[dict[str, Any] | None]
    state: Mapped[str] = mapped_column(server_default="pending")
    result: Mapped[dict[str, Any] | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    version: Mapped[int] = mapped_column(server_default="1")
