"""People, keys and the audit log."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    LargeBinary,
    UniqueConstraint,
    func,
)
from sqlalchemy.orm import Mapped, mapped_column

from warehouse.postgres.models.base import Base, HasCreatedAt, HasId, one_of

ROLES = ("platform_admin", "customer_admin", "analyst", "ml_server", "agent")
# What only programs are.
KEY_ROLES = (*ROLES, "event_pusher")


class User(HasId, HasCreatedAt, Base):
    """A person. Platform admins belong to no customer."""

    __tablename__ = "users"
    __table_args__ = (
        UniqueConstraint("email"),
        UniqueConstraint("customer_id", "id"),
        CheckConstraint(one_of("role", *ROLES), name="role"),
    )

    customer_id: Mapped[UUID | None] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    email: Mapped[str]
    password_hash: Mapped[str]
    role: Mapped[str]
    disabled_at: Mapped[datetime | None]


class UserSession(HasId, HasCreatedAt, Base):
    """One sign-in. ``refresh_token_id`` is the only refresh token it accepts next; a used one ends the session."""

    __tablename__ = "user_sessions"
    __table_args__ = (
        Index("ix_user_sessions_expires_at", "expires_at"),
        # Beside the key of user_id alone, which holds for platform admins too: their sessions have no customer.
        ForeignKeyConstraint(["customer_id", "user_id"], ["users.customer_id", "users.id"], ondelete="CASCADE"),
    )

    customer_id: Mapped[UUID | None] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    refresh_token_id: Mapped[UUID]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class ApiKey(HasId, HasCreatedAt, Base):
    """A program's key: ``prefix.secret``, the secret kept only as an HMAC with a pepper from the environment."""

    __tablename__ = "api_keys"
    __table_args__ = (
        UniqueConstraint("prefix"),
        CheckConstraint(one_of("role", *KEY_ROLES), name="role"),
        CheckConstraint("role <> 'event_pusher' OR customer_id IS NOT NULL", name="pusher_has_customer"),
        CheckConstraint("role <> 'agent' OR (customer_id IS NOT NULL AND cluster_id IS NOT NULL)", name="agent_bound"),
        CheckConstraint("cluster_id IS NULL OR customer_id IS NOT NULL", name="cluster_has_customer"),
        ForeignKeyConstraint(
            ["customer_id", "cluster_id"], ["clusters.customer_id", "clusters.id"], ondelete="CASCADE"
        ),
    )

    customer_id: Mapped[UUID | None] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    cluster_id: Mapped[UUID | None]
    name: Mapped[str]
    role: Mapped[str]
    prefix: Mapped[str]
    secret_hmac: Mapped[bytes] = mapped_column(LargeBinary)
    last_used_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class AuditLog(Base):
    """Append-only, hash-chained per customer; UPDATE and DELETE are refused by grant and trigger."""

    __tablename__ = "audit_log"
    __table_args__ = (Index("ix_audit_log_customer", "customer_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    customer_id: Mapped[UUID | None]
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    detail: Mapped[dict[str, Any]]
    previous_hash: Mapped[bytes] = mapped_column(LargeBinary)
    entry_hash: Mapped[bytes] = mapped_column(LargeBinary)
