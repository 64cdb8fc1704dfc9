"""When Postgres and the lake are kept small: once a day, in the quiet hours of the UTC morning."""

from datetime import timedelta

import dagster as dg

from cloudoptim_pipelines.defs.maintenance.assets import (
    inbox_retention,
    lake_maintenance,
    metric_retention,
    record_retention,
)
from cloudoptim_pipelines.pacing import EVERY_TEN_MINUTES, tick

maintain = dg.define_asset_job(
    "maintain",
    selection=dg.AssetSelection.assets(metric_retention, inbox_retention, record_retention, lake_maintenance),
    description="Drop what the lake holds already, join small files, remove unneeded ones.",
)


@dg.schedule(
    job=maintain,
    cron_schedule=EVERY_TEN_MINUTES,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Once a day: retention, compaction, vacuum.",
)
def maintenance_daily(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """One run a day."""
    if skip := tick(context, "maintain", daily=timedelta(hours=3, minutes=20), after=["refresh_current_day"]):
        return skip
    return dg.RunRequest(run_key=context.scheduled_execution_time.isoformat())
