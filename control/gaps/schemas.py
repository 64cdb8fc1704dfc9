"""Requests and answers of the gap filler."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from pydantic import Field, computed_field, model_validator

from warehouse.contracts import Contract, UtcDatetime
from warehouse.gap_reasons import REMEDIES

MAX_PARTITIONS = 5_000
PARTITION = r"^\d{4}-\d{2}-\d{2}(\|[a-z0-9-]{1,32})?$"


class FillableTable(StrEnum):
    """Tables whose gaps can be filled, and what from."""

    SPOT_PRICES = "spot_prices"
    METRIC_5M = "metric_5m"


class GapOut(Contract):
    """One stretch of one series that should be there and is not.

    ``remedy`` says what mends it; ``source_error`` is what the source answered when it was last asked and refused.
    """

    id: UUID
    customer_id: UUID | None
    table_name: str
    series: str
    partition_key: str
    gap_start: UtcDatetime
    gap_end: UtcDatetime
    expected_points: int
    missing_points: int
    reason: str
    state: str
    found_at: UtcDatetime
    filled_at: UtcDatetime | None
    fill_id: UUID | None
    source_error: str | None = None

    @computed_field
    def remedy(self) -> str:
        """What mends it."""
        return "" if self.state == "filled" else REMEDIES.get(self.reason, "")


class DayCoverage(Contract):
    """One day of a table: how many of the expected points are there."""

    day: str
    table_name: str
    expected_points: int
    present_points: int


class GapsAnswer(Contract):
    """Gaps of the window, newest first, and the window's coverage by day.

    With a model the window is its training window; else it is the lookback.
    """

    window_start: UtcDatetime
    window_end: UtcDatetime
    model_id: UUID | None = None
    total: int
    gaps: list[GapOut]
    coverage: list[DayCoverage]


class FillRequest(Contract):
    """What to fill: gaps by id, or partitions of a table."""

    table_name: FillableTable | None = None
    partitions: Annotated[list[Annotated[str, Field(pattern=PARTITION)]], Field(max_length=MAX_PARTITIONS)] = Field(
        default_factory=list, examples=[["2026-11-20|us-east-1"]]
    )
    gap_ids: Annotated[list[UUID], Field(max_length=MAX_PARTITIONS)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_way(self) -> FillRequest:
        if bool(self.gap_ids) == bool(self.partitions):
            raise ValueError("give either gap_ids or partitions with their table_name")
        if self.partitions and self.table_name is None:
            raise ValueError("partitions need their table_name")
        return self


class FillOut(Contract):
    """A request to fill and how it stands. ``seconds`` is its duration so far, or in all."""

    fill_id: UUID
    table_name: str
    state: str
    requested_by: str
    created_at: UtcDatetime
    finished_at: UtcDatetime | None
    seconds: float
    partitions: int
    partitions_done: int
    records_filled: int
    sources_used: list[str]
    dagster_run_id: str | None
    dagster_backfill_id: str | None
    dagster_url: str | None
    runs: dict[str, str] = Field(default_factory=dict)
    error: str | None
    gaps_left: list[GapOut] = Field(default_factory=list)


class FillList(Contract):
    """Fills, newest first."""

    fills: list[dict[str, Any]]
