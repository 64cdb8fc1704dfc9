-- A customer's savings of a period, by cluster and baseline.
--
-- table: savings_daily
-- reads: savings_daily
-- parameters: $customer_id, $first_day, $last_day
--
-- grain: cluster x baseline
-- units: USD; coverage_ratio 0 to 1 (hours counted / hours that should be there)
-- keys: cluster_id, baseline
SELECT
    cluster_id,
    baseline,
    CASE WHEN bool_and(stage = 'realised') THEN 'realised' ELSE 'estimated' END AS stage,
    CAST(sum(baseline_usd) AS DECIMAL(18, 8)) AS baseline_usd,
    CAST(sum(actual_usd) AS DECIMAL(18, 8)) AS actual_usd,
    CAST(sum(gross_usd) AS DECIMAL(18, 8)) AS gross_usd,
    CAST(sum(overlap_usd) AS DECIMAL(18, 8)) AS overlap_usd,
    CAST(sum(fallback_premium_usd) AS DECIMAL(18, 8)) AS fallback_premium_usd,
    -- null when it is not known of a day: a sum of the others would pass for the whole
    CASE WHEN count(displaced_commitment_usd) = count(*) THEN CAST(sum(displaced_commitment_usd) AS DECIMAL(18, 8)) END
        AS displaced_commitment_usd,
    CASE WHEN count(rework_usd) = count(*) THEN CAST(sum(rework_usd) AS DECIMAL(18, 8)) END AS rework_usd,
    CAST(sum(net_usd) AS DECIMAL(18, 8)) AS net_usd,
    CAST(sum(hours_covered) AS BIGINT) AS hours_covered,
    count(*) AS days,
    -- hours expected are hours covered / coverage of each day; a day with no covered hour counts as a whole day missed
    list_sum(list(CASE WHEN coverage_ratio > 0 THEN hours_covered / coverage_ratio ELSE 24 END ORDER BY day)) AS hours_expected
FROM savings_daily
WHERE customer_id = CAST($customer_id AS VARCHAR)
  AND day BETWEEN CAST($first_day AS DATE) AND CAST($last_day AS DATE)
GROUP BY cluster_id, baseline
ORDER BY cluster_id, baseline
