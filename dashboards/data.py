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
from datetime import UTC, datetime, timedelta
from decimal import Decimal
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


LIVE_COST_SQL = """
    SELECT c.id AS cluster_id, c.cluster_name, n.node_type, n.instance_type, count(*) AS nodes,
           count(p.paid) FILTER (WHERE od.price_usd_per_hour IS NOT NULL) AS priced,
           sum(p.paid) FILTER (WHERE od.price_usd_per_hour IS NOT NULL) AS actual,
           sum(od.price_usd_per_hour) FILTER (WHERE p.paid IS NOT NULL) AS b1
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
    GROUP BY c.id, c.cluster_name, n.node_type, n.instance_type
    ORDER BY actual DESC NULLS LAST, n.instance_type
"""


class LakeMissing(DataError):
    """There is no lake yet."""


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
