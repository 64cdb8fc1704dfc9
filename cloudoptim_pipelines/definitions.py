"""Everything Dagster loads: the assets, checks, jobs and schedules of every domain, one resource, one executor."""

import dagster as dg

from cloudoptim_pipelines import defs as domains
from cloudoptim_pipelines.automation import jobs, schedules
from cloudoptim_pipelines.resources import Warehouse

defs = dg.Definitions(
    assets=dg.load_assets_from_package_module(domains),
    asset_checks=dg.load_asset_checks_from_package_module(domains),
    jobs=jobs(),
    schedules=schedules(),
    resources={"warehouse": Warehouse()},
    # A second Python start for each step costs more than the step: runs are processes already.
    executor=dg.in_process_executor,
)
