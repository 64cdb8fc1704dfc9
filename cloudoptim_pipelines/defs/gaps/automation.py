"""When gaps are looked for as a whole: once a day. Runs that write prices or metrics keep their own up to date."""

from datetime import timedelta

import dagster as dg

from cloudoptim_pipelines.defs.gaps.assets import data_gaps
from cloudoptim_pipelines.pacing import EVERY_TEN_MINUTES, tick

find_gaps = dg.define_asset_job(
    "find_gaps", selection=dg.AssetSelection.assets(data_gaps), description="Look for what is missing."
)


@dg.schedule(
    job=find_gaps,
    cron_schedule=EVERY_TEN_MINUTES,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Once a day: look through all prices and metrics for what is missing.",
)
def gaps_daily(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """One run a day, after the last windows of the day before arrived."""
    if skip := tick(context, "find_gaps", daily=timedelta(minutes=40), after=["refresh_current_day"]):
        return skip
    return dg.RunRequest(run_key=context.scheduled_execution_time.isoformat())
