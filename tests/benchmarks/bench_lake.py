"""The lake beside bare Parquet, Polars and DuckDB alone, in one run on this machine.

    python -m tests.benchmarks.bench_lake [--rows 10000000]

Prints seconds and ratios; below 1 the lake is faster. Everything lives in a temporary folder and a Postgres of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from control.embedded import EmbeddedPostgres, free_port
from warehouse.lake.computed import parse_model, run_model
from warehouse.lake.query import LakeReader, Limits
from warehouse.lake.store import Lake, PartitionWrite
from warehouse.lake.tables import TABLES
from warehouse.postgres.migrate import upgrade

DAY_US = 86_400_000_000
START_US = 1_704_067_200_000_000  # 2024-01-01
TYPES, ZONES = 500, 4
DAY_1 = {"day": "2024-01-01", "region": "us-east-1"}
DAY_1_ELSEWHERE = {"day": "2024-01-01", "region": "eu-west-1"}
BATCH_ROWS = 250_000
COMMITS = 50
LIMITS = Limits(memory="8GB", threads=os.cpu_count() or 2, statement_seconds=None)

ASOF = """
SELECT count(*) AS n, sum(h.minutes / 60 * CAST(p.price_usd_per_hour AS DOUBLE)) AS usd
FROM {hours} h ASOF JOIN {prices} p
  ON h.zone_id = p.zone_id AND h.instance_type = p.instance_type AND h.product = p.product AND h.ts >= p.ts
"""
MODEL = """-- What each node cost.
-- table: node_cost_hourly
-- grain: one row per node and hour
-- units: USD
-- keys: customer_id, cluster_id, instance_id, ts
SELECT h.ts, h.customer_id, h.cluster_id, h.node_name, h.instance_id, h.zone_id, h.instance_type, h.lifecycle,
       h.minutes, p.price_usd_per_hour, CAST(h.minutes / 60 * p.price_usd_per_hour AS DECIMAL(18, 8)) AS actual_usd,
       'spot_as_of' AS price_basis, 'observed' AS source
FROM {hours} h ASOF LEFT JOIN {prices} p
  ON h.zone_id = p.zone_id AND h.instance_type = p.instance_type AND h.product = p.product AND h.ts >= p.ts
"""


def say(text: str) -> None:
    """One line on the screen."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def text(values: list[str], codes: np.ndarray) -> pa.Array:
    """Plain text from codes."""
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(values)).cast(pa.string())


def required(table: str) -> pa.Schema:
    """The columns a writer has to give."""
    spec = TABLES[table]
    return pa.schema([c.field() for c in spec.columns if c.required and c.name not in spec.partition_by])


