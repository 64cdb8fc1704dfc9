"""What is missing: the finder's rules, the ledger, and fills as runs."""

from __future__ import annotations

import random
from datetime import UTC, datetime, time, timedelta
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from cloudoptim_pipelines.coverage import Coverage
from cloudoptim_pipelines.defs.gaps import needs
from cloudoptim_pipelines.defs.gaps.finder import AWS_KEEPS, daily_rhythm, expected_slots, match_slots, price_gaps
from control.sandbox.aws import Fault
from tests.pipelines.conftest import World, add_tenant, at, price

DAY = timedelta(days=1)
FIRST = datetime(2026, 3, 1, tzinfo=UTC)


def rhythm_of(hours: tuple[int, ...], days: int, *, seed: int = 1) -> list[datetime]:
    """Snapshots of a sampler that starts at these hours and takes ten to twenty minutes."""
    jitter = random.Random(seed)
    return [
        FIRST + i * DAY + timedelta(hours=hour, minutes=10 + jitter.random() * 10)
        for i in range(days)
        for hour in hours
    ]


def row(
    day: datetime, moments: list[datetime], *, start: datetime | None = None, end: datetime | None = None
) -> Coverage:
    """Coverage of one region's day."""
    return Coverage(
        "spot_prices",
        f"{day:%Y-%m-%d}|r-1",
        "r-1",
        start or day,
        end or day + DAY,
        1440,
        1440,
        {"snapshots": [moment.isoformat() for moment in moments if moment.date() == day.date()]},
    )


def rows(moments: list[datetime], days: int) -> list[Coverage]:
    """Coverage of consecutive days."""
    return [row(FIRST + i * DAY, moments) for i in range(days)]


@pytest.mark.parametrize("hours", [(0, 7, 14, 21), (3,), (0, 6, 12, 18), (23,), tuple(range(24))])
def test_a_rhythm_is_read_from_the_data(hours: tuple[int, ...]) -> None:
    found = daily_rhythm(rhythm_of(hours, 60))
    assert [(slot.hour, slot.minute) for slot in found] == [(hour, 10) for hour in hours]


def test_missing_snapshots_are_found_and_nothing_else_between_late_and_double_ones() -> None:
    moments = rhythm_of((0, 7, 14, 21), 90)
    lost = [moments[i] for i in (17, 18, 203)]
    kept = [moment for moment in moments if moment not in lost]
    kept[100] += timedelta(hours=2, minutes=30)  # a late run
    kept.append(moments[60] + timedelta(minutes=40))  # one by hand
    gaps = price_gaps(rows(sorted(kept), 90), now=FIRST + 90 * DAY + timedelta(minutes=30))
    assert [(gap.start, gap.reason, gap.missing) for gap in gaps] == [
        (moment.replace(minute=10, second=0, microsecond=0), "no_scrape", 1) for moment in lost
    ]
    assert gaps[0].end == gaps[1].start


def test_changes_without_a_rhythm_have_no_missing_snapshots() -> None:
    chance = random.Random(3)
    moments = sorted(FIRST + chance.random() * 60 * DAY for _ in range(30))
    assert daily_rhythm(moments[:3]) == []
    quiet = [row(FIRST + i * DAY, []) for i in range(60)]
    assert price_gaps(quiet, now=FIRST + 60 * DAY) == []


