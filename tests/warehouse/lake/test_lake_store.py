"""Publishing: whole partitions, several tables in one release, data that does not fit, writers that died."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import polars as pl
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import Field
from deltalake.schema import PrimitiveType

from tests.warehouse.lake.lake_rows import CUSTOMER_A, node_costs, node_hours, prices
from warehouse.lake.errors import (
    LakeBusyError,
    LakeConflictError,
    LakeDataError,
    LakeError,
    LakeReleaseError,
)
from warehouse.lake.query import LakeReader
from warehouse.lake.staging import ALL, OPEN_FILES, ROW_GROUP_ROWS
from warehouse.lake.store import Lake, PartitionWrite
from warehouse.lake.tables import TABLES

DAY_1 = {"day": "2024-01-01", "region": "us-east-1"}
DAY_2 = {"day": "2024-01-02", "region": "us-east-1"}
COUNTS = "SELECT CAST(day AS VARCHAR) AS day, region, count(*) AS rows FROM spot_prices GROUP BY ALL ORDER BY ALL"


def publish(lake: Lake, *writes: PartitionWrite, run_id: str = "test"):
    return lake.publish(list(writes), run_id=run_id, code_version="1")


def counts(reader: LakeReader, **pin: Any) -> list[tuple[str, str, int]]:
    return reader.pin(**pin).frame(COUNTS).rows()


def files(lake: Lake, table: str) -> list[Path]:
    return sorted(Path(lake.storage.uri(table)).glob("day=*/**/*.parquet"))


def test_every_table_of_the_specification_exists(lake: Lake) -> None:
    assert set(lake.release().versions) == {
        *("spot_prices", "on_demand_prices", "metric_5m", "node_hours", "node_cost_hourly", "cluster_cost_hourly"),
        *("savings_daily", "interruptions", "interruption_exposure", "predictions", "prediction_scores"),
        *("optimizations", "events", "gap_ledger"),
    }
    for spec in TABLES.values():
        assert lake.table_schema(spec.name).equals(spec.schema()), spec.name
        assert lake.delta_table(spec.name).metadata().description == spec.description


def test_creating_tables_twice_changes_nothing(lake: Lake) -> None:
    before = lake.release()
    assert lake.create_tables() == before
    assert len(lake.releases()) == 1


def test_a_partition_is_replaced_in_one_commit_and_the_others_stay(lake: Lake, reader: LakeReader) -> None:
    publish(
        lake, PartitionWrite("spot_prices", DAY_1, prices(1, 10)), PartitionWrite("spot_prices", DAY_2, prices(2, 5))
    )
    before = lake.release()
    release = publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 3)), run_id="second")
    assert counts(reader) == [("2024-01-01", "us-east-1", 3), ("2024-01-02", "us-east-1", 5)]
    assert release.versions["spot_prices"] == before.versions["spot_prices"] + 1
    assert list(release.replaced) == [{"table": "spot_prices", "partition": DAY_1, "rows_before": 10, "rows": 3}]
    assert release.rows == 3
    assert lake.delta_table("spot_prices").history(1)[0]["run_id"] == "second"


def test_a_partition_replaced_with_no_rows_is_gone(lake: Lake, reader: LakeReader) -> None:
    publish(
        lake, PartitionWrite("spot_prices", DAY_1, prices(1, 10)), PartitionWrite("spot_prices", DAY_2, prices(2, 5))
    )
    release = publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 0)))
    assert counts(reader) == [("2024-01-02", "us-east-1", 5)]
    assert list(release.replaced) == [{"table": "spot_prices", "partition": DAY_1, "rows_before": 10, "rows": 0}]


def test_replacing_nothing_with_nothing_makes_no_release(lake: Lake) -> None:
    before = lake.release()
    assert publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 0))) == before


def test_many_partitions_in_one_write_are_split_and_those_without_rows_are_removed(
    lake: Lake, reader: LakeReader
) -> None:
    publish(lake, PartitionWrite("spot_prices", {"day": "2024-01-03", "region": "us-east-1"}, prices(3, 7)))
    days = [date(2024, 1, day) for day in (1, 2, 3)]
    mixed = pl.concat([prices(2, 4), prices(1, 6)]).sample(fraction=1.0, shuffle=True, seed=1)
    release = publish(lake, PartitionWrite("spot_prices", {"day": days, "region": "us-east-1"}, mixed))
    assert counts(reader) == [("2024-01-01", "us-east-1", 6), ("2024-01-02", "us-east-1", 4)]
    assert [entry["rows"] for entry in release.replaced] == [6, 4, 0]


def test_a_partition_column_left_out_means_all_its_values(lake: Lake, reader: LakeReader) -> None:
    regions = [prices(1, 2).with_columns(region=pl.lit(region)) for region in ("us-east-1", "eu-west-1")]
    publish(lake, PartitionWrite("spot_prices", {"day": "2024-01-01"}, pl.concat(regions)))
    assert counts(reader) == [("2024-01-01", "eu-west-1", 2), ("2024-01-01", "us-east-1", 2)]
    publish(lake, PartitionWrite("spot_prices", {"day": "2024-01-01"}, regions[0]))
    assert counts(reader) == [("2024-01-01", "us-east-1", 2)]
    publish(lake, PartitionWrite("spot_prices", {"day": ALL}, None))
    assert counts(reader) == []


def test_two_tables_change_together(lake: Lake, reader: LakeReader) -> None:
    release = publish(
        lake,
        PartitionWrite("node_hours", DAY_1, node_hours(CUSTOMER_A, 1, 24)),
        PartitionWrite("node_cost_hourly", DAY_1, node_costs(CUSTOMER_A, 1, 24, price="0.1")),
    )
    row = reader.pin(release.id).frame(
        "SELECT (SELECT count(*) FROM node_hours) AS hours, (SELECT sum(actual_usd) FROM node_cost_hourly) AS usd",
        all_customers=True,
    )
    assert row.rows() == [(24, Decimal("2.40000000"))]


def test_money_comes_back_to_the_last_decimal(lake: Lake, reader: LakeReader) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 30_000, price="0.10000001")))
    total = reader.query("SELECT sum(price_usd_per_hour) AS usd FROM spot_prices")["usd"][0].as_py()
    assert total == Decimal("3000.00030000")


def test_times_come_back_in_utc_to_the_microsecond(lake: Lake, reader: LakeReader) -> None:
    at = datetime(2024, 1, 1, 23, 59, 59, 999_999, tzinfo=UTC)
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 1).with_columns(ts=pl.lit(at))))
    assert reader.query("SELECT ts FROM spot_prices")["ts"][0].as_py() == at


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (prices(1, 2).with_columns(pl.lit(1).alias("odd")), r"has no column 'odd'; .*Lake.add_column"),
        (prices(1, 2).drop("zone_id"), r"required column 'zone_id' is missing"),
        (prices(1, 2).with_columns(zone_id=pl.lit(None, pl.String)), r"column 'zone_id' is null in 2 of 2 rows"),
        (prices(1, 2).with_columns(zone_id=pl.lit(7)), r"column 'zone_id' is int32 and must be string: cast it"),
        (prices(1, 2).with_columns(price_usd_per_hour=pl.lit(float("nan"))), r"'price_usd_per_hour' is double"),
        (prices(1, 2).with_columns(pl.col("ts").dt.replace_time_zone(None)), r"'ts' .* no time zone; make it UTC"),
        (prices(1, 2).with_columns(source=pl.lit("guess")), r"'source' holds 'guess'; it must be one of observed"),
        (
            prices(2, 2),
            r"has rows of day=2024-01-02/region=us-east-1, outside the replaced partition day=2024-01-01/region=",
        ),
        (
            prices(1, 2).with_columns(region=pl.lit("eu-west-1")),
            r"has rows of day=2024-01-01/region=eu-west-1, outside",
        ),
        (prices(1, 2).with_columns(day=pl.lit(date(2024, 1, 2))), r"'day' is not the UTC day of 'ts'"),
    ],
)
def test_data_that_does_not_fit_is_refused_by_name_and_leaves_nothing(
    still_lake: Lake, frame: pl.DataFrame, message: str
) -> None:
    before, there = still_lake.release(), files(still_lake, "spot_prices")
    with pytest.raises(LakeDataError, match=message):
        publish(still_lake, PartitionWrite("spot_prices", DAY_1, frame))
    assert still_lake.release() == before
    assert files(still_lake, "spot_prices") == there


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ({}, r"would replace the whole table"),
        ({"zone": "a"}, r"'zone' is not a partition column; it is partitioned by day, region"),
        ({"day": "01.02.2024", "region": "us-east-1"}, r"day '01.02.2024' is no date"),
        ({"day": "2024-01-01", "region": "us east/1"}, r"region 'us east/1' cannot be a partition value"),
        ({"day": []}, r"list of values for 'day' is empty"),
    ],
)
def test_a_partition_that_makes_no_sense_is_refused(
    still_lake: Lake, partition: dict[str, object], message: str
) -> None:
    with pytest.raises(LakeDataError, match=message):
        publish(still_lake, PartitionWrite("spot_prices", partition, prices(1, 1)))


def test_one_release_cannot_replace_a_partition_twice(lake: Lake) -> None:
    twice = [PartitionWrite("spot_prices", DAY_1, prices(1, 1)), PartitionWrite("spot_prices", {"day": ALL}, None)]
    with pytest.raises(LakeDataError, match="replace the same partition"):
        lake.publish(twice, run_id="test")
    assert files(lake, "spot_prices") == []


def test_an_unknown_table_is_refused_with_the_known_ones(lake: Lake) -> None:
    with pytest.raises(LakeDataError, match=r"no lake table 'prices'; the tables are spot_prices"):
        publish(lake, PartitionWrite("prices", DAY_1, prices(1, 1)))


def test_a_stream_that_breaks_half_way_leaves_no_file(lake: Lake) -> None:
    good = prices(1, 80_000).to_arrow(compat_level=pl.CompatLevel.oldest())

    def batches():
        yield from good.to_batches(max_chunksize=20_000)
        raise OSError("source went away")

    with pytest.raises(OSError, match="source went away"):
        publish(lake, PartitionWrite("spot_prices", DAY_1, pa.RecordBatchReader.from_batches(good.schema, batches())))
    assert files(lake, "spot_prices") == []


def test_a_long_stream_over_many_partitions_keeps_few_files_open(lake: Lake, reader: LakeReader) -> None:
    """More partitions than files may be open, in an order that goes round and round."""
    regions = [f"zz-test-{index}" for index in range(OPEN_FILES + 10)]
    one = pl.concat([prices(1, 2).with_columns(region=pl.lit(region)) for region in regions])
    batches = one.to_arrow(compat_level=pl.CompatLevel.oldest()).to_batches() * 3
    stream = pa.RecordBatchReader.from_batches(batches[0].schema, iter(batches))
    publish(lake, PartitionWrite("spot_prices", {"day": "2024-01-01"}, stream))
    assert counts(reader) == [("2024-01-01", region, 6) for region in sorted(regions)]


def test_files_carry_statistics_and_ordered_row_groups(lake: Lake) -> None:
    rows = prices(1, ROW_GROUP_ROWS // 4)
    shuffled = pl.concat([rows, rows.with_columns(instance_type=pl.lit("a1.large"))]).sample(
        fraction=1.0, shuffle=True, seed=3
    )
    publish(lake, PartitionWrite("spot_prices", {"day": ALL, "region": "us-east-1"}, shuffled))
    log = Path(lake.storage.uri("spot_prices"), "_delta_log", f"{1:020d}.json").read_text().splitlines()
    statistics = json.loads(next(json.loads(line)["add"] for line in log if '"add"' in line)["stats"])
    assert statistics["numRecords"] == shuffled.height
    assert statistics["minValues"]["instance_type"] == "a1.large"
    assert statistics["maxValues"]["ts"] == rows["ts"].to_list()[-1].strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert statistics["nullCount"]["availability_zone"] == shuffled.height
    stored = pl.DataFrame(pl.from_arrow(pq.ParquetFile(files(lake, "spot_prices")[0]).read()))
    keys = stored.select("instance_type", "zone_id", "product", "ts")
    assert keys.equals(keys.sort(keys.columns))


def test_a_release_can_be_read_as_of_its_id_and_as_of_a_time(lake: Lake, reader: LakeReader) -> None:
    first = publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 1)))
    second = publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 2)))
    assert lake.pin() == second
    assert counts(reader, which=first.id) == [("2024-01-01", "us-east-1", 1)]
    assert counts(reader, as_of=first.released_at) == [("2024-01-01", "us-east-1", 1)]
    between = first.released_at + (second.released_at - first.released_at) / 2
    assert lake.release(as_of=between) == first
    with pytest.raises(LakeReleaseError, match="no release at or before"):
        lake.release(as_of=datetime(2020, 1, 1, tzinfo=UTC))
    with pytest.raises(LakeReleaseError, match="no release 999"):
        lake.release(999)
    with pytest.raises(LakeReleaseError, match="no time zone"):
        lake.release(as_of=datetime(2024, 1, 1))  # noqa: DTZ001 - the error is about this


def test_a_page_pins_one_release_whatever_is_published_meanwhile(lake: Lake, reader: LakeReader) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 1)))
    page = reader.pin()
    for rows in range(2, 20):
        publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, rows)))
        assert counts(reader) == [("2024-01-01", "us-east-1", rows)]
    assert page.frame(COUNTS).rows() == [("2024-01-01", "us-east-1", 1)]


def test_a_column_added_is_null_in_old_rows_and_filled_in_new_ones(lake: Lake, reader: LakeReader) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 2)))
    before = lake.release()
    lake.add_column("spot_prices", pa.field("volatility", pa.float64()))
    assert reader.query("SELECT volatility FROM spot_prices")["volatility"].to_pylist() == [None, None]
    publish(lake, PartitionWrite("spot_prices", DAY_2, prices(2, 1).with_columns(volatility=0.5)))
    rows = reader.pin().frame("SELECT volatility FROM spot_prices ORDER BY ts").rows()
    assert rows == [(None,), (None,), (0.5,)]
    assert "volatility" not in reader.pin(before.id).columns("spot_prices").names
    with pytest.raises(LakeDataError, match="already has a column 'volatility'"):
        lake.add_column("spot_prices", pa.field("volatility", pa.float64()))
    with pytest.raises(LakeDataError, match="must be nullable"):
        lake.add_column("spot_prices", pa.field("other", pa.float64(), nullable=False))
    with pytest.raises(LakeDataError, match="lake columns cannot be list"):
        lake.add_column("spot_prices", pa.field("other", pa.list_(pa.int64())))


def test_a_column_declared_optional_later_may_be_null_in_a_lake_that_is_there(
    tmp_path: Path, database_url: str
) -> None:
    spec = TABLES["savings_daily"]
    strict = replace(spec, columns=tuple(replace(column, required=True) for column in spec.columns))
    with Lake(tmp_path / "old", database_url, tables={spec.name: strict}) as old:
        old.create_tables()
        made = old.release()
    with Lake(tmp_path / "old", database_url, tables={spec.name: spec}) as lake:
        relaxed = lake.create_tables()
        nullable = {field.name for field in lake.delta_table(spec.name).schema().fields if field.nullable}
        assert nullable == {column.name for column in spec.columns if not column.required} != set()
        assert relaxed.versions[spec.name] == made.versions[spec.name] + 1
        assert lake.create_tables().id == relaxed.id, "once is enough"


def test_columns_survive_a_checkpoint_of_the_log(lake: Lake, reader: LakeReader) -> None:
    """Which file holds which column is read from statistics, and those must outlive the JSON log."""
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 2)))
    lake.add_column("spot_prices", pa.field("volatility", pa.float64()))
    for rows in range(1, 25):
        publish(lake, PartitionWrite("spot_prices", DAY_2, prices(2, rows).with_columns(volatility=0.5)))
    assert list(Path(lake.storage.uri("spot_prices"), "_delta_log").glob("*.checkpoint.parquet"))
    assert reader.query("SELECT count(volatility) AS n, count(*) AS rows FROM spot_prices").to_pylist() == [
        {"n": 24, "rows": 26}
    ]


def leave_behind(lake: Lake, table: str, version_of: str = "replace") -> None:
    """What a writer leaves that dies between its Delta commit and its release row."""
    handle = lake.delta_table(table)
    if version_of == "replace":
        handle.delete("true")
    else:
        handle.alter.add_columns([Field("half_done", PrimitiveType("double"))])


@pytest.mark.parametrize("left", ["replace", "add column"])
def test_a_dead_writers_version_is_never_read_and_the_next_writer_rolls_it_back(
    lake: Lake, database_url: str, left: str
) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 3)))
    leave_behind(lake, "spot_prices", left)
    ahead = lake.delta_table("spot_prices").version()
    assert ahead == lake.release().versions["spot_prices"] + 1
    reader = LakeReader(lake)
    assert counts(reader) == [("2024-01-01", "us-east-1", 3)]
    with Lake(lake.storage.root, database_url) as next_writer:
        release = publish(next_writer, PartitionWrite("spot_prices", DAY_2, prices(2, 1)))
    assert counts(reader) == [("2024-01-01", "us-east-1", 3), ("2024-01-02", "us-east-1", 1)]
    assert release.versions["spot_prices"] == lake.delta_table("spot_prices").version() == ahead + 2
    assert "half_done" not in lake.table_schema("spot_prices").names
    reader.close()


def test_repair_rolls_back_at_once(lake: Lake) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 3)))
    leave_behind(lake, "spot_prices")
    assert lake.repair() == ["spot_prices"]
    assert lake.delta_table("spot_prices").count() == 3
    assert lake.repair() == []


def test_who_read_a_partition_to_change_it_does_not_overwrite_a_newer_one(lake: Lake, reader: LakeReader) -> None:
    read = publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 3)))
    publish(lake, PartitionWrite("spot_prices", DAY_2, prices(2, 1)))
    merged = lake.publish([PartitionWrite("spot_prices", DAY_1, prices(1, 4))], run_id="merge", based_on=read)
    with pytest.raises(LakeConflictError, match="changed since release"):
        lake.publish([PartitionWrite("spot_prices", DAY_1, prices(1, 9))], run_id="late", based_on=read)
    assert lake.release() == merged
    assert counts(reader) == [("2024-01-01", "us-east-1", 4), ("2024-01-02", "us-east-1", 1)]
    assert len(files(lake, "spot_prices")) == 3  # the refused file is gone


def test_a_commit_that_bypasses_the_store_is_met_with_an_error_not_a_mix(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's engine commits between our look and our commit."""
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 3)))
    real = Lake._commit_table

    def with_intruder(self, handle, table, *rest):
        leave_behind(lake, table)
        return real(self, handle, table, *rest)

    monkeypatch.setattr(Lake, "_commit_table", with_intruder)
    with pytest.raises(LakeConflictError, match="does not hold the lake's lock"):
        publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 1)))
    monkeypatch.undo()
    assert publish(lake, PartitionWrite("spot_prices", DAY_2, prices(2, 1))).rows == 1
    assert lake.delta_table("spot_prices").count() == 4


