"""A market that repeats recorded prices: a folder of Parquet in the layout of the spot price catalogue.

    PATH/spot_price/region=us-east-1/month=2023-04.parquet   (or PATH/region=…/month=…, or any *.parquet inside)
        timestamp, region, availability_zone (a zone *id*), instance_type, product_description, price_usd
    PATH/on_demand_price.parquet                             (optional)
        valid_from, region, instance_type, vcpus, memory_gib, on_demand_price_usd

Every row is served as a record of its own: where the recording consists of snapshots, `timestamp` is a sampling time
and a repeated price is an observation, not a change. Four months of a region are in memory at most (a few MB each).

Two ways to tell the time. By default everything is said in recorded time: `now` is in 2023, and so are the records.
With `in_real_time` (the sandbox of `cloudoptim up`) recorded moments appear at the real ones at which the clock reaches
them, so that whoever asks for today's prices gets them; then only what the sandbox's EC2 can launch is sold.
"""

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from control.sandbox.market.catalogue import Pool, load_catalogue
from control.sandbox.market.clock import ReplayClock
from control.sandbox.market.clock import moment as _moment
from control.sandbox.market.interface import PRODUCT, PriceChanges, microseconds

ROWS_PER_CHUNK = 100_000
"""About 60 MB while it is formatted."""
_MONTHS_KEPT = 4
_CALM_LOG_RATIO, _LOG_RATIO_SD = -0.65, 0.3
_CALM_HAZARD_PER_HOUR = 7e-5
"""5 % a month: the recording has prices only, so hazards are the generator's rule at an average pool."""


@dataclass(frozen=True, slots=True)
class _Month:
    """One file, sorted by time."""

    pool: npt.NDArray[np.int32]
    at: npt.NDArray[np.int64]
    usd: npt.NDArray[np.float64]


class _Region:
    """The files of a region by their first moment, and its pools."""

    def __init__(self, files: list[Path], sold: set[Pool] | None) -> None:
        spans, pools = [], []
        for file in files:
            rows = pl.scan_parquet(file, hive_partitioning=False).filter(pl.col("product_description") == PRODUCT)
            first, last = (
                rows.select(pl.col("timestamp").min().alias("first"), pl.col("timestamp").max().alias("last"))
                .collect()
                .row(0)
            )
            if first is None:
                continue
            spans.append((microseconds(first), microseconds(last), file))
            pools.append(rows.select("region", "availability_zone", "instance_type").unique().collect())
        spans.sort()
        self.spans = spans
        named = (
            pl.concat(pools)
            .unique()
            .sort("instance_type", "availability_zone")
            .rename({"availability_zone": "zone_id"})
        )
        columns = ("region", "zone_id", "instance_type")
        if sold is not None:
            keys = [(pool.region, pool.zone_id, pool.instance_type) for pool in sold]
            named = named.join(pl.DataFrame(keys, schema=dict.fromkeys(columns, pl.String), orient="row"), on=columns,
                               how="semi").sort("instance_type", "zone_id")  # fmt: skip
        self.names = named.with_row_index("pool")
        self.pools = tuple(Pool(*row) for row in named.select(*columns).iter_rows())
        self.index = {pool: i for i, pool in enumerate(self.pools)}


