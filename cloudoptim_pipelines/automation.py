"""All jobs and schedules of the domains, gathered."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

DOMAINS = ("spot_prices", "on_demand_prices", "metrics", "costs", "savings", "gaps", "maintenance")


def _found(kinds: tuple[type, ...]) -> Iterator[object]:
    for domain in DOMAINS:
        module = import_module(f"cloudoptim_pipelines.defs.{domain}.automation")
        yield from (value for value in vars(module).values() if isinstance(value, kinds))


def jobs() -> list:
    """Every job."""
    return list(_found((dg.JobDefinition, UnresolvedAssetJobDefinition)))


def schedules() -> list:
    """Every schedule."""
    return list(_found((dg.ScheduleDefinition,)))
