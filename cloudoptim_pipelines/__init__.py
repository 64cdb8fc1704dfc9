"""Pipelines: Dagster assets, schedules and checks. Imports warehouse, control.gateways and control.settings."""

import warnings

from dagster import BetaWarning, PreviewWarning

# Backfill policies are still called beta in 1.13; they are used on purpose, as Dagster's own platform does.
warnings.filterwarnings("ignore", category=BetaWarning)
warnings.filterwarnings("ignore", category=PreviewWarning)
