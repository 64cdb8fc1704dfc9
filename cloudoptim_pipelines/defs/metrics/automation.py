"""When past days' metrics are computed again: as soon as late samples made them stale."""

from datetime import date, timedelta

import dagster as dg
from sqlalchemy import text

from cloudoptim_pipelines.defs.costs.assets import cluster_cost_hourly, node_cost_hourly, node_hours
from cloudoptim_pipelines.defs.metrics.assets import TABLE, metric_5m, metrics_summary
from cloudoptim_pipelines.pacing import EVERY_TEN_MINUTES, tick
from cloudoptim_pipelines.partitions import days_of, range_tags
from cloudoptim_pipelines.resources import Warehouse

# Late samples come in bursts, when an agent is back: wait for the burst's end.
EVERY = timedelta(minutes=15)

recompute_days = dg.define_asset_job(
    "recompute_days",
    selection=dg.AssetSelection.assets(metric_5m, metrics_summary, node_hours, node_cost_hourly, cluster_cost_hourly),
    description="Compute days again that late samples made stale.",
)
fill_metric_5m = dg.define_asset_job(
    "fill_metric_5m",
    selection=dg.AssetSelection.assets(metric_5m, metrics_summary),
    description="Fill a gap: read a day's samples again, then interpolate short holes, marked as such.",
)


@dg.schedule(
    job=recompute_days,
    cron_schedule=EVERY_TEN_MINUTES,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every quarter of an hour: days that late samples made stale.",
)
def stale_days(context: dg.ScheduleEvaluationContext, warehouse: Warehouse) -> list[dg.RunRequest] | dg.SkipReason:
    """One run for each stretch of stale days, the current day left to its own refresh."""
    if skip := tick(context, "recompute_days", every=EVERY):
        return skip
    with warehouse.database.system() as connection:
        keys = list(
            connection.execute(
                text("SELECT partition_key FROM dirty_partitions WHERE table_name = :t"), {"t": TABLE}
            ).scalars()
        )
    today = context.scheduled_execution_time.date()
    past = [key for key in keys if date.fromisoformat(key) < today]
    if not past:
        return dg.SkipReason("no day is stale")
    at = context.scheduled_execution_time.isoformat()
    return [
        dg.RunRequest(run_key=f"{at}/{days.first}", tags=range_tags(days.first.isoformat(), days.last.isoformat()))
        for days in days_of(past)
    ]
