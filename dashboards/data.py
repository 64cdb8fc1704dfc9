"""All queries of the pages: live rows from Postgres in the tenant's scope, history from one pinned lake release.

Nothing here takes a tenant from a page or a URL: every function gets the customer id of the signed session. Sums are
made in SQL and answers are at most a few thousand rows, kept per customer and lake release, so that a page another
person of the same customer has just opened costs no query.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from math import exp
from typing import Any, TypeVar
from uuid import UUID

import psycopg
import pyarrow as pa
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from dashboards.config import DashboardSettings
from warehouse.lake.errors import LakeError, LakeReleaseError
from warehouse.lake.query import LakeReader, Limits, Snapshot
from warehouse.postgres.session import SyncDatabase

LIVE_SECONDS = 4.0
CACHE_ENTRIES = 400
STATEMENT_TIMEOUT = "5s"
PRODUCT = "Linux/UNIX"
HOURS_PER_MONTH = 730
# Points one chart gets at most: more cannot be told apart on a screen and cost time on the way.
MAX_POINTS = 3000

# A page must never take the machine from the control service.
LIMITS = Limits(memory="256MB", threads=2, spill="2GB", statement_seconds=20.0)

T = TypeVar("T")


class DataError(Exception):
    """Data cannot be read; ``what``, ``why`` and ``next_step`` are fit for a person."""

    def __init__(self, what: str, why: str, next_step: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what, self.why, self.next_step = what, why, next_step


class Cache:
    """Answers kept by key, the oldest given up first. ``seconds`` None keeps an answer until it is pushed out."""

    def __init__(self, entries: int = CACHE_ENTRIES) -> None:
        self._entries = entries
        self._kept: OrderedDict[tuple[Any, ...], tuple[float, Any]] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: tuple[Any, ...], seconds: float | None, make: Callable[[], T]) -> T:
        """The kept answer, else a new one. Two threads may make the same answer; both are right."""
        now = time.monotonic()
        with self._guard:
            kept = self._kept.get(key)
            if kept is not None and (seconds is None or now - kept[0] < seconds):
                self._kept.move_to_end(key)
                return kept[1]
        answer = make()
        with self._guard:
            self._kept[key] = (now, answer)
            self._kept.move_to_end(key)
            while len(self._kept) > self._entries:
                self._kept.popitem(last=False)
        return answer


@dataclass(frozen=True, slots=True)
class Customer:
    """A customer a platform admin may choose."""

    id: UUID
    name: str


@dataclass(frozen=True, slots=True)
class Freshness:
    """The lake release pages read, and the newest complete hour of this customer in it."""

    release_id: int | None
    released_at: datetime | None
    complete_until: datetime | None


@dataclass(frozen=True, slots=True)
class LiveGroup:
    """Nodes running now with one cluster, purchase option and type; money in USD per hour, None when no price is
    known for any of them."""

    cluster_id: UUID
    cluster_name: str
    node_type: str
    instance_type: str
    nodes: int
    priced: int
    actual: Decimal | None
    b1: Decimal | None


@dataclass(frozen=True, slots=True)
class LiveCost:
    """What runs now and what it costs, beside the same machines on demand (B1 list). Nodes without a known price are
    left out of both sums and lower the coverage."""

    at: datetime
    groups: tuple[LiveGroup, ...]

    @property
    def nodes(self) -> int:
        """Nodes running now."""
        return sum(group.nodes for group in self.groups)

    @property
    def spot_nodes(self) -> int:
        """Spot nodes running now."""
        return sum(group.nodes for group in self.groups if group.node_type == "spot")

    @property
    def priced(self) -> int:
        """Nodes with a known price and list price."""
        return sum(group.priced for group in self.groups)

    @property
    def actual(self) -> Decimal | None:
        """USD per hour; None when nothing is priced."""
        return sum((group.actual or Decimal() for group in self.groups), Decimal()) if self.priced else None

    @property
    def b1(self) -> Decimal | None:
        """The same nodes on demand, USD per hour; None when nothing is priced."""
        return sum((group.b1 or Decimal() for group in self.groups), Decimal()) if self.priced else None

    @property
    def coverage(self) -> float | None:
        """Priced share of the nodes; None without nodes."""
        return self.priced / self.nodes if self.nodes else None

    @property
    def savings(self) -> Decimal | None:
        """Share of B1 saved, negative when Spot costs more; None when B1 is not known or zero."""
        return saved_share(self.b1, self.actual)

    def of(self, cluster_id: UUID | None) -> LiveCost:
        """The same for one cluster; None keeps all."""
        if cluster_id is None:
            return self
        return LiveCost(self.at, tuple(group for group in self.groups if group.cluster_id == cluster_id))


def saved_share(baseline: Decimal | None, actual: Decimal | None) -> Decimal | None:
    """(baseline - actual) / baseline, or None when the baseline is unknown or zero (FIELD.md §5.2)."""
    if not baseline or actual is None:
        return None
    return (baseline - actual) / baseline


@dataclass(frozen=True, slots=True)
class Projection:
    """Cost of a month of 730 hours, from complete hours only: mean, and the range 10 to 90 % of the hours lie in."""

    hours: int
    actual: Decimal
    low: Decimal
    high: Decimal
    b1: Decimal | None


@dataclass(frozen=True, slots=True)
class CostHour:
    """One hour of all chosen clusters, USD."""

    ts: datetime
    actual: Decimal | None
    spot: Decimal | None
    on_demand: Decimal | None
    b1: Decimal | None
    coverage: float | None
    nodes: int
    complete: bool


def project(hours: list[CostHour]) -> Projection | None:
    """The month these hours point to; None without a complete hour."""
    complete = [hour for hour in hours if hour.complete and hour.actual is not None]
    if not complete:
        return None
    costs = sorted(hour.actual for hour in complete if hour.actual is not None)
    mean = sum(costs, Decimal()) / len(costs)
    with_b1 = [hour.b1 for hour in complete if hour.b1 is not None]
    b1 = sum(with_b1, Decimal()) / len(with_b1) * HOURS_PER_MONTH if len(with_b1) == len(complete) else None
    low, high = costs[int(0.1 * (len(costs) - 1))], costs[-(-9 * (len(costs) - 1) // 10)]
    return Projection(len(costs), mean * HOURS_PER_MONTH, low * HOURS_PER_MONTH, high * HOURS_PER_MONTH, b1)


class Data:
    """Reads for all pages; safe to use from several threads."""

    def __init__(self, settings: DashboardSettings) -> None:
        self._settings = settings
        self._db = SyncDatabase(settings.database_url, pool_size=2, max_overflow=4)
        self._cache = Cache()
        self._lake: LakeReader | None = None
        self._lake_guard = threading.Lock()

    def close(self) -> None:
        """Close connections."""
        self._db.close()
        if self._lake is not None:
            self._lake.close()
            self._lake.lake.close()

    def forget(self) -> None:
        """Drop every kept answer, so that the next read sees what is there now."""
        self._cache = Cache()

    # Plumbing

    def _rows(self, scope_id: UUID | None, sql: str, /, **params: Any) -> list[Mapping[str, Any]]:
        """Rows of one statement in the scope of one customer, or of the platform when that is None."""
        scope = self._db.system() if scope_id is None else self._db.tenant(scope_id)
        with _database_errors(), scope as conn:
            conn.exec_driver_sql(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT}'")
            return [dict(row) for row in conn.execute(text(sql), params).mappings()]

    def _reader(self) -> LakeReader:
        with self._lake_guard:
            if self._lake is None:
                with _lake_errors():
                    self._lake = LakeReader((self._settings.lake_root, self._settings.database_url), LIMITS)
            return self._lake

    def _release(self) -> Snapshot:
        """The newest release, asked for at most every few seconds."""

        def pin() -> Snapshot:
            with _lake_errors(), _database_errors():
                return self._reader().pin()

        return self._cache.get(("release",), LIVE_SECONDS, pin)

    def _lake_table(self, customer_id: UUID, sql: str, **params: Any) -> pa.Table:
        """Rows of one lake query on the pinned release, limited to one customer; kept for that release."""
        snapshot = self._release()

        def read() -> pa.Table:
            with _lake_errors():
                return snapshot.query(sql, {**params, "customer_id": customer_id})

        key = (str(customer_id), snapshot.release.id, sql, tuple(sorted(params.items())))
        return self._cache.get(key, None, read)

    # The platform

    def customers(self) -> list[Customer]:
        """All customers, for a platform admin's choice."""

        def read() -> list[Customer]:
            rows = self._rows(
                None, "SELECT id, company_name FROM customers WHERE status <> 'offboarded' ORDER BY company_name, id"
            )
            return [Customer(row["id"], row["company_name"]) for row in rows]

        return self._cache.get(("customers",), LIVE_SECONDS, read)

    def freshness(self, customer_id: UUID) -> Freshness:
        """What the pages read now; a lake without a release is an empty one, not an error."""
        try:
            release = self._release().release
        except LakeMissing:
            return Freshness(None, None, None)
        rows = self._lake_table(
            customer_id,
            "SELECT max(ts) + INTERVAL 1 HOUR AS until FROM cluster_cost_hourly WHERE complete AND day >= $since",
            since=datetime.now(UTC).date() - timedelta(days=60),
        ).to_pylist()
        return Freshness(release.id, release.released_at, rows[0]["until"])

    # Cost

    def clusters(self, customer_id: UUID) -> dict[str, UUID]:
        """Names and ids of the customer's clusters."""

        def read() -> dict[str, UUID]:
            rows = self._rows(
                customer_id,
                "SELECT id, cluster_name FROM clusters "
                "WHERE customer_id = :customer_id AND status <> 'deleted' ORDER BY cluster_name",
                customer_id=customer_id,
            )
            return {row["cluster_name"]: row["id"] for row in rows}

        return self._cache.get((str(customer_id), "clusters"), LIVE_SECONDS, read)

    def live_cost(self, customer_id: UUID) -> LiveCost:
        """What runs now at the newest known prices; Spot nodes at their own pool's price."""

        def read() -> LiveCost:
            rows = self._rows(customer_id, LIVE_COST_SQL, customer_id=customer_id, product=PRODUCT)
            return LiveCost(datetime.now(UTC), tuple(LiveGroup(**row) for row in rows))

        return self._cache.get((str(customer_id), "live cost"), LIVE_SECONDS, read)

    def cost_hours(self, customer_id: UUID, hours: int, cluster_id: UUID | None = None) -> list[CostHour]:
        """The last ``hours`` hours of all clusters or one, oldest first; hours without a row are absent."""
        until = _hour(datetime.now(UTC))
        since = until - timedelta(hours=hours)
        rows = self._lake_table(
            customer_id,
            f"""
            SELECT ts, sum(actual_usd) AS actual, sum(spot_usd) AS spot, sum(on_demand_usd) AS on_demand,
                   sum(b1_list_usd) AS b1,
                   sum(coverage_ratio * node_minutes) / nullif(sum(node_minutes), 0) AS coverage,
                   sum(node_count)::BIGINT AS nodes, bool_and(complete) AS complete
            FROM cluster_cost_hourly
            WHERE day >= $day AND ts >= $since AND ts <= $until {"AND cluster_id = $cluster" if cluster_id else ""}
            GROUP BY ts ORDER BY ts
            """,
            day=since.date(),
            since=since,
            until=until,
            **({"cluster": str(cluster_id)} if cluster_id else {}),
        )
        return [CostHour(**row) for row in rows.to_pylist()]

    def cost_by_cluster(self, customer_id: UUID, hours: int) -> dict[str, dict[str, Any]]:
        """Cost and baseline of complete hours by cluster id: ``actual``, ``b1``, ``hours``, ``expected``."""
        until = _hour(datetime.now(UTC))
        since = until - timedelta(hours=hours)
        rows = self._lake_table(
            customer_id,
            """
            SELECT cluster_id, sum(actual_usd) FILTER (complete) AS actual, sum(b1_list_usd) FILTER (complete) AS b1,
                   count(*) FILTER (complete) AS hours, $hours AS expected
            FROM cluster_cost_hourly WHERE day >= $day AND ts >= $since AND ts < $until GROUP BY cluster_id
            """,
            day=since.date(),
            since=since,
            until=until,
            hours=hours,
        )
        return {row["cluster_id"]: row for row in rows.to_pylist()}

    def cost_export(self, customer_id: UUID, hours: int, cluster_id: UUID | None = None) -> pa.Table:
        """The hourly rows by cluster behind the cost page."""
        until = _hour(datetime.now(UTC))
        since = until - timedelta(hours=hours)
        return self._lake_table(
            customer_id,
            f"""
            SELECT ts AS hour_utc, cluster_id, region, actual_usd, spot_usd, on_demand_usd, b1_list_usd,
                   b1_list_usd - actual_usd AS saved_usd, node_count, node_minutes, spot_minutes, coverage_ratio,
                   complete, source
            FROM cluster_cost_hourly
            WHERE day >= $day AND ts >= $since AND ts <= $until {"AND cluster_id = $cluster" if cluster_id else ""}
            ORDER BY ts, cluster_id
            """,
            day=since.date(),
            since=since,
            until=until,
            **({"cluster": str(cluster_id)} if cluster_id else {}),
        )

    # Interruptions

    def interruptions(
        self, customer_id: UUID, since: datetime, cluster_id: UUID | None = None, limit: int = 300
    ) -> list[InterruptionRow]:
        """Interruptions received since then with the moments of each, newest first."""

        def read() -> list[InterruptionRow]:
            rows = self._rows(
                customer_id,
                INTERRUPTIONS_SQL,
                customer_id=customer_id,
                since=since,
                cluster_id=cluster_id,
                interruption_id=None,
                limit=limit,
            )
            return [InterruptionRow(**row) for row in rows]

        key = (str(customer_id), "interruptions", since.replace(second=0, microsecond=0), cluster_id, limit)
        return self._cache.get(key, LIVE_SECONDS, read)

    def interruption(self, customer_id: UUID, interruption_id: UUID) -> InterruptionRow | None:
        """One interruption; None when this customer has none of that id."""
        rows = self._rows(
            customer_id,
            INTERRUPTIONS_SQL,
            customer_id=customer_id,
            since=datetime(2000, 1, 1, tzinfo=UTC),
            cluster_id=None,
            interruption_id=interruption_id,
            limit=1,
        )
        return InterruptionRow(**rows[0]) if rows else None

    def interruption_history(self, customer_id: UUID, interruption_id: UUID) -> list[Mapping[str, Any]]:
        """Every recorded change of one interruption: ``version``, ``at``, ``event``, ``state``."""
        return self._rows(
            customer_id,
            "SELECT version, at, event, state FROM interruption_history "
            "WHERE customer_id = :customer_id AND interruption_id = :id ORDER BY version LIMIT 200",
            customer_id=customer_id,
            id=interruption_id,
        )

    def interruption_rates(self, customer_id: UUID, since: datetime, cluster_id: UUID | None = None) -> list[PoolRate]:
        """Spot interruptions and the instance hours they happened in, by pool, most exposed first.

        Hours come from the lake, so only interruptions before the newest hour there are counted.
        """
        hours = self._lake_table(
            customer_id,
            f"""
            SELECT region, availability_zone, instance_type, sum(minutes) / 60.0 AS hours,
                   max(ts) + INTERVAL 1 HOUR AS until
            FROM node_cost_hourly
            WHERE day >= $day AND ts >= $since AND lifecycle = 'spot'
                  {"AND cluster_id = $cluster" if cluster_id else ""}
            GROUP BY ALL
            """,
            day=since.date(),
            since=_hour(since),
            **({"cluster": str(cluster_id)} if cluster_id else {}),
        ).to_pylist()
        if not hours:
            return []
        taken = self._rows(
            customer_id,
            """
            SELECT region, availability_zone, instance_type, count(*) AS taken FROM interruptions
            WHERE customer_id = :customer_id AND kind = 'spot_interruption' AND notice_at >= :since
              AND notice_at < :until AND (CAST(:cluster_id AS uuid) IS NULL OR cluster_id = :cluster_id)
            GROUP BY region, availability_zone, instance_type
            """,
            customer_id=customer_id,
            since=_hour(since),
            until=max(row["until"] for row in hours),
            cluster_id=cluster_id,
        )
        counts = {(row["region"], row["availability_zone"], row["instance_type"]): row["taken"] for row in taken}
        rates = []
        for row in hours:
            pool = (row["region"], row["availability_zone"], row["instance_type"])
            rates.append(PoolRate(*pool, float(row["hours"]), counts.pop(pool, 0)))
        # Interrupted in a pool without a recorded hour: counted, so that the total is not too small.
        rates += [PoolRate(*pool, 0.0, taken) for pool, taken in counts.items()]
        return sorted(rates, key=lambda rate: (-rate.hours, rate.instance_type or ""))

    def interruptions_export(self, customer_id: UUID, since: datetime, cluster_id: UUID | None = None) -> pa.Table:
        """The interruptions with every moment of their timeline."""
        rows = self.interruptions(customer_id, since, cluster_id, limit=50_000)
        return table_of(rows, INTERRUPTION_SCHEMA)

    # Clusters and nodes

    def cluster_states(self, customer_id: UUID) -> list[Mapping[str, Any]]:
        """Clusters with what their agents last said."""

        def read() -> list[Mapping[str, Any]]:
            return self._rows(customer_id, CLUSTERS_SQL, customer_id=customer_id)

        return self._cache.get((str(customer_id), "cluster states"), LIVE_SECONDS, read)

    def nodes(
        self, customer_id: UUID, cluster_id: UUID | None = None, node_type: str | None = None
    ) -> list[Mapping[str, Any]]:
        """Nodes running now with the price of each, most expensive first."""

        def read() -> list[Mapping[str, Any]]:
            return self._rows(
                customer_id,
                NODES_SQL,
                customer_id=customer_id,
                product=PRODUCT,
                cluster_id=cluster_id,
                node_type=node_type,
            )

        return self._cache.get((str(customer_id), "nodes", cluster_id, node_type), LIVE_SECONDS, read)

    def node_counts(self, customer_id: UUID, hours: int, cluster_id: UUID | None = None) -> pa.Table:
        """Nodes in each hour, Spot and on demand: ``ts``, ``spot``, ``on_demand`` (mean number in the hour).

        The running hour is the last one: its mean is over the minutes that were computed of it.
        """
        running = _hour(datetime.now(UTC))
        since = running - timedelta(hours=hours)
        of_cluster = "AND cluster_id = $cluster" if cluster_id else ""
        return self._lake_table(
            customer_id,
            f"""
            WITH computed AS (
                SELECT greatest(max(minutes), 1) AS minutes FROM node_cost_hourly
                WHERE day = $today AND ts = $running {of_cluster}
            ),
            hours AS (
                SELECT ts, sum(spot_minutes) AS spot, sum(node_minutes - spot_minutes) AS on_demand,
                       CASE WHEN ts = $running THEN (SELECT minutes FROM computed) ELSE 60.0 END AS minutes
                FROM cluster_cost_hourly
                WHERE day >= $day AND ts >= $since AND ts <= $running {of_cluster}
                GROUP BY ts
            )
            SELECT ts, spot / minutes AS spot, on_demand / minutes AS on_demand FROM hours ORDER BY ts
            """,
            day=since.date(),
            today=running.date(),
            since=since,
            running=running,
            **({"cluster": str(cluster_id)} if cluster_id else {}),
        )

    def nodes_export(self, customer_id: UUID, cluster_id: UUID | None, node_type: str | None) -> pa.Table:
        """The nodes running now."""
        return pa.Table.from_pylist(
            [dict(row) for row in self.nodes(customer_id, cluster_id, node_type)], schema=NODE_SCHEMA
        )

    # Spot prices

    def price_regions(self, customer_id: UUID) -> list[PriceRegion]:
        """Regions with Spot prices in the lake, and the days they cover."""
        rows = self._lake_table(
            customer_id,
            "SELECT region, min(day) AS first, max(day) AS last FROM spot_prices GROUP BY region ORDER BY region",
        )
        return [PriceRegion(**row) for row in rows.to_pylist()]

    def price_types(self, customer_id: UUID, region: PriceRegion) -> list[str]:
        """Instance types with a price in the newest days of the region."""
        rows = self._lake_table(
            customer_id,
            "SELECT DISTINCT instance_type FROM spot_prices "
            "WHERE region = $region AND product = $product AND day >= $day ORDER BY instance_type",
            region=region.region,
            product=PRODUCT,
            day=region.last - timedelta(days=2),
        )
        return rows["instance_type"].to_pylist()

    def spot_prices(self, customer_id: UUID, region: PriceRegion, instance_type: str, days: int) -> pa.Table:
        """Prices of one type in each zone: ``zone_id``, ``ts``, ``price``, ``lowest``, ``highest``.

        At most MAX_POINTS rows: a bucket keeps its last price and its extremes, so that a shock is not averaged away.
        The price that held before the window is set at its start.
        """
        until = datetime.combine(region.last, datetime.max.time(), UTC)
        since = datetime.combine(region.last - timedelta(days=days - 1), datetime.min.time(), UTC)
        bucket = max(60.0, days * 86_400 / (MAX_POINTS / 8))
        return self._lake_table(
            customer_id,
            """
            SELECT zone_id, greatest(to_timestamp(floor(epoch(ts) / $bucket) * $bucket), $since) AS ts,
                   CAST(arg_max(price_usd_per_hour, ts) AS DOUBLE) AS price,
                   CAST(min(price_usd_per_hour) FILTER (ts >= $since) AS DOUBLE) AS lowest,
                   CAST(max(price_usd_per_hour) FILTER (ts >= $since) AS DOUBLE) AS highest
            FROM spot_prices
            WHERE region = $region AND instance_type = $type AND product = $product
              AND day BETWEEN $before AND $last AND ts <= $until
            GROUP BY 1, 2 ORDER BY 1, 2
            """,
            region=region.region,
            type=instance_type,
            product=PRODUCT,
            bucket=bucket,
            since=since,
            until=until,
            before=since.date() - timedelta(days=2),
            last=region.last,
        )

    def price_movers(self, customer_id: UUID, region: PriceRegion, days: int, limit: int = 12) -> list[dict[str, Any]]:
        """Pools whose price moved most in the window: highest over lowest."""
        return self._lake_table(
            customer_id,
            """
            SELECT instance_type, zone_id, CAST(min(price_usd_per_hour) AS DOUBLE) AS lowest,
                   CAST(max(price_usd_per_hour) AS DOUBLE) AS highest, arg_max(ts, price_usd_per_hour) AS highest_at,
                   CAST(arg_max(price_usd_per_hour, ts) AS DOUBLE) AS newest
            FROM spot_prices
            WHERE region = $region AND product = $product AND day BETWEEN $first AND $last AND price_usd_per_hour > 0
            GROUP BY instance_type, zone_id
            ORDER BY highest / lowest DESC, highest DESC, instance_type, zone_id LIMIT $limit
            """,
            region=region.region,
            product=PRODUCT,
            first=region.last - timedelta(days=days - 1),
            last=region.last,
            limit=limit,
        ).to_pylist()

    def list_price(self, customer_id: UUID, region: str, instance_type: str) -> Decimal | None:
        """On-demand price of the type now, USD per hour; None when it is not known."""
        rows = self._rows(
            customer_id,
            "SELECT price_usd_per_hour FROM on_demand_price "
            "WHERE region = :region AND instance_type = :instance_type AND product = :product",
            region=region,
            instance_type=instance_type,
            product=PRODUCT,
        )
        return rows[0]["price_usd_per_hour"] if rows else None

    def prices_export(self, customer_id: UUID, region: PriceRegion, instance_type: str, days: int) -> pa.Table:
        """Every price change of the type in the window."""
        return self._lake_table(
            customer_id,
            """
            SELECT ts AS effective_at_utc, region, zone_id, availability_zone, instance_type, product,
                   price_usd_per_hour, source, fetched_at
            FROM spot_prices
            WHERE region = $region AND instance_type = $type AND product = $product AND day BETWEEN $first AND $last
            ORDER BY zone_id, ts
            """,
            region=region.region,
            type=instance_type,
            product=PRODUCT,
            first=region.last - timedelta(days=days - 1),
            last=region.last,
        )

    # Gaps

    def coverage_by_day(self, customer_id: UUID, lookback_days: int) -> list[Mapping[str, Any]]:
        """Expected, present and missing points by table and day, with the number of gaps in each state.

        The customer's own series, and prices, which belong to nobody.
        """
        since = _midnight(datetime.now(UTC)) - timedelta(days=lookback_days)
        given = {"first": since.date().isoformat(), "since": since}
        own = self._rows(
            customer_id,
            COVERAGE_SQL.format(scope="customer_id = :customer_id"),
            customer_id=customer_id,
            **given,
        )
        return own + self._rows(None, COVERAGE_SQL.format(scope="customer_id IS NULL"), **given)

    def gaps(self, customer_id: UUID, lookback_days: int, limit: int = 20_000) -> list[Mapping[str, Any]]:
        """Gaps of the lookback, newest first."""
        return self._rows(
            customer_id,
            """
            SELECT table_name, series, partition_key, gap_start, gap_end, expected_points, missing_points, reason,
                   state, found_at, filled_at
            FROM data_gaps
            WHERE gap_start >= :since AND (customer_id = :customer_id OR customer_id IS NULL)
            ORDER BY gap_start DESC, table_name, series LIMIT :limit
            """,
            customer_id=customer_id,
            since=_midnight(datetime.now(UTC)) - timedelta(days=lookback_days),
            limit=limit,
        )

    def source_failures(self) -> dict[tuple[str, str], str]:
        """What sources said that refused when they were last asked, by table and series. The platform's alone: AWS
        names identities in it."""
        rows = self._rows(None, "SELECT table_name, series, message FROM source_failures")
        return {(row["table_name"], row["series"]): row["message"] for row in rows}

    def fills(self, customer_id: UUID, platform: bool, limit: int = 12) -> list[Mapping[str, Any]]:
        """Requests to fill gaps, newest first: the customer's own, or all for the platform."""
        return self._rows(
            None if platform else customer_id,
            """
            SELECT id, created_at, requested_by, table_name, jsonb_array_length(partitions) AS partitions, state,
                   records_filled, sources_used, error, finished_at
            FROM gap_fills WHERE :platform OR customer_id = :customer_id ORDER BY created_at DESC LIMIT :limit
            """,
            customer_id=customer_id,
            platform=platform,
            limit=limit,
        )

    # Savings

    def savings_days(self, customer_id: UUID, first: date, last: date) -> list[dict[str, Any]]:
        """Savings of all clusters against B1 list by day, USD."""
        return self._lake_table(
            customer_id,
            """
            SELECT day, sum(baseline_usd) AS baseline, sum(actual_usd) AS actual, sum(gross_usd) AS gross,
                   sum(overlap_usd) AS overlap, sum(fallback_premium_usd) AS fallback, sum(net_usd) AS net,
                   CAST(sum(hours_covered) AS BIGINT) AS hours, avg(coverage_ratio) AS coverage,
                   bool_and(stage = 'realised') AS realised
            FROM savings_daily
            WHERE day BETWEEN $first AND $last AND baseline = 'b1_list'
            GROUP BY day ORDER BY day
            """,
            first=first,
            last=last,
        ).to_pylist()

    def savings_months(self, customer_id: UUID) -> list[date]:
        """First days of the months with savings, newest first."""
        rows = self._lake_table(
            customer_id,
            "SELECT DISTINCT CAST(date_trunc('month', day) AS DATE) AS month FROM savings_daily ORDER BY month DESC",
        )
        return rows["month"].to_pylist()

    def savings_export(self, customer_id: UUID, first: date, last: date) -> pa.Table:
        """Savings by cluster, day and baseline."""
        return self._lake_table(
            customer_id,
            """
            SELECT day, cluster_id, baseline, stage, baseline_usd, actual_usd, gross_usd, overlap_usd,
                   fallback_premium_usd, displaced_commitment_usd, rework_usd, net_usd, hours_covered, coverage_ratio
            FROM savings_daily WHERE day BETWEEN $first AND $last ORDER BY day, cluster_id, baseline
            """,
            first=first,
            last=last,
        )

    def statements(self, customer_id: UUID, limit: int = 62) -> list[Mapping[str, Any]]:
        """Statements as they were written, newest period first, each with the lake release it read."""
        return self._rows(
            customer_id,
            """
            SELECT id, period, period_start, period_end, revision, baseline_name, baseline_usd, actual_usd,
                   net_savings_usd, fee_usd, coverage, lake_release_id, created_at, sent_at
            FROM savings_statements WHERE customer_id = :customer_id
            ORDER BY period_start DESC, period, revision DESC LIMIT :limit
            """,
            customer_id=customer_id,
            limit=limit,
        )


