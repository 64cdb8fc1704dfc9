"""What Dagster loads, and when jobs are due."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta

import dagster as dg
import psycopg
import pytest
from dagster._core.definitions.partitions.context import partition_loading_context
from deltalake.schema import Field, PrimitiveType

from cloudoptim_pipelines.coverage import Coverage
from cloudoptim_pipelines.definitions import defs
from cloudoptim_pipelines.defs.costs.automation import current_days
from cloudoptim_pipelines.defs.savings.automation import closing_days
from cloudoptim_pipelines.defs.spot_prices.automation import due_days
from cloudoptim_pipelines.pacing import RETRY_AFTER, LastRun, Outcome, why_not, why_not_today
from cloudoptim_pipelines.partitions import DayRange, by_day_and_region, days_of, ranges_by_region
from cloudoptim_pipelines.refusals import Refusal
from control.sandbox.aws import Fault
from tests.pipelines.conftest import World, at, price
from warehouse.lake.store import Lake

HOUR = timedelta(hours=1)
UNPARTITIONED = {"data_gaps", "metric_retention", "inbox_retention", "record_retention", "lake_maintenance"}


def assets() -> list[dg.AssetSpec]:
    """Every asset's declaration."""
    return list(defs.resolve_all_asset_specs())


def test_every_asset_says_what_it_is_and_whose() -> None:
    names = {spec.key.to_user_string() for spec in assets()}
    assert names == {
        "spot_prices",
        "on_demand_prices",
        "metric_5m",
        "metrics_summary",
        "events",
        "interruptions",
        "node_hours",
        "node_cost_hourly",
        "cluster_cost_hourly",
        "savings_daily",
        "savings_statements",
        *UNPARTITIONED,
    }
    for spec in assets():
        assert spec.owners, spec.key
        assert spec.kinds, spec.key
        assert spec.group_name != "default", spec.key
        assert spec.description is not None
        assert spec.description.endswith("."), spec.key
        assert "\n" not in spec.description, spec.key
        assert len(spec.description) < 160, spec.key


def test_partitioned_assets_take_a_range_in_one_run_and_are_tried_again() -> None:
    repository = defs.get_repository_def()
    for key, asset in repository.assets_defs_by_key.items():
        name = key.to_user_string()
        assert asset.op.retry_policy is not None, name
        if name in UNPARTITIONED:
            continue
        assert asset.backfill_policy == dg.BackfillPolicy.single_run(), name
        assert asset.partitions_def is not None, name


def test_ten_years_of_partitions_stay_under_dagsters_advice() -> None:
    with partition_loading_context(at(20) + timedelta(days=3653)):
        assert 10_000 < by_day_and_region.get_num_partitions() < 100_000


def test_every_schedule_runs_without_being_switched_on() -> None:
    schedules = list(defs.get_repository_def().schedule_defs)
    assert len(schedules) == 8
    assert all(schedule.default_status == dg.DefaultScheduleStatus.RUNNING for schedule in schedules)


@pytest.mark.parametrize(
    ("last", "due"),
    [
        (None, True),
        (LastRun(at(20, 11, 59), Outcome.ACTIVE), False),
        (LastRun(at(19), Outcome.ACTIVE), False),
        (LastRun(at(20, 11, 30), Outcome.SUCCEEDED), False),
        (LastRun(at(20, 11, 0, 8), Outcome.SUCCEEDED), True),
        (LastRun(at(20, 11, 55), Outcome.FAILED), False),
        (LastRun(at(20, 12) - RETRY_AFTER, Outcome.FAILED), True),
    ],
)
def test_an_hourly_job(last: LastRun | None, due: bool) -> None:
    assert (why_not(at(20, 12), last, every=HOUR) is None) == due


@pytest.mark.parametrize(
    ("now", "last", "due"),
    [
        (at(20, 0, 10), None, False),
        (at(20, 0, 30), None, True),
        (at(20, 9), LastRun(at(19, 0, 31), Outcome.SUCCEEDED), True),
        (at(20, 9), LastRun(at(20, 0, 31), Outcome.SUCCEEDED), False),
        (at(20, 9), LastRun(at(20, 8, 55), Outcome.FAILED), False),
        (at(20, 9), LastRun(at(20, 8, 30), Outcome.FAILED), True),
        (at(20, 9), LastRun(at(20, 8, 30), Outcome.ACTIVE), False),
    ],
)
def test_a_daily_job(now: datetime, last: LastRun | None, due: bool) -> None:
    assert (why_not_today(now, last, not_before=timedelta(minutes=30)) is None) == due


