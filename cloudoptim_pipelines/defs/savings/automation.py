"""When savings reports are made: every day for the day before, with the days whose figures became final."""

from datetime import UTC, date, datetime, timedelta

import dagster as dg

from cloudoptim_pipelines.defs.metrics.assets import metric_5m, metrics_summary
from cloudoptim_pipelines.defs.savings.assets import REALISED_AFTER_DAYS, savings_statements
from cloudoptim_pipelines.pacing import EVERY_TEN_MINUTES, last_run, tick
from cloudoptim_pipelines.partitions import START, range_tags

OPENS = timedelta(minutes=30)

close_days = dg.define_asset_job(
    "close_days",
    selection=dg.AssetSelection.assets(metric_5m, metrics_summary, savings_statements).upstream()
    - dg.AssetSelection.groups("prices"),
    description="Compute finished days again with what came late, and write their savings reports.",
)


def closing_days(now: datetime, first: date, last_closed: datetime | None) -> tuple[str, str] | None:
    """Yesterday, and back to the day whose savings are final now; None before the first full day.

    After a stop of the server, back to what was not final when days were last closed.
    """
    yesterday = now.date() - timedelta(days=1)
    if yesterday < first:
        return None
    newest = min(yesterday, last_closed.date()) if last_closed else yesterday
    oldest = max(first, newest - timedelta(days=REALISED_AFTER_DAYS))
    return oldest.isoformat(), yesterday.isoformat()


@dg.schedule(
    job=close_days,
    cron_schedule=EVERY_TEN_MINUTES,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Once a day: costs and savings of the last days with what came late, and the savings reports.",
)
def savings_reports_daily(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """One run over the days that are closed today."""
    if skip := tick(context, "close_days", daily=OPENS, after=["refresh_current_day"]):
        return skip
    closed = last_run(context.instance, "close_days", [dg.DagsterRunStatus.SUCCESS])
    days = closing_days(
        context.scheduled_execution_time.astimezone(UTC),
        date.fromisoformat(START),
        closed.created_at if closed else None,
    )
    if days is None:
        return dg.SkipReason("no day is over yet")
    return dg.RunRequest(run_key=context.scheduled_execution_time.isoformat(), tags=range_tags(*days))
