"""Formats, escaping and downloads."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards import components as ui
from dashboards.export import csv_bytes, parquet_bytes

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (ui.usd(Decimal("1234.5")), "$1,234.50"),
        (ui.usd(-3.2), "−$3.20"),
        (ui.usd(Decimal("-0.001")), "$0.00"),
        (ui.usd(None), "–"),
        (ui.usd_per_hour(12.344), "$12.34/h"),
        (ui.usd_per_hour(0.898), "$0.898/h"),
        (ui.usd_per_hour(Decimal("0.0312")), "$0.0312/h"),
        (ui.usd_per_hour(0), "$0.00/h"),
        (ui.percent(0.6123), "61.2%"),
        (ui.percent(Decimal("-0.05")), "−5.0%"),
        (ui.percent(None), "–"),
        (ui.lasted(0.84), "0.8 s"),
        (ui.lasted(timedelta(seconds=185)), "3 min 05 s"),
        (ui.lasted(-20), "−20 s"),
        (ui.lasted(timedelta(hours=35)), "35 h 00 min"),
        (ui.gib(8 * 2**30), "8.0 GiB"),
        (ui.when(datetime(2026, 11, 23, 14, 5, tzinfo=UTC)), "23 Nov 14:05"),
        (ui.ago(None, datetime.now(UTC)), "never"),
    ],
)
def test_formats(shown: str, wanted: str) -> None:
    assert shown == wanted


def test_nothing_shown_is_markup_of_the_data() -> None:
    pieces = [
        ui.chip(HOSTILE),
        ui.link(HOSTILE, '/x?"' + HOSTILE),
        ui.bar(1, 2, HOSTILE),
        ui.kpis([ui.Kpi(HOSTILE, HOSTILE, HOSTILE)]),
        ui.table([ui.Column(HOSTILE, lambda row: row)], [HOSTILE], caption=HOSTILE),
        ui.empty(HOSTILE, HOSTILE),
        ui.problem(HOSTILE, HOSTILE, HOSTILE),
        ui.legend({HOSTILE: '"' + HOSTILE}),
        ui.downloads("cost", {"cluster": HOSTILE}),
        ui.link_here(HOSTILE, {"cluster": HOSTILE}),
    ]
    assert all("<img" not in piece for piece in pieces)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\x00", "＝", "＋", "－", "＠"])
def test_a_cell_that_a_spreadsheet_would_run_is_text(start: str) -> None:
    name = f'{start}cmd|"/c calc"!A1'
    rows = list(csv.reader(io.StringIO(csv_bytes(pa.table({"name": [name]})).decode(), newline="")))
    assert rows[1][0].startswith("'")


def test_numbers_and_times_stay_what_they_are() -> None:
    table = pa.table(
        {
            "usd": pa.array([Decimal("-1.50000000")], pa.decimal128(18, 8)),
            "ratio": [-0.25],
            "at": pa.array([datetime(2026, 11, 23, 4, 5, 6, tzinfo=UTC)], pa.timestamp("us", tz="UTC")),
            "text": ['a "quoted", text'],
            "nothing": pa.array([None], pa.string()),
        }
    )
    body = csv_bytes(table).decode()
    assert list(csv.reader(io.StringIO(body)))[1] == [
        "-1.50000000",
        "-0.25",
        "2026-11-23T04:05:06.000000Z",
        'a "quoted", text',
        "",
    ]
    assert pq.read_table(io.BytesIO(parquet_bytes(table))).equals(table)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=20))
def test_any_text_comes_back_as_one_cell(names: list[str]) -> None:
    names = [name.encode("utf-8", "replace").decode() for name in names]
    body = csv_bytes(pa.table({"name": pa.array(names, pa.string()), "end": ["|"] * len(names)})).decode()
    rows = list(csv.reader(io.StringIO(body, newline="")))
    assert len(rows) == len(names) + 1
    assert all(row[-1] == "|" and len(row) == 2 for row in rows[1:])
    assert not any(row[0][:1] in tuple("=+-@\t\r\n\x00") for row in rows[1:] if row[0])