def price_batches(rows: int) -> list[pa.RecordBatch]:
    """Price changes of one day, in the lake's order: type, zone, product, time."""
    pools = TYPES * ZONES
    per_pool = max(1, rows // pools)
    types = [f"m{index:03}.large" for index in range(TYPES)]
    zones = [f"use1-az{index + 1}" for index in range(ZONES)]
    schema = pa.schema([field for field in TABLES["spot_prices"].schema() if not field.name.startswith("fill")])
    schema = pa.schema(
        [field for field in schema if field.name not in ("filled_at", "availability_zone", "day", "region")]
    )
    batches = []
    rng = np.random.default_rng(1)
    for start in range(0, per_pool * pools, BATCH_ROWS):
        index = np.arange(start, min(start + BATCH_ROWS, per_pool * pools))
        pool, step = index // per_pool, index % per_pool
        n = len(index)
        arrays = {
            "ts": pa.array(START_US + step * (DAY_US // per_pool)).cast(pa.timestamp("us", tz="UTC")),
            "zone_id": text(zones, pool % ZONES),
            "instance_type": text(types, pool // ZONES),
            "product": text(["Linux/UNIX"], np.zeros(n)),
            "price_usd_per_hour": pa.array(rng.integers(1, 50_000, n) / 10_000).cast(pa.decimal128(18, 8)),
            "source": text(["observed"], np.zeros(n)),
            "fetched_at": pa.array(np.full(n, START_US)).cast(pa.timestamp("us", tz="UTC")),
        }
        batches.append(pa.RecordBatch.from_arrays([arrays[field.name] for field in schema], schema=schema))
    return batches


def hour_batches(rows: int) -> list[pa.RecordBatch]:
    """Node hours of one day, many nodes, in the lake's order."""
    nodes = max(1, rows // 24)
    types = [f"m{index:03}.large" for index in range(TYPES)]
    zones = [f"use1-az{index + 1}" for index in range(ZONES)]
    names = TABLES["node_hours"].schema()
    schema = pa.schema(
        [f for f in names if f.name not in ("availability_zone", "cpu_cores", "memory_bytes", "day", "region")]
    )
    rng = np.random.default_rng(2)
    pool_of = rng.integers(0, TYPES * ZONES, nodes)
    batches = []
    for start in range(0, nodes * 24, BATCH_ROWS):
        index = np.arange(start, min(start + BATCH_ROWS, nodes * 24))
        node, hour = index // 24, index % 24
        n = len(index)
        ids = pl.Series(node).cast(pl.String).str.zfill(9).to_arrow().cast(pa.string())
        arrays = {
            "ts": pa.array(START_US + hour * 3_600_000_000).cast(pa.timestamp("us", tz="UTC")),
            "customer_id": text(["01890000-0000-7000-8000-00000000000a"], np.zeros(n)),
            "cluster_id": text(["01890000-0000-7000-8000-0000000000c1"], np.zeros(n)),
            "node_name": ids,
            "instance_id": ids,
            "zone_id": text(zones, pool_of[node] % ZONES),
            "instance_type": text(types, pool_of[node] // ZONES),
            "product": text(["Linux/UNIX"], np.zeros(n)),
            "lifecycle": text(["spot"], np.zeros(n)),
            "minutes": pa.array(np.full(n, 60.0)),
            "source": text(["observed"], np.zeros(n)),
        }
        batches.append(pa.RecordBatch.from_arrays([arrays[field.name] for field in schema], schema=schema))
    return batches


def stream(batches: list[pa.RecordBatch]) -> pa.RecordBatchReader:
    """The batches as a stream."""
    return pa.RecordBatchReader.from_batches(batches[0].schema, iter(batches))


def bare(path: Path, batches: list[pa.RecordBatch]) -> None:
    """What pyarrow does with the same batches, made as durable as the lake's files."""
    with pq.ParquetWriter(path, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def best(action: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """The fastest of some runs."""
    return min((timed(action) for _ in range(times)), key=lambda run: run[0])


def report(name: str, ours: float, other: str, theirs: float, detail: str = "") -> None:
    """One line of the table."""
    say(f"{name:44} {ours:9.3f} s   {other:26} {theirs:9.3f} s   ratio {ours / theirs:5.2f}   {detail}")


def percentile(values: list[float], share: float) -> float:
    """A percentile of the values."""
    return statistics.quantiles(values, n=100, method="inclusive")[int(share) - 1]


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A migrated Postgres for this run."""
    server = EmbeddedPostgres(folder / "postgres", port=free_port()).start()
    try:
        server.ensure_database("bench")
        upgrade(server.url("bench"))
        yield server.url("bench")
    finally:
        server.stop()


def run(rows: int, folder: Path, url: str) -> None:
    """All measurements."""
    lake = Lake(folder / "lake", url)
    lake.create_tables()
    prices, hours = price_batches(rows), hour_batches(rows)
    count = sum(batch.num_rows for batch in prices)

    lake.publish([PartitionWrite("spot_prices", {"day": "2024-01-02", "region": "warm-up"}, None)], run_id="warm")
    plain, _ = best(lambda: bare(folder / "bare.parquet", prices))
    write = lambda: lake.publish([PartitionWrite("spot_prices", DAY_1, stream(prices))], run_id="bench")  # noqa: E731
    ours, release = best(write)
    assert release.rows == count
    report(f"write {count:,} rows", ours, "bare pyarrow Parquet", plain, f"{count / ours / 1e6:.2f} M rows/s")

    thousand = [prices[0].slice(0, 1000)]
    small = [
        timed(lambda: lake.publish([PartitionWrite("spot_prices", DAY_1_ELSEWHERE, stream(thousand))], run_id="bench"))[
            0
        ]
        for _ in range(COMMITS)
    ]
    files = [timed(lambda: bare(folder / "small.parquet", thousand))[0] for _ in range(COMMITS)]
    detail = f"p95 {percentile(small, 95) * 1000:.0f} ms"
    report("publish 1,000 rows, p50", statistics.median(small), "bare Parquet", statistics.median(files), detail)

    lake.publish([PartitionWrite("node_hours", DAY_1, stream(hours))], run_id="bench")
    bare(folder / "hours.parquet", hours)
    reader = LakeReader(lake, LIMITS)
    page = reader.pin()
    asof = ASOF.format(hours="node_hours", prices="spot_prices")
    ours, table = best(lambda: page.query(asof, all_customers=True))
    theirs, frame = best(lambda: polars_asof(folder))
    assert table["n"][0].as_py() == frame["n"][0]
    assert abs(table["usd"][0].as_py() / frame["usd"][0] - 1) < 1e-9
    hour_count = sum(batch.num_rows for batch in hours)
    report(f"ASOF {hour_count:,} x {count:,}", ours, "Polars, bare Parquet", theirs)
    files_sql = ASOF.format(hours="read_parquet($hours)", prices="read_parquet($prices)")
    theirs, _ = best(lambda: duckdb_alone(folder, files_sql))
    report("the same", ours, "DuckDB, bare Parquet", theirs)

    model = parse_model("bench", MODEL.format(hours="node_hours", prices="spot_prices"))
    ours, _ = timed(lambda: run_model(lake, page, model, DAY_1, run_id="bench"))
    body = model.sql.replace("FROM node_hours", "FROM read_parquet($hours)").replace(
        "JOIN spot_prices", "JOIN read_parquet($prices)"
    )
    theirs, _ = timed(lambda: duckdb_alone(folder, f"COPY ({body}) TO '{folder / 'cost.parquet'}' (FORMAT parquet)"))
    report("model: query text to release, keys checked", ours, "DuckDB COPY to Parquet", theirs)

    ours, _ = best(lambda: reader.pin().query("SELECT 1 AS one"), 20)
    say(f"{'pin the newest release and ask SELECT 1':44} {ours:9.4f} s")
    reader.close()
    lake.close()


def polars_asof(folder: Path) -> pl.DataFrame:
    """The ASOF join in Polars."""
    by = ["zone_id", "instance_type", "product"]
    hours = pl.scan_parquet(folder / "hours.parquet").select("ts", "minutes", *by).sort("ts")
    prices = pl.scan_parquet(folder / "bare.parquet").select("ts", "price_usd_per_hour", *by).sort("ts")
    cost = pl.col("minutes") / 60 * pl.col("price_usd_per_hour").cast(pl.Float64)
    joined = hours.join_asof(prices, on="ts", by=by, strategy="backward", check_sortedness=False)
    return joined.select(pl.len().alias("n"), cost.sum().alias("usd")).collect()


def duckdb_alone(folder: Path, sql: str) -> Any:
    """The same text on bare Parquet files."""
    db = duckdb.connect(config={"threads": LIMITS.threads, "memory_limit": LIMITS.memory})
    db.execute("SET asof_loop_join_threshold = 0")
    names = {"hours": str(folder / "hours.parquet"), "prices": str(folder / "bare.parquet")}
    for name, path in names.items():
        sql = sql.replace(f"${name}", f"'{path}'")
    try:
        return db.execute(sql).fetchall()
    finally:
        db.close()


def main() -> None:
    """Parse, run, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=10_000_000)
    rows = parser.parse_args().rows
    folder = Path(tempfile.mkdtemp(prefix="cloudoptim-bench-"))
    folder.chmod(0o755)
    try:
        with postgres(folder) as url:
            run(rows, folder, url)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