def test_a_writer_waits_for_the_lock_no_longer_than_it_should(
    lake: Lake, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from warehouse.lake import sessions

    monkeypatch.setattr(sessions, "LOCK_TIMEOUT_SECONDS", 0.2)
    with psycopg.connect(database_url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [sessions.COMMIT_LOCK])
        with Lake(lake.storage.root, database_url) as waiting:
            staged = waiting.stage("spot_prices", DAY_1, prices(1, 1))
            with pytest.raises(LakeBusyError, match="pg_locks"):
                waiting.publish([staged], run_id="test")
            assert files(lake, "spot_prices") == []
            other.execute("SELECT pg_advisory_unlock_all()")
            with pytest.raises(LakeDataError, match="given to a publish that failed; stage the data again"):
                waiting.publish([staged], run_id="test")
            assert publish(waiting, PartitionWrite("spot_prices", DAY_1, prices(1, 1))).rows == 1


def test_staged_files_are_published_once(lake: Lake, reader: LakeReader) -> None:
    staged = lake.stage("spot_prices", DAY_1, prices(1, 3))
    release = lake.publish([staged], run_id="test")
    lake.discard(staged)
    with pytest.raises(LakeDataError, match="already published"):
        lake.publish([staged], run_id="test")
    with pytest.raises(LakeDataError, match="already published"):
        publish(lake, PartitionWrite("spot_prices", DAY_1, staged))
    assert lake.release() == release
    assert counts(reader) == [("2024-01-01", "us-east-1", 3)]


def test_staged_files_are_used_up_by_a_publish_that_another_write_spoils(lake: Lake) -> None:
    staged = lake.stage("spot_prices", DAY_2, prices(2, 3))
    with pytest.raises(LakeDataError, match="outside the replaced partition"):
        lake.publish([PartitionWrite("spot_prices", DAY_1, prices(3, 1)), staged], run_id="test")
    assert files(lake, "spot_prices") == []
    with lake.nothing_staged():
        pass


class Wire:
    """Stands between a lake and Postgres, and lets something happen when a statement passes.

    ``event`` comes when a message of the client holds ``statement``: ``before`` the server sees it, or ``after`` the
    server has answered, with the answer still on its way. True from it cuts the connection there.
    """

    def __init__(
        self, database_url: str, statement: bytes, *, moment: Literal["before", "after"], event: Callable[[], bool]
    ) -> None:
        host, _, port = database_url.rpartition("/")[0].rpartition("@")[2].partition(":")
        self._server = (host, int(port))
        self._statement, self._moment, self._event = statement, moment, event
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = database_url.replace(f"{host}:{port}", f"127.0.0.1:{self._listener.getsockname()[1]}")
        self.happened = 0
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._carry, args=[client], daemon=True))
                self._threads[-1].start()

    def _carry(self, client: socket.socket) -> None:
        due = False
        with client, socket.create_connection(self._server) as server, suppress(OSError):
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    if ready is client and self._statement in data and not self.happened:
                        self.happened += 1
                        due = True
                    if due and (self._moment == "before" or ready is server):
                        due = False
                        if self._event():
                            return
                    (server if ready is client else client).sendall(data)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