@dataclass(frozen=True, slots=True)
class InterruptionRow:
    """One interruption with its moments; those that have not come are None."""

    id: UUID
    cluster_id: UUID | None
    cluster_name: str | None
    node_name: str | None
    region: str
    instance_id: str
    instance_type: str | None
    availability_zone: str | None
    kind: str
    instance_action: str
    detected_by: list[str]
    state: str
    outcome: str | None
    reason: str | None
    first_notice_at: datetime | None
    notice_at: datetime
    received_at: datetime
    deadline_at: datetime
    task_created_at: datetime | None
    task_taken_at: datetime | None
    cordoned_at: datetime | None
    drained_at: datetime | None
    task_state: str | None
    launch_state: str | None
    launched_at: datetime | None
    ready_at: datetime | None
    replacement_instance_id: str | None
    replacement_type: str | None
    replacement_zone: str | None
    replacement_node_type: str | None
    attempts: int
    closed_at: datetime | None

    def after_notice(self, moment: datetime | None) -> float | None:
        """Seconds from the notice; None when the moment has not come, negative for what an earlier signal had begun."""
        return None if moment is None else (moment - self.notice_at).total_seconds()

    @property
    def margin(self) -> float | None:
        """Seconds between drained and the deadline; negative when late, None while it is not drained."""
        return None if self.drained_at is None else (self.deadline_at - self.drained_at).total_seconds()


