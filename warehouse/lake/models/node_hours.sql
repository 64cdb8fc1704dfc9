-- How many minutes of each hour each node ran, and as what.
--
-- reads: nodes (given by the caller: one row per node with run_from, run_until and its region)
-- parameters: $start, $end: hours from $start (included) to $end (not included)
--
-- grain: node x hour
-- units: minutes 0 to 60; cores; bytes
-- keys: customer_id, cluster_id, instance_id, ts
SELECT
    hours.ts,
    nodes.customer_id,
    nodes.cluster_id,
    nodes.node_name,
    nodes.instance_id,
    nodes.zone_id,
    nodes.availability_zone,
    nodes.instance_type,
    nodes.product,
    nodes.lifecycle,
    (epoch_us(least(nodes.run_until, hours.ts + INTERVAL 1 HOUR)) - epoch_us(greatest(nodes.run_from, hours.ts)))
        / 60000000.0 AS minutes,
    nodes.cpu_cores,
    nodes.memory_bytes,
    'observed' AS source,
    nodes.region
FROM nodes
CROSS JOIN (
    SELECT unnest(generate_series(CAST($start AS TIMESTAMPTZ), CAST($end AS TIMESTAMPTZ) - INTERVAL 1 HOUR, INTERVAL 1 HOUR)) AS ts
) AS hours
WHERE nodes.run_from < hours.ts + INTERVAL 1 HOUR
  AND nodes.run_until > hours.ts
ORDER BY nodes.customer_id, nodes.cluster_id, nodes.instance_id, hours.ts