def terminate_writers(database_url: str) -> bool:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE application_name = 'cloudoptim lake writer' AND datname = current_database()"
        )
    return False


def cut(_: str) -> bool:
    return True


@pytest.mark.parametrize(
    ("statement", "moment", "event"),
    [
        (b"pg_advisory_unlock(", "before", terminate_writers),
        (b"pg_advisory_unlock(", "before", cut),
        (b"pg_advisory_unlock(", "after", cut),
        (b"INSERT INTO lake_releases", "after", cut),
        (b"INSERT INTO lake_releases", "after", terminate_writers),
    ],
    ids=["terminated before unlock", "cut before unlock", "unlock unanswered", "release unanswered", "terminated"],
)
def test_a_release_that_was_written_is_returned_and_its_files_stay(
    lake: Lake,
    reader: LakeReader,
    database_url: str,
    statement: bytes,
    moment: Literal["before", "after"],
    event: Callable[[str], bool],
) -> None:
    with (
        Wire(database_url, statement, moment=moment, event=lambda: event(database_url)) as wire,
        Lake(lake.storage.root, wire.url) as writer,
    ):
        release = publish(writer, PartitionWrite("spot_prices", DAY_1, prices(1, 3)), run_id="lost")
        assert wire.happened == 1
        assert lake.release() == release
        assert release.run_id == "lost"
        assert counts(reader) == [("2024-01-01", "us-east-1", 3)]
        publish(lake, PartitionWrite("spot_prices", DAY_2, prices(2, 1)))  # the lock is free
        publish(writer, PartitionWrite("spot_prices", DAY_1, prices(1, 4)))
    assert counts(reader) == [("2024-01-01", "us-east-1", 4), ("2024-01-02", "us-east-1", 1)]


