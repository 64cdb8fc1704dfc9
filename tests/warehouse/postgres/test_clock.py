"""Moments are Postgres', whatever the clock of the machine says (RELIABILITY R-26)."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

from warehouse.postgres.session import Database, ServerClock

REPOSITORY = Path(__file__).resolve().parents[3]
START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize("minutes", [10, -10])
async def test_a_machine_ten_minutes_off_follows_postgres(database_url: str, minutes: int) -> None:
    # Seen from a machine that is ten minutes behind, Postgres is ten minutes ahead, and the other way round.
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA shifted")
        connection.execute("GRANT USAGE ON SCHEMA shifted TO PUBLIC")
        connection.execute(
            "CREATE FUNCTION shifted.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS "
            f"$$ SELECT pg_catalog.clock_timestamp() + interval '{minutes} minutes' $$"
        )
    options = quote("-c search_path=shifted,pg_catalog,public", safe="")
    db = Database(f"{database_url}?options={options}")
    try:
        assert abs((db.now() - datetime.now(UTC)).total_seconds()) < 5
        async with db.system():
            pass
        assert abs((db.now() - datetime.now(UTC)).total_seconds() - minutes * 60) < 5
    finally:
        await db.close()


def test_a_reading_is_never_ahead_and_a_better_look_is_taken() -> None:
    clock, began = ServerClock(), time.monotonic() - 100
    # A slow answer: Postgres' time when it arrives is between START and START + 2 s.
    clock.heard(START, asked=began, answered=began + 2)
    assert clock._reading(began + 2) == START
    # A quick one shows that it was later than the slow one could tell.
    clock.heard(START + timedelta(seconds=3.5), asked=began + 4, answered=began + 4.001)
    assert clock._reading(began + 5) == START + timedelta(seconds=4.499)
    # A slow one that tells nothing new changes nothing.
    clock.heard(START + timedelta(seconds=5.5), asked=began + 6, answered=began + 8)
    assert clock._reading(began + 8) == START + timedelta(seconds=7.499)


@pytest.mark.parametrize("seconds", [-30.0, 30.0])
def test_a_clock_that_was_set_is_followed_at_once(seconds: float) -> None:
    clock, began = ServerClock(), time.monotonic() - 100
    clock.heard(START, asked=began, answered=began + 0.001)
    clock.heard(START + timedelta(seconds=10 + seconds), asked=began + 10, answered=began + 10.001)
    assert abs((clock._reading(began + 10) - START).total_seconds() - 10 - seconds) < 0.01


def test_the_interruption_path_asks_no_machine_for_the_time() -> None:
    files = sorted((REPOSITORY / "control" / "interruptions").rglob("*.py"))
    assert files
    asking = [path.name for path in files if re.search(r"datetime\.now\(|time\.time\(", path.read_text())]
    assert asking == []
