"""What a partition holds after a run: everything known once, nothing observed overwritten by something filled."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from warehouse.lake.tables import Source


def merge(existing: pl.DataFrame, fetched: pl.DataFrame, key: Sequence[str]) -> pl.DataFrame:
    """Rows of both, one for each key: the better source stays (observed over refetched over made up), then the newer.

    A row that a source no longer returns is kept: AWS forgets prices after 90 days, raw samples are dropped after a
    week.
    """
    if existing.is_empty():
        return fetched
    ranks = {str(source): source.rank for source in Source}
    both = pl.concat([existing, fetched], how="diagonal_relaxed").with_columns(
        __rank=pl.col("source").replace_strict(ranks, return_dtype=pl.Int8), __newer=pl.int_range(pl.len())
    )
    best = both.sort("__rank", "__newer", descending=True).unique(list(key), keep="first", maintain_order=True)
    return best.drop("__rank", "__newer")
