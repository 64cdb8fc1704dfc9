-- What each node cost in each hour at the price of that hour, beside the same minutes on demand (baseline B1 list).
--
-- reads: node_hours, spot_prices, on_demand_prices
-- parameters: $first_day, $last_day: days computed; $prices_from: first day of prices looked at; $price_age_days: a
--             price that did not change for longer is not believed
-- price paid: Spot: the pool's price in force at the start of the hour (Amazon charges an instance hour at it), by zone
--             id, never by zone name; on-demand: the list price in force then. No price known: null, basis missing.
--
-- grain: node x hour
-- units: USD; minutes
-- keys: customer_id, cluster_id, instance_id, ts
WITH hours AS (
    SELECT * FROM node_hours WHERE day BETWEEN CAST($first_day AS DATE) AND CAST($last_day AS DATE)
),
spot AS (
    SELECT region, zone_id, instance_type, product, ts, price_usd_per_hour
    FROM spot_prices
    WHERE day BETWEEN CAST($prices_from AS DATE) AND CAST($last_day AS DATE)
      AND region IN (SELECT region FROM hours)
      AND instance_type IN (SELECT instance_type FROM hours WHERE lifecycle = 'spot')
),
listed AS (
    SELECT region, instance_type, product, ts, price_usd_per_hour
    FROM on_demand_prices
    WHERE day BETWEEN CAST($prices_from AS DATE) AND CAST($last_day AS DATE)
      AND region IN (SELECT region FROM hours)
      AND instance_type IN (SELECT instance_type FROM hours)
),
with_list AS (
    SELECT
        hours.*,
        CASE WHEN listed.ts >= hours.ts - to_days(CAST($price_age_days AS INTEGER)) THEN listed.price_usd_per_hour END
            AS on_demand_usd_per_hour
    FROM hours
    ASOF LEFT JOIN listed
        ON hours.region = listed.region
        AND hours.instance_type = listed.instance_type
        AND hours.product = listed.product
        AND hours.ts >= listed.ts
),
priced AS (
    SELECT
        with_list.*,
        CASE
            WHEN with_list.lifecycle <> 'spot' THEN on_demand_usd_per_hour
            WHEN spot.ts >= with_list.ts - to_days(CAST($price_age_days AS INTEGER)) THEN spot.price_usd_per_hour
        END AS price_usd_per_hour
    FROM with_list
    ASOF LEFT JOIN spot
        ON with_list.region = spot.region
        AND with_list.zone_id = spot.zone_id
        AND with_list.instance_type = spot.instance_type
        AND with_list.product = spot.product
        AND with_list.ts >= spot.ts
)
SELECT
    ts,
    customer_id,
    cluster_id,
    node_name,
    instance_id,
    zone_id,
    availability_zone,
    instance_type,
    lifecycle,
    minutes,
    price_usd_per_hour,
    on_demand_usd_per_hour,
    CAST(CAST(price_usd_per_hour AS DOUBLE) * minutes / 60 AS DECIMAL(18, 8)) AS actual_usd,
    CAST(CAST(on_demand_usd_per_hour AS DOUBLE) * minutes / 60 AS DECIMAL(18, 8)) AS b1_list_usd,
    CASE
        WHEN price_usd_per_hour IS NULL THEN 'missing'
        WHEN lifecycle = 'spot' THEN 'spot_as_of'
        ELSE 'on_demand'
    END AS price_basis,
    source,
    region
FROM priced
ORDER BY customer_id, cluster_id, ts, instance_id
