"""What has to be told to the outside, written in the transaction that caused it."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from warehouse.postgres.models.base import Base, HasCreatedAt, HasId, one_of


class Outbox(HasId, HasCreatedAt, Base):
    """One event for the bus; claimed with SKIP LOCKED, never with "id greater than the last seen"."""

    __tablename__ = "outbox"
    __table_args__ = (
        Index("ix_outbox_pending", "next_attempt_at", postgresql_where=text("published_at IS NULL")),
        Index("ix_outbox_published_at", "published_at"),
    )

    customer_id: Mapped[UUID | None] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    topic: Mapped[str]
    payload: Mapped[dict[str, Any]]
    attempts: Mapped[int] = mapped_column(server_default="0")
    next_attempt_at: Mapped[datetime] = mapped_column(server_default=func.now())
    published_at: Mapped[datetime | None]
    error: Mapped[str | None]


class Notification(HasId, HasCreatedAt, Base):
    """One message to one channel of a customer, with its delivery log."""

    __tablename__ = "notifications"
    __table_args__ = (
        UniqueConstraint("customer_id", "channel", "dedupe_key"),
        CheckConstraint(one_of("state", "pending", "sent", "quarantined"), name="state"),
        Index("ix_notifications_pending", "next_attempt_at", postgresql_where=text("state = 'pending'")),
    )

    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    channel: Mapped[str]
    dedupe_key: Mapped[str]
    subject: Mapped[str]
    body: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="pending")
    attempts: Mapped[int] = mapped_column(server_default="0")
    next_attempt_at: Mapped[datetime] = mapped_column(server_default=func.now())
    sent_at: Mapped[datetime | None]
    error: Mapped[str | None]