def whole(day: int, region: str = "r-1") -> Coverage:
    """A complete day."""
    return Coverage("spot_prices", f"2026-11-{day}|{region}", region, at(day), at(day + 1), 1440, 1440)


def test_prices_are_read_of_today_and_of_recent_days_that_are_not_complete() -> None:
    now, first, day = at(20, 12), at(1).date(), lambda number: at(number).date()
    assert due_days(now, first, [], ["r-1"]) == DayRange(day(18), day(20))
    assert due_days(now, first, [whole(18), whole(19)], ["r-1"]) == DayRange(day(20), day(20))
    assert due_days(now, first, [whole(18), whole(19)], ["r-1", "r-2"]) == DayRange(day(18), day(20))
    half = Coverage("spot_prices", "2026-11-19|r-1", "r-1", at(19), at(19, 23), 1440, 1380)
    assert due_days(now, first, [whole(18), half], ["r-1"]) == DayRange(day(19), day(20))
    assert due_days(now, day(20), [], ["r-1"]) == DayRange(day(20), day(20))


def test_the_running_day_takes_yesterday_along_shortly_after_midnight() -> None:
    assert current_days(at(20, 0, 10)) == ("2026-11-19", "2026-11-20")
    assert current_days(at(20, 0, 20)) == ("2026-11-20", "2026-11-20")


def test_days_are_closed_until_their_savings_are_final() -> None:
    assert closing_days(at(20, 1), at(1).date(), None) == ("2026-11-17", "2026-11-19")
    assert closing_days(at(20, 1), at(1).date(), at(19, 0, 31)) == ("2026-11-17", "2026-11-19")
    assert closing_days(at(20, 1), at(19).date(), None) == ("2026-11-19", "2026-11-19")
    assert closing_days(at(20, 1), at(20).date(), None) is None


def test_after_a_stop_every_day_that_was_not_final_is_closed() -> None:
    assert closing_days(at(20, 1), at(1).date(), at(12, 0, 31)) == ("2026-11-10", "2026-11-19")
    assert closing_days(at(20, 1), at(11).date(), at(12, 0, 31)) == ("2026-11-11", "2026-11-19")


def test_partitions_of_a_run_need_not_be_one_rectangle() -> None:
    keys = ["2026-11-03|b", "2026-11-01|a", "2026-11-02|a", "2026-11-05|a"]
    day = lambda number: at(number).date()  # noqa: E731
    assert ranges_by_region(keys) == {
        "a": [DayRange(day(1), day(2)), DayRange(day(5), day(5))],
        "b": [DayRange(day(3), day(3))],
    }
    assert days_of(["2026-11-02", "2026-11-01"]) == [DayRange(day(1), day(2))]
    assert [(c.first.day, c.last.day) for c in DayRange(day(1), day(7)).chunks(3)] == [(1, 3), (4, 6), (7, 7)]


def test_looking_whether_a_job_is_due_leaves_no_connection_behind(world: World, serve) -> None:
    serve([price(at(20, 1), "m5.large", 0.03)])
    repository = defs.get_repository_def()
    schedule = repository.get_schedule_def("spot_prices_hourly")
    with dg.DagsterInstance.local_temp(str(world.folder)) as instance:
        for minute in range(3):
            with dg.build_schedule_context(
                instance=instance,
                repository_def=repository,
                resources={"warehouse": world.warehouse()},
                scheduled_execution_time=at(20, 12, minute),
            ) as context:
                requests = schedule.evaluate_tick(context).run_requests
                assert requests is not None
                assert requests[0].tags["dagster/asset_partition_range_start"] == "2026-11-18|eu-west-1"
                assert requests[0].tags["dagster/asset_partition_range_end"] == "2026-11-20|us-east-2"
    with psycopg.connect(world.dsn) as connection:
        left = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchone()
    assert left == (0,)


