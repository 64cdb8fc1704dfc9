"""Spot prices: from AWS's price history to the lake and to the table of current prices."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from typing import Any

import dagster as dg
import polars as pl
import pyarrow as pa
from sqlalchemy import text

from cloudoptim_pipelines import coverage, refusals, stale
from cloudoptim_pipelines.defs.gaps import ledger
from cloudoptim_pipelines.defs.spot_prices import shape
from cloudoptim_pipelines.merging import merge
from cloudoptim_pipelines.partitions import DayRange, by_day_and_region, dagster_key, price_key, ranges_by_region
from cloudoptim_pipelines.policies import DENIALS, OWNERS, RETRY, SINGLE_RUN
from cloudoptim_pipelines.resources import Warehouse
from control.gateways.spot_prices import SCHEMA, FetchReport, SpotPriceError, fetch_spot_prices
from warehouse.lake.query import LakeReader
from warehouse.lake.store import PartitionWrite

TABLE = "spot_prices"
# A month of the largest region is 400,000 rows, 150 MB while it is shaped: memory does not grow with the backfill.
CHUNK_DAYS = 31
# Each run asks from a little before its first day: records published late are seen, and AWS adds by itself the last
# change before the window, so the price at midnight is known.
OVERLAP = timedelta(hours=1)

_POOL = ["zone_id", "instance_type", "product"]

_UPSERT_CURRENT = text(
    """
    INSERT INTO spot_price_current
        (region, zone_id, instance_type, product, availability_zone, price_usd_per_hour, effective_at, fetched_at,
         source)
    SELECT :region, * FROM unnest(
        CAST(:zone_id AS text[]), CAST(:instance_type AS text[]), CAST(:product AS text[]),
        CAST(:availability_zone AS text[]), CAST(:price AS numeric(18, 8)[]), CAST(:ts AS timestamptz[]),
        CAST(:fetched_at AS timestamptz[]), CAST(:source AS text[])
    )
    ON CONFLICT (region, zone_id, instance_type, product) DO UPDATE SET
        availability_zone = excluded.availability_zone, price_usd_per_hour = excluded.price_usd_per_hour,
        effective_at = excluded.effective_at, fetched_at = excluded.fetched_at, source = excluded.source
    WHERE excluded.effective_at >= spot_price_current.effective_at
    """
)


@dg.asset(
    partitions_def=by_day_and_region,
    backfill_policy=SINGLE_RUN,
    retry_policy=RETRY,
    pool="aws_spot_prices",
    group_name="prices",
    owners=OWNERS,
    kinds={"aws", "polars", "deltalake"},
    tags={"domain": "prices"},
)
def spot_prices(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """Every change of every Spot price of a region and day, as AWS's price history tells it, USD per instance hour."""
    reader = warehouse.reader
    total = _Outcome()
    refused: dict[str, SpotPriceError] = {}
    asked = ranges_by_region(context.partition_keys)
    for region, ranges in asked.items():
        try:
            for part in (chunk for days in ranges for chunk in days.chunks(CHUNK_DAYS)):
                outcome = _ingest(warehouse, reader, region, part, context.run.run_id)
                total.add(outcome)
                context.log.info(f"{region} {part.first}..{part.last}: {outcome.totals['rows']} rows")
        except SpotPriceError as error:
            refused[region] = error
            context.log.error(f"{region}: {error}")
        _remember(warehouse, region, refused.get(region), ranges)
    with warehouse.database.system() as connection:
        gaps = ledger.sync(connection, TABLE, now=warehouse.now())
        ledger.record(
            connection,
            context.run.tags,
            records=total.totals["added"],
            sources=sorted(total.sources),
            now=warehouse.now(),
        )
    if refused:
        # The other regions' partitions were written, and Dagster is to know it.
        for fact in total.facts:
            context.log_event(dg.AssetMaterialization(TABLE, partition=dagster_key(fact.key)))
        raise dg.Failure(
            "; ".join(f"{region}: {error}" for region, error in sorted(refused.items())),
            allow_retries=not all(_denied(error) for error in refused.values()),
        )
    return dg.MaterializeResult(metadata={**_metadata(total), "open_gaps": sum(gap.fillable for gap in gaps)})


def _denied(error: SpotPriceError) -> bool:
    return error.code in DENIALS


def _remember(warehouse: Warehouse, region: str, error: SpotPriceError | None, ranges: Sequence[DayRange]) -> None:
    """Whether the region answers: why its prices are missing, for the gaps."""
    with warehouse.database.system() as connection:
        if error is None:
            refusals.answered(connection, TABLE, region)
        else:
            since = min(days.start for days in ranges)
            denied = _denied(error)
            refusals.failed(connection, TABLE, region, error, denied=denied, since=since, now=warehouse.now())


