"""What the gaps page reads: what was expected and what is there, and the requests to fill the rest."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from dashboards.data.source import Source, midnight_of


class GapData(Source):
    """Reads of the gaps page."""

    def coverage_by_day(self, customer_id: UUID, lookback_days: int) -> list[Mapping[str, Any]]:
        """Expected, present and missing points by table and day, with the number of gaps in each state.

        The customer's own series, and prices, which belong to nobody.
        """
        since = midnight_of(datetime.now(UTC)) - timedelta(days=lookback_days)
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
            since=midnight_of(datetime.now(UTC)) - timedelta(days=lookback_days),
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
