"""What every page shows: the customers a platform admin may choose, a customer's clusters, how fresh the data is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from dashboards.data.source import LIVE_SECONDS, LakeMissing, Source


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
class Alarm:
    """What a person has to look at: ``detector`` names the kind, ``reason`` what and what it costs, ``remedy`` what to
    do; since ``changed_at``."""

    customer_id: UUID
    detector: str
    reason: str
    remedy: str
    changed_at: datetime


class CustomerData(Source):
    """Reads of the frame around every page."""

    def customers(self) -> list[Customer]:
        """All customers, for a platform admin's choice."""

        def read() -> list[Customer]:
            rows = self._rows(
                None, "SELECT id, company_name FROM customers WHERE status <> 'offboarded' ORDER BY company_name, id"
            )
            return [Customer(row["id"], row["company_name"]) for row in rows]

        return self._cache.get(("customers",), LIVE_SECONDS, read)

    def alarms(self, customer_id: UUID | None) -> list[Alarm]:
        """Open alarms of one customer, or of all for the platform; those that cost money first, then the oldest."""

        def read() -> list[Alarm]:
            rows = self._rows(customer_id, ALARMS_SQL, customer_id=customer_id)
            return [Alarm(**row) for row in rows]

        return self._cache.get((str(customer_id), "alarms"), LIVE_SECONDS, read)

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


ALARMS_SQL = """
    SELECT h.customer_id, h.detector, coalesce(h.reason, '') AS reason, coalesce(h.remedy, '') AS remedy, h.changed_at
    FROM intake_health h JOIN customers m ON m.id = h.customer_id
    WHERE h.state = 'degraded' AND m.status <> 'offboarded'
      AND (CAST(:customer_id AS uuid) IS NULL OR h.customer_id = :customer_id)
    ORDER BY h.detector IN ('ending', 'launches', 'never_ready', 'adopted') DESC,
             h.changed_at, h.detector, h.customer_id
"""
