"""Spot prices as a pure function of seed and absolute time: any window asked at any time has the same values.

The model (docs/market.md has the fit and how good it is). For a pool p the log of Spot over on-demand is

    x_p(t) = mu_p + sum over factors f of  a_f * regime_f(t) + b_f * noise_f(t)

with the factors market, family, family-and-zone, type and the pool itself. `regime_f` is a level that jumps at random
and is approached exponentially (a first-order lag): regime shifts. `noise_f` is an Ornstein-Uhlenbeck process: mean
reversion. Prices are published once per slot of the pool's own length, at a random second of it, rounded to four
decimals and kept between a floor and the on-demand price, which is how AWS publishes them. Noise comes from a
counter-based generator keyed by (seed, factor, block), so a block of 32 days follows from its own noise and a fixed
burn-in before it.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt

from control.sandbox.market.catalogue import REGIONS, Catalogue, Pool, load_catalogue
from control.sandbox.market.interface import PriceChanges, microseconds

FACTORS = ("market", "family", "family_zone", "type", "pool")

STEP_HOURS = 3
BLOCK_DAYS = 32
STEPS_PER_BLOCK = BLOCK_DAYS * 24 // STEP_HOURS
BLOCK_SECONDS = BLOCK_DAYS * 86_400
BLOCK_US = BLOCK_SECONDS * 1_000_000
BURN_IN_TIME_CONSTANTS = 8
"""exp(-8) = 0.03 % of a standard deviation is what two blocks disagree by at their border: under a tick."""

LISTED_SINCE = datetime(2023, 8, 1, tzinfo=UTC)
"""The catalogue's list prices are those of August 2023 and do not change."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

SCARCE_SLOT_HOURS = 12
"""A shortage lasts at least half a day, as long as the shortest run of capped prices in the recorded data."""


@dataclass(frozen=True, slots=True)
class FamilyLevel:
    """Long-run log(Spot / on-demand) of one family: mean over its types and the spread between them."""

    mean: float
    spread_between_types: float


@dataclass(frozen=True, slots=True)
class Parameters:
    """Everything the generator needs; `fit.py` writes it to parameters.json, defaults are that fit rounded."""

    source: str = "built-in"
    regime_sd: float = 0.24
    """Standard deviation of the regime part of x, all factors together (log units)."""
    regime_mean_days: float = 30.0
    """Mean time between jumps of a level."""
    regime_lag_days: float = 14.0
    """Time constant with which the price follows the level."""
    noise_sd: float = 0.035
    """Standard deviation of the Ornstein-Uhlenbeck part of x."""
    noise_days: float = 12.0
    """Its time constant of mean reversion."""
    regime_share: dict[str, float] = field(
        default_factory=lambda: {"market": 0.5, "family": 0.12, "family_zone": 0.05, "type": 0.15, "pool": 0.18}
    )
    """Variance shares of the factors in the regime part; they sum to 1."""
    noise_share: dict[str, float] = field(
        default_factory=lambda: {"market": 0.10, "family": 0.05, "family_zone": 0.05, "type": 0.10, "pool": 0.70}
    )
    """Variance shares of the factors in the noise part; they sum to 1."""
    publish_every_hours_median: float = 9.0
    """Median over pools of the time between publications; a published price may round to the one before."""
    publish_every_log_sd: float = 0.4
    """Spread of that time between pools (log units)."""
    floor_ratio: float = 0.27
    """Lowest Spot / on-demand."""
    region_level: dict[str, float] = field(default_factory=dict)
    """Mean log(Spot / on-demand) by region."""
    family_level: dict[str, FamilyLevel] = field(default_factory=dict)
    """By family, relative to the region's mean."""
    pool_spread: float = 0.12
    """Standard deviation of the long-run level between zones of one type (log units)."""
    hazard_per_month_shares: tuple[float, ...] = (0.42, 0.22, 0.13, 0.09, 0.14)
    """Share of pools in AWS's five interruption classes <5 %, 5-10 %, 10-15 %, 15-20 %, >20 % a month."""
    hazard_pressure: float = 1.2
    """A pool's hazard is multiplied by exp(hazard_pressure * pressure); pressure: x's distance from its mean in sd."""
    scarce_share: float = 0.03
    """Share of half-day slots in which a family in a zone is short of capacity."""
    scarce_hazard_factor: float = 10.0

    @classmethod
    def from_json(cls, text: str) -> "Parameters":
        """Parse parameters.json; raises ValueError naming a field it does not know."""
        document = json.loads(text)
        known = {f.name for f in fields(cls)}
        if unknown := set(document) - known:
            raise ValueError(
                f"parameters.json has unknown fields {sorted(unknown)}; refit with control.sandbox.market.fit"
            )
        document["family_level"] = {k: FamilyLevel(**v) for k, v in document.get("family_level", {}).items()}
        if "hazard_per_month_shares" in document:
            document["hazard_per_month_shares"] = tuple(document["hazard_per_month_shares"])
        return cls(**document)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def load_parameters(path: Path | None = None) -> Parameters:
    """Read parameters.json (the one in the package by default)."""
    path = path or Path(__file__).with_name("parameters.json")
    return Parameters.from_json(path.read_text()) if path.exists() else Parameters()