@dataclass(slots=True)
class _Outcome:
    """What happened to one chunk, or to all of them added up."""

    totals: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    facts: list[shape.DayFacts] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)

    def add(self, other: "_Outcome") -> None:
        self.totals += other.totals
        self.rejected += other.rejected
        self.examples = other.examples | self.examples
        self.facts += other.facts
        self.sources |= other.sources


def _ingest(warehouse: Warehouse, reader: LakeReader, region: str, days: DayRange, run_id: str) -> _Outcome:
    """Fetch, check and replace the partitions of one region; what the lake knew already and AWS forgot stays."""
    now = warehouse.now()
    asked_until = min(days.end, now)
    keys = [price_key(day, region) for day in days.days()]
    with coverage.partition_locks(warehouse.database, TABLE, keys):
        report = FetchReport()
        fetched = _fetch(warehouse, region, days.start - OVERLAP, asked_until, report)
        cleaned = shape.clean(fetched, fetched_at=now, list_prices=list_prices(warehouse, region))
        fresh = shape.inside(cleaned.rows, days)
        existing = _existing(reader, region, days.days())
        rows = merge(existing, fresh, shape.KEY)
        warehouse.publish([PartitionWrite(TABLE, {"day": days.days(), "region": region}, rows)], run_id)
        in_force = _keep_prices_in_force(warehouse, reader, region, shape.before(cleaned.rows, days), run_id)
        _mark_stale(warehouse, reader, region, pl.concat([in_force, _new(existing, rows)]), days)
        priced_before = bool((cleaned.rows["ts"] <= days.start).any())
        facts = shape.day_facts(rows, region, days, asked_until=asked_until, priced_before=priced_before)
        with warehouse.database.system() as connection:
            known = {row.partition_key: row for row in coverage.load(connection, TABLE, keys=keys)}
            facts = [_still_covered(fact, known.get(fact.key)) for fact in facts]
            coverage.save(connection, [_coverage(fact, region, run_id) for fact in facts])
            _update_current(connection, region, shape.newest(cleaned.rows))
    totals = Counter(
        rows=rows.height,
        fetched=report.rows,
        pages=report.pages,
        retries=sum(report.retries.values()),
        partitions=len(keys),
        added=max(0, rows.height - existing.height),
    )
    sources = set(fresh["source"].unique())
    return _Outcome(totals, cleaned.rejected + report.rejected, report.examples | cleaned.examples, facts, sources)


def _fetch(warehouse: Warehouse, region: str, start: datetime, end: datetime, report: FetchReport) -> pl.DataFrame:
    batches = fetch_spot_prices(region, start, end, endpoint_url=warehouse.aws_endpoint, report=report)
    return pl.DataFrame(pl.from_arrow(pa.Table.from_batches(list(batches), SCHEMA)))


def list_prices(warehouse: Warehouse, region: str) -> pl.DataFrame:
    """The region's on-demand prices known now: instance_type, list_price."""
    with warehouse.database.system() as connection:
        rows = connection.execute(
            text(
                "SELECT instance_type, max(price_usd_per_hour)::float8 FROM on_demand_price "
                "WHERE region = :r GROUP BY 1"
            ),
            {"r": region},
        ).all()
    return pl.DataFrame(
        [tuple(row) for row in rows], schema={"instance_type": pl.String, "list_price": pl.Float64}, orient="row"
    )


def _keep_prices_in_force(
    warehouse: Warehouse, reader: LakeReader, region: str, rows: pl.DataFrame, run_id: str
) -> pl.DataFrame:
    """Write the prices in force when the days began into the days they are from, where nobody has read that moment.

    Without them a pool whose price did not change since would have no price, or an older one. Such days stay as covered
    as they were: what was not read of them is a gap. Returns the rows that were not known.
    """
    keys = {price_key(day, region): day for day in rows["ts"].dt.date().unique()}
    with warehouse.database.system() as connection:
        read = coverage.load(connection, TABLE, keys=list(keys))
    known = pl.any_horizontal(
        pl.lit(False), *(pl.col("ts").is_between(row.start, row.end, closed="left") for row in read if row.present)
    )
    rows = rows.filter(~known)
    days = sorted(rows["ts"].dt.date().unique())
    if not days:
        return rows.select(*_POOL, "ts")
    with coverage.partition_locks(warehouse.database, TABLE, [price_key(day, region) for day in days]):
        existing = _existing(reader, region, days)
        merged = merge(existing, rows, shape.KEY)
        new = _new(existing, merged)
        if not new.is_empty():
            warehouse.publish([PartitionWrite(TABLE, {"day": days, "region": region}, merged)], run_id)
    return new


