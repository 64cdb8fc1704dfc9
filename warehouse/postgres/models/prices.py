"""The newest known prices, for decisions in milliseconds. History lives in the lake."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

from sqlalchemy import func
from sqlalchemy.orm import Mapped, mapped_column

from warehouse.postgres.models.base import Base


class SpotPriceCurrent(Base):
    """Newest Spot price of a pool (instance type × zone), USD per hour. ``zone_id`` is the same in every account."""

    __tablename__ = "spot_price_current"

    region: Mapped[str] = mapped_column(primary_key=True)
    zone_id: Mapped[str] = mapped_column(primary_key=True)
    instance_type: Mapped[str] = mapped_column(primary_key=True)
    product: Mapped[str] = mapped_column(primary_key=True)
    availability_zone: Mapped[str | None]
    price_usd_per_hour: Mapped[Decimal]
    effective_at: Mapped[datetime]
    fetched_at: Mapped[datetime] = mapped_column(server_default=func.now())
    source: Mapped[str]


class OnDemandPrice(Base):
    """On-demand price of a type in a region, USD per hour, with the type's size."""

    __tablename__ = "on_demand_price"

    region: Mapped[str] = mapped_column(primary_key=True)
    instance_type: Mapped[str] = mapped_column(primary_key=True)
    product: Mapped[str] = mapped_column(primary_key=True)
    price_usd_per_hour: Mapped[Decimal]
    vcpus: Mapped[float | None]
    memory_gib: Mapped[float | None]
    effective_at: Mapped[datetime]
    fetched_at: Mapped[datetime] = mapped_column(server_default=func.now())
    source: Mapped[str]