def test_a_release_that_was_not_written_says_so_and_the_next_one_works(
    lake: Lake, reader: LakeReader, database_url: str
) -> None:
    before = publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 3)))
    with (
        Wire(database_url, b"INSERT INTO lake_releases", moment="before", event=lambda: True) as wire,
        Lake(lake.storage.root, wire.url) as writer,
    ):
        staged = writer.stage("spot_prices", DAY_1, prices(1, 5))
        with pytest.raises(LakeError, match=r"run lost was published .*: nothing of it is visible; run it again"):
            writer.publish([staged], run_id="lost")
        writer.discard(staged)  # what a caller may do in its own clean-up
        assert lake.release() == before
        assert counts(reader) == [("2024-01-01", "us-east-1", 3)]
        assert len(files(lake, "spot_prices")) == 2  # left to vacuum
        publish(writer, PartitionWrite("spot_prices", DAY_1, prices(1, 5)))
    assert counts(reader) == [("2024-01-01", "us-east-1", 5)]


def test_a_release_is_not_taken_for_that_of_another_writer(lake: Lake, reader: LakeReader, database_url: str) -> None:
    """The session is lost before the INSERT arrives, and somebody publishes before the loser can look it up."""

    def overtake() -> bool:
        terminate_writers(database_url)
        publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 7)), run_id="lost")
        return True

    with (
        Wire(database_url, b"INSERT INTO lake_releases", moment="before", event=overtake) as wire,
        Lake(lake.storage.root, wire.url) as writer,
        pytest.raises(LakeError, match="nothing of it is visible"),
    ):
        publish(writer, PartitionWrite("spot_prices", DAY_1, prices(1, 5)), run_id="lost")
    assert counts(reader) == [("2024-01-01", "us-east-1", 7)]


