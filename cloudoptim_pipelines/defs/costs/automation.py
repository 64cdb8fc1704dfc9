"""When metrics, events, costs and savings of the running day are computed: every five minutes, in one run."""

from datetime import UTC, datetime, timedelta

import dagster as dg

from cloudoptim_pipelines.defs.costs.assets import cluster_cost_hourly, node_cost_hourly, node_hours
from cloudoptim_pipelines.defs.events.assets import events, interruptions
from cloudoptim_pipelines.defs.metrics.assets import metric_5m, metrics_summary
from cloudoptim_pipelines.defs.savings.assets import savings_daily
from cloudoptim_pipelines.pacing import EVERY_MINUTE, URGENT, tick
from cloudoptim_pipelines.partitions import range_tags

# A run costs about five seconds of one core, most of it Python's start: every five minutes that is under 2 %.
EVERY = timedelta(minutes=5)
PRICE_JOBS = ("refresh_spot_prices", "refresh_on_demand_prices")
# The last windows of a day arrive after midnight.
DAY_CLOSES_AFTER = timedelta(minutes=20)

refresh_current_day = dg.define_asset_job(
    "refresh_current_day",
    selection=dg.AssetSelection.assets(
        metric_5m,
        metrics_summary,
        events,
        interruptions,
        node_hours,
        node_cost_hourly,
        cluster_cost_hourly,
        savings_daily,
    ),
    description="Metrics, events, costs and savings of a day, in one process.",
)


def current_days(now: datetime) -> tuple[str, str]:
    """First and last partition to refresh: today, and shortly after midnight yesterday too."""
    return (now - DAY_CLOSES_AFTER).date().isoformat(), now.date().isoformat()


@dg.schedule(
    job=refresh_current_day,
    cron_schedule=EVERY_MINUTE,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every five minutes: metrics, events, costs and savings of the current day.",
)
def current_day(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """One run for the current day. The first of an installation waits until prices were asked for: no cost without."""
    if skip := tick(context, "refresh_current_day", every=EVERY, after=PRICE_JOBS):
        return skip
    first, last = current_days(context.scheduled_execution_time.astimezone(UTC))
    return dg.RunRequest(run_key=context.scheduled_execution_time.isoformat(), tags=range_tags(first, last) | URGENT)