@dataclass(frozen=True, slots=True)
class PoolRate:
    """Interruptions of a pool over the Spot instance hours in it."""

    region: str
    availability_zone: str | None
    instance_type: str | None
    hours: float
    taken: int


@dataclass(frozen=True, slots=True)
class PriceRegion:
    """A region with Spot prices, first and last day included."""

    region: str
    first: date
    last: date


@dataclass(frozen=True, slots=True)
class Rate:
    """Events per 1,000 instance hours with a 95% interval."""

    per_thousand: float
    low: float
    high: float


def rate(events: int, hours: float) -> Rate | None:
    """Poisson rate per 1,000 instance hours with its exact (Garwood) interval; None without hours.

    From 200 events on Byar's approximation, which is within 0.1% there.
    """
    if hours <= 0:
        return None
    if events < 200:
        low = _solve(lambda mean: 1 - _at_most(events - 1, mean), 0.025, events + 1.0) if events else 0.0
        high = _solve(lambda mean: -_at_most(events, mean), -0.025, 2 * events + 10.0)
    else:
        low = events * (1 - 1 / (9 * events) - 1.96 / (3 * events**0.5)) ** 3
        high = (events + 1) * (1 - 1 / (9 * (events + 1)) + 1.96 / (3 * (events + 1) ** 0.5)) ** 3
    scale = 1000 / hours
    return Rate(events * scale, low * scale, high * scale)


