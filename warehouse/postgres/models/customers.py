"""Customers, their configuration, and the health of their event intake."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, LargeBinary, UniqueConstraint, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from warehouse.postgres.models.base import Base, HasCreatedAt, HasId, new_id, one_of


class Customer(HasId, HasCreatedAt, Base):
    """A tenant. ``external_id`` is made by the server and never changes (confused-deputy protection).

    ``offboarding``: nothing new is begun, and the role is kept until what is in flight has ended. ``adopt_only_since``:
    its account has launches that the database never heard of (it was restored), so nothing of this customer is
    terminated until a person lifts it.
    """

    __tablename__ = "customers"
    __table_args__ = (
        UniqueConstraint("aws_account_id"),
        CheckConstraint(
            one_of("status", "pending", "active", "degraded", "suspended", "offboarding", "offboarded"), name="status"
        ),
    )

    company_name: Mapped[str]
    email: Mapped[str]
    aws_role_arn: Mapped[str | None]
    aws_account_id: Mapped[str | None]
    sqs_queue_url: Mapped[str | None]
    external_id: Mapped[UUID] = mapped_column(unique=True, default=new_id)
    status: Mapped[str] = mapped_column(server_default="pending")
    kill_switch: Mapped[bool] = mapped_column(server_default="false")
    data_key: Mapped[bytes | None] = mapped_column(LargeBinary)
    adopt_only_since: Mapped[datetime | None]
    adopt_only_reason: Mapped[str | None]


class CustomerConfig(Base):
    """One configured value of a customer; keys and their validation are a registry in control.customers."""

    __tablename__ = "customer_config"

    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"), primary_key=True)
    config_key: Mapped[str] = mapped_column(primary_key=True)
    config_value: Mapped[Any] = mapped_column(JSONB)
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now(), onupdate=func.now())


class IntakeHealth(Base):
    """What a detector (sqs, poll) last learned about a customer's account, and what would mend it."""

    __tablename__ = "intake_health"
    __table_args__ = (CheckConstraint(one_of("state", "ok", "degraded"), name="state"),)

    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"), primary_key=True)
    detector: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    reason: Mapped[str | None]
    remedy: Mapped[str | None]
    changed_at: Mapped[datetime] = mapped_column(server_default=func.now())
    last_ok_at: Mapped[datetime | None]
