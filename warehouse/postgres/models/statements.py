"""Monthly savings statements."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from warehouse.postgres.models.base import Base, HasCreatedAt, HasId


class SavingsStatement(HasId, HasCreatedAt, Base):
    """A customer's period with the lake release it read, so that it can be recomputed to the cent. All money in USD."""

    __tablename__ = "savings_statements"
    __table_args__ = (UniqueConstraint("customer_id", "period", "period_start", "revision"),)

    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    period: Mapped[str]
    period_start: Mapped[date]
    period_end: Mapped[date]
    revision: Mapped[int] = mapped_column(server_default="1")
    baseline_name: Mapped[str]
    baseline_usd: Mapped[Decimal]
    actual_usd: Mapped[Decimal]
    net_savings_usd: Mapped[Decimal]
    fee_usd: Mapped[Decimal]
    coverage: Mapped[float]
    lake_release_id: Mapped[int] = mapped_column(BigInteger)
    body: Mapped[dict[str, Any]]
    sent_at: Mapped[datetime | None]
