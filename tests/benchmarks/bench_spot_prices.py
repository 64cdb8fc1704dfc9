"""Our Spot price gateway beside boto3's paginator, on the same pages in the same run.

    python -m tests.benchmarks.bench_spot_prices [--days 30] [--region us-east-1]
    python -m tests.benchmarks.bench_spot_prices --replay FOLDER      all of a recording, three regions, ours only

The endpoint is the sandbox in a process of its own; CPU seconds are those of the reading process. Values must be equal
to 1e-9. `--replay` also prints what the endpoint served per CPU-second and both processes' peak memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import boto3
import polars as pl
import psutil
from botocore.credentials import Credentials

from control.gateways.spot_prices import FetchReport, fetch_spot_prices

KEYS = Credentials("AKIAEXAMPLEEXAMPLE00", "secret")
KEY = ["zone_id", "instance_type", "ts"]
SERVER = """
import pathlib, sys
from datetime import UTC, datetime
from control.sandbox.aws import SandboxAWSThread, SandboxConfig
from control.sandbox.market import GeneratedMarket, ReplayMarket
market = ReplayMarket(pathlib.Path(sys.argv[1]), datetime(2023, 9, 1, tzinfo=UTC)) if sys.argv[1] else GeneratedMarket()
with SandboxAWSThread(SandboxConfig(market=market)) as aws:
    print(aws.url, flush=True)
    sys.stdin.read()
"""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def server(replay: str) -> Iterator[tuple[str, psutil.Process]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, replay], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield process.stdout.readline().strip(), psutil.Process(process.pid)
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def ours(url: str, region: str, start: datetime, end: datetime) -> pl.DataFrame:
    batches = fetch_spot_prices(region, start, end, endpoint_url=url, credentials=KEYS, window=end - start)
    return pl.concat([pl.DataFrame(pl.from_arrow(batch)) for batch in batches])


def theirs(url: str, region: str, start: datetime, end: datetime) -> pl.DataFrame:
    client = boto3.client(
        "ec2",
        endpoint_url=url,
        region_name=region,
        aws_access_key_id=KEYS.access_key,
        aws_secret_access_key=KEYS.secret_key,
    )
    pages = client.get_paginator("describe_spot_price_history").paginate(
        StartTime=start, EndTime=end, ProductDescriptions=["Linux/UNIX"], PaginationConfig={"PageSize": 1000}
    )
    rows = [row for page in pages for row in page["SpotPriceHistory"]]
    return pl.DataFrame(rows).select(
        pl.col("Timestamp").dt.convert_time_zone("UTC").dt.cast_time_unit("us").alias("ts"),
        pl.col("AvailabilityZoneId").alias("zone_id"),
        pl.col("InstanceType").alias("instance_type"),
        pl.col("SpotPrice").alias("price_usd_per_hour"),
    )


def compare(region: str, days: int) -> None:
    end = datetime.now(UTC).replace(microsecond=0)
    start = end - timedelta(days=days)
    with server("") as (url, _):
        ours(url, region, start, end)  # the endpoint makes and formats its pages once, for both
        rates, frames = {}, {}
        for name, read in (("ours", ours), ("boto3", theirs)):
            began, cpu = time.perf_counter(), time.process_time()
            frame = read(url, region, start, end)
            took, cpu = time.perf_counter() - began, time.process_time() - cpu
            rates[name], frames[name] = frame.height / cpu, frame.sort(KEY)
            say(
                f"{name:6} {frame.height:8} rows in {took:6.2f} s: {rates[name]:9.0f} rows per CPU-second ({cpu:.2f} s)"
            )
    a, b = frames["ours"], frames["boto3"]
    same = a.select(KEY).equals(b.select(KEY))
    difference = (a["price_usd_per_hour"].cast(pl.Float64) - b["price_usd_per_hour"].cast(pl.Float64)).abs()
    worst = max(difference.to_list())
    say(f"same rows: {same}, largest difference of prices: {worst:.1e} USD/h")
    say(f"ratio: {rates['ours'] / rates['boto3']:.1f} x boto3 (target 5)")


def replay(folder: str) -> None:
    total, began, cpu = 0, time.perf_counter(), time.process_time()
    with server(folder) as (url, process):
        for region in ("us-east-1", "us-east-2", "eu-west-1"):
            report, started = FetchReport(), time.perf_counter()
            first, last = datetime(2022, 12, 1, tzinfo=UTC), datetime(2023, 9, 1, tzinfo=UTC)
            rows = sum(
                batch.num_rows
                for batch in fetch_spot_prices(region, first, last, endpoint_url=url, credentials=KEYS, report=report)
            )
            total += rows
            say(f"{region}: {rows} rows, {report.pages} pages in {time.perf_counter() - started:.1f} s")
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        times = process.cpu_times()
        theirs_rss = process.memory_info().rss / 2**20
    served = total / (times.user + times.system)
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    say(
        f"{total} rows in {took:.1f} s; reading {total / cpu:.0f} rows per CPU-second, {mine:.0f} MiB at most; "
        f"serving {served:.0f} rows per CPU-second, {theirs_rss:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--region", default="us-east-1")
    parser.add_argument("--replay", default="", metavar="FOLDER")
    options = parser.parse_args()
    if options.replay:
        replay(options.replay)
    else:
        compare(options.region, options.days)


if __name__ == "__main__":
    main()
