-- Savings of each cluster and day against B1 list ("the same machines on demand"); negative savings are kept.
--
-- reads: cluster_cost_hourly, node_cost_hourly, interruptions, spot_prices, returns (given by the caller: customer_id,
--        instance_id, started_at, replaced_until: Spot nodes launched in the place of a fallback)
-- parameters: $first_day, $last_day, $as_of, $prices_from, $fallback_days, $realised_after_days, $price_age_days
-- Only complete hours count; coverage_ratio says how many of the hours that have passed they are.
--   gross            B1 - actual
--   overlap          minutes in which a node and its replacement both ran, after an interruption or on the way back to
--                    Spot, at the replacement's list price: B1 counts that second machine, which nobody would have had
--                    without us
--   fallback premium on-demand minutes of a replacement of a Spot node, up to $fallback_days days after its
--                    interruption, at list price less the Spot price of the interrupted pool as of the hour (never below
--                    zero); minutes of overlap are taken off in full already
--   displaced commitment, rework: null, not measured: no commitments (Savings Plans, reservations) of customers are read,
--                    and no agent reports work that pods lost with their node and did again. A zero would claim both.
--   net              gross less the deductions that are known
--
-- grain: cluster x day x baseline
-- units: USD; coverage_ratio 0 to 1
-- keys: customer_id, cluster_id, baseline, day
WITH hours AS (
    SELECT day, ts, customer_id, cluster_id, actual_usd, b1_list_usd, complete
    FROM cluster_cost_hourly
    WHERE day BETWEEN CAST($first_day AS DATE) AND CAST($last_day AS DATE)
),
days AS (
    SELECT
        day,
        customer_id,
        cluster_id,
        coalesce(sum(b1_list_usd) FILTER (WHERE complete), 0) AS baseline_usd,
        coalesce(sum(actual_usd) FILTER (WHERE complete), 0) AS actual_usd,
        count(*) FILTER (WHERE complete) AS hours_covered,
        -- A cluster younger than the day is expected from its first hour on, the current day up to now.
        greatest(
            date_diff('hour', min(ts), least(CAST(day + 1 AS TIMESTAMPTZ), date_trunc('hour', CAST($as_of AS TIMESTAMPTZ)))), 0
        ) AS hours_expected
    FROM hours
    GROUP BY day, customer_id, cluster_id
),
replacements AS (
    SELECT
        customer_id,
        replacement_instance_id AS instance_id,
        min(zone_id) AS interrupted_zone_id,
        min(instance_type) AS interrupted_type,
        -- Rows from before the column was there are of Spot nodes.
        bool_or(coalesce(lifecycle, 'spot') = 'spot') AS was_spot,
        max(day) AS interrupted_on,
        min(replacement_launched_at) AS started_at,
        max(ended_at) AS replaced_until
    FROM interruptions
    WHERE day BETWEEN CAST($first_day AS DATE) - CAST($fallback_days AS INTEGER) AND CAST($last_day AS DATE)
      AND replacement_instance_id IS NOT NULL
    GROUP BY customer_id, replacement_instance_id
    UNION ALL
    SELECT customer_id, instance_id, NULL, NULL, false, NULL, min(started_at), max(replaced_until)
    FROM returns
    GROUP BY customer_id, instance_id
),
replacement_hours AS (
    SELECT
        cost.day,
        cost.ts,
        cost.customer_id,
        cost.cluster_id,
        cost.region,
        cost.minutes,
        cost.on_demand_usd_per_hour,
        'Linux/UNIX' AS product,
        replacements.interrupted_zone_id,
        replacements.interrupted_type,
        replacements.was_spot
            AND cost.lifecycle = 'on-demand'
            AND cost.day <= replacements.interrupted_on + CAST($fallback_days AS INTEGER) AS fallback,
        CASE
            WHEN replacements.replaced_until IS NULL OR replacements.started_at IS NULL THEN 0
            ELSE greatest(0, least(
                cost.minutes,
                (
                    epoch_us(least(replacements.replaced_until, cost.ts + INTERVAL 1 HOUR))
                    - epoch_us(greatest(replacements.started_at, cost.ts))
                ) / 60000000.0
            ))
        END AS overlap_minutes
    FROM node_cost_hourly AS cost
    JOIN replacements USING (customer_id, instance_id)
    JOIN hours ON hours.customer_id = cost.customer_id AND hours.cluster_id = cost.cluster_id AND hours.ts = cost.ts
    WHERE cost.day BETWEEN CAST($first_day AS DATE) AND CAST($last_day AS DATE)
      AND hours.complete
),
spot AS (
    SELECT region, zone_id, instance_type, product, ts, price_usd_per_hour
    FROM spot_prices
    WHERE day BETWEEN CAST($prices_from AS DATE) AND CAST($last_day AS DATE)
      AND instance_type IN (SELECT interrupted_type FROM replacements)
),
deductions AS (
    SELECT
        replacement_hours.day,
        replacement_hours.customer_id,
        replacement_hours.cluster_id,
        sum(CAST(CAST(on_demand_usd_per_hour AS DOUBLE) * overlap_minutes / 60 AS DECIMAL(18, 8))) AS overlap_usd,
        sum(CASE
            WHEN fallback AND spot.ts >= replacement_hours.ts - to_days(CAST($price_age_days AS INTEGER))
            THEN CAST(
                greatest(CAST(on_demand_usd_per_hour AS DOUBLE) - CAST(spot.price_usd_per_hour AS DOUBLE), 0)
                    * (minutes - overlap_minutes) / 60
                AS DECIMAL(18, 8)
            )
            ELSE CAST(0 AS DECIMAL(18, 8))
        END) AS fallback_premium_usd
    FROM replacement_hours
    ASOF LEFT JOIN spot
        ON replacement_hours.region = spot.region
        AND replacement_hours.interrupted_zone_id = spot.zone_id
        AND replacement_hours.interrupted_type = spot.instance_type
        AND replacement_hours.product = spot.product
        AND replacement_hours.ts >= spot.ts
    GROUP BY replacement_hours.day, replacement_hours.customer_id, replacement_hours.cluster_id
)
SELECT
    days.customer_id,
    days.cluster_id,
    'b1_list' AS baseline,
    CASE
        WHEN CAST(days.day AS TIMESTAMPTZ) + INTERVAL 1 DAY + to_days(CAST($realised_after_days AS INTEGER))
            <= CAST($as_of AS TIMESTAMPTZ) THEN 'realised'
        ELSE 'estimated'
    END AS stage,
    CAST(baseline_usd AS DECIMAL(18, 8)) AS baseline_usd,
    CAST(actual_usd AS DECIMAL(18, 8)) AS actual_usd,
    CAST(baseline_usd - actual_usd AS DECIMAL(18, 8)) AS gross_usd,
    CAST(coalesce(overlap_usd, 0) AS DECIMAL(18, 8)) AS overlap_usd,
    CAST(coalesce(fallback_premium_usd, 0) AS DECIMAL(18, 8)) AS fallback_premium_usd,
    CAST(NULL AS DECIMAL(18, 8)) AS displaced_commitment_usd,
    CAST(NULL AS DECIMAL(18, 8)) AS rework_usd,
    CAST(
        baseline_usd - actual_usd - coalesce(overlap_usd, 0) - coalesce(fallback_premium_usd, 0) AS DECIMAL(18, 8)
    ) AS net_usd,
    hours_covered,
    CASE WHEN hours_expected = 0 THEN 0.0 ELSE least(1.0, hours_covered / hours_expected) END AS coverage_ratio,
    'observed' AS source,
    days.day
FROM days
LEFT JOIN deductions USING (day, customer_id, cluster_id)
ORDER BY days.customer_id, days.cluster_id, days.day
