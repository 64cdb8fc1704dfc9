"""Compaction, releases that are kept, and vacuum that spares what somebody may read."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import psycopg
import pytest

from tests.warehouse.lake.lake_rows import prices
from warehouse.lake import maintenance
from warehouse.lake.errors import LakeBusyError, LakeDataError, LakeError, LakeReleaseError
from warehouse.lake.query import LakeReader
from warehouse.lake.staging import Staged, StagedFile
from warehouse.lake.store import Lake, PartitionWrite

DAY_1 = {"day": "2024-01-01", "region": "us-east-1"}
DAY_2 = {"day": "2024-01-02", "region": "us-east-1"}
ROWS = "SELECT count(*) AS n FROM spot_prices"


def publish(lake: Lake, partition: dict[str, str], rows: pl.DataFrame | None):
    return lake.publish([PartitionWrite("spot_prices", partition, rows)], run_id="test")


def files(lake: Lake) -> set[str]:
    return {path.name for path in Path(lake.storage.uri("spot_prices")).glob("day=*/**/*.parquet")}


def age(lake: Lake, database_url: str, hours: float) -> None:
    """Make everything so far look that old: releases, files and the log's notes of removed files."""
    seconds = hours * 3600
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE lake_releases SET released_at = released_at - make_interval(secs => %s)", [seconds])
    then = time.time() - seconds
    for file in Path(lake.storage.uri("spot_prices")).glob("day=*/**/*.parquet"):
        os.utime(file, (then, then))
    for log in Path(lake.storage.uri("spot_prices"), "_delta_log").glob("*.json"):
        text = pl.Series([log.read_text()])
        for found in set(text.str.extract_all(r'"deletionTimestamp":\d+')[0]):
            name, stamp = found.split(":")
            text = text.str.replace_all(found, f"{name}:{int(stamp) - int(seconds * 1000)}", literal=True)
        log.write_text(text[0])


def in_pieces(lake: Lake, sizes: list[int]) -> None:
    """One partition that is several files, as interleaved streams leave it."""
    start = 0
    whole = prices(1, sum(sizes))
    files: list[StagedFile] = []
    for size in sizes:
        staged = lake.stage("spot_prices", DAY_1, whole.slice(start, size))
        files.extend(staged.files)
        start += size
    lake.publish([Staged("spot_prices", staged.scope, tuple(files), staged.hold)], run_id="pieces")


def test_compaction_leaves_one_sorted_file_and_the_same_rows(lake: Lake, reader: LakeReader) -> None:
    in_pieces(lake, [10, 30, 5])
    publish(lake, DAY_2, prices(2, 4))
    before = reader.pin().frame("SELECT * FROM spot_prices ORDER BY ts")
    compacted = maintenance.compact(lake, reader, "spot_prices", run_id="compact")
    assert [entry["partition"] for release in compacted for entry in release.replaced] == [DAY_1]
    assert reader.pin().frame("SELECT * FROM spot_prices ORDER BY ts").equals(before)
    assert len(reader.plan(lake.release())["spot_prices"].uris) == 2
    assert maintenance.compact(lake, reader, "spot_prices", run_id="compact") == []
    log = Path(lake.storage.uri("spot_prices"), "_delta_log", f"{lake.release().versions['spot_prices']:020d}.json")
    assert '"dataChange":false' in log.read_text()
    assert '"dataChange":true' not in log.read_text()


