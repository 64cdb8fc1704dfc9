"""Is what the lake holds about Spot prices fit to compute money with?"""

from datetime import timedelta

import dagster as dg

from cloudoptim_pipelines import coverage
from cloudoptim_pipelines.defs.spot_prices.assets import TABLE, spot_prices
from cloudoptim_pipelines.partitions import REGIONS
from cloudoptim_pipelines.resources import Warehouse

# The checks of each run look at this many days; the whole history was checked when it was written.
CHECKED_DAYS = timedelta(days=2)
# The hourly refresh may miss one turn.
STALE_AFTER = timedelta(hours=2, minutes=10)

_SANE = """
    WITH recent AS (
        SELECT * FROM spot_prices WHERE day >= $since
    ), ceilings AS (
        SELECT region, instance_type, max(price_usd_per_hour) AS list_price FROM on_demand_prices
        WHERE day >= $since GROUP BY region, instance_type
    )
    SELECT
        count(*) AS rows,
        count(*) FILTER (WHERE price_usd_per_hour <= 0) AS not_positive,
        count(*) FILTER (WHERE price_usd_per_hour > list_price) AS over_on_demand,
        count(*) FILTER (WHERE price_usd_per_hour > 50 * list_price) AS over_50x,
        count(DISTINCT price_usd_per_hour) AS different_prices,
        count(DISTINCT (region, zone_id, instance_type)) AS pools
    FROM recent LEFT JOIN ceilings USING (region, instance_type)
"""


@dg.asset_check(asset=spot_prices, blocking=True)
def prices_are_sane(warehouse: Warehouse) -> dg.AssetCheckResult:
    """Recent prices are positive, none is over fifty times on-demand, and they are not all the same."""
    reader = warehouse.reader
    found = reader.query(_SANE, {"since": (warehouse.now() - CHECKED_DAYS).date()}).to_pylist()[0]
    # A constant price is what a stub answers (moto's 0.00001), never a market.
    frozen = found["pools"] > 10 and found["different_prices"] == 1
    passed = found["not_positive"] == 0 and found["over_50x"] == 0 and not frozen
    return dg.AssetCheckResult(passed=passed, metadata={**found, "one_price_for_all": frozen})


@dg.asset_check(asset=spot_prices)
def prices_are_fresh(warehouse: Warehouse) -> dg.AssetCheckResult:
    """Every listed region was asked for its prices within the last two hours."""
    now = warehouse.now()
    with warehouse.database.system() as connection:
        rows = coverage.load(connection, TABLE)
    newest = {row.series: row.end for row in rows if row.series in REGIONS}
    late = {region: until for region, until in newest.items() if now - until > STALE_AFTER}
    return dg.AssetCheckResult(
        passed=bool(newest) and not late,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={region: f"{(now - until).total_seconds() / 60:.0f} minutes ago" for region, until in newest.items()},
    )
