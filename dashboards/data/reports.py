"""What the reports page reads: savings by day and the statements that were written."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any
from uuid import UUID

import pyarrow as pa

from dashboards.data.source import Source


class ReportData(Source):
    """Reads of the reports page."""

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
