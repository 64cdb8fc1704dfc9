"""What the prices page reads: Spot prices of a type in each zone, and the pools that moved."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa

from dashboards.data.source import PRODUCT, Source

# Points one chart gets at most: more cannot be told apart on a screen and cost time on the way.
MAX_POINTS = 3000


@dataclass(frozen=True, slots=True)
class PriceRegion:
    """A region with Spot prices, first and last day included."""

    region: str
    first: date
    last: date


class PriceData(Source):
    """Reads of the prices page."""

    def price_regions(self, customer_id: UUID) -> list[PriceRegion]:
        """Regions with Spot prices in the lake, and the days they cover."""
        rows = self._lake_table(
            customer_id,
            "SELECT region, min(day) AS first, max(day) AS last FROM spot_prices GROUP BY region ORDER BY region",
        )
        return [PriceRegion(**row) for row in rows.to_pylist()]

    def price_types(self, customer_id: UUID, region: PriceRegion) -> list[str]:
        """Instance types with a price in the newest days of the region."""
        rows = self._lake_table(
            customer_id,
            "SELECT DISTINCT instance_type FROM spot_prices "
            "WHERE region = $region AND product = $product AND day >= $day ORDER BY instance_type",
            region=region.region,
            product=PRODUCT,
            day=region.last - timedelta(days=2),
        )
        return rows["instance_type"].to_pylist()

    def spot_prices(self, customer_id: UUID, region: PriceRegion, instance_type: str, days: int) -> pa.Table:
        """Prices of one type in each zone: ``zone_id``, ``ts``, ``price``, ``lowest``, ``highest``.

        At most MAX_POINTS rows: a bucket keeps its last price and its extremes, so that a shock is not averaged away.
        The price that held before the window is set at its start.
        """
        until = datetime.combine(region.last, datetime.max.time(), UTC)
        since = datetime.combine(region.last - timedelta(days=days - 1), datetime.min.time(), UTC)
        bucket = max(60.0, days * 86_400 / (MAX_POINTS / 8))
        return self._lake_table(
            customer_id,
            """
            SELECT zone_id, greatest(to_timestamp(floor(epoch(ts) / $bucket) * $bucket), $since) AS ts,
                   CAST(arg_max(price_usd_per_hour, ts) AS DOUBLE) AS price,
                   CAST(min(price_usd_per_hour) FILTER (ts >= $since) AS DOUBLE) AS lowest,
                   CAST(max(price_usd_per_hour) FILTER (ts >= $since) AS DOUBLE) AS highest
            FROM spot_prices
            WHERE region = $region AND instance_type = $type AND product = $product
              AND day BETWEEN $before AND $last AND ts <= $until
            GROUP BY 1, 2 ORDER BY 1, 2
            """,
            region=region.region,
            type=instance_type,
            product=PRODUCT,
            bucket=bucket,
            since=since,
            until=until,
            before=since.date() - timedelta(days=2),
            last=region.last,
        )

    def price_movers(self, customer_id: UUID, region: PriceRegion, days: int, limit: int = 12) -> list[dict[str, Any]]:
        """Pools whose price moved most in the window: highest over lowest."""
        return self._lake_table(
            customer_id,
            """
            SELECT instance_type, zone_id, CAST(min(price_usd_per_hour) AS DOUBLE) AS lowest,
                   CAST(max(price_usd_per_hour) AS DOUBLE) AS highest, arg_max(ts, price_usd_per_hour) AS highest_at,
                   CAST(arg_max(price_usd_per_hour, ts) AS DOUBLE) AS newest
            FROM spot_prices
            WHERE region = $region AND product = $product AND day BETWEEN $first AND $last AND price_usd_per_hour > 0
            GROUP BY instance_type, zone_id
            ORDER BY highest / lowest DESC, highest DESC, instance_type, zone_id LIMIT $limit
            """,
            region=region.region,
            product=PRODUCT,
            first=region.last - timedelta(days=days - 1),
            last=region.last,
            limit=limit,
        ).to_pylist()

    def list_price(self, customer_id: UUID, region: str, instance_type: str) -> Decimal | None:
        """On-demand price of the type now, USD per hour; None when it is not known."""
        rows = self._rows(
            customer_id,
            "SELECT price_usd_per_hour FROM on_demand_price "
            "WHERE region = :region AND instance_type = :instance_type AND product = :product",
            region=region,
            instance_type=instance_type,
            product=PRODUCT,
        )
        return rows[0]["price_usd_per_hour"] if rows else None

    def prices_export(self, customer_id: UUID, region: PriceRegion, instance_type: str, days: int) -> pa.Table:
        """Every price change of the type in the window."""
        return self._lake_table(
            customer_id,
            """
            SELECT ts AS effective_at_utc, region, zone_id, availability_zone, instance_type, product,
                   price_usd_per_hour, source, fetched_at
            FROM spot_prices
            WHERE region = $region AND instance_type = $type AND product = $product AND day BETWEEN $first AND $last
            ORDER BY zone_id, ts
            """,
            region=region.region,
            type=instance_type,
            product=PRODUCT,
            first=region.last - timedelta(days=days - 1),
            last=region.last,
        )
