"""When the price list is read: once a day, all regions."""

from datetime import UTC, timedelta

import dagster as dg

from cloudoptim_pipelines.defs.on_demand_prices.assets import on_demand_prices
from cloudoptim_pipelines.pacing import EVERY_MINUTE, URGENT, tick
from cloudoptim_pipelines.partitions import REGIONS, price_key, range_tags

refresh_on_demand_prices = dg.define_asset_job(
    "refresh_on_demand_prices",
    selection=dg.AssetSelection.assets(on_demand_prices),
    description="Read the on-demand price list of all regions for a day.",
)


@dg.schedule(
    job=refresh_on_demand_prices,
    cron_schedule=EVERY_MINUTE,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Once a day: the on-demand price list of every region.",
)
def on_demand_prices_daily(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """One run for all regions of the day."""
    if skip := tick(context, "refresh_on_demand_prices", daily=timedelta(0)):
        return skip
    day = context.scheduled_execution_time.astimezone(UTC).date()
    return dg.RunRequest(
        run_key=context.scheduled_execution_time.isoformat(),
        tags=range_tags(price_key(day, REGIONS[0]), price_key(day, REGIONS[-1])) | URGENT,
    )
