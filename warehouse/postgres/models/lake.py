"""The record of what the lake published: lineage, audit and the "as of" index."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Identity, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from warehouse.postgres.models.base import Base


class LakeRelease(Base):
    """One published change: the version of every lake table after it, and which partitions it replaced."""

    __tablename__ = "lake_releases"
    __table_args__ = (
        Index("ix_lake_releases_released_at", "released_at"),
        Index("ix_lake_releases_kept", "id", postgresql_where=text("kept")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    released_at: Mapped[datetime] = mapped_column(server_default=func.now())
    versions: Mapped[dict[str, Any]]
    replaced: Mapped[list[Any]]
    rows: Mapped[int] = mapped_column(BigInteger)
    run_id: Mapped[str]
    code_version: Mapped[str]
    kept: Mapped[bool] = mapped_column(server_default="false")
    # Set when vacuum may have removed files this release reads; the row stays as lineage.
    expired_at: Mapped[datetime | None]
    note: Mapped[str | None]