class ReplayMarket:
    """Recorded prices under a mapped clock: at first `start`, then `speed` seconds of the recording per second."""

    def __init__(
        self,
        prices: Path,
        start: datetime,
        *,
        speed: float = 1.0,
        state: Path | None = None,
        in_real_time: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`state` keeps the clock over restarts; `clock` is the real time in seconds since the epoch.

        Raises ValueError naming the folder when there is nothing to replay in it, and with `in_real_time` when nothing
        was recorded at `start`.
        """
        if start.tzinfo is None:
            raise ValueError("the start of a replay must carry a time zone (UTC)")
        self.in_real_time = in_real_time
        self.history_limit: timedelta | None = timedelta(days=90) if in_real_time else None
        root = prices / "spot_price" if (prices / "spot_price").is_dir() else prices
        folders = sorted(root.glob("region=*"))
        files = {f.name.removeprefix("region="): sorted(f.glob("*.parquet")) for f in folders}
        self._files = {region: found for region, found in files.items() if found}
        if not self._files:
            raise ValueError(
                f"{prices} has no recorded prices; expected {root.name}/region=<region>/month=<month>.parquet in it"
            )
        self._regions: dict[str, _Region] = {}
        self._months: OrderedDict[Path, _Month] = OrderedDict()
        self._lock = threading.RLock()
        listed = prices / "on_demand_price.parquet"
        self._listed: dict[tuple[str, str], list[tuple[datetime, float]]] = {}
        self._sizes = {t.name: (t.vcpus, t.memory_gib) for t in load_catalogue().types.values()}
        if listed.exists():
            for row in pl.read_parquet(listed).sort("valid_from").iter_rows(named=True):
                key = (row["region"], row["instance_type"])
                self._listed.setdefault(key, []).append((row["valid_from"], row["on_demand_price_usd"]))
                if row["vcpus"] and row["memory_gib"]:
                    self._sizes[row["instance_type"]] = (int(row["vcpus"]), float(row["memory_gib"]))
        self._catalogue = load_catalogue()
        if in_real_time:
            if not speed:
                raise ValueError("speed 0 stands still; prices that appear in real time need a speed above 0")
            if not self.recorded_span[0] <= start <= self.recorded_span[1]:
                raise ValueError(
                    f"nothing was recorded on {start:%Y-%m-%d}: the prices in {prices} go "
                    f"from {self.recorded_span[0]:%Y-%m-%d} to {self.recorded_span[1]:%Y-%m-%d}"
                )
        self.clock = ReplayClock(
            start, self.recorded_span[1], speed=speed, file=state, recording=str(prices.resolve()), now=clock
        )
        self._real = clock

    def now(self) -> datetime:
        recorded = self.clock.now()
        return datetime.fromtimestamp(self._real(), UTC) if self.in_real_time else recorded

    @functools.cached_property
    def recorded_span(self) -> tuple[datetime, datetime]:
        """First and last moment of all regions."""
        files = [file for found in self._files.values() for file in found]
        rows = pl.scan_parquet(files, hive_partitioning=False).filter(pl.col("product_description") == PRODUCT)
        first, last = rows.select(pl.min("timestamp"), pl.max("timestamp").alias("last")).collect().row(0)
        if first is None:
            raise ValueError(f"{files[0].parents[1]} has no recorded prices of {PRODUCT}")
        return first, last

    def _recorded(self, at: datetime) -> datetime:
        return self.clock.recorded(at) if self.in_real_time else at

    def _real_time(self, recorded: datetime) -> datetime:
        return self.clock.real(recorded) if self.in_real_time else recorded

    def regions(self) -> tuple[str, ...]:
        return tuple(self._files)

    def pools(self, region: str) -> tuple[Pool, ...]:
        return self._region(region).pools if region in self._files else ()

    def span(self, region: str) -> tuple[datetime, datetime]:
        """First and last moment recorded, in recorded time; raises KeyError for a region that is not."""
        spans = self._region(region).spans
        return _moment(spans[0][0]), _moment(max(last for _, last, _ in spans))

    def price_usd_per_hour(self, pool: Pool, at: datetime) -> float:
        state = self._region(pool.region)
        i, when = state.index[pool], microseconds(self._recorded(at))
        for first, _, file in reversed(state.spans):
            if first > when:
                continue
            month = self._month(state, file)
            found = np.flatnonzero((month.pool == i) & (month.at <= when))
            if len(found):
                return float(month.usd[found[-1]])
        raise KeyError(f"{pool} has no recorded price up to {at}")

    def on_demand_usd_per_hour(self, region: str, instance_type: str, at: datetime) -> float | None:
        entry = self._on_demand(region, instance_type, at)
        return entry[1] if entry else self._catalogue.on_demand_usd_per_hour(region, instance_type)

    def on_demand_since(self, region: str, instance_type: str, at: datetime) -> datetime:
        """When the list price took effect; for the oldest recorded one the first of its month, as price lists date."""
        entry = self._on_demand(region, instance_type, at)
        if entry is None:
            return _moment(0)
        since = entry[0]
        if since == self._listed[region, instance_type][0][0]:
            since = since.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        return self._real_time(since)

    def size(self, instance_type: str) -> tuple[int, float] | None:
        return self._sizes.get(instance_type)

    def changes(
        self,
        region: str,
        start: datetime,
        end: datetime,
        *,
        instance_types: Collection[str] | None = None,
        zone_ids: Collection[str] | None = None,
    ) -> Iterator[PriceChanges]:
        if region not in self._files:
            return
        state = self._region(region)
        start_us, end_us = microseconds(self._recorded(start)), microseconds(self._recorded(end))
        wanted = None
        if instance_types is not None or zone_ids is not None:
            wanted = np.array(
                [
                    (instance_types is None or p.instance_type in instance_types)
                    and (zone_ids is None or p.zone_id in zone_ids)
                    for p in state.pools
                ]
            )
        missing = np.ones(len(state.pools), dtype=bool) if wanted is None else wanted.copy()
        looked_back = 0
        for first, _, file in reversed(state.spans):
            if first > end_us:
                continue
            # a pool that was not seen in the month of `start` nor in the one before had left the market
            if looked_back == 2 or not missing.any():
                return
            month = self._month(state, file)
            stop = int(np.searchsorted(month.at, end_us, side="right"))
            begin = int(np.searchsorted(month.at, start_us, side="right"))
            for chunk_end in range(stop, begin, -ROWS_PER_CHUNK):
                rows = slice(max(begin, chunk_end - ROWS_PER_CHUNK), chunk_end)
                yield self._selected(state, month, np.arange(rows.start, rows.stop), wanted)
            if first <= start_us:
                looked_back += 1
                before = month.pool[: min(begin, stop)][::-1]
                seen, newest = np.unique(before, return_index=True)
                index = len(before) - 1 - newest
                fresh = missing[seen]
                missing[seen] = False
                yield self._selected(state, month, np.sort(index[fresh]), None)

    def hazard_per_hour(self, pool: Pool, at: datetime) -> float:
        listed = self.on_demand_usd_per_hour(pool.region, pool.instance_type, at)
        if listed is None:
            return _CALM_HAZARD_PER_HOUR
        log_ratio = float(np.log(self.price_usd_per_hour(pool, at) / listed))
        return _CALM_HAZARD_PER_HOUR * float(
            np.exp(1.2 * np.clip((log_ratio - _CALM_LOG_RATIO) / _LOG_RATIO_SD, -2, 2))
        )

    def capacity(self, pool: Pool, at: datetime, *, spot: bool) -> int:
        """The recording does not say; there is always enough of what had a price."""
        if spot:
            try:
                self.price_usd_per_hour(pool, at)
            except KeyError:
                return 0
        return 1_000

    def _on_demand(self, region: str, instance_type: str, at: datetime) -> tuple[datetime, float] | None:
        entries = self._listed.get((region, instance_type))
        if not entries:
            return None
        # before its first sight a price is taken to have been the same: lists do not change often
        recorded = self._recorded(at)
        return next((e for e in reversed(entries) if e[0] <= recorded), entries[0])

    def _selected(
        self, state: _Region, month: _Month, rows: npt.NDArray[np.int64], wanted: npt.NDArray[np.bool_] | None
    ) -> PriceChanges:
        if wanted is not None:
            rows = rows[wanted[month.pool[rows]]]
        at = month.at[rows]
        return PriceChanges(
            state.pools, month.pool[rows], self.clock.real_us(at) if self.in_real_time else at, month.usd[rows]
        )

    def _region(self, region: str) -> _Region:
        with self._lock:
            if region not in self._regions:
                sold = set(self._catalogue.pools(region)) if self.in_real_time else None
                self._regions[region] = _Region(self._files[region], sold)
            return self._regions[region]

    def _month(self, state: _Region, file: Path) -> _Month:
        with self._lock:
            if file in self._months:
                self._months.move_to_end(file)
                return self._months[file]
            frame = (
                pl.scan_parquet(file, hive_partitioning=False)
                .filter(pl.col("product_description") == PRODUCT)
                .rename({"availability_zone": "zone_id"})
                .join(state.names.lazy(), on=["region", "zone_id", "instance_type"])
                .select("pool", pl.col("timestamp").dt.epoch("us").alias("at"), pl.col("price_usd").alias("usd"))
                .sort("at", "pool")
                .collect()
            )
            month = _Month(
                frame["pool"].to_numpy().astype(np.int32), frame["at"].to_numpy().copy(), frame["usd"].to_numpy().copy()
            )
            self._months[file] = month
            while len(self._months) > _MONTHS_KEPT:
                self._months.popitem(last=False)
            return month
