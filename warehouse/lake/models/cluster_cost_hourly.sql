-- What each cluster cost in each hour, its baseline, and how much of the hour is covered by data.
--
-- reads: node_cost_hourly, agent_gaps (given by the caller: cluster_id, gap_start, gap_end), price_gaps (given by the
--        caller: region, gap_start, gap_end: stretches in which its Spot prices were not read)
-- parameters: $first_day, $last_day, $as_of
-- A node minute is covered when both the price paid and the list price are known; cost and baseline are summed over
-- the same covered minutes. An hour is complete when it is over, every minute is covered, the agent was there and, if
-- it has minutes on Spot, the region's Spot prices were read: a price that may be stale counts in no statement.
-- B2 (shape) and B3 (commit) are null: they need a frozen plan and the customer's commitments.
--
-- grain: cluster x hour
-- units: USD; minutes; coverage_ratio 0 to 1
-- keys: customer_id, cluster_id, ts
WITH per_hour AS (
    SELECT
        ts,
        customer_id,
        cluster_id,
        min(region) AS region,
        sum(actual_usd) FILTER (WHERE b1_list_usd IS NOT NULL) AS actual_usd,
        sum(actual_usd) FILTER (WHERE b1_list_usd IS NOT NULL AND lifecycle = 'spot') AS spot_usd,
        sum(actual_usd) FILTER (WHERE b1_list_usd IS NOT NULL AND lifecycle = 'on-demand') AS on_demand_usd,
        sum(b1_list_usd) FILTER (WHERE actual_usd IS NOT NULL) AS b1_list_usd,
        count(*) AS node_count,
        sum(minutes) AS node_minutes,
        coalesce(sum(minutes) FILTER (WHERE lifecycle = 'spot'), 0) AS spot_minutes,
        coalesce(sum(minutes) FILTER (WHERE actual_usd IS NOT NULL AND b1_list_usd IS NOT NULL), 0) AS covered_minutes,
        count(*) FILTER (WHERE actual_usd IS NULL OR b1_list_usd IS NULL) AS uncovered
    FROM node_cost_hourly
    WHERE day BETWEEN CAST($first_day AS DATE) AND CAST($last_day AS DATE)
    GROUP BY ts, customer_id, cluster_id
)
SELECT
    ts,
    customer_id,
    cluster_id,
    region,
    CAST(actual_usd AS DECIMAL(18, 8)) AS actual_usd,
    CASE WHEN actual_usd IS NOT NULL THEN CAST(coalesce(spot_usd, 0) AS DECIMAL(18, 8)) END AS spot_usd,
    CASE WHEN actual_usd IS NOT NULL THEN CAST(coalesce(on_demand_usd, 0) AS DECIMAL(18, 8)) END AS on_demand_usd,
    CAST(b1_list_usd AS DECIMAL(18, 8)) AS b1_list_usd,
    CAST(NULL AS DECIMAL(18, 8)) AS b2_shape_usd,
    CAST(NULL AS DECIMAL(18, 8)) AS b3_commit_usd,
    node_count,
    node_minutes,
    spot_minutes,
    CASE WHEN uncovered = 0 THEN 1.0 ELSE covered_minutes / node_minutes END AS coverage_ratio,
    uncovered = 0
        AND ts + INTERVAL 1 HOUR <= CAST($as_of AS TIMESTAMPTZ)
        AND NOT EXISTS (
            SELECT 1 FROM agent_gaps
            WHERE agent_gaps.cluster_id = per_hour.cluster_id
              AND agent_gaps.gap_start < per_hour.ts + INTERVAL 1 HOUR
              AND agent_gaps.gap_end > per_hour.ts
        )
        AND (spot_minutes = 0 OR NOT EXISTS (
            SELECT 1 FROM price_gaps
            WHERE price_gaps.region = per_hour.region
              AND price_gaps.gap_start < per_hour.ts + INTERVAL 1 HOUR
              AND price_gaps.gap_end > per_hour.ts
        )) AS complete,
    'observed' AS source
FROM per_hour
ORDER BY customer_id, cluster_id, ts