def _mixed(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), elementwise."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _uniforms(keys: npt.NDArray[np.uint64], block: int, count: int, stream: int) -> npt.NDArray[np.float64]:
    """`count` uniforms in (0, 1) per key that depend on nothing but the arguments; keys by count.

    A counter-based generator (SplitMix64) written out, for two reasons: numpy may change the streams of its own between
    releases, and one Philox object per pool and block took ten times as long.
    """
    with np.errstate(over="ignore"):
        salt = np.uint64((block * 64 + stream) % 2**64) * _GOLDEN
        bits = _mixed(_mixed(keys + salt)[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _uniforms_at(keys: npt.NDArray[np.uint64], index: npt.NDArray[np.int64], stream: int) -> npt.NDArray[np.float64]:
    """One uniform per pair of key and index."""
    with np.errstate(over="ignore"):
        salt = (index.astype(np.uint64) * np.uint64(64) + np.uint64(stream)) * _GOLDEN
        bits = _mixed(_mixed(keys + salt) + _GOLDEN)
    result: npt.NDArray[np.float64] = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return result


def _normals(keys: npt.NDArray[np.uint64], block: int, count: int, stream: int) -> npt.NDArray[np.float64]:
    """`count` standard normals per key by Box and Muller (scipy would cost seconds of start-up)."""
    draws = _uniforms(keys, block, 2 * count, stream)
    result: npt.NDArray[np.float64] = np.sqrt(-2.0 * np.log(draws[:, :count])) * np.cos(2.0 * np.pi * draws[:, count:])
    return result


def _first_order(inputs: npt.NDArray[np.float64], rho: float, gain: float) -> npt.NDArray[np.float64]:
    """y[t] = rho * y[t - 1] + gain * inputs[t] along the last axis, from rest."""
    out = np.empty_like(inputs.T)
    level = np.zeros(inputs.shape[0])
    for t, column in enumerate(np.ascontiguousarray(inputs.T)):
        level = rho * level + gain * column
        out[t] = level
    return out.T


class _Block:
    """All price records of one region in one block of 32 days, sorted by pool, then time."""

    __slots__ = ("at", "offsets", "pool", "usd", "x_grid")

    def __init__(
        self,
        pool: npt.NDArray[np.int32],
        at: npt.NDArray[np.int64],
        usd: npt.NDArray[np.float64],
        x_grid: npt.NDArray[np.float32],
        pools: int,
    ) -> None:
        self.pool, self.at, self.usd, self.x_grid = pool, at, usd, x_grid
        self.offsets = np.searchsorted(pool, np.arange(pools + 1))


_RECENT_KEPT = 4
_Published = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.float64]]