def test_a_refused_insert_leaves_readers_where_they_were(lake: Lake, reader: LakeReader, database_url: str) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 3)))
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE lake_releases ADD CONSTRAINT refuse CHECK (run_id <> 'refused')")
        with pytest.raises(psycopg.errors.CheckViolation):
            publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 5)), run_id="refused")
        assert counts(reader) == [("2024-01-01", "us-east-1", 3)]
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 6)))
    assert counts(reader) == [("2024-01-01", "us-east-1", 6)]


def test_the_server_looks_for_a_writer_that_vanished(lake: Lake, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("""
            CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                SELECT string_agg(current_setting(name), ' ' ORDER BY name) INTO NEW.note
                FROM pg_settings WHERE name ^@ 'tcp_';
                RETURN NEW;
            END $$
        """)
        connection.execute("CREATE TRIGGER tell BEFORE INSERT ON lake_releases FOR EACH ROW EXECUTE FUNCTION tell()")
    release = publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 1)))
    assert release.note == "3 20 10 50000"  # count, idle s, interval s, user timeout ms


@pytest.mark.timeout(30)
def test_staging_fits_the_released_columns_and_does_not_wait_for_a_writer(lake: Lake, database_url: str) -> None:
    """A dead writer added a column, and another thread of this process waits for the lake's lock."""
    leave_behind(lake, "spot_prices", "add column")
    from warehouse.lake import sessions

    with psycopg.connect(database_url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [sessions.COMMIT_LOCK])
        waiting = threading.Thread(target=lambda: publish(lake, PartitionWrite("spot_prices", DAY_2, prices(2, 1))))
        waiting.start()
        while not other.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted").fetchone():
            time.sleep(0.01)
        with pytest.raises(LakeDataError, match="no column 'half_done'"):
            lake.stage("spot_prices", DAY_1, prices(1, 1).with_columns(half_done=0.5))
        staged = lake.stage("spot_prices", DAY_1, prices(1, 1))
        other.execute("SELECT pg_advisory_unlock_all()")
        waiting.join(20)
    lake.publish([staged], run_id="test")
    assert "half_done" not in pq.ParquetFile(files(lake, "spot_prices")[0]).schema_arrow.names


