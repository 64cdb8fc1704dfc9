"""Rows for lake tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import polars as pl

CUSTOMER_A = "01890000-0000-7000-8000-00000000000a"
CUSTOMER_B = "01890000-0000-7000-8000-00000000000b"
CLUSTER = "01890000-0000-7000-8000-0000000000c1"


def prices(day: int, rows: int, *, price: str = "0.01160000", zone_id: str = "use1-az1") -> pl.DataFrame:
    """Spot prices of one day of January 2024, a second apart."""
    start = datetime(2024, 1, day, tzinfo=UTC)
    return pl.DataFrame(
        {
            "ts": [start + timedelta(seconds=second) for second in range(rows)],
            "zone_id": [zone_id] * rows,
            "instance_type": ["m5.large"] * rows,
            "product": ["Linux/UNIX"] * rows,
            "price_usd_per_hour": pl.Series([Decimal(price)] * rows, dtype=pl.Decimal(18, 8)),
            "source": ["observed"] * rows,
            "fetched_at": [start] * rows,
        }
    )


def node_hours(customer_id: str, day: int, rows: int) -> pl.DataFrame:
    """Hours of one node."""
    start = datetime(2024, 1, day, tzinfo=UTC)
    return pl.DataFrame(
        {
            "ts": [start + timedelta(hours=hour) for hour in range(rows)],
            "customer_id": [customer_id] * rows,
            "cluster_id": [CLUSTER] * rows,
            "node_name": ["node"] * rows,
            "instance_id": [f"i-{customer_id[-4:]}"] * rows,
            "zone_id": ["use1-az1"] * rows,
            "instance_type": ["m5.large"] * rows,
            "product": ["Linux/UNIX"] * rows,
            "lifecycle": ["spot"] * rows,
            "minutes": [60.0] * rows,
            "source": ["observed"] * rows,
        }
    )


def node_costs(customer_id: str, day: int, rows: int, *, price: str) -> pl.DataFrame:
    """Cost of the same hours."""
    money = pl.lit(Decimal(price)).cast(pl.Decimal(18, 8))
    return (
        node_hours(customer_id, day, rows)
        .drop("product")
        .with_columns(price_usd_per_hour=money, actual_usd=money, price_basis=pl.lit("spot_as_of"))
    )