class _Region:
    """The fixed numbers of one region: pools, factor keys, levels, change rates, hazards."""

    def __init__(self, name: str, seed: int, parameters: Parameters, catalogue: Catalogue) -> None:
        self.name = name
        self.pools = catalogue.pools(name)
        self.index = {pool: i for i, pool in enumerate(self.pools)}
        self.on_demand = np.array([catalogue.types[p.instance_type].on_demand_usd_per_hour[name] for p in self.pools])
        names = {
            "market": ["market"] * len(self.pools),
            "family": [f"family/{p.family}" for p in self.pools],
            "family_zone": [f"family_zone/{p.family}/{p.zone_id}" for p in self.pools],
            "type": [f"type/{name}/{p.instance_type}" for p in self.pools],
            "pool": [f"pool/{p.zone_id}/{p.instance_type}" for p in self.pools],
        }
        # each factor: the distinct noise sources and which of them every pool listens to
        self.sources: dict[str, tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]] = {}
        for factor, labels in names.items():
            distinct, inverse = np.unique(np.array(labels), return_inverse=True)
            keys = np.array([_key(seed, str(label)) for label in distinct], dtype=np.uint64)
            self.sources[factor] = (keys, inverse)
        pool_keys, pool_of = self.sources["pool"]
        type_keys, type_of = self.sources["type"]
        own = _uniforms(pool_keys, 0, 4, stream=9)[pool_of]
        own_normal = _normals(pool_keys, 0, 2, stream=8)[pool_of]
        type_normal = _normals(type_keys, 0, 1, stream=8)[type_of]
        default = FamilyLevel(0.0, 0.1)
        family = [parameters.family_level.get(p.family, default) for p in self.pools]
        self.mean = (
            parameters.region_level.get(name, -0.65)
            + np.array([level.mean for level in family])
            + np.array([level.spread_between_types for level in family]) * type_normal[:, 0]
            + parameters.pool_spread * own_normal[:, 0]
        )
        self.publish_every_seconds = np.round(
            np.clip(
                parameters.publish_every_hours_median * np.exp(parameters.publish_every_log_sd * own_normal[:, 1]),
                1.0,
                96.0,
            )
            * 3600.0
        ).astype(np.int64)
        shares = np.cumsum(parameters.hazard_per_month_shares) / np.sum(parameters.hazard_per_month_shares)
        bucket = np.minimum(np.searchsorted(shares, own[:, 0]), 4)
        low, high = np.array([0.005, 0.05, 0.10, 0.15, 0.20]), np.array([0.05, 0.10, 0.15, 0.20, 0.45])
        monthly = low[bucket] + (high[bucket] - low[bucket]) * own[:, 1]
        self.base_hazard = -np.log1p(-monthly) / 730.0
        self.depth = np.round(np.exp(3.0 + 3.5 * own[:, 2])).astype(int)
        self.shock_share = own[:, 3]


