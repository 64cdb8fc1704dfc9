"""When the price list is read: every hour, all regions."""

from datetime import UTC, date, timedelta

import dagster as dg

from cloudoptim_pipelines.defs.on_demand_prices.assets import on_demand_prices
from cloudoptim_pipelines.pacing import EVERY_MINUTE, URGENT, tick
from cloudoptim_pipelines.partitions import REGIONS, START, price_key, range_tags

EVERY = timedelta(hours=1)

refresh_on_demand_prices = dg.define_asset_job(
    "refresh_on_demand_prices",
    selection=dg.AssetSelection.assets(on_demand_prices),
    description="Read the on-demand price list of all regions for a range of days.",
)


@dg.schedule(
    job=refresh_on_demand_prices,
    cron_schedule=EVERY_MINUTE,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every hour: the on-demand price list of every region.",
)
def on_demand_prices_hourly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """One run for all regions of yesterday, whose last hour may have changed a price, and today."""
    if skip := tick(context, "refresh_on_demand_prices", every=EVERY):
        return skip
    today = context.scheduled_execution_time.astimezone(UTC).date()
    first = max(today - timedelta(days=1), date.fromisoformat(START))
    return dg.RunRequest(
        run_key=context.scheduled_execution_time.isoformat(),
        tags=range_tags(price_key(first, REGIONS[0]), price_key(today, REGIONS[-1])) | URGENT,
    )
