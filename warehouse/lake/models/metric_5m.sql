-- Agents' samples in windows of five minutes.
--
-- reads: samples (given by the caller: rows of Postgres' metric_samples)
-- Two values for one series and time: the one received first counts. The mean adds samples in the order of their times,
-- so that it is the same to the last bit whichever thread computes it.
--
-- grain: series (cluster, metric, subject) x five minutes
-- units: the metric's base unit (cores, bytes, ratio, count), in its name
-- keys: customer_id, cluster_id, metric, subject, ts
WITH single AS (
    SELECT customer_id, cluster_id, metric, subject, ts, arg_min(value, received_at) AS value
    FROM samples
    GROUP BY customer_id, cluster_id, metric, subject, ts
)
SELECT
    time_bucket(INTERVAL 5 MINUTE, ts) AS ts,
    customer_id,
    cluster_id,
    CASE WHEN metric LIKE 'node\_%' ESCAPE '\' THEN subject END AS node_name,
    subject,
    metric,
    min(value) AS min,
    list_sum(list(value ORDER BY ts)) / count(*) AS mean,
    max(value) AS max,
    arg_max(value, ts) AS last,
    count(*) AS samples,
    'observed' AS source
FROM single
GROUP BY time_bucket(INTERVAL 5 MINUTE, ts), customer_id, cluster_id, metric, subject
ORDER BY customer_id, cluster_id, metric, subject, ts
