"""What a long list of files costs a query of one day, beside DuckDB over the same files.

    python -m tests.benchmarks.bench_lake_files [--days 365] [--regions 3]

Prints milliseconds: DuckDB alone with the whole list, the reader with the list not narrowed, and the reader. A year of
three regions is 1,095 files.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path

import duckdb
import polars as pl

from tests.benchmarks.bench_lake import best, postgres, say
from warehouse.lake import query as lake_query
from warehouse.lake.query import LakeReader
from warehouse.lake.store import Lake, PartitionWrite

FIRST = date(2020, 1, 1)
SQL = "SELECT count(*) AS n FROM spot_prices WHERE day = $day"


def rows(days: int, regions: int) -> pl.DataFrame:
    """One price for each day and region."""
    when = [FIRST + timedelta(days=day) for day in range(days) for _ in range(regions)]
    moments = pl.Series(when).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    return pl.DataFrame(
        {
            "ts": moments,
            "fetched_at": moments,
            "region": [f"region-{number}" for _ in range(days) for number in range(regions)],
            "zone_id": "zone-1",
            "availability_zone": "zone-1a",
            "instance_type": "m5.large",
            "product": "Linux/UNIX",
            "price_usd_per_hour": pl.Series([Decimal("0.03")] * len(when), dtype=pl.Decimal(18, 8)),
            "source": "observed",
        }
    )


def run(days: int, regions: int, folder: Path, url: str) -> None:
    """All measurements."""
    with Lake(folder / "lake", url) as lake:
        lake.create_tables()
        every = [(FIRST + timedelta(days=day)).isoformat() for day in range(days)]
        names = [f"region-{number}" for number in range(regions)]
        for start in range(0, days, 200):
            part = every[start : start + 200]
            data = rows(days, regions).filter(pl.col("ts").dt.date().cast(pl.String).is_in(part))
            lake.publish([PartitionWrite("spot_prices", {"day": part, "region": names}, data)], run_id="bench")
        files = sorted(str(path) for path in (folder / "lake" / "spot_prices").rglob("*.parquet"))
        reader = LakeReader(lake)
        page = reader.pin()
        given = {"day": FIRST + timedelta(days=days // 2)}
        listed = ", ".join(f"'{file}'" for file in files if "_delta_log" not in file)
        alone = duckdb.connect(config={"threads": 2})
        alone.execute("SET GLOBAL parquet_metadata_cache = true")
        sql = SQL.replace("spot_prices", f"read_parquet([{listed}], hive_partitioning = true)")
        plain, expected = best(lambda: alone.execute(sql, given).fetchall(), 5)
        ours, found = best(lambda: page.query(SQL, given), 5)
        few, lake_query.FEW_FILES = lake_query.FEW_FILES, days * regions
        whole, _ = best(lambda: page.query(SQL, given), 5)
        lake_query.FEW_FILES = few
        assert found["n"].to_pylist() == [expected[0][0]] == [regions]
        say(f"{days * regions:,} files, one day of them")
        for name, seconds in (("DuckDB alone", plain), ("the reader, not narrowed", whole), ("the reader", ours)):
            say(f"  {name:<26} {seconds * 1000:8.1f} ms   {seconds / plain:6.2f} of DuckDB alone")
        reader.close()


def main() -> None:
    """Measure in a folder that is deleted again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--regions", type=int, default=3)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-lake-files-"))
    try:
        with postgres(folder) as url:
            run(given.days, given.regions, folder, url)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
