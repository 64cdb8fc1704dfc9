"""Fill short holes of metric series where no source can be asked any more. Every row says that it was made up."""

from __future__ import annotations

from datetime import datetime, timedelta

import polars as pl

from cloudoptim_pipelines.defs.metrics.windows import WINDOW

# Usage of a node an hour ago says little about now; longer holes stay holes.
LONGEST_HOLE = timedelta(hours=1)
SERIES = ["customer_id", "cluster_id", "metric", "subject"]


def interpolate(rows: pl.DataFrame, *, day_end: datetime, run_id: str, filled_at: datetime) -> pl.DataFrame:
    """Rows for the missing windows between two measured ones of a series, on the straight line between their means.

    A hole longer than ``LONGEST_HOLE``, or one without a measured window on both sides (within the frame and before
    ``day_end``), is left. Made-up rows have no minimum, maximum or last value, and 0 samples.
    """
    measured = rows.filter(pl.col("source") != "interpolated", pl.col("mean").is_not_null(), pl.col("ts") < day_end)
    pairs = (
        measured.sort(*SERIES, "ts")
        .with_columns(next_ts=pl.col("ts").shift(-1).over(SERIES), next_mean=pl.col("mean").shift(-1).over(SERIES))
        .filter((pl.col("next_ts") - pl.col("ts") > WINDOW) & (pl.col("next_ts") - pl.col("ts") <= LONGEST_HOLE))
    )
    if pairs.is_empty():
        return rows.head(0)
    steps = (pl.col("next_ts") - pl.col("ts")).dt.total_seconds() // int(WINDOW.total_seconds())
    holes = pairs.with_columns(step=pl.int_ranges(1, steps), steps=steps).explode("step")
    share = pl.col("step") / pl.col("steps")
    return holes.select(
        (pl.col("ts") + pl.duration(seconds=pl.col("step") * int(WINDOW.total_seconds()))).alias("ts"),
        *SERIES,
        "node_name",
        (pl.col("mean") + (pl.col("next_mean") - pl.col("mean")) * share).alias("mean"),
        pl.lit(0, dtype=pl.Int64).alias("samples"),
        pl.lit("interpolated").alias("source"),
        pl.lit(run_id).alias("fill_run_id"),
        pl.lit("linear").alias("fill_method"),
        pl.lit(filled_at).alias("filled_at"),
    )