def _new(existing: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Prices among ``rows`` that ``existing`` did not hold, as their pools and times."""
    price = pl.col("price_usd_per_hour").cast(pl.Float64).round(8)
    columns = [*shape.KEY, "price"]
    new = rows.with_columns(price=price)
    if not existing.is_empty():
        new = new.join(existing.with_columns(price=price).select(columns), on=columns, how="anti")
    return new.select(*_POOL, "ts")


_NEXT_CHANGES = """
    SELECT zone_id, instance_type, product, min(ts) AS until FROM spot_prices
    WHERE region = $region AND day > $last AND instance_type IN (SELECT unnest($types))
    GROUP BY zone_id, instance_type, product
"""


def _mark_stale(warehouse: Warehouse, reader: LakeReader, region: str, new: pl.DataFrame, days: DayRange) -> None:
    """Have the days computed again whose costs the new prices change: until each pool's next change.

    Only types that a node of the region has are anybody's cost.
    """
    with warehouse.database.system() as connection:
        types = list(connection.execute(_TYPES_IN_USE, {"region": region}).scalars())
    new = new.filter(pl.col("instance_type").is_in(types))
    if new.is_empty():
        return
    since = new.group_by(_POOL).agg(pl.col("ts").min())
    now = warehouse.now()
    if days.end <= now:
        changes = reader.pin().frame(
            _NEXT_CHANGES, {"region": region, "last": days.last, "types": since["instance_type"].unique().to_list()}
        )
        since = since.join(changes, on=_POOL, how="left")
    else:
        since = since.with_columns(until=pl.lit(None, pl.Datetime("us", "UTC")))
    stale_days = {
        day
        for ts, until in since.select("ts", pl.col("until").fill_null(now)).iter_rows()
        for day in DayRange(ts.date(), max(ts, until - timedelta.resolution).date()).days()
    }
    with warehouse.database.system() as connection:
        stale.mark(connection, stale.COSTS, stale_days, reason="prices came late")


_TYPES_IN_USE = text(
    """
    SELECT DISTINCT n.instance_type FROM nodes n
    JOIN clusters c ON c.customer_id = n.customer_id AND c.id = n.cluster_id WHERE c.region = :region
    """
)


def _existing(reader: LakeReader, region: str, days: Sequence[date]) -> pl.DataFrame:
    return reader.pin().frame(
        "SELECT * EXCLUDE (day) FROM spot_prices WHERE region = $region AND day IN (SELECT unnest($days))",
        {"region": region, "days": list(days)},
    )


def _still_covered(fact: shape.DayFacts, known: coverage.Coverage | None) -> shape.DayFacts:
    """What was covered stays covered: the rows that AWS has forgotten since are still in the lake."""
    if known is None or not known.present or known.end < fact.start or known.start > fact.end:
        return fact
    return replace(fact, start=min(fact.start, known.start), end=max(fact.end, known.end))


def _coverage(fact: shape.DayFacts, region: str, run_id: str) -> coverage.Coverage:
    return coverage.Coverage(
        TABLE,
        fact.key,
        region,
        fact.start,
        fact.end,
        expected=24 * 60,
        present=int((fact.end - fact.start).total_seconds() // 60) if fact.rows else 0,
        detail={
            "rows": fact.rows,
            "pools": fact.pools,
            "snapshots": [moment.isoformat() for moment in fact.snapshots],
        },
        run_id=run_id,
    )


def _update_current(connection: Any, region: str, rows: pl.DataFrame) -> None:
    if rows.is_empty():
        return
    connection.execute(
        _UPSERT_CURRENT,
        {
            "region": region,
            "price": rows["price_usd_per_hour"].to_list(),
            **{
                name: rows[name].to_list()
                for name in ("zone_id", "instance_type", "product", "availability_zone", "ts", "fetched_at", "source")
            },
        },
    )


def _metadata(total: _Outcome) -> dict[str, Any]:
    totals, rejected, examples, facts = total.totals, total.rejected, total.examples, total.facts
    minutes = sum((fact.end - fact.start).total_seconds() / 60 for fact in facts if fact.rows)
    metadata: dict[str, Any] = {
        "dagster/partition_row_count": totals["rows"],
        "rows_fetched": totals["fetched"],
        "pages": totals["pages"],
        "retries": totals["retries"],
        "rows_rejected": sum(rejected.values()),
        "partitions": totals["partitions"],
        "coverage_ratio": round(minutes / (24 * 60 * len(facts)), 4) if facts else 0.0,
        "pools": max((fact.pools for fact in facts), default=0),
    }
    if rejected:
        metadata["rejected"] = dg.TableMetadataValue(
            records=[
                dg.TableRecord({"reason": reason, "rows": count, "example": examples.get(reason, "")})
                for reason, count in sorted(rejected.items())
            ],
            schema=dg.TableSchema(
                columns=[
                    dg.TableColumn("reason", "string"),
                    dg.TableColumn("rows", "int"),
                    dg.TableColumn("example", "string"),
                ]
            ),
        )
    return metadata
