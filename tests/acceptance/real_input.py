"""The main job on real input: nine months of real Spot prices through the product's own assets, and what a fleet saved.

    python -m tests.acceptance.real_input --data ../shared/data            # or: make real-input

A Postgres of its own, the sandbox's replay of the recording on its price endpoints, and the assets as one backfill:
ingest, find what is missing, cost and savings of a fixed fleet hour by hour. The recording lacks five snapshots: the
hours between a missing one and the next count in no figure. The cost is then computed a second time by other means
(Polars, straight from the recorded files) and must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

FIRST_DAY = date(2022, 12, 3)
LAST_DAY = date(2023, 8, 31)
# The replay's clock stands still here: the whole recording is in the past.
CLOCK = datetime(2023, 9, 1, tzinfo=UTC)
REGIONS = ("eu-west-1", "us-east-1", "us-east-2")
# One node of each common type in every zone that sells it, on Spot the whole time.
FLEET = ("c5.xlarge", "c5.2xlarge", "m5.large", "m5.xlarge", "m5.2xlarge", "m6i.xlarge", "r5.xlarge", "r5.2xlarge")
FLEET_START = datetime(2022, 12, 3, 8, tzinfo=UTC)
# When the recording's cron began a snapshot, UTC; it ran minutes to hours late, never before its hour.
TURNS = (0, 7, 14, 21)


@dataclass
class Watch:
    """Peak memory of a set of processes, sampled; the kernel's own peak of this process beside it."""

    pids: list[int]
    peak_bytes: int = 0

    @contextmanager
    def running(self) -> Iterator[Watch]:
        """Sample while the block runs."""
        import psutil

        processes = [psutil.Process(pid) for pid in self.pids]
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(0.1):
                self.peak_bytes = max(self.peak_bytes, sum(process.memory_info().rss for process in processes))

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()