def _at_most(events: int, mean: float) -> float:
    """Probability of at most so many events when ``mean`` are expected."""
    term = total = exp(-mean)
    for number in range(1, events + 1):
        term *= mean / number
        total += term
    return total


def _solve(rising: Callable[[float], float], wanted: float, upper: float) -> float:
    """Where a rising function takes the wanted value between 0 and ``upper``."""
    lower = 0.0
    for _ in range(60):
        middle = (lower + upper) / 2
        if rising(middle) < wanted:
            lower = middle
        else:
            upper = middle
    return upper


_TIME = pa.timestamp("us", tz="UTC")
INTERRUPTION_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in (
            "id",
            "cluster_name",
            "node_name",
            "region",
            "availability_zone",
            "instance_type",
            "instance_id",
            "kind",
            "instance_action",
            "detected_by",
            "state",
            "outcome",
            "reason",
        )
    ]
    + [
        (name, _TIME)
        for name in (
            "first_notice_at",
            "notice_at",
            "received_at",
            "task_created_at",
            "task_taken_at",
            "cordoned_at",
            "launched_at",
            "ready_at",
            "drained_at",
            "deadline_at",
            "closed_at",
        )
    ]
    + [
        ("replacement_instance_id", pa.string()),
        ("replacement_type", pa.string()),
        ("replacement_zone", pa.string()),
        ("replacement_node_type", pa.string()),
        ("attempts", pa.int64()),
    ]
)
NODE_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in ("cluster_name", "node_name", "instance_id", "instance_type", "availability_zone", "zone_id")
    ]
    + [
        ("node_type", pa.string()),
        ("status", pa.string()),
        ("cpu_cores", pa.float64()),
        ("memory_bytes", pa.int64()),
        ("price_usd_per_hour", pa.decimal128(18, 8)),
        ("on_demand_usd_per_hour", pa.decimal128(18, 8)),
        ("created_at", _TIME),
        ("ready_at", _TIME),
        ("last_seen_at", _TIME),
    ]
)


