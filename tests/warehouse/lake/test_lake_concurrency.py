"""Writers and readers at once, and writers killed at any moment, all in processes of their own.

The short versions run always. The long ones: ``pytest -m soak tests/warehouse/lake/test_lake_concurrency.py``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.warehouse.lake.lake_processes import STAMPS, disagreements, stamped
from warehouse.lake.query import LakeReader
from warehouse.lake.store import Lake

SCRIPT = "tests.warehouse.lake.lake_processes"
TABLES = ("node_hours", "node_cost_hourly")


def start(lake: Lake, database_url: str, command: str, number: float, seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", SCRIPT, command, lake.storage.root, str(number), str(seed)],
        env={**os.environ, "DATABASE_URL": database_url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def process(lake: Lake, database_url: str, command: str, number: float, seed: int) -> Iterator[subprocess.Popen[str]]:
    child = start(lake, database_url, command, number, seed)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate(timeout=30)


def collide(lake: Lake, database_url: str, *, seconds: float, writers: int, readers: int) -> tuple[int, int]:
    """Let them run side by side; returns releases and reads."""
    lake.publish([write for day in (1, 2, 3) for write in stamped(day, day)], run_id="first")
    commands = [("write", seed) for seed in range(writers)] + [("read", seed) for seed in range(readers)]
    running = [start(lake, database_url, command, seconds, seed) for command, seed in commands]
    outcomes = []
    for child in running:
        out, error = child.communicate(timeout=seconds + 120)
        assert child.returncode == 0, error
        outcomes.append(json.loads(out.splitlines()[-1]))
    wrong = [line for outcome in outcomes for line in outcome.get("wrong", [])]
    assert wrong == []
    releases = sum(outcome.get("releases", 0) for outcome in outcomes)
    reads = sum(outcome.get("reads", 0) for outcome in outcomes)
    assert len(lake.releases(limit=1_000_000)) == releases + 2  # creation and the first
    for table in TABLES:
        assert lake.delta_table(table).version() == lake.release().versions[table]
    sys.stdout.write(f"{releases} releases, {reads} reads in {seconds:g} s: no error, torn read or disagreement\n")
    return releases, reads


def test_two_writers_and_two_readers_never_disagree(lake: Lake, database_url: str) -> None:
    releases, reads = collide(lake, database_url, seconds=4, writers=2, readers=2)
    assert releases > 4
    assert reads > 4


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_two_writers_and_four_readers_for_a_minute(lake: Lake, database_url: str) -> None:
    releases, reads = collide(lake, database_url, seconds=60, writers=2, readers=4)
    assert releases > 100
    assert reads > 100


def check_after_a_death(lake: Lake, database_url: str, reader: LakeReader) -> int:
    """Readers see whole releases only, and the next writer proceeds. Returns how many versions the dead one left."""
    released = lake.release().versions
    left = sum(lake.delta_table(table).version() - released[table] for table in TABLES)
    assert disagreements(reader.pin().frame(STAMPS, all_customers=True).rows()) == []
    with Lake(lake.storage.root, database_url) as next_writer:
        release = next_writer.publish([write for day in (1, 2) for write in stamped(5 + day, day)], run_id="next")
    assert disagreements(reader.pin().frame(STAMPS, all_customers=True).rows()) == []
    for table in TABLES:
        assert lake.delta_table(table).version() == release.versions[table]
    return left


def kill_writers(lake: Lake, database_url: str, reader: LakeReader, *, kills: int) -> int:
    """Kill a busy writer at random moments; returns in how many cases it left commits without a release."""
    rng = random.Random(20_24)
    lake.publish([write for day in (1, 2, 3) for write in stamped(day, day)], run_id="first")
    unfinished = 0
    for seed in range(kills):
        with process(lake, database_url, "write", 0, seed) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(rng.uniform(0, 0.25))
            writer.send_signal(signal.SIGKILL)
            writer.wait(30)
        unfinished += check_after_a_death(lake, database_url, reader) > 0
    sys.stdout.write(f"{kills} writers killed, {unfinished} between their commits and their release row\n")
    return unfinished


def test_three_writers_killed_at_random_moments(lake: Lake, database_url: str, reader: LakeReader) -> None:
    kill_writers(lake, database_url, reader, kills=3)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_twenty_writers_killed_at_random_moments(lake: Lake, database_url: str, reader: LakeReader) -> None:
    kill_writers(lake, database_url, reader, kills=20)


@pytest.mark.parametrize(
    ("point", "commits_left", "visible"),
    [(0, 0, False), (1, 1, False), (2, 2, False), (3, 0, True)],
    ids=["staged", "one table committed", "both tables committed", "released"],
)
def test_a_writer_killed_at_each_step(
    lake: Lake, database_url: str, reader: LakeReader, point: int, commits_left: int, visible: bool
) -> None:
    before = lake.publish(stamped(3, 1), run_id="before")
    with process(lake, database_url, "die", point, 0) as writer:
        assert writer.wait(60) == -signal.SIGKILL
    assert (lake.release() != before) == visible
    assert check_after_a_death(lake, database_url, reader) == commits_left
