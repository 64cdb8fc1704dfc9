"""Predictions and the model registry."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from warehouse.postgres.models.base import Base, HasCreatedAt, HasId, one_of


class PredictionRecord(HasId, Base):
    """What was predicted, graded when its window closes. Pool predictions belong to no customer."""

    __tablename__ = "predictions"
    __table_args__ = (
        Index("ix_predictions_window", "kind", "window_end"),
        CheckConstraint(one_of("made_by", "ml_server", "advisor"), name="made_by"),
    )

    customer_id: Mapped[UUID | None] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    kind: Mapped[str]
    subject: Mapped[str]
    window_start: Mapped[datetime]
    window_end: Mapped[datetime]
    value: Mapped[float]
    lower: Mapped[float | None]
    upper: Mapped[float | None]
    model_version: Mapped[str]
    made_at: Mapped[datetime]
    made_by: Mapped[str]


class MlModel(HasId, HasCreatedAt, Base):
    """A stored model file and what is known about it; never loaded by unpickling."""

    __tablename__ = "ml_models"
    __table_args__ = (
        UniqueConstraint("name", "version"),
        CheckConstraint(one_of("state", "uploaded", "tested", "active", "retired"), name="state"),
    )

    name: Mapped[str]
    version: Mapped[str]
    kind: Mapped[str]
    format: Mapped[str]
    sha256: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    trained_from: Mapped[datetime | None]
    trained_until: Mapped[datetime | None]
    model_metadata: Mapped[dict[str, Any]] = mapped_column("metadata")
    state: Mapped[str] = mapped_column(server_default="uploaded")
    uploaded_by: Mapped[str]