def test_what_is_denied_is_asked_for_half_as_often_each_time_and_at_last_every_six_hours() -> None:
    since = when = at(20)
    waits = []
    for _ in range(9):
        again = Refusal("denied", True, since, since, when).ask_again_at
        waits.append((again - when) // timedelta(minutes=1))
        when = again
    assert waits == [10, 10, 20, 40, 80, 160, 320, 360, 360]


def test_a_denied_region_is_asked_by_itself_ever_less_often_and_the_others_keep_their_hour(world: World, serve) -> None:
    serve([price(at(20, 1), "m5.large", 0.03), price(at(20, 1), "m5.large", 0.03, region="eu-west-1")])
    assert world.aws is not None
    world.aws.inject(
        Fault(
            "error",
            action="DescribeSpotPriceHistory",
            region="us-east-1",
            count=None,
            code="UnauthorizedOperation",
            message="You are not authorized to perform this operation.",
            status=403,
        )
    )
    repository = defs.get_repository_def()

    def due(name: str, when: datetime) -> list[str] | str:
        """First and last region of each run that the schedule asks for, or why it asks for none."""
        with dg.build_schedule_context(
            instance=instance,
            repository_def=repository,
            resources={"warehouse": world.warehouse()},
            scheduled_execution_time=when,
        ) as context:
            tick = repository.get_schedule_def(name).evaluate_tick(context)
        ends = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
        return ["..".join(run.tags[end].partition("|")[2] for end in ends) for run in tick.run_requests or []] or str(
            tick.skip_message
        )

    def asked(when: datetime, first: str, last: str) -> None:
        world.now = when
        with suppress(dg.Failure):
            world.run(["spot_prices"], f"2026-11-20|{first}", f"2026-11-20|{last}")

    with dg.DagsterInstance.local_temp(str(world.folder)) as instance:
        assert due("spot_prices_hourly", at(20, 6)) == ["eu-west-1..us-east-2"]
        assert due("denied_regions", at(20, 6)) == "no region denies us its prices"
        asked(at(20, 6), "eu-west-1", "us-east-2")
        assert due("spot_prices_hourly", at(20, 6, 10)) == ["eu-west-1..eu-west-1", "us-east-2..us-east-2"]
        told = due("denied_regions", at(20, 6, 9))
        assert "us-east-1 is asked again at 20 Nov 06:10" in told
        assert "not authorized" in told
        assert due("denied_regions", at(20, 6, 10)) == ["us-east-1..us-east-1"]
        asked(at(20, 6, 40), "us-east-1", "us-east-1")
        assert "us-east-1 is asked again at 20 Nov 07:20" in due("denied_regions", at(20, 7, 19))
        # Allowed again and read, by whomever: it has its hour like the others.
        world.aws.clear_faults()
        asked(at(20, 7, 20), "us-east-1", "us-east-1")
        assert due("spot_prices_hourly", at(20, 7, 21)) == ["eu-west-1..us-east-2"]


def test_a_new_installation_reads_prices_before_anything_else(world: World, serve) -> None:
    serve([price(at(20, 1), "m5.large", 0.03)])
    repository = defs.get_repository_def()
    with dg.DagsterInstance.local_temp(str(world.folder)) as instance:
        for name, words in (
            ("current_day", "refresh_spot_prices"),
            ("gaps_daily", "refresh_current_day"),
            ("savings_reports_daily", "refresh_current_day"),
            ("maintenance_daily", "refresh_current_day"),
        ):
            with dg.build_schedule_context(
                instance=instance, repository_def=repository, scheduled_execution_time=at(20, 12)
            ) as context:
                tick = repository.get_schedule_def(name).evaluate_tick(context)
            assert tick.skip_message == f"waits for the first run of {words}"
            assert not tick.run_requests


def test_maintenance_rolls_back_what_a_killed_writer_left(world: World) -> None:
    with Lake(world.folder / "lake", world.dsn) as lake:
        released = lake.release().versions["events"]
        lake.delta_table("events").alter.add_columns([Field("half_done", PrimitiveType("double"))])
    world.run_unpartitioned(["lake_maintenance"])
    with Lake(world.folder / "lake", world.dsn) as lake:
        found = lake.delta_table("events")
        assert lake.release().versions["events"] == found.version() > released
        assert "half_done" not in [field.name for field in found.schema().fields]