def table_of(rows: list[Any], schema: pa.Schema) -> pa.Table:
    """Objects as an Arrow table; ids and lists as text."""
    columns = {}
    for column in schema:
        values = [getattr(row, column.name) for row in rows]
        if pa.types.is_string(column.type):
            values = [
                value if value is None else ",".join(value) if isinstance(value, list) else str(value)
                for value in values
            ]
        columns[column.name] = pa.array(values, column.type)
    return pa.table(columns, schema=schema)


INTERRUPTIONS_SQL = """
    SELECT i.id, i.cluster_id, c.cluster_name, n.node_name, i.region, i.instance_id, i.instance_type,
           i.availability_zone, i.kind, i.instance_action, i.detected_by, i.state, i.outcome, i.reason,
           i.first_notice_at, i.notice_at, i.received_at, i.deadline_at,
           t.created_at AS task_created_at, t.first_leased_at AS task_taken_at,
           t.cordoned_at, CASE WHEN t.state = 'done' THEN t.finished_at END AS drained_at, t.state AS task_state,
           l.state AS launch_state, a.launched_at, a.ready_at, a.instance_id AS replacement_instance_id,
           a.instance_type AS replacement_type, a.availability_zone AS replacement_zone,
           a.node_type AS replacement_node_type, coalesce(a.attempt_no, 0) AS attempts, i.closed_at
    FROM interruptions i
    LEFT JOIN clusters c ON c.customer_id = i.customer_id AND c.id = i.cluster_id
    LEFT JOIN nodes n ON n.customer_id = i.customer_id AND n.id = i.node_id
    LEFT JOIN agent_tasks t ON t.customer_id = i.customer_id AND t.dedupe_key = 'drain:' || i.id
    LEFT JOIN launch_intents l ON l.customer_id = i.customer_id AND l.interruption_id = i.id
    LEFT JOIN LATERAL (
        SELECT * FROM launch_attempts a
        WHERE a.customer_id = i.customer_id AND a.intent_id = l.id ORDER BY a.attempt_no DESC LIMIT 1
    ) a ON true
    WHERE i.customer_id = :customer_id AND i.received_at >= :since
      AND (CAST(:cluster_id AS uuid) IS NULL OR i.cluster_id = :cluster_id)
      AND (CAST(:interruption_id AS uuid) IS NULL OR i.id = :interruption_id)
    ORDER BY i.received_at DESC, i.id LIMIT :limit
"""

