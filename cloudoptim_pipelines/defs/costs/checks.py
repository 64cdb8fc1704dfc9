"""Do the computed costs hold together?"""

from datetime import timedelta

import dagster as dg

from cloudoptim_pipelines.defs.costs.assets import cluster_cost_hourly
from cloudoptim_pipelines.resources import Warehouse

CHECKED_DAYS = timedelta(days=2)

_SUMS = """
    WITH nodes AS (
        SELECT ts, customer_id, cluster_id, sum(actual_usd) AS actual_usd, max(minutes) AS longest
        FROM node_cost_hourly WHERE day >= $since AND actual_usd IS NOT NULL AND b1_list_usd IS NOT NULL
        GROUP BY ALL
    )
    SELECT
        count(*) AS cluster_hours,
        count(*) FILTER (WHERE clusters.actual_usd IS DISTINCT FROM nodes.actual_usd) AS sums_differ,
        count(*) FILTER (WHERE longest > 60) AS more_than_an_hour,
        count(*) FILTER (WHERE coverage_ratio < 1) AS not_fully_priced
    FROM cluster_cost_hourly AS clusters
    LEFT JOIN nodes USING (ts, customer_id, cluster_id)
    WHERE day >= $since
"""


@dg.asset_check(asset=cluster_cost_hourly)
def cluster_costs_add_up(warehouse: Warehouse) -> dg.AssetCheckResult:
    """Each cluster's hour costs exactly what its nodes cost, and no node ran more than sixty minutes of it."""
    reader = warehouse.reader
    since = (warehouse.now() - CHECKED_DAYS).date()
    found = reader.query(_SUMS, {"since": since}, all_customers=True).to_pylist()[0]
    passed = found["sums_differ"] == 0 and found["more_than_an_hour"] == 0
    return dg.AssetCheckResult(passed=passed, metadata=found)
