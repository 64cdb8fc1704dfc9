"""What is missing in the data, why, and what was filled from where."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, UniqueConstraint, func
from sqlalchemy.orm import Mapped, mapped_column

from warehouse.postgres.models.base import Base, HasCreatedAt, HasId, one_of


class DataGap(HasId, Base):
    """A stretch of one series that should be there and is not. Price gaps belong to no customer."""

    __tablename__ = "data_gaps"
    __table_args__ = (
        UniqueConstraint("table_name", "series", "gap_start", postgresql_nulls_not_distinct=True),
        CheckConstraint(one_of("state", "open", "filling", "filled", "unfillable"), name="state"),
        Index("ix_data_gaps_state", "state", "table_name"),
    )

    customer_id: Mapped[UUID | None] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    table_name: Mapped[str]
    series: Mapped[str]
    partition_key: Mapped[str]
    gap_start: Mapped[datetime]
    gap_end: Mapped[datetime]
    expected_points: Mapped[int]
    missing_points: Mapped[int]
    reason: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="open")
    found_at: Mapped[datetime] = mapped_column(server_default=func.now())
    filled_at: Mapped[datetime | None]
    fill_id: Mapped[UUID | None]


class GapFill(HasId, HasCreatedAt, Base):
    """One request to fill gaps: ours, not Dagster's, is the record of what is still missing."""

    __tablename__ = "gap_fills"
    __table_args__ = (
        CheckConstraint(one_of("state", "requested", "running", "succeeded", "failed", "cancelled"), name="state"),
    )

    customer_id: Mapped[UUID | None] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    requested_by: Mapped[str]
    table_name: Mapped[str]
    partitions: Mapped[list[Any]]
    state: Mapped[str] = mapped_column(server_default="requested")
    dagster_run_id: Mapped[str | None]
    dagster_backfill_id: Mapped[str | None]
    records_filled: Mapped[int | None]
    sources_used: Mapped[list[Any] | None]
    error: Mapped[str | None]
    finished_at: Mapped[datetime | None]


class SourceFailure(Base):
    """Why a series could not be read when its source was last asked; gone as soon as it answers.

    ``denied``: asking again changes nothing until somebody allows it. ``asked_from`` is the earliest moment that was
    asked for in vain, ``failing_since`` when asking first failed.
    """

    __tablename__ = "source_failures"

    table_name: Mapped[str] = mapped_column(primary_key=True)
    series: Mapped[str] = mapped_column(primary_key=True)
    code: Mapped[str]
    message: Mapped[str]
    denied: Mapped[bool]
    asked_from: Mapped[datetime]
    failing_since: Mapped[datetime] = mapped_column(server_default=func.now())
    failed_at: Mapped[datetime]


class PartitionCoverage(Base):
    """What one partition of one series holds, kept when it is written, so that looking for gaps reads kilobytes.

    ``covered_from`` to ``covered_until`` is the stretch the writer asked its source for; ``detail`` holds what only
    that table needs to find its gaps (e.g. the sampling instants of a price snapshot, the present 5-minute windows).
    """

    __tablename__ = "partition_coverage"

    table_name: Mapped[str] = mapped_column(primary_key=True)
    partition_key: Mapped[str] = mapped_column(primary_key=True)
    series: Mapped[str] = mapped_column(primary_key=True)
    customer_id: Mapped[UUID | None] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    covered_from: Mapped[datetime]
    covered_until: Mapped[datetime]
    expected_points: Mapped[int] = mapped_column(BigInteger)
    present_points: Mapped[int] = mapped_column(BigInteger)
    detail: Mapped[dict[str, Any]]
    run_id: Mapped[str]
    written_at: Mapped[datetime] = mapped_column(server_default=func.now())
