"""When Spot prices are read: every hour the current day, with the recent days that are not complete yet."""

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

import dagster as dg

from cloudoptim_pipelines import coverage
from cloudoptim_pipelines.defs.spot_prices.assets import TABLE, spot_prices
from cloudoptim_pipelines.pacing import EVERY_MINUTE, URGENT, tick
from cloudoptim_pipelines.partitions import (
    DAY,
    REGIONS,
    START,
    DayRange,
    day_start,
    price_key,
    range_tags,
)
from cloudoptim_pipelines.resources import Warehouse

EVERY = timedelta(hours=1)
# After a stop of the server the hourly run catches up on its own this far back; older holes are gaps to fill.
CATCH_UP = timedelta(days=2)

refresh_spot_prices = dg.define_asset_job(
    "refresh_spot_prices",
    selection=dg.AssetSelection.assets(spot_prices),
    description="Read the Spot prices of a range of days and regions.",
)
fill_spot_prices = dg.define_asset_job(
    "fill_spot_prices",
    selection=dg.AssetSelection.assets(spot_prices),
    description="Fill a gap: read the Spot prices of the given days and regions again from AWS's history.",
)


def due_days(now: datetime, first: date, covered: Iterable[coverage.Coverage], regions: Iterable[str]) -> DayRange:
    """Today, and back to the oldest recent day of which some region has no complete partition.

    One range without holes: a run takes a range, and reading a complete day again changes nothing.
    """
    today = now.astimezone(UTC).date()
    complete = {
        row.partition_key for row in covered if row.end >= day_start(date.fromisoformat(row.partition_key[:10])) + DAY
    }
    oldest = min(today, max(first, today - CATCH_UP))
    wanted = list(regions)
    due = [
        day
        for day in DayRange(oldest, today).days()
        if day == today or any(price_key(day, region) not in complete for region in wanted)
    ]
    return DayRange(min(due), today)


@dg.schedule(
    job=refresh_spot_prices,
    cron_schedule=EVERY_MINUTE,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every hour: Spot prices of the current day, and of recent days that are not complete.",
)
def spot_prices_hourly(context: dg.ScheduleEvaluationContext, warehouse: Warehouse) -> dg.RunRequest | dg.SkipReason:
    """One run over the days that are due, all regions."""
    if skip := tick(context, "refresh_spot_prices", every=EVERY):
        return skip
    now = context.scheduled_execution_time
    with warehouse.database.system() as connection:
        covered = coverage.load(connection, TABLE)
    days = due_days(now, date.fromisoformat(START), covered, REGIONS)
    return dg.RunRequest(
        run_key=now.isoformat(),
        tags=range_tags(price_key(days.first, REGIONS[0]), price_key(days.last, REGIONS[-1])) | URGENT,
    )