def test_compaction_gives_way_to_a_writer(lake: Lake, reader: LakeReader, monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces(lake, [10, 30])
    real = Lake.stage

    def overtaken(self, table, partition, data):
        staged = real(self, table, partition, data)
        monkeypatch.undo()
        publish(lake, DAY_1, prices(1, 3))
        return staged

    monkeypatch.setattr(Lake, "stage", overtaken)
    assert maintenance.compact(lake, reader, "spot_prices", run_id="compact") == []
    assert reader.query(ROWS).to_pylist() == [{"n": 3}]


def test_vacuum_removes_what_no_readable_release_needs(lake: Lake, reader: LakeReader, database_url: str) -> None:
    first = publish(lake, DAY_1, prices(1, 1))
    kept = publish(lake, DAY_1, prices(1, 2))
    third = publish(lake, DAY_1, prices(1, 3))
    newest_old = publish(lake, DAY_2, prices(2, 4))
    lake.keep(kept.id, note="statement of January")
    age(lake, database_url, 200)
    recent = publish(lake, DAY_1, prices(1, 5))
    lake.stage("spot_prices", DAY_2, prices(2, 9))  # waits for its commit
    foreseen = maintenance.vacuum(lake, dry_run=True)
    assert foreseen.expired == []
    before = files(lake)
    report = maintenance.vacuum(lake)
    assert {first.id, third.id} <= set(report.expired)
    assert not {kept.id, newest_old.id} & set(report.expired)
    assert before - files(lake) == {Path(file).name for file in report.files["spot_prices"]}
    # The first release's. The third's was live until a moment ago: it goes when that is a week past.
    assert len(before - files(lake)) == 1
    assert lake.release(as_of=recent.released_at - timedelta(microseconds=1)).id == newest_old.id
    for release, rows in ((kept, 2), (newest_old, 7), (recent, 9)):
        assert reader.pin(release.id).query(ROWS).to_pylist() == [{"n": rows}]
        fresh = LakeReader(lake)
        assert fresh.pin(release.id).query(ROWS).to_pylist() == [{"n": rows}]
        fresh.close()
    with pytest.raises(LakeReleaseError, match=f"release {third.id} .* expired"):
        lake.pin(third.id)
    with pytest.raises(LakeReleaseError, match="expired"):
        lake.keep(third.id)
    assert [release.id for release in lake.releases()][:2] == [recent.id, newest_old.id]


def test_vacuum_leaves_recent_releases_alone(lake: Lake, reader: LakeReader) -> None:
    releases = [publish(lake, DAY_1, prices(1, rows)) for rows in range(1, 6)]
    before = files(lake)
    report = maintenance.vacuum(lake)
    assert report.expired == []
    assert files(lake) == before
    for rows, release in enumerate(releases, start=1):
        assert reader.pin(release.id).query(ROWS).to_pylist() == [{"n": rows}]


def test_vacuum_removes_what_a_dead_writer_staged(lake: Lake, database_url: str) -> None:
    publish(lake, DAY_1, prices(1, 1))
    with Lake(lake.storage.root, database_url) as dead:
        litter = {Path(file.path).name for file in dead.stage("spot_prices", DAY_2, prices(2, 2)).files}
    assert litter <= files(lake)
    maintenance.vacuum(lake)
    assert litter <= files(lake)  # could still be somebody's
    age(lake, database_url, 200)
    maintenance.vacuum(lake)
    assert not litter & files(lake)


def test_vacuum_without_retention_waits_for_nobody_staging(lake: Lake, reader: LakeReader, database_url: str) -> None:
    publish(lake, DAY_1, prices(1, 1))
    publish(lake, DAY_1, prices(1, 2))
    with Lake(lake.storage.root, database_url) as writer:
        staged = writer.stage("spot_prices", DAY_2, prices(2, 2))
        with pytest.raises(LakeBusyError, match="files are being staged"):
            maintenance.vacuum(lake, retention_hours=0)
        writer.publish([staged], run_id="staged")
        report = maintenance.vacuum(lake, retention_hours=0)
    assert len(report.files["spot_prices"]) == 1
    assert reader.query(ROWS).to_pylist() == [{"n": 4}]
    with pytest.raises(LakeDataError, match="retention_hours is -1"):
        maintenance.vacuum(lake, retention_hours=-1)


def lose_staging_sessions(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE application_name = 'cloudoptim lake staging' AND datname = current_database()"
        )


@pytest.mark.parametrize("staged_more", [False, True], ids=["found at publish", "found by the next staging"])
def test_staged_files_that_a_vacuum_removed_are_not_published(
    lake: Lake, reader: LakeReader, database_url: str, staged_more: bool
) -> None:
    publish(lake, DAY_1, prices(1, 1))
    with Lake(lake.storage.root, database_url) as writer:
        staged = writer.stage("spot_prices", DAY_2, prices(2, 2))
        lose_staging_sessions(database_url)
        maintenance.vacuum(lake, retention_hours=0)
        other = [PartitionWrite("spot_prices", {**DAY_1, "day": "2024-01-03"}, prices(3, 4))] if staged_more else []
        before = lake.release()
        with pytest.raises(LakeError, match=r"was lost, and a vacuum has run since; stage the data again"):
            writer.publish([*other, staged], run_id="staged")
        assert lake.release() == before
        again = writer.stage("spot_prices", DAY_2, prices(2, 2))
        writer.publish([again], run_id="staged again")
        maintenance.vacuum(lake, retention_hours=0)  # nothing is held any more
    assert reader.query(ROWS).to_pylist() == [{"n": 3}]


def test_staged_files_are_not_published_while_a_vacuum_may_be_removing_them(lake: Lake, database_url: str) -> None:
    with Lake(lake.storage.root, database_url) as writer:
        staged = writer.stage("spot_prices", DAY_2, prices(2, 2))
        lose_staging_sessions(database_url)
        with lake.nothing_staged(), pytest.raises(LakeError, match="stage the data again"):
            writer.publish([staged], run_id="staged")


def test_staged_files_survive_the_loss_of_their_session(lake: Lake, reader: LakeReader, database_url: str) -> None:
    with Lake(lake.storage.root, database_url) as writer:
        staged = writer.stage("spot_prices", DAY_2, prices(2, 2))
        lose_staging_sessions(database_url)
        writer.publish([staged], run_id="staged")
    maintenance.vacuum(lake, retention_hours=0)
    assert reader.query(ROWS).to_pylist() == [{"n": 2}]


def test_a_kept_release_survives_every_vacuum_and_can_be_let_go(lake: Lake, reader: LakeReader) -> None:
    kept = publish(lake, DAY_1, prices(1, 7))
    lake.keep(kept.id)
    for rows in range(1, 30):  # past several checkpoints of the log
        publish(lake, DAY_1, prices(1, rows))
    publish(lake, DAY_1, None)
    maintenance.vacuum(lake, retention_hours=0)
    assert reader.pin(kept.id).query(ROWS).to_pylist() == [{"n": 7}]
    assert len(files(lake)) == 1
    assert not lake.keep(kept.id, kept=False).kept
    maintenance.vacuum(lake, retention_hours=0)
    assert files(lake) == set()


def test_a_release_that_was_the_newest_within_the_retention_can_still_be_kept(
    lake: Lake, reader: LakeReader, database_url: str
) -> None:
    """A run reads the newest release, which is old because nothing changed, and is overtaken before it keeps it."""
    publish(lake, DAY_1, prices(1, 1))
    pinned = publish(lake, DAY_1, prices(1, 2))
    age(lake, database_url, 200)
    newest = publish(lake, DAY_1, prices(1, 3))
    report = maintenance.vacuum(lake)
    assert pinned.id not in report.expired
    assert lake.release(as_of=newest.released_at - timedelta(microseconds=1)).id == pinned.id
    assert lake.keep(pinned.id).kept
    assert reader.pin(pinned.id).query(ROWS).to_pylist() == [{"n": 2}]


def test_releases_expire_by_age_but_the_newest_never(lake: Lake) -> None:
    for rows in range(1, 4):
        publish(lake, DAY_1, prices(1, rows))
    expired = lake.expire(superseded_before=datetime.now(UTC) + timedelta(days=1))
    assert lake.release().id not in expired
    assert [release.id for release in lake.releases() if release.expired_at] == sorted(expired, reverse=True)
