"""Is the price list whole?"""

from datetime import timedelta

import dagster as dg

from cloudoptim_pipelines.defs.on_demand_prices.assets import on_demand_prices
from cloudoptim_pipelines.partitions import REGIONS
from cloudoptim_pipelines.resources import Warehouse

_LISTS = """
    SELECT day, region, count(DISTINCT (instance_type, product)) AS types,
           count(*) FILTER (WHERE price_usd_per_hour <= 0) AS not_positive
    FROM on_demand_prices WHERE day >= $since GROUP BY day, region ORDER BY day, region
"""
# AWS adds types and hardly ever removes one: a list that lost a tenth overnight was not read to its end.
SMALLEST_SHARE_OF_YESTERDAY = 0.9


@dg.asset_check(asset=on_demand_prices, blocking=True)
def list_is_whole(warehouse: Warehouse) -> dg.AssetCheckResult:
    """Today's list has a positive price for every type, and about as many types as the list before it."""
    reader = warehouse.reader
    rows = reader.query(_LISTS, {"since": (warehouse.now() - timedelta(days=7)).date()}).to_pylist()
    problems = [
        f"{row['region']}: {row['not_positive']} prices are not positive" for row in rows if row["not_positive"]
    ]
    for region in REGIONS:
        counts = [row["types"] for row in rows if row["region"] == region][-2:]
        if len(counts) == 2 and counts[1] < SMALLEST_SHARE_OF_YESTERDAY * counts[0]:
            problems.append(f"{region}: {counts[1]} types after {counts[0]}")
    return dg.AssetCheckResult(
        passed=bool(rows) and not problems,
        metadata={"problems": problems, **{f"types_{row['region']}": row["types"] for row in rows}},
    )
