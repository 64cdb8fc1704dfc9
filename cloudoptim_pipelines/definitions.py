"""Everything Dagster loads: the assets, checks, jobs and schedules of every domain, one resource, one executor."""

from __future__ import annotations

import warnings

import dagster as dg
from dagster import BetaWarning, PreviewWarning

# Backfill policies and owners of schedules are still called beta in 1.13; they are used on purpose.
warnings.filterwarnings("ignore", category=BetaWarning)
warnings.filterwarnings("ignore", category=PreviewWarning)

from cloudoptim_pipelines import defs as domains  # noqa: E402
from cloudoptim_pipelines.automation import jobs, schedules  # noqa: E402
from cloudoptim_pipelines.resources import Warehouse  # noqa: E402

defs = dg.Definitions(
    assets=dg.load_assets_from_package_module(domains),
    asset_checks=dg.load_asset_checks_from_package_module(domains),
    jobs=jobs(),
    schedules=schedules(),
    resources={"warehouse": Warehouse()},
    # A second Python start for each step costs more than the step: runs are processes already.
    executor=dg.in_process_executor,
)