@contextmanager
def replay(prices: Path, home: Path) -> Iterator[tuple[str, int]]:
    """The sandbox's replay in a process of its own: its address and process id."""
    command = [sys.executable, "-m", "control.cli", "sandbox", "replay", "--prices", str(prices)]
    command += ["--from", CLOCK.date().isoformat(), "--speed", "0", "--port", "0"]
    environment = {**os.environ, "CLOUDOPTIM_HOME": str(home)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"AWS_ENDPOINT_URL=(\S+)", line):
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield found[1], process.pid
                return
        raise RuntimeError(f"the replay of {prices} did not start (exit {process.wait()})")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def run(prices: Path, database_url: str, folder: Path, regions: Sequence[str]) -> dict[str, Any]:
    """Everything of the given regions, on an empty migrated database; returns the figures."""
    # The partitions of the assets are made from the settings when their modules are imported.
    os.environ.update(
        CLOUDOPTIM_DATA_START=FIRST_DAY.isoformat(),
        CLOUDOPTIM_PRICE_REGIONS=",".join(regions),
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
    )
    import dagster as dg

    from cloudoptim_pipelines import defs as domains
    from cloudoptim_pipelines.partitions import price_key, range_tags
    from cloudoptim_pipelines.resources import Warehouse
    from warehouse.lake.store import Lake

    lake = Lake(folder / "lake", database_url)
    lake.create_tables()
    lake.close()
    loaded = dg.load_assets_from_package_module(domains)
    assets = {asset.key.to_user_string(): asset for asset in loaded if isinstance(asset, dg.AssetsDefinition)}
    figures: dict[str, Any] = {}

    def materialize(warehouse: Warehouse, names: list[str], first: str, last: str) -> None:
        result = dg.materialize(
            [assets[name] for name in names],
            instance=instance,
            resources={"warehouse": warehouse},
            tags=range_tags(first, last),
            run_config={"loggers": {"console": {"config": {"log_level": "ERROR"}}}},
        )
        assert result.success

    with (
        dg.DagsterInstance.ephemeral() as instance,
        replay(prices, folder) as (endpoint, server_pid),
    ):
        warehouse = Warehouse(
            database_url=database_url,
            lake_root=str(folder / "lake"),
            aws_endpoint_url=endpoint,
            as_of=CLOCK.isoformat(),
        )
        ends = price_key(FIRST_DAY, regions[0]), price_key(LAST_DAY, regions[-1])
        with Watch([os.getpid(), server_pid]).running() as watch:
            started = time.monotonic()
            materialize(warehouse, ["on_demand_prices"], *ends)
            figures["on_demand_seconds"] = round(time.monotonic() - started, 1)
            started = time.monotonic()
            materialize(warehouse, ["spot_prices"], *ends)
            figures["ingest_seconds"] = round(time.monotonic() - started, 1)
        figures["ingest_peak_mb"] = watch.peak_bytes >> 20
        figures["ingest_peak_mb_pipeline"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        figures["missing"] = missing_snapshots(warehouse)
        started = time.monotonic()
        add_fleet(warehouse, regions)
        names = ["node_hours", "node_cost_hourly", "cluster_cost_hourly", "interruptions", "savings_daily"]
        materialize(warehouse, names, FIRST_DAY.isoformat(), LAST_DAY.isoformat())
        figures["cost_seconds"] = round(time.monotonic() - started, 1)
        figures |= summary(warehouse)
        warehouse.close()
    return figures


def missing_snapshots(warehouse: Any) -> list[dict[str, Any]]:
    """Open gaps whose sampler missed its turn, one entry per moment, with the regions it is missing in."""
    from sqlalchemy import text

    with warehouse.database.system() as connection:
        rows = connection.execute(
            text(
                "SELECT gap_start, count(DISTINCT series) FROM data_gaps WHERE reason = 'no_scrape' AND state = 'open' "
                "AND table_name = 'spot_prices' GROUP BY gap_start ORDER BY gap_start"
            )
        ).all()
        others = connection.execute(
            text("SELECT count(*) FROM data_gaps WHERE reason NOT IN ('no_scrape', 'did_not_exist')")
        ).scalar_one()
    assert others == 0, f"{others} gaps that are not the recording's own"
    return [{"expected_at": row[0].isoformat(), "regions": row[1]} for row in rows]


def add_fleet(warehouse: Any, regions: Sequence[str]) -> None:
    """A customer with one cluster in each region, and the fleet's nodes."""
    from uuid import uuid4

    from sqlalchemy import insert, text

    from warehouse.lake.query import LakeReader
    from warehouse.postgres.models import Cluster, Customer, Node, new_id

    reader = LakeReader(warehouse.lake)
    pools = reader.query(
        "SELECT DISTINCT region, zone_id, instance_type FROM spot_prices "
        "WHERE instance_type IN (SELECT unnest($types)) ORDER BY ALL",
        {"types": list(FLEET)},
    ).to_pylist()
    reader.close()
    customer, clusters = new_id(), {region: new_id() for region in regions}
    with warehouse.database.system() as connection:
        connection.execute(
            insert(Customer).values(id=customer, company_name="Fleet", email="fleet@example.org", external_id=uuid4())
        )
        for region, cluster in clusters.items():
            connection.execute(
                insert(Cluster).values(id=cluster, customer_id=customer, cluster_name=f"fleet-{region}", region=region)
            )
        connection.execute(
            insert(Node),
            [
                {
                    "id": new_id(),
                    "customer_id": customer,
                    "cluster_id": clusters[pool["region"]],
                    "node_name": f"node-{number}",
                    "instance_id": f"i-{number:017x}",
                    "instance_type": pool["instance_type"],
                    "availability_zone": pool["zone_id"],
                    "zone_id": pool["zone_id"],
                    "node_type": "spot",
                    "status": "ready",
                    "cpu_cores": 1.0,
                    "memory_bytes": 1,
                    "created_at": FLEET_START,
                    "last_seen_at": CLOCK,
                }
                for number, pool in enumerate(pools)
            ],
        )
        connection.execute(text("UPDATE clusters SET created_at = :at"), {"at": FLEET_START})


def summary(warehouse: Any) -> dict[str, Any]:
    """Cost, baseline and savings by region, and the months around the shock of spring 2023."""
    from warehouse.lake.query import LakeReader

    reader = LakeReader(warehouse.lake)
    page = reader.pin()

    def rows(sql: str) -> list[dict[str, Any]]:
        return page.query(sql, all_customers=True).to_pylist()

    counted = rows("SELECT count(*) AS rows, count(DISTINCT (day, region)) AS partitions FROM spot_prices")[0]
    total = rows(
        "SELECT sum(actual_usd) AS actual, sum(baseline_usd) AS baseline, sum(net_usd) AS net, "
        "sum(hours_covered) AS hours, avg(coverage_ratio) AS coverage FROM savings_daily"
    )[0]
    regions = rows(
        "SELECT region, sum(actual_usd) AS actual, sum(b1_list_usd) AS b1, sum(node_minutes) / 60 AS node_hours "
        "FROM cluster_cost_hourly WHERE complete GROUP BY region ORDER BY region"
    )
    months = rows(
        "SELECT strftime(day, '%Y-%m') AS month, region, sum(actual_usd) AS actual, sum(b1_list_usd) AS b1 "
        "FROM cluster_cost_hourly WHERE complete GROUP BY ALL ORDER BY ALL"
    )
    incomplete = rows("SELECT count(*) AS hours FROM cluster_cost_hourly WHERE NOT complete")[0]
    dearest = rows(
        "SELECT ts, region, actual_usd, b1_list_usd FROM cluster_cost_hourly WHERE complete "
        "ORDER BY actual_usd / b1_list_usd DESC, ts LIMIT 1"
    )[0]
    fleet = rows("SELECT count(DISTINCT instance_id) AS nodes, count(*) AS node_hours FROM node_cost_hourly")[0]
    reader.close()
    return {
        "price_rows": counted["rows"],
        "price_partitions": counted["partitions"],
        "nodes": fleet["nodes"],
        "node_hours": fleet["node_hours"],
        "cost": {key: str(total[key]) for key in ("actual", "baseline", "net")},
        "cluster_hours": int(total["hours"]),
        "incomplete_hours": incomplete["hours"],
        "coverage": round(total["coverage"], 6),
        "regions": [{**row, "actual": str(row["actual"]), "b1": str(row["b1"])} for row in regions],
        "months": [{**row, "actual": str(row["actual"]), "b1": str(row["b1"])} for row in months],
        "dearest_hour": {
            "ts": dearest["ts"].isoformat(),
            "region": dearest["region"],
            "ratio": float(dearest["actual_usd"] / dearest["b1_list_usd"]),
        },
    }


def cross_check(data: Path, regions: Sequence[str]) -> dict[str, str]:
    """Cost and baseline of the same fleet by other means: Polars, straight from the recorded files.

    Every node's every full hour from the fleet's start to the recording's end, at the price last recorded at or before
    its start (180 days back at most) and the list price of its type in the region; money in whole 1e-8 dollars. Hours
    whose snapshot is missing are left out.
    """
    import polars as pl

    root = data / "spot_price_catalog"
    prices = (
        pl.scan_parquet(root / "spot_price" / "**" / "*.parquet")
        .filter(pl.col("instance_type").is_in(FLEET), pl.col("region").is_in(regions))
        .select("region", zone="availability_zone", type="instance_type", at="timestamp", usd="price_usd")
        .collect()
        .sort("at")
    )
    hours = pl.DataFrame(
        {
            "at": pl.datetime_range(
                FLEET_START, CLOCK - timedelta(hours=1), "1h", time_zone="UTC", time_unit="us", eager=True
            )
        }
    )
    nodes = prices.select("region", "zone", "type").unique()
    priced = (
        hours.join(nodes, how="cross")
        .sort("at")
        .join_asof(prices, on="at", by=["region", "zone", "type"], strategy="backward", tolerance="180d")
        .join(
            pl.read_parquet(root / "on_demand_price.parquet").select(
                "region", type="instance_type", listed="on_demand_price_usd"
            ),
            on=["region", "type"],
            how="left",
        )
    )
    for region, missed in missed_hours(data, regions).items():
        priced = priced.filter((pl.col("region") != region) | ~pl.col("at").is_in(missed))
    exact = [(pl.col(name) * 1e8).round().cast(pl.Int64) for name in ("usd", "listed")]
    # An hour of a cluster counts when all its nodes are priced, as in the product.
    whole = priced.with_columns(exact).filter(
        pl.all_horizontal(pl.col("usd", "listed").is_not_null()).all().over("region", "at")
    )
    spot, listed = int(whole["usd"].sum()), int(whole["listed"].sum())
    return {
        "actual": str(Decimal(spot).scaleb(-8)),
        "baseline": str(Decimal(listed).scaleb(-8)),
        "net": str(Decimal(listed - spot).scaleb(-8)),
    }


def missed_hours(data: Path, regions: Sequence[str]) -> dict[str, list[datetime]]:
    """Hours from a turn of the recording's cron without any price to the hour of the next turn, which runs late too."""
    import polars as pl

    recorded = (
        pl.scan_parquet(data / "spot_price_catalog" / "spot_price" / "**" / "*.parquet")
        .filter(pl.col("region").is_in(regions))
        .select("region", hour=pl.col("timestamp").dt.truncate("1h"))
        .unique()
        .collect()
    )
    turns = [
        datetime(day.year, day.month, day.day, hour, tzinfo=UTC)
        for day in (FIRST_DAY + timedelta(days=offset) for offset in range((LAST_DAY - FIRST_DAY).days + 1))
        for hour in TURNS
    ]
    out: dict[str, list[datetime]] = {region: [] for region in regions}
    for region, missed in out.items():
        taken = set(recorded.filter(pl.col("region") == region)["hour"])
        for turn, following in zip(turns, [*turns[1:], CLOCK], strict=True):
            hours = [turn + timedelta(hours=n) for n in range((following - turn) // timedelta(hours=1) + 1)]
            if following > min(taken) and not taken.intersection(hours[:-1]):
                missed += hours
    return out


def show(figures: dict[str, Any]) -> str:
    """The figures as text for people (and the README)."""
    actual, baseline = Decimal(figures["cost"]["actual"]), Decimal(figures["cost"]["baseline"])
    lines = [
        f"prices: {figures['price_rows']:,} rows in {figures['price_partitions']} partitions (day x region), ingested "
        f"in {figures['ingest_seconds']} s, peak memory {figures['ingest_peak_mb']} MB with the replay server "
        f"({figures['ingest_peak_mb_pipeline']} MB without)",
        f"snapshots missing: {len(figures['missing'])}: "
        + ", ".join(item["expected_at"][:16].replace("T", " ") for item in figures["missing"]),
        f"fleet: {figures['nodes']} nodes, {figures['node_hours']:,} node hours, costs and savings in "
        f"{figures['cost_seconds']} s",
        f"cost on Spot {actual:,.2f} USD, the same on demand {baseline:,.2f} USD (B1 list), saved "
        f"{baseline - actual:,.2f} USD = {(baseline - actual) / baseline:.1%}, coverage {figures['coverage']:.2%} "
        f"({figures['cluster_hours']:,} cluster hours, {figures['incomplete_hours']} left out as incomplete)",
    ]
    lines += [
        f"  {row['region']}: {Decimal(row['actual']):,.2f} of {Decimal(row['b1']):,.2f} USD, saved "
        f"{1 - Decimal(row['actual']) / Decimal(row['b1']):.1%}"
        for row in figures["regions"]
    ]
    lines.append("share of the on-demand price paid, by month:")
    months = sorted({row["month"] for row in figures["months"]})
    lines.append("  " + " ".join(f"{month:>8}" for month in ["", *months]))
    for region in (row["region"] for row in figures["regions"]):
        by_month = {row["month"]: row for row in figures["months"] if row["region"] == region}
        shares = [f"{Decimal(by_month[m]['actual']) / Decimal(by_month[m]['b1']):8.1%}" for m in months]
        lines.append(f"  {region:>9}" + " ".join(["", *shares])[1:])
    hour = figures["dearest_hour"]
    lines.append(f"dearest hour: {hour['ts'][:13]}:00 UTC in {hour['region']}, {hour['ratio']:.1%} of on-demand")
    return "\n".join(lines)


def main() -> None:
    """Run it on a Postgres of its own and print the figures; exit 1 when the two computations differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with spot_price_catalog")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--database-url", help="an empty, migrated database; a Postgres of its own by default")
    parser.add_argument("--regions", default=",".join(REGIONS), help="some of them, separated by commas")
    arguments = parser.parse_args()
    regions = sorted(arguments.regions.split(","))
    with tempfile.TemporaryDirectory(prefix="cloudoptim-real-input-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        if arguments.database_url:
            figures = run(arguments.data / "spot_price_catalog", arguments.database_url, folder, regions)
        else:
            from control.embedded import EmbeddedPostgres, free_port
            from warehouse.postgres.migrate import upgrade

            server = EmbeddedPostgres(folder / "postgres", port=free_port()).start()
            try:
                server.ensure_database("real_input")
                upgrade(server.url("real_input"))
                figures = run(arguments.data / "spot_price_catalog", server.url("real_input"), folder, regions)
            finally:
                server.stop()
    figures["cross_check"] = cross_check(arguments.data, regions)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    print(show(figures))  # noqa: T201
    if figures["cross_check"] != figures["cost"]:
        sys.exit(f"the two computations differ: {figures['cost']} and {figures['cross_check']}")
    print("computed a second time from the files with Polars: the same to 1e-8 USD")  # noqa: T201


if __name__ == "__main__":
    main()