def _key(seed: int, label: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{label}".encode()).digest()[:8], "little")


class GeneratedMarket:
    """The living market. Thread-safe; the same seed and parameters give the same prices on every machine."""

    history_limit: timedelta | None = timedelta(days=90)

    def __init__(
        self,
        seed: int = 20_240_229,
        *,
        parameters: Parameters | None = None,
        catalogue: Catalogue | None = None,
        blocks_kept: int = 24,
    ) -> None:
        self.seed = seed
        self.parameters = parameters or load_parameters()
        self.catalogue = catalogue or load_catalogue()
        self._regions = {name: _Region(name, seed, self.parameters, self.catalogue) for name in REGIONS}
        self._blocks: OrderedDict[tuple[str, int], _Block] = OrderedDict()
        self._blocks_kept = blocks_kept
        self._recent: OrderedDict[tuple[str, int], _Published] = OrderedDict()
        self._lock = threading.Lock()

    def now(self) -> datetime:
        return datetime.now(UTC)

    def regions(self) -> tuple[str, ...]:
        return tuple(self._regions)

    def pools(self, region: str) -> tuple[Pool, ...]:
        return self._regions[region].pools if region in self._regions else ()

    def on_demand_usd_per_hour(self, region: str, instance_type: str, at: datetime) -> float | None:
        return self.catalogue.on_demand_usd_per_hour(region, instance_type)

    def on_demand_since(self, region: str, instance_type: str, at: datetime) -> datetime:
        return LISTED_SINCE

    def price_usd_per_hour(self, pool: Pool, at: datetime) -> float:
        region, i = self._find(pool)
        when = microseconds(at)
        number = when // BLOCK_US
        while True:
            block = self._block(region, number)
            first, last = block.offsets[i], block.offsets[i + 1]
            found = first + int(np.searchsorted(block.at[first:last], when, side="right")) - 1
            if found >= first:
                return float(block.usd[found])
            # nothing published in this block yet: the newest record of the block before is in force
            number -= 1
            when = (number + 1) * BLOCK_US

    def size(self, instance_type: str) -> tuple[int, float] | None:
        kind = self.catalogue.types.get(instance_type)
        return None if kind is None else (kind.vcpus, kind.memory_gib)

    def changes(
        self,
        region: str,
        start: datetime,
        end: datetime,
        *,
        instance_types: Collection[str] | None = None,
        zone_ids: Collection[str] | None = None,
    ) -> Iterator[PriceChanges]:
        if region not in self._regions:
            return
        state = self._regions[region]
        wanted = np.array(
            [
                (instance_types is None or p.instance_type in instance_types)
                and (zone_ids is None or p.zone_id in zone_ids)
                for p in state.pools
            ]
        )
        start_us, end_us = microseconds(start), microseconds(end)
        missing = wanted.copy()
        number = end_us // BLOCK_US
        while missing.any():
            block = self._block(state, number)
            keep = wanted[block.pool] & (block.at <= end_us) & (block.at > start_us)
            # the record in force at `start`, once per pool: the newest one not after it
            for i in np.flatnonzero(missing):
                first, last = block.offsets[i], block.offsets[i + 1]
                found = first + int(np.searchsorted(block.at[first:last], min(start_us, end_us), side="right")) - 1
                if found >= first:
                    keep[found] = True
                    missing[i] = False
            order = np.argsort(block.at[keep], kind="stable")
            yield PriceChanges(state.pools, block.pool[keep][order], block.at[keep][order], block.usd[keep][order])
            number -= 1

    def hazard_per_hour(self, pool: Pool, at: datetime) -> float:
        """Base rate of the pool's interruption class, times price pressure, times ten in a shortage."""
        region, i = self._find(pool)
        p = self.parameters
        sd = float(np.hypot(p.regime_sd, p.noise_sd))
        pressure = float(np.clip((self._x(region, i, at) - region.mean[i]) / sd, -2.0, 2.0))
        hazard = float(region.base_hazard[i]) * float(np.exp(p.hazard_pressure * pressure))
        return hazard * (p.scarce_hazard_factor if self.scarce(pool, at) else 1.0)

    def scarce(self, pool: Pool, at: datetime) -> bool:
        """Whether the pool's family is short in its zone at that time (and this pool among those hit)."""
        region, i = self._find(pool)
        slot = microseconds(at) // (SCARCE_SLOT_HOURS * 3_600_000_000)
        keys, inverse = region.sources["family_zone"]
        family_short = (
            _uniforms(keys[inverse[i] : inverse[i] + 1], slot, 1, stream=5)[0, 0] < self.parameters.scarce_share
        )
        return bool(family_short) and float(region.shock_share[i]) < 0.7

    def capacity(self, pool: Pool, at: datetime, *, spot: bool) -> int:
        region, i = self._find(pool)
        if not self.scarce(pool, at):
            return int(region.depth[i]) * (1 if spot else 4)
        # in a shortage Spot is refused outright and on-demand gets a handful, the ladder's reason to exist
        return 0 if spot else 4

    def _find(self, pool: Pool) -> tuple[_Region, int]:
        region = self._regions[pool.region]
        return region, region.index[pool]

    def _x(self, region: _Region, i: int, at: datetime) -> float:
        when = microseconds(at)
        number, inside = divmod(when, BLOCK_US)
        grid = self._block(region, number).x_grid[i]
        position = inside / (STEP_HOURS * 3_600_000_000)
        return float(np.interp(position, np.arange(len(grid)), grid))

    def _block(self, region: _Region, number: int) -> _Block:
        key = (region.name, number)
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
        block = self._generate(region, number)
        with self._lock:
            self._blocks[key] = block
            while len(self._blocks) > self._blocks_kept:
                self._blocks.popitem(last=False)
        return block

    def _generate(self, region: _Region, number: int) -> _Block:
        x, pool, at, usd = self._published(region, number)
        # a record that repeats the price in force is no change; the price in force at the start comes from the
        # last time the block before published, computed from that block's own noise
        before = self._last_of(region, number - 1)
        first_of_pool = np.r_[True, pool[1:] != pool[:-1]] if len(pool) else np.zeros(0, bool)
        previous = np.where(first_of_pool, before[pool], np.r_[np.nan, usd[:-1]] if len(usd) else usd)
        keep = usd != previous
        return _Block(pool[keep], at[keep], usd[keep], x, len(region.pools))

    def _published(self, region: _Region, number: int) -> _Published:
        """x on the grid and everything published in a block; kept shortly, since the block after it asks again."""
        key = (region.name, number)
        with self._lock:
            found = self._recent.get(key)
        if found is None:
            x = region.mean[:, None] + self._deviation(region, number)
            found = (x.astype(np.float32), *self._publish(region, number, x))
            with self._lock:
                self._recent[key] = found
                while len(self._recent) > _RECENT_KEPT:
                    self._recent.popitem(last=False)
        return found

    def _last_of(self, region: _Region, number: int) -> npt.NDArray[np.float64]:
        with self._lock:
            cached = self._blocks.get((region.name, number))
        if cached is not None and (np.diff(cached.offsets) > 0).all():
            return cached.usd[cached.offsets[1:] - 1]
        _, pool, _, usd = self._published(region, number)
        last = np.full(len(region.pools), np.nan)
        last[pool] = usd  # later assignments win, and records are in time order within a pool
        return last

    def _publish(
        self, region: _Region, number: int, x: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        keys, inverse = region.sources["pool"]
        # one publication per slot of the pool's own length, at a random second of it: more regular than a Poisson
        # process, which is how the recorded prices behave (the share of changed prices grows linearly with time)
        every = region.publish_every_seconds
        begin, end = number * BLOCK_SECONDS, (number + 1) * BLOCK_SECONDS
        first_slot = begin // every
        slots = end // every - first_slot + 1
        pool = np.repeat(np.arange(len(every)), slots)
        slot = np.arange(len(pool)) - np.repeat(np.cumsum(slots) - slots, slots) + first_slot[pool]
        second = ((slot + _uniforms_at(keys[inverse][pool], slot, stream=3)) * every[pool]).astype(np.int64)
        inside = (second >= begin) & (second < end)
        pool, second = pool[inside], second[inside]
        position = (second - begin) / (STEP_HOURS * 3600.0)
        left = position.astype(np.int64)
        weight = position - left
        value = x[pool, left] * (1.0 - weight) + x[pool, left + 1] * weight
        ratio = np.clip(np.exp(value), self.parameters.floor_ratio, 1.0)
        usd = np.maximum(0.0001, np.round(ratio * region.on_demand[pool], 4))
        return pool.astype(np.int32), second * 1_000_000, usd

    def _deviation(self, region: _Region, number: int) -> npt.NDArray[np.float64]:
        """x minus its mean on the 3-hour grid of one block, one step beyond its end included; pools by steps."""
        p = self.parameters
        total = np.zeros((len(region.pools), STEPS_PER_BLOCK + 1))
        for factor in FACTORS:
            keys, inverse = region.sources[factor]
            regime = _regime_paths(keys, number, p.regime_mean_days, p.regime_lag_days)
            noise = _noise_paths(keys, number, p.noise_days)
            path = p.regime_sd * np.sqrt(p.regime_share[factor]) * regime
            path += p.noise_sd * np.sqrt(p.noise_share[factor]) * noise
            total += path[inverse]
        return total


def _burn_in_blocks(time_constant_days: float) -> int:
    return int(np.ceil(BURN_IN_TIME_CONSTANTS * time_constant_days / BLOCK_DAYS))


def _noise_paths(keys: npt.NDArray[np.uint64], number: int, time_constant_days: float) -> npt.NDArray[np.float64]:
    """Unit-variance Ornstein-Uhlenbeck paths on the grid of one block (sources by steps + 1)."""
    burn_in = _burn_in_blocks(time_constant_days)
    rho = float(np.exp(-STEP_HOURS / 24.0 / time_constant_days))
    blocks = range(number - burn_in, number + 2)
    shocks = np.hstack([_normals(keys, block, STEPS_PER_BLOCK, stream=1) for block in blocks])
    path = _first_order(shocks, rho, float(np.sqrt(1.0 - rho * rho)))
    first = burn_in * STEPS_PER_BLOCK
    return path[:, first : first + STEPS_PER_BLOCK + 1]


def _regime_paths(
    keys: npt.NDArray[np.uint64], number: int, mean_days: float, lag_days: float
) -> npt.NDArray[np.float64]:
    """Unit-variance paths that follow a jumping level with a first-order lag (sources by steps + 1).

    Levels live in slots of `mean_days`, with the jump at a random moment of the slot, so that finding the level at any
    time needs only two slots: no history is walked.
    """
    burn_in = _burn_in_blocks(lag_days)
    days = (np.arange((number - burn_in) * STEPS_PER_BLOCK, (number + 1) * STEPS_PER_BLOCK + 1) * STEP_HOURS) / 24.0
    slot = np.floor(days / mean_days).astype(np.int64)
    slots = np.arange(slot[0] - 1, slot[-1] + 1)
    level = np.hstack([_normals(keys, int(s), 1, stream=2) for s in slots])
    jump = np.hstack([_uniforms(keys, int(s), 1, stream=4) for s in slots])
    here = slot - slots[0]
    jumped = days[None, :] - slot[None, :] * mean_days >= jump[:, here] * mean_days
    target = np.where(jumped, level[:, here], level[:, here - 1])
    rho = float(np.exp(-STEP_HOURS / 24.0 / lag_days))
    path = _first_order(target, rho, 1.0 - rho)
    first = burn_in * STEPS_PER_BLOCK
    return path[:, first:] / _regime_scale(mean_days, lag_days)


def _regime_scale(mean_days: float, lag_days: float) -> float:
    """Standard deviation of the lagged level, from the autocovariance of slots with uniform jump times.

    The level at t and t + s agree with probability c(s): no jump between them. The lag filters it with an exponential
    kernel, whose variance is the integral of c against exp(-|s| / lag) / (2 lag).
    """
    s = np.linspace(0.0, 2.0 * mean_days, 4001)
    u = s / mean_days
    # slots with one uniform jump each: P(no jump in a window of length u slots), averaged over its position
    no_jump = np.where(u < 1.0, 1.0 - u + u**3 / 6.0, np.maximum(0.0, (2.0 - u) ** 3 / 6.0))
    return float(np.sqrt(np.trapezoid(no_jump * np.exp(-s / lag_days) / lag_days, s)))
