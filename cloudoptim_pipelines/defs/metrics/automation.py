"""When past days are computed again, down to their savings reports: as soon as late data made them stale."""

from datetime import UTC, date, datetime, timedelta

import dagster as dg
from sqlalchemy import Connection, text

from cloudoptim_pipelines import stale
from cloudoptim_pipelines.defs.costs.assets import cluster_cost_hourly, node_cost_hourly, node_hours
from cloudoptim_pipelines.defs.events.assets import interruptions
from cloudoptim_pipelines.defs.metrics.assets import TABLE, metric_5m, metrics_summary
from cloudoptim_pipelines.defs.savings.assets import savings_daily, savings_statements
from cloudoptim_pipelines.defs.savings.automation import OPENS
from cloudoptim_pipelines.pacing import EVERY_TEN_MINUTES, tick
from cloudoptim_pipelines.partitions import DayRange, consecutive, range_tags
from cloudoptim_pipelines.resources import Warehouse

# Late samples come in bursts, when an agent is back: wait for the burst's end.
EVERY = timedelta(minutes=15)

recompute_days = dg.define_asset_job(
    "recompute_days",
    selection=dg.AssetSelection.assets(
        metric_5m,
        metrics_summary,
        interruptions,
        node_hours,
        node_cost_hourly,
        cluster_cost_hourly,
        savings_daily,
        savings_statements,
    ),
    description="Compute days again that late samples or closed gaps made stale, and restate their savings.",
)
fill_metric_5m = dg.define_asset_job(
    "fill_metric_5m",
    selection=dg.AssetSelection.assets(metric_5m, metrics_summary),
    description="Fill a gap: read a day's samples again, then interpolate short holes, marked as such.",
)

_STALE = text("SELECT partition_key FROM dirty_partitions WHERE table_name = ANY(:tables)")


def stale_stretches(connection: Connection, now: datetime) -> list[DayRange]:
    """Stale days as ranges; a day that is not closed yet is left to its refresh and its closing."""
    keys = connection.execute(_STALE, {"tables": [TABLE, stale.COSTS]}).scalars()
    open_day = (now.astimezone(UTC) - OPENS).date()
    return consecutive(day for key in keys if (day := date.fromisoformat(key)) < open_day)


@dg.schedule(
    job=recompute_days,
    cron_schedule=EVERY_TEN_MINUTES,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every quarter of an hour: days that late samples or closed gaps made stale.",
)
def stale_days(context: dg.ScheduleEvaluationContext, warehouse: Warehouse) -> list[dg.RunRequest] | dg.SkipReason:
    """One run for each stretch of stale days."""
    if skip := tick(context, "recompute_days", every=EVERY):
        return skip
    with warehouse.database.system() as connection:
        stretches = stale_stretches(connection, context.scheduled_execution_time)
    if not stretches:
        return dg.SkipReason("no day is stale")
    at = context.scheduled_execution_time.isoformat()
    return [
        dg.RunRequest(run_key=f"{at}/{days.first}", tags=range_tags(days.first.isoformat(), days.last.isoformat()))
        for days in stretches
    ]
