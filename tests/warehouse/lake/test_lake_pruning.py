"""A query of some days is given the files of those days, and says the same as one that is given all."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import polars as pl
import pytest

from tests.warehouse.lake.lake_rows import CUSTOMER_A, CUSTOMER_B, node_costs, prices
from warehouse.lake import query as lake_query
from warehouse.lake.pruning import Days, days_read
from warehouse.lake.query import LakeReader
from warehouse.lake.store import Lake, PartitionWrite
from warehouse.lake.texts import parsed

FROM, UNTIL = date(2024, 1, 2), date(2024, 1, 3)
GIVEN: dict[str, Any] = {"from": FROM, "until": UNTIL}


@pytest.mark.parametrize(
    ("where", "parameters", "days"),
    [
        ("day >= $from AND day < $until", GIVEN, (FROM, UNTIL)),
        ("region = 'x' AND (p.day = $from AND price > 0)", GIVEN, (FROM, FROM)),
        ("$from <= day AND $until >= day", GIVEN, (FROM, UNTIL)),
        ("day BETWEEN DATE '2024-01-02' AND CAST('2024-01-03' AS DATE)", {}, (FROM, UNTIL)),
        ("DAY = '2024-01-02'", {}, (FROM, FROM)),
        ("day >= $from", {"from": datetime(2024, 1, 2, 23, tzinfo=UTC)}, (FROM, date.max)),
        ("day >= $from", {"from": "2024-01-02"}, (FROM, date.max)),
        ("day >= $from", {"from": "2024-1-2"}, None),
        ("day >= $from", {"from": None}, None),
        ("day >= $from OR region = 'x'", GIVEN, None),
        ("NOT day >= $from", GIVEN, None),
        ("NOT (day BETWEEN $from AND $until)", GIVEN, None),
        ("day <> $from", GIVEN, None),
        ("day >= $from - INTERVAL 1 DAY", GIVEN, None),
        ("q.day >= $from", GIVEN, None),
        ("day IN ($from, $until)", GIVEN, None),
        ("true", {}, None),
    ],
)
def test_days_are_read_from_what_is_certain(where: str, parameters: dict[str, Any], days: tuple | None) -> None:
    found = days_read(parsed(f"SELECT * FROM spot_prices p WHERE {where}").mentions, parameters)
    assert found == ({"spot_prices": Days(*days)} if days else {})


@pytest.mark.parametrize(
    ("sql", "days"),
    [
        # Every mention counts, and the days of all of them.
        ("SELECT 1 FROM t WHERE day = $from UNION ALL SELECT 1 FROM T WHERE day = $until", (FROM, UNTIL)),
        ("WITH a AS (SELECT * FROM t WHERE day = $from) SELECT * FROM a WHERE x IN (SELECT x FROM t)", None),
        ("WITH a AS (SELECT * FROM t WHERE day = $from) SELECT * FROM a", (FROM, FROM)),
        # What a join does with a row that is not there is not known from its WHERE.
        ("SELECT * FROM h ASOF JOIN t ON h.x = t.x AND h.ts >= t.ts WHERE t.day = $from", None),
        ("SELECT * FROM t, h WHERE t.day = $from", None),
        ("SELECT * FROM t TABLESAMPLE 10% WHERE day = $from", None),
        ("SELECT * FROM t AS t(day, x) WHERE day = $from", None),
        ("SELECT * FROM (SELECT * FROM t) WHERE day = $from", None),
        ("SELECT * FROM versions.t WHERE day = $from", None),
    ],
)
def test_a_table_is_narrowed_when_each_mention_of_it_is_bounded(sql: str, days: tuple | None) -> None:
    assert days_read(parsed(sql).mentions, GIVEN).get("t") == (Days(*days) if days else None)


TEXTS = [
    "SELECT day, count(*) AS n, sum(price_usd_per_hour) AS usd FROM spot_prices WHERE day >= $from GROUP BY day",
    "SELECT count(*) AS n FROM spot_prices WHERE day > $from AND day <= $until",
    "SELECT count(*) AS n, max(ts) AS ts FROM spot_prices WHERE day = DATE '2030-01-01' AND $from IS NOT NULL",
    "SELECT ts, row_number() OVER (ORDER BY ts) AS n FROM spot_prices WHERE day <= $from",
    "WITH a AS (SELECT * FROM spot_prices WHERE day = $until) SELECT count(*) AS n FROM a LEFT JOIN "
    "(SELECT DISTINCT ts FROM spot_prices WHERE day = $from) b USING (ts)",
    "SELECT customer_id, count(*) AS n FROM node_cost_hourly WHERE day BETWEEN $from AND $until GROUP BY customer_id",
    "SELECT count(*) AS n FROM node_cost_hourly c JOIN spot_prices p USING (day) WHERE c.day >= $from",
]


def test_narrowed_or_not_a_query_says_the_same_of_whomever_it_may_see(
    lake: Lake, reader: LakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = (1, 2, 3, 4)
    lake.publish(
        [
            *(
                PartitionWrite("spot_prices", {"day": f"2024-01-0{day}", "region": "us-east-1"}, prices(day, 3 + day))
                for day in days
            ),
            *(
                PartitionWrite(
                    "node_cost_hourly",
                    {"day": f"2024-01-0{day}", "region": "us-east-1"},
                    pl.concat(
                        [
                            node_costs(CUSTOMER_A, day, 5 + day, price="0.1"),
                            node_costs(CUSTOMER_B, day, day, price="0.2"),
                        ]
                    ),
                )
                for day in days
            ),
        ],
        run_id="test",
    )
    page = reader.pin()

    def answers() -> list[list[dict[str, Any]]]:
        found = []
        for scope in ({"all_customers": True}, {"parameters": {"customer_id": CUSTOMER_A}}):
            for text in TEXTS:
                used = {name: value for name, value in GIVEN.items() if f"${name}" in text}
                given = {**used, **scope.get("parameters", {})}
                rows = page.query(text, given, all_customers="all_customers" in scope).to_pylist()
                found.append(sorted(rows, key=str))
        return found

    whole = answers()
    monkeypatch.setattr(lake_query, "FEW_FILES", 0)
    assert answers() == whole
    assert whole[0] != []
