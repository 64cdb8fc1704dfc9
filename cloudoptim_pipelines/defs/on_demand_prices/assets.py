"""On-demand prices: from the AWS price list to the lake and to the table of current prices."""

from datetime import datetime
from typing import Any

import dagster as dg
import polars as pl
from botocore.exceptions import BotoCoreError, ClientError
from sqlalchemy import text

from cloudoptim_pipelines import coverage
from cloudoptim_pipelines.merging import merge
from cloudoptim_pipelines.partitions import (
    DAY,
    DayRange,
    by_day_and_region,
    dagster_key,
    day_start,
    price_key,
    ranges_by_region,
)
from cloudoptim_pipelines.policies import DENIALS, OWNERS, RETRY, SINGLE_RUN
from cloudoptim_pipelines.resources import Warehouse
from control.gateways.on_demand_prices import OnDemandPriceError, fetch_on_demand
from warehouse.lake.query import LakeReader
from warehouse.lake.store import PartitionWrite

TABLE = "on_demand_prices"

_UPSERT_CURRENT = text(
    """
    INSERT INTO on_demand_price
        (region, instance_type, product, price_usd_per_hour, vcpus, memory_gib, effective_at, fetched_at, source)
    SELECT :region, * FROM unnest(
        CAST(:instance_type AS text[]), CAST(:product AS text[]), CAST(:price AS numeric(18, 8)[]),
        CAST(:vcpus AS float8[]), CAST(:memory_gib AS float8[]), CAST(:effective_at AS timestamptz[]),
        CAST(:fetched_at AS timestamptz[]), CAST(:source AS text[])
    )
    ON CONFLICT (region, instance_type, product) DO UPDATE SET
        price_usd_per_hour = excluded.price_usd_per_hour, vcpus = excluded.vcpus, memory_gib = excluded.memory_gib,
        effective_at = excluded.effective_at, fetched_at = excluded.fetched_at, source = excluded.source
    """
)


KEY = ["region", "instance_type", "product", "ts"]


@dg.asset(
    partitions_def=by_day_and_region,
    backfill_policy=SINGLE_RUN,
    retry_policy=RETRY,
    pool="aws_price_list",
    group_name="prices",
    owners=OWNERS,
    kinds={"aws", "polars", "deltalake"},
    tags={"domain": "prices"},
)
def on_demand_prices(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """On-demand list price of every instance type of a region and day, USD per instance hour."""
    reader = warehouse.reader
    rows = fetched = 0
    refusals: dict[str, Exception] = {}
    for region, ranges in ranges_by_region(context.partition_keys).items():
        try:
            listed = _fetch(warehouse, region)
        except (OnDemandPriceError, ClientError, BotoCoreError) as error:
            refusals[region] = error
            context.log.error(f"{region}: {error}")
            continue
        fetched += listed.height
        for days in ranges:
            rows += _replace(warehouse, reader, region, days, listed, context.run.run_id)
        _update_current(warehouse, region, listed)
    if refusals:
        # The other regions' partitions were written, and Dagster is to know it.
        for key in context.partition_keys:
            if key.partition("|")[2] not in refusals:
                context.log_event(dg.AssetMaterialization(TABLE, partition=dagster_key(key)))
        raise dg.Failure(
            "; ".join(f"{region}: {error}" for region, error in sorted(refusals.items())),
            allow_retries=not all(_denied(error) for error in refusals.values()),
        )
    return dg.MaterializeResult(metadata={"dagster/partition_row_count": rows, "types_listed": fetched})


def _denied(error: Exception) -> bool:
    """Whether asking again changes nothing until somebody mends the right or the region's code."""
    if isinstance(error, ClientError):
        return error.response["Error"].get("Code") in DENIALS
    return isinstance(error, OnDemandPriceError)


def _fetch(warehouse: Warehouse, region: str) -> pl.DataFrame:
    """The region's list now: one positive price for each type, with its size and since when it holds."""
    listed = pl.DataFrame(pl.from_arrow(fetch_on_demand(region, endpoint_url=warehouse.aws_endpoint)))
    return (
        listed.filter(pl.col("price_usd_per_hour").cast(pl.Float64) > 0)
        .with_columns(fetched_at=pl.lit(warehouse.now()), region=pl.lit(region))
        .unique(["instance_type", "product"], keep="last", maintain_order=True)
    )


def rows_of_day(listed: pl.DataFrame, start: datetime, fetched_at: datetime) -> pl.DataFrame:
    """The list as rows of one day: a price that holds since before the day counts from its start.

    A price that took effect after the day says nothing about it. What is listed on the day itself was observed, a list
    read later was fetched again.
    """
    end = start + DAY
    source = "observed" if start <= fetched_at < end else "aws_history"
    return listed.filter(pl.col("effective_at") < end).select(
        pl.max_horizontal("effective_at", pl.lit(start)).dt.cast_time_unit("us").alias("ts"),
        "region",
        "instance_type",
        "product",
        "price_usd_per_hour",
        pl.col("vcpus").cast(pl.Float64).alias("cpu_cores"),
        (pl.col("memory_gib") * 1024**3).cast(pl.Int64).alias("memory_bytes"),
        "sku",
        pl.lit(source).alias("source"),
        "fetched_at",
    )


def _replace(
    warehouse: Warehouse, reader: LakeReader, region: str, days: DayRange, listed: pl.DataFrame, run_id: str
) -> int:
    keys = [price_key(day, region) for day in days.days()]
    now = warehouse.now()
    with coverage.partition_locks(warehouse.database, TABLE, keys):
        fresh = pl.concat([rows_of_day(listed, day_start(day), now) for day in days.days()])
        with warehouse.database.system() as connection:
            written = coverage.load(connection, TABLE, keys=keys)
        existing = _existing(reader, region, days) if written else fresh.head(0)
        rows = merge(existing, fresh, KEY)
        warehouse.publish([PartitionWrite(TABLE, {"day": days.days(), "region": region}, rows)], run_id)
        counts = dict(rows.group_by(pl.col("ts").dt.date()).len().iter_rows())
        with warehouse.database.system() as connection:
            coverage.save(
                connection,
                [
                    coverage.Coverage(
                        TABLE,
                        price_key(day, region),
                        region,
                        day_start(day),
                        min(day_start(day) + DAY, max(now, day_start(day))),
                        expected=listed.height,
                        present=counts.get(day, 0),
                        run_id=run_id,
                    )
                    for day in days.days()
                ],
            )
    return rows.height


def _existing(reader: LakeReader, region: str, days: DayRange) -> pl.DataFrame:
    return reader.pin().frame(
        "SELECT * EXCLUDE (day) FROM on_demand_prices WHERE region = $region AND day BETWEEN $first AND $last",
        {"region": region, "first": days.first, "last": days.last},
    )


def _update_current(warehouse: Warehouse, region: str, listed: pl.DataFrame) -> None:
    if listed.is_empty():
        return
    columns: dict[str, Any] = {
        name: listed[name].to_list()
        for name in ("instance_type", "product", "vcpus", "memory_gib", "effective_at", "fetched_at")
    }
    with warehouse.database.system() as connection:
        connection.execute(
            _UPSERT_CURRENT,
            {
                "region": region,
                "price": listed["price_usd_per_hour"].to_list(),
                "source": ["observed"] * listed.height,
                **columns,
            },
        )