def test_the_writer_survives_a_restart_of_its_sessions(lake: Lake, database_url: str) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 1)))
    with psycopg.connect(database_url, autocommit=True) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'cloudoptim lake%'"
        )
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 2)))
    assert lake.release().rows == 2


def test_a_folder_of_another_database_is_refused(lake: Lake, tmp_path: Path, database_url: str) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 1)))
    with Lake(tmp_path / "elsewhere", database_url) as wrong, pytest.raises(LakeReleaseError, match="LAKE_ROOT"):
        publish(wrong, PartitionWrite("spot_prices", DAY_1, prices(1, 1)))
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DELETE FROM lake_releases")
    with pytest.raises(LakeReleaseError, match="this database has no release of it"):
        lake.create_tables()


def test_no_release_yet_says_what_to_do(tmp_path: Path, database_url: str) -> None:
    with Lake(tmp_path / "lake", database_url) as lake, pytest.raises(LakeReleaseError, match="cloudoptim migrate"):
        lake.release()


FORKING = """
import os, sys
from warehouse.lake.store import Lake
print(os.getpid(), flush=True)
if os.fork() == 0:
    Lake(sys.argv[1], sys.argv[2])
os.wait()
"""


def test_a_forked_child_is_told_to_spawn(tmp_path: Path, database_url: str) -> None:
    # In a process of its own: a fork of this one would inherit the locks that threads of other tests hold.
    command = [sys.executable, "-c", FORKING, str(tmp_path / "lake"), database_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "LakeForkError" in last
    assert f"forked from {done.stdout.split()[0]}" in last
    assert "spawn" in last


def test_released_times_ascend(lake: Lake) -> None:
    for rows in range(1, 5):
        publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, rows)))
    times = [release.released_at for release in reversed(lake.releases())]
    assert times == sorted(set(times))
    assert times[-1] - times[0] < timedelta(minutes=5)


@pytest.mark.parametrize("root", ["gs://bucket/lake", "/tmp/lake[1]", "s3://bucket/la*ke"])
def test_a_root_that_cannot_work_is_refused_by_the_settings_name(root: str) -> None:
    with pytest.raises(LakeError, match="CLOUDOPTIM_LAKE_ROOT is"):
        Lake(root, "postgresql://nowhere")


def test_postgres_out_of_reach_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match=r"cannot reach Postgres .* check DATABASE_URL"):
        Lake(tmp_path, "postgresql://nobody:secret-word@127.0.0.1:1/none").release()
