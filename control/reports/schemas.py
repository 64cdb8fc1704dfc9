"""A savings statement as an answer. Money in USD as text, so that no cent is lost in a float."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, PlainSerializer

Money = Annotated[Decimal, PlainSerializer(lambda value: f"{value:f}", return_type=str)]


class ClusterSavings(BaseModel):
    """One cluster's part of a statement. A deduction that is not measured is null, never zero."""

    cluster_id: UUID
    cluster_name: str
    region: str
    baseline_usd: Money
    actual_usd: Money
    gross_usd: Money
    overlap_usd: Money
    fallback_premium_usd: Money
    displaced_commitment_usd: Money | None
    rework_usd: Money | None
    net_usd: Money
    hours_covered: float


class Statement(BaseModel):
    """What a customer saved in a period against a named baseline, and how much of it data covers (0 to 1).

    ``partial`` is true for a month that is summed from its finished days because it is not over. ``lake_release_ids``
    are the releases it was computed from: from those it can be computed again, to the cent. ``not_measured`` says why a
    deduction is null.
    """

    customer_id: UUID
    company_name: str
    aws_account_id: str | None
    period: str
    period_start: date
    period_end: date
    revision: int
    stage: str
    partial: bool
    baseline_name: str
    baseline_usd: Money
    actual_usd: Money
    net_savings_usd: Money
    savings_ratio: float | None
    fee_usd: Money
    coverage: float
    lake_release_ids: list[int]
    computed_at: datetime
    not_measured: dict[str, str]
    clusters: list[ClusterSavings]