def test_real_snapshots_lack_exactly_five(shared_data: Path) -> None:
    snapshots = pl.read_csv(shared_data / "spot_price_catalog" / "snapshots.csv")["timestamp"]
    moments = sorted(snapshots.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%z").dt.convert_time_zone("UTC").to_list())
    slots = expected_slots(daily_rhythm(moments), moments[0], moments[-1])
    taken = match_slots(slots, moments)
    missing = [slot for i, slot in enumerate(slots) if i not in set(taken)]
    # cron at 00, 07, 14, 21 UTC: what GitHub's scheduler started, late as it is, lies in the hours after
    assert [(m.date().isoformat(), m.hour) for m in missing] == [
        ("2022-12-23", 21),
        ("2023-01-29", 14),
        ("2023-02-18", 14),
        ("2023-04-03", 21),
        ("2023-06-25", 21),
    ]
    assert len(slots) - len(set(taken)) == 5
    assert len(set(taken)) == len(moments), "every snapshot has a turn of its own"


def test_days_nobody_wrote_and_days_cut_short_are_gaps_with_their_reason() -> None:
    now = FIRST + 10 * DAY + timedelta(hours=1)
    given = [row(FIRST + i * DAY, []) for i in (0, 1, 4, 5, 6, 7, 8)]
    given[3] = row(FIRST + 5 * DAY, [], end=FIRST + 5 * DAY + timedelta(hours=9))
    found = [(gap.start, gap.end, gap.reason, gap.fillable) for gap in price_gaps(given, now=now)]
    assert found == [
        (FIRST + 2 * DAY, FIRST + 3 * DAY, "api_error", True),
        (FIRST + 3 * DAY, FIRST + 4 * DAY, "api_error", True),
        (FIRST + 5 * DAY + timedelta(hours=9), FIRST + 6 * DAY, "api_error", True),
        # the refresh of the running day is not due yet; the day before it is
        (FIRST + 9 * DAY, FIRST + 9 * DAY + timedelta(hours=22, minutes=50), "api_error", True),
    ]
    late = price_gaps(given, now=now + AWS_KEEPS + 5 * DAY)
    assert {gap.reason for gap in late if gap.start < now} == {"too_old"}


def test_before_the_first_price_nothing_existed() -> None:
    first = row(FIRST, [], start=FIRST + timedelta(hours=7))
    gaps = price_gaps([first], now=FIRST + DAY)
    assert [(gap.start, gap.end, gap.reason, gap.fillable) for gap in gaps] == [
        (FIRST, FIRST + timedelta(hours=7), "did_not_exist", False)
    ]


def test_slots_begin_with_the_first_snapshot_and_end_with_the_last() -> None:
    slots = expected_slots([time(0), time(12)], FIRST + timedelta(hours=13), FIRST + DAY + timedelta(hours=1))
    assert slots == [FIRST + timedelta(hours=12), FIRST + DAY]


def test_a_gap_opens_is_filled_by_any_run_and_opens_again(world: World, serve) -> None:
    serve([price(at(day, 1), "m5.large", 0.03) for day in (16, 17, 18, 19, 20)])
    world.run(["spot_prices"], "2026-11-17|us-east-1")
    world.run(["spot_prices"], "2026-11-20|us-east-1")
    gaps = world.sql("SELECT partition_key, state, reason FROM data_gaps WHERE state <> 'filled' ORDER BY gap_start")
    assert [(g["partition_key"], g["state"], g["reason"]) for g in gaps] == [
        ("2026-11-18|us-east-1", "open", "api_error"),
        ("2026-11-19|us-east-1", "open", "api_error"),
    ]
    # As from Dagster's own page: a run without any mark of ours.
    world.run(["spot_prices"], "2026-11-18|us-east-1", "2026-11-19|us-east-1")
    gaps = world.sql("SELECT state, filled_at FROM data_gaps")
    assert {g["state"] for g in gaps} == {"filled"}
    assert all(g["filled_at"] for g in gaps)
    world.sql("DELETE FROM partition_coverage WHERE partition_key LIKE '2026-11-18%'")
    world.run_unpartitioned(["data_gaps"])
    states = world.sql("SELECT partition_key, state FROM data_gaps ORDER BY gap_start")
    assert [s["state"] for s in states][:2] == ["open", "filled"]
    ledger = world.query("SELECT series, filled_points, reason FROM gap_ledger ORDER BY ts")
    assert [(g["series"], g["filled_points"]) for g in ledger][:2] == [
        ("spot_prices/us-east-1", 0),
        ("spot_prices/us-east-1", 1440),
    ]


def test_the_check_shows_open_gaps_as_a_table(world: World, serve) -> None:
    serve([price(at(day, 1), "m5.large", 0.03) for day in (16, 17, 18, 19, 20)])
    world.run(["on_demand_prices"], "2026-11-20|us-east-1")
    world.run(["spot_prices"], "2026-11-17|us-east-1")
    world.sql("UPDATE partition_coverage SET present_points = 0 WHERE table_name = 'spot_prices'")
    result = world.run(["spot_prices"], "2026-11-20|us-east-1", checks=True)
    check = next(c for c in result.get_asset_check_evaluations() if c.check_name == "no_gaps")
    assert not check.passed
    assert check.metadata["gap_count"].value == 3
    table = check.metadata["gaps"]
    assert isinstance(table, dg.TableMetadataValue)
    assert [record.data["partition"] for record in table.records] == [
        f"2026-11-{day}|us-east-1" for day in (19, 18, 17)
    ]


def test_a_fill_ends_with_its_last_partition_whatever_runs_wrote_them(world: World, serve) -> None:
    serve([price(at(day, 1), "m5.large", 0.03) for day in range(14, 21)])
    fill_id = "0192f0c0-0000-7000-8000-000000000002"
    world.run(["spot_prices"], "2026-11-20|us-east-1")
    keys = [f"2026-11-{day}|us-east-1" for day in (16, 18)]
    world.sql(
        "INSERT INTO gap_fills (id, requested_by, table_name, partitions) "
        "VALUES (:id, 'test', 'spot_prices', to_jsonb(CAST(:keys AS text[])))",
        id=fill_id,
        keys=keys,
    )
    world.run(["spot_prices"], keys[0], tags={"cloudoptim/fill_id": fill_id})
    half = world.sql("SELECT state, records_filled, sources_used FROM gap_fills")[0]
    assert (half["state"], half["records_filled"], half["sources_used"]) == ("running", 1, ["aws_history"])
    world.run(["spot_prices"], keys[1], tags={"cloudoptim/fill_id": fill_id})
    done = world.sql("SELECT state, records_filled, finished_at FROM gap_fills")[0]
    assert (done["state"], done["records_filled"]) == ("succeeded", 2)
    assert done["finished_at"] is not None


def unfilled(world: World, series: str) -> list[tuple[int, str, str]]:
    """Day, reason and state of a region's gaps that are still there."""
    rows = world.sql(
        "SELECT gap_start, reason, state FROM data_gaps WHERE series = :s AND state <> 'filled' ORDER BY gap_start",
        s=series,
    )
    return [(row["gap_start"].day, row["reason"], row["state"]) for row in rows]


def test_a_region_denied_from_its_first_day_is_missing_with_that_reason_and_holds_up_no_other(
    world: World, serve
) -> None:
    days = range(16, 21)
    serve(
        [price(at(day, 1), "m5.large", 0.03) for day in days]
        + [price(at(day, 1), "m5.large", 0.03, zone="euw1-az1", region="eu-west-1") for day in days]
    )
    add_tenant(world, created_at=at(18, 6), region="eu-west-1")
    assert world.aws is not None
    world.aws.inject(
        Fault(
            "error",
            action="DescribeSpotPriceHistory",
            region="eu-west-1",
            count=None,
            code="UnauthorizedOperation",
            message="You are not authorized to perform this operation.",
            status=403,
        )
    )
    with pytest.raises(dg.Failure, match=r"eu-west-1: .*UnauthorizedOperation") as failed:
        world.run(["spot_prices"], "2026-11-19|eu-west-1", "2026-11-20|us-east-1")
    assert not failed.value.allow_retries, "asking again changes nothing until somebody allows it"
    assert [row["partition_key"] for row in world.sql("SELECT partition_key FROM partition_coverage ORDER BY 1")] == [
        "2026-11-19|us-east-1",
        "2026-11-20|us-east-1",
    ]
    # Since the cluster there needs prices, and until the last refresh was due.
    assert unfilled(world, "eu-west-1") == [(day, "denied", "open") for day in (18, 19, 20)]
    world.run_unpartitioned(["data_gaps"])
    assert unfilled(world, "eu-west-1") == [(day, "denied", "open") for day in (18, 19, 20)]
    # Allowed again: one day read is one gap less, what was missing before it stays missing.
    world.aws.clear_faults()
    world.run(["spot_prices"], "2026-11-20|eu-west-1")
    assert unfilled(world, "eu-west-1") == [(day, "api_error", "open") for day in (18, 19)]
    world.run(["spot_prices"], "2026-11-18|eu-west-1", "2026-11-19|eu-west-1")
    assert unfilled(world, "eu-west-1") == []
    assert world.sql("SELECT * FROM source_failures") == []


def test_a_region_that_nobody_lists_or_uses_any_more_gathers_no_gaps_and_its_old_ones_are_closed(
    world: World, serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve([price(at(day, 1), "m5.large", 0.03, zone="euw1-az1", region="eu-west-1") for day in range(15, 21)])
    tenant = add_tenant(world, created_at=at(16), region="eu-west-1")
    world.run(["spot_prices"], "2026-11-16|eu-west-1")
    world.run(["spot_prices"], "2026-11-18|eu-west-1", "2026-11-19|eu-west-1")
    assert unfilled(world, "eu-west-1") == [(17, "api_error", "open"), (20, "api_error", "open")]

    def ends() -> list[datetime]:
        return [row["gap_end"] for row in world.sql("SELECT gap_end FROM data_gaps ORDER BY gap_end")]

    monkeypatch.setattr(needs, "REGIONS", ["us-east-1"])
    world.now = at(20, 18)
    world.run_unpartitioned(["data_gaps"])
    # A cluster there still needs them.
    assert unfilled(world, "eu-west-1") == [(17, "not_configured", "unfillable"), (20, "not_configured", "unfillable")]
    last = ends()[-1]
    world.sql("UPDATE clusters SET status = 'deleted' WHERE id = :id", id=tenant.cluster_id)
    world.sql("DELETE FROM dirty_partitions")
    for world.now in (at(20, 20), at(23)):
        world.run_unpartitioned(["data_gaps"])
        assert unfilled(world, "eu-west-1") == [(17, "not_needed", "unfillable"), (20, "not_needed", "unfillable")]
        assert ends()[-1] == last
    # What the cluster cost in those hours is no more whole than it was.
    assert world.sql("SELECT * FROM dirty_partitions") == []
    # Listed again, they are open again, with what came in between.
    monkeypatch.undo()
    world.run_unpartitioned(["data_gaps"])
    assert unfilled(world, "eu-west-1") == [(day, "api_error", "open") for day in (17, 20, 21, 22)]


def test_a_cluster_in_a_region_whose_prices_nobody_reads_is_a_gap_until_it_is_gone(world: World) -> None:
    tenant = add_tenant(world, created_at=at(19, 6), region="ap-south-1")
    world.run_unpartitioned(["data_gaps"])
    assert unfilled(world, "ap-south-1") == [(day, "not_configured", "unfillable") for day in (19, 20)]
    world.sql("UPDATE clusters SET status = 'deleted' WHERE id = :id", id=tenant.cluster_id)
    world.run_unpartitioned(["data_gaps"])
    assert world.sql("SELECT * FROM data_gaps") == []