_PRICED_NODES = """
    FROM nodes n
    JOIN clusters c ON c.customer_id = n.customer_id AND c.id = n.cluster_id
    LEFT JOIN on_demand_price od
           ON od.region = c.region AND od.instance_type = n.instance_type AND od.product = :product
    LEFT JOIN LATERAL (
        SELECT s.price_usd_per_hour FROM spot_price_current s
        WHERE s.region = c.region AND s.instance_type = n.instance_type AND s.product = :product
          AND (s.zone_id = n.zone_id OR (n.zone_id IS NULL AND s.availability_zone = n.availability_zone))
        ORDER BY s.effective_at DESC LIMIT 1
    ) spot ON n.node_type = 'spot'
    CROSS JOIN LATERAL (
        SELECT CASE n.node_type WHEN 'spot' THEN spot.price_usd_per_hour ELSE od.price_usd_per_hour END AS paid
    ) p
    WHERE n.customer_id = :customer_id AND n.terminated_at IS NULL AND c.status <> 'deleted'
"""

LIVE_COST_SQL = f"""
    SELECT c.id AS cluster_id, c.cluster_name, n.node_type, n.instance_type, count(*) AS nodes,
           count(p.paid) FILTER (WHERE od.price_usd_per_hour IS NOT NULL) AS priced,
           sum(p.paid) FILTER (WHERE od.price_usd_per_hour IS NOT NULL) AS actual,
           sum(od.price_usd_per_hour) FILTER (WHERE p.paid IS NOT NULL) AS b1
    {_PRICED_NODES}
    GROUP BY c.id, c.cluster_name, n.node_type, n.instance_type
    ORDER BY actual DESC NULLS LAST, n.instance_type
"""

