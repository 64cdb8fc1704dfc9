"""When Spot prices are read: every hour the current day, with the recent days that are not complete yet.

Regions that refuse for good are left out and asked by a job of their own, ever less often: the run of the others would
fail with them, and be tried again every ten minutes.
"""

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

import dagster as dg

from cloudoptim_pipelines import coverage, refusals
from cloudoptim_pipelines.defs.spot_prices.assets import TABLE, spot_prices
from cloudoptim_pipelines.pacing import EVERY_MINUTE, RETRY_AFTER, URGENT, tick
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
ask_denied_regions = dg.define_asset_job(
    "ask_denied_regions",
    selection=dg.AssetSelection.assets(spot_prices),
    description="Ask regions that deny us their Spot prices once more.",
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


def requests(now: datetime, regions: Iterable[str], covered: Iterable[coverage.Coverage]) -> list[dg.RunRequest]:
    """A run for each stretch of neighbouring regions, over the days that are due in them."""
    rows = list(covered)
    out = []
    for stretch in refusals.neighbours(REGIONS, set(regions)):
        days = due_days(now, date.fromisoformat(START), rows, stretch)
        tags = range_tags(price_key(days.first, stretch[0]), price_key(days.last, stretch[-1]))
        out.append(dg.RunRequest(run_key=f"{now.isoformat()} {stretch[0]}", tags=tags | URGENT))
    return out


@dg.schedule(
    job=refresh_spot_prices,
    cron_schedule=EVERY_MINUTE,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every hour: Spot prices of the current day, and of recent days that are not complete.",
)
def spot_prices_hourly(
    context: dg.ScheduleEvaluationContext, warehouse: Warehouse
) -> list[dg.RunRequest] | dg.SkipReason:
    """The days that are due, of all regions that nobody denies us."""
    if skip := tick(context, "refresh_spot_prices", every=EVERY):
        return skip
    with warehouse.database.system() as connection:
        covered = coverage.load(connection, TABLE)
        denied = refusals.denied_now(refusals.load(connection, TABLE), REGIONS)
    answering = [region for region in REGIONS if region not in denied]
    if not answering:
        return dg.SkipReason(f"every region denies us its prices; {ask_denied_regions.name} asks again")
    return requests(context.scheduled_execution_time, answering, covered)


@dg.schedule(
    job=ask_denied_regions,
    cron_schedule=EVERY_MINUTE,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Regions that deny us their prices: asked again, ever less often, at last every six hours.",
)
def denied_regions(context: dg.ScheduleEvaluationContext, warehouse: Warehouse) -> list[dg.RunRequest] | dg.SkipReason:
    """The denied regions whose turn has come; the others, and why, are in the reason for skipping."""
    now = context.scheduled_execution_time
    with warehouse.database.system() as connection:
        denied = refusals.denied_now(refusals.load(connection, TABLE), REGIONS)
        covered = coverage.load(connection, TABLE) if denied else []
    waiting = refusals.waiting(denied, now)
    due = [region for region in denied if region not in waiting]
    if not due:
        told = "; ".join(
            f"{region} is asked again at {refusal.ask_again_at:%d %b %H:%M} UTC: {refusal.message}"
            for region, refusal in waiting.items()
        )
        return dg.SkipReason(told or "no region denies us its prices")
    if skip := tick(context, ask_denied_regions.name, every=RETRY_AFTER):
        return skip
    return requests(now, due, covered)
