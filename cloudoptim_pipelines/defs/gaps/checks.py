"""Are there holes that a fill could close? Freshness says when something was written last, not what is missing."""

from typing import Any

import dagster as dg

from cloudoptim_pipelines.defs.gaps.assets import recent_gaps
from cloudoptim_pipelines.defs.metrics.assets import metric_5m
from cloudoptim_pipelines.defs.spot_prices.assets import spot_prices
from cloudoptim_pipelines.resources import Warehouse

_COLUMNS = ("partition", "series", "from", "to", "missing", "reason")


def _result(gaps: list[dict[str, Any]]) -> dg.AssetCheckResult:
    records = [
        dg.TableRecord(
            {
                "partition": gap["partition_key"],
                "series": gap["series"],
                "from": gap["gap_start"].isoformat(),
                "to": gap["gap_end"].isoformat(),
                "missing": gap["missing_points"],
                "reason": gap["reason"],
            }
        )
        for gap in gaps
    ]
    schema = dg.TableSchema(
        columns=[dg.TableColumn(name, "int" if name == "missing" else "string") for name in _COLUMNS]
    )
    return dg.AssetCheckResult(
        passed=not gaps,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"gap_count": len(gaps), "gaps": dg.TableMetadataValue(records=records, schema=schema)},
    )


@dg.asset_check(asset=spot_prices, name="no_gaps")
def no_gaps_in_spot_prices(warehouse: Warehouse) -> dg.AssetCheckResult:
    """No open gap in the Spot prices of the last ninety days; the table lists the newest hundred."""
    return _result(recent_gaps(warehouse, "spot_prices"))


@dg.asset_check(asset=metric_5m, name="no_gaps")
def no_gaps_in_metrics(warehouse: Warehouse) -> dg.AssetCheckResult:
    """No open gap in clusters' metrics of the last ninety days; the table lists the newest hundred."""
    return _result(recent_gaps(warehouse, "metric_5m"))