NODES_SQL = f"""
    SELECT c.cluster_name, n.node_name, n.instance_id, n.instance_type, n.availability_zone, n.zone_id, n.node_type,
           n.status, n.cpu_cores, n.memory_bytes, p.paid AS price_usd_per_hour,
           od.price_usd_per_hour AS on_demand_usd_per_hour, n.created_at, n.ready_at, n.last_seen_at
    {_PRICED_NODES}
      AND (CAST(:cluster_id AS uuid) IS NULL OR n.cluster_id = :cluster_id)
      AND (CAST(:node_type AS text) IS NULL OR n.node_type = :node_type)
    ORDER BY p.paid DESC NULLS LAST, n.node_name
"""

COVERAGE_SQL = """
    SELECT table_name, day, coalesce(c.expected, 0) + coalesce(g.never_written, 0) AS expected,
           coalesce(c.present, 0) AS present,
           coalesce(g.missing, 0) AS missing, coalesce(g.open, 0) AS open, coalesce(g.filling, 0) AS filling,
           coalesce(g.filled, 0) AS filled, coalesce(g.unfillable, 0) AS unfillable
    FROM (
        SELECT table_name, CAST(left(partition_key, 10) AS date) AS day, sum(expected_points)::bigint AS expected,
               sum(present_points)::bigint AS present
        FROM partition_coverage WHERE left(partition_key, 10) >= :first AND {scope} GROUP BY 1, 2
    ) c
    FULL JOIN (
        SELECT table_name, CAST(left(partition_key, 10) AS date) AS day,
               (sum(missing_points) FILTER (WHERE state <> 'filled'))::bigint AS missing,
               (sum(missing_points) FILTER (WHERE state <> 'filled' AND NOT EXISTS (
                   SELECT 1 FROM partition_coverage p
                   WHERE (p.table_name, p.partition_key, p.series) = (d.table_name, d.partition_key, d.series)
               )))::bigint AS never_written,
               count(*) FILTER (WHERE state = 'open') AS open, count(*) FILTER (WHERE state = 'filling') AS filling,
               count(*) FILTER (WHERE state = 'filled') AS filled,
               count(*) FILTER (WHERE state = 'unfillable') AS unfillable
        FROM data_gaps d WHERE gap_start >= :since AND {scope} GROUP BY 1, 2
    ) g USING (table_name, day)
    ORDER BY table_name, day
"""

