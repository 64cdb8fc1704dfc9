"""All queries of the pages: live rows from Postgres in the tenant's scope, history from one pinned lake release.

Nothing here takes a tenant from a page or a URL: every function gets the customer id of the signed session. Sums are
made in SQL and answers are at most a few thousand rows, kept per customer and lake release, so that a page another
person of the same customer has just opened costs no query.
"""

from __future__ import annotations

from dashboards.data.cost import HOURS_PER_MONTH, CostData, CostHour, LiveCost, project, saved_share
from dashboards.data.customers import Alarm, Customer, CustomerData
from dashboards.data.gaps import GapData
from dashboards.data.interruptions import InterruptionData, InterruptionRow, PoolRate, rate
from dashboards.data.nodes import NodeData
from dashboards.data.prices import MAX_POINTS, PriceData, PriceRegion
from dashboards.data.reports import ReportData
from dashboards.data.source import DataError, LakeMissing

__all__ = [
    "HOURS_PER_MONTH",
    "MAX_POINTS",
    "Alarm",
    "CostHour",
    "Customer",
    "Data",
    "DataError",
    "InterruptionRow",
    "LakeMissing",
    "LiveCost",
    "PoolRate",
    "PriceRegion",
    "project",
    "rate",
    "saved_share",
]


class Data(CustomerData, CostData, InterruptionData, NodeData, PriceData, GapData, ReportData):
    """Reads for all pages; safe to use from several threads."""