CLUSTERS_SQL = """
    SELECT c.id, c.cluster_name, c.region, c.status, c.kill_switch, c.agent_version, c.last_seen_at,
           count(n.id) AS nodes, count(n.id) FILTER (WHERE n.node_type = 'spot') AS spot_nodes,
           count(n.id) FILTER (WHERE n.status <> 'ready') AS not_ready,
           coalesce(sum(n.cpu_cores), 0) AS cpu_cores, coalesce(sum(n.memory_bytes), 0)::bigint AS memory_bytes
    FROM clusters c
    LEFT JOIN nodes n ON n.customer_id = c.customer_id AND n.cluster_id = c.id AND n.terminated_at IS NULL
    WHERE c.customer_id = :customer_id AND c.status <> 'deleted'
    GROUP BY c.id ORDER BY c.cluster_name
"""


class LakeMissing(DataError):
    """There is no lake yet."""


def _midnight(now: datetime) -> datetime:
    return now.replace(hour=0, minute=0, second=0, microsecond=0)


def _hour(now: datetime) -> datetime:
    return now.replace(minute=0, second=0, microsecond=0)


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, psycopg.Error) as error:
        cause = str(getattr(error, "orig", None) or error).strip().splitlines()
        reason = cause[0] if cause else type(error).__name__
        if "statement timeout" in reason:
            raise DataError(
                "The database is too slow",
                f"a query did not end within {STATEMENT_TIMEOUT}",
                "look at the database's load; the page tries again by itself.",
            ) from error
        raise DataError(
            "The database cannot be read",
            reason,
            "see that Postgres runs (`cloudoptim doctor` tells) and that DATABASE_URL is right, then reload the page.",
        ) from error


@contextmanager
def _lake_errors() -> Iterator[None]:
    try:
        yield
    except LakeReleaseError as error:
        raise LakeMissing(
            "The lake holds no data yet", str(error), "run `cloudoptim migrate`, then let Dagster's first runs finish."
        ) from error
    except LakeError as error:
        raise DataError(
            "The lake cannot be read", str(error), "run `cloudoptim doctor`, then reload the page."
        ) from error
    except OSError as error:
        raise DataError(
            "The lake's files cannot be read", str(error), "see that CLOUDOPTIM_LAKE_ROOT is right and readable."
        ) from error
