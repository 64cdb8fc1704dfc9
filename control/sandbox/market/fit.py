"""Fit the market generator to recorded Spot prices, and say how good the fit is.

    python -m control.sandbox.market.fit FOLDER            writes parameters.json beside this file and compares
    python -m control.sandbox.market.fit FOLDER --dry-run  only compares
    python -m control.sandbox.market.fit FOLDER --catalogue writes catalogue.json for the types it names

FOLDER has the layout that `replay.py` describes; a `spot_advisor/spot_advisor.parquet` beside it supplies the shares
of AWS's interruption classes. Fitted are moments: the variogram of log(Spot / on-demand) and its cross-covariances
between pools that share a family, a zone or a type. What cannot be seen in prices (hazards' link to prices, shortages)
is not fitted; docs/market.md lists those choices.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from control.sandbox.market.catalogue import REGIONS, Pool, load_catalogue
from control.sandbox.market.generator import FACTORS, FamilyLevel, GeneratedMarket, Parameters

Floats = npt.NDArray[np.float64]
VARIOGRAM_DAYS = (1, 2, 4, 7, 14, 30, 60, 90)
CROSS_DAYS = (1, 2, 4, 7, 14, 30)


@dataclass(frozen=True, slots=True)
class Panel:
    """Prices of the pools of one region at sampling moments: `log_ratio` is moments by pools, NaN where absent."""

    region: str
    pools: tuple[Pool, ...]
    at_us: npt.NDArray[np.int64]
    usd: Floats
    log_ratio: Floats


def recorded(folder: Path, region: str) -> Panel:
    """The recording of the catalogue's types, against the list price of the day."""
    types = list(load_catalogue().types)
    listed = (
        pl.read_parquet(folder / "on_demand_price.parquet")
        .filter(pl.col("region") == region)
        .select("instance_type", pl.col("valid_from").alias("timestamp"), "on_demand_price_usd")
        .sort("timestamp")
    )
    rows = (
        pl.scan_parquet(folder / "spot_price" / f"region={region}" / "*.parquet", hive_partitioning=False)
        .filter(pl.col("instance_type").is_in(types) & (pl.col("product_description") == "Linux/UNIX"))
        .select("timestamp", "availability_zone", "instance_type", "price_usd")
        .collect()
        .sort("timestamp")
        .join_asof(listed, on="timestamp", by="instance_type", check_sortedness=False)
        .drop_nulls("on_demand_price_usd")
    )
    wide = rows.pivot(
        ["availability_zone", "instance_type"], index="timestamp", values="price_usd", separator="|"
    ).sort("timestamp")
    ratio = rows.with_columns(x=(pl.col("price_usd") / pl.col("on_demand_price_usd")).log()).pivot(
        ["availability_zone", "instance_type"], index="timestamp", values="x", separator="|"
    )
    names = [c for c in wide.columns if c != "timestamp"]
    pools = []
    for name in names:
        zone_id, _, instance_type = name.strip('{}"').replace('","', "|").partition("|")
        pools.append(Pool(region, zone_id, instance_type))
    ratio = ratio.sort("timestamp")
    return Panel(
        region,
        tuple(pools),
        wide["timestamp"].dt.epoch("us").to_numpy().astype(np.int64),
        wide.select(names).to_numpy().astype(float),
        ratio.select(names).to_numpy().astype(float),
    )


def generated(market: GeneratedMarket, like: Panel, *, shift: timedelta = timedelta(0)) -> Panel:
    """The generator's prices of the same pools at the same moments (moved by `shift`)."""
    state_pools = market.pools(like.region)
    index = {pool: i for i, pool in enumerate(state_pools)}
    chosen = [pool for pool in like.pools if pool in index]
    at_us = like.at_us + int(shift / timedelta(microseconds=1))
    first, last = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(m)) for m in (at_us[0], at_us[-1]))
    chunks = list(market.changes(like.region, first, last))
    pool = np.concatenate([c.pool for c in chunks])
    at = np.concatenate([c.at for c in chunks])
    usd = np.concatenate([c.usd_per_hour for c in chunks])
    order = np.lexsort((at, pool))
    pool, at, usd = pool[order], at[order], usd[order]
    prices = np.empty((len(at_us), len(chosen)))
    for column, p in enumerate(chosen):
        begin, end = np.searchsorted(pool, [index[p], index[p] + 1])
        found = np.searchsorted(at[begin:end], at_us, side="right") - 1
        prices[:, column] = usd[begin:end][np.maximum(found, 0)]
    on_demand = np.array([market.catalogue.types[p.instance_type].on_demand_usd_per_hour[p.region] for p in chosen])
    return Panel(like.region, tuple(chosen), at_us, prices, np.log(prices / on_demand))


# what is compared ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Statistics:
    """Moments of one or more panels; the keys are the rows of the table in docs/market.md."""

    values: dict[str, float]
    variogram: dict[int, float]
    """Days to mean squared change of log ratio."""
    cross: dict[str, dict[int, float]]
    """Relation of two pools to days to covariance of changes over their variance."""
    change_share: Floats
    """Per pool, the share of intervals of some 7 hours in which the price changed."""


def _daily(panel: Panel) -> Floats:
    """The last value of each day, days by pools, complete pools only are kept by the callers."""
    day = panel.at_us // 86_400_000_000
    last = np.flatnonzero(np.r_[day[1:] != day[:-1], True])
    grid = np.full((int(day[-1] - day[0]) + 1, panel.log_ratio.shape[1]), np.nan)
    grid[(day[last] - day[0]).astype(int)] = panel.log_ratio[last]
    for i in range(1, len(grid)):  # a missed day repeats the one before it
        missing = np.isnan(grid[i])
        grid[i, missing] = grid[i - 1, missing]
    return grid


def statistics(panels: Sequence[Panel]) -> Statistics:
    """All moments, pools weighted alike."""
    ratios = np.concatenate([np.exp(p.log_ratio[~np.isnan(p.log_ratio)]) for p in panels])
    values = {
        f"ratio, quantile {q:g}": float(np.quantile(ratios, q)) for q in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    }
    shares, sizes, steps, follow = [], [], [], []
    short: list[float] = []
    for panel in panels:
        hours = np.diff(panel.at_us) / 3.6e9
        moved = np.diff(panel.usd, axis=0)
        change = np.diff(panel.log_ratio, axis=0)
        valid = ~np.isnan(change)
        usual, brief = (hours > 6.0) & (hours < 8.0), (hours > 3.0) & (hours < 4.5)
        with np.errstate(invalid="ignore"):
            shares.append(np.nanmean(np.where(valid[usual], moved[usual] != 0, np.nan), axis=0))
        short.append(float((moved[brief] != 0)[valid[brief]].mean()))
        sizes.append(np.abs(change[valid & (moved != 0)]))
        steps.append(change[usual][valid[usual]])
        pair = valid[1:] & valid[:-1]
        follow.append(np.corrcoef(change[1:][pair], change[:-1][pair])[0, 1])
    change_share = np.concatenate(shares)
    change_share = change_share[~np.isnan(change_share)]
    values["price changed after ~7 h, median pool"] = float(np.median(change_share))
    values["price changed after ~7 h, 10 % of pools below"] = float(np.quantile(change_share, 0.1))
    values["price changed after ~7 h, 10 % of pools above"] = float(np.quantile(change_share, 0.9))
    values["price changed after ~4 h, mean"] = float(np.mean(short))
    values["size of a change, median change of log"] = float(np.median(np.concatenate(sizes)))
    values["volatility, sd of d log over ~7 h"] = float(np.std(np.concatenate(steps)))
    values["autocorrelation of consecutive changes"] = float(np.mean(follow))
    grids = []
    for panel in panels:
        grid = _daily(panel)
        complete: npt.NDArray[np.bool_] = np.asarray(~np.isnan(grid).any(axis=0))
        grids.append((grid[:, complete], [p for p, whole in zip(panel.pools, complete, strict=True) if whole]))
    variogram = {
        days: float(np.mean(np.concatenate([((g[days:] - g[:-days]) ** 2).mean(axis=0) for g, _ in grids])))
        for days in VARIOGRAM_DAYS
    }
    for days in (1, 7, 30):
        values[f"volatility, rms of d log over {days} d"] = float(np.sqrt(variogram[days]))
    for days in (7, 30, 60):
        found = []
        for grid, _ in grids:
            a, b = grid[days:] - grid.mean(axis=0), grid[:-days] - grid.mean(axis=0)
            spread = grid.var(axis=0)
            found.append((a * b).mean(axis=0)[spread > 1e-8] / spread[spread > 1e-8])
        values[f"autocorrelation of the level, {days} d"] = float(np.median(np.concatenate(found)))
    cross = _cross(grids)
    for relation, by_days in cross.items():
        for days in (1, 7):
            values[f"cross-correlation of {days} d changes, {relation}"] = by_days[days]
    return Statistics(values, variogram, cross, change_share)


def _cross(grids: list[tuple[Floats, list[Pool]]]) -> dict[str, dict[int, float]]:
    """Covariance over variance of changes between pools of one region, by what they share."""
    sums: dict[str, dict[int, list[float]]] = {}
    for grid, pools in grids:
        family = np.array([p.family for p in pools])
        zone = np.array([p.zone_id for p in pools])
        kind = np.array([p.instance_type for p in pools])
        upper = np.triu_indices(len(pools), 1)
        same_family = np.equal(family[upper[0]], family[upper[1]])
        same_zone = np.equal(zone[upper[0]], zone[upper[1]])
        same_type = np.equal(kind[upper[0]], kind[upper[1]])
        relations = {
            "nothing shared": ~same_family & ~same_zone,
            "zone only": ~same_family & same_zone,
            "family": same_family & ~same_zone & ~same_type,
            "family and zone": same_family & same_zone,
            "type": same_type,
        }
        for days in CROSS_DAYS:
            change = grid[days:] - grid[:-days]
            covariance = (change.T @ change) / len(change)
            variance = float(np.mean(np.diag(covariance)))
            for name, mask in relations.items():
                value = float(covariance[upper][mask].mean()) / variance
                sums.setdefault(name, {}).setdefault(days, []).append(value)
    return {name: {days: float(np.mean(v)) for days, v in by_days.items()} for name, by_days in sums.items()}


# the fit ------------------------------------------------------------------------------------------------------------


def _regime_correlation(days: Floats, mean_days: float, lag_days: float) -> Floats:
    """Autocorrelation of the regime part at the given lags: that of the slots, smoothed by the lag's kernel."""
    s = np.arange(-12.0 * lag_days - 2 * mean_days, 12.0 * lag_days + 2 * mean_days, 0.25)
    u = np.abs(s) / mean_days
    slots = np.where(u < 1.0, 1.0 - u + u**3 / 6.0, np.maximum(0.0, 2.0 - u) ** 3 / 6.0)
    found = np.array([np.sum(slots * np.exp(-np.abs(s - d) / lag_days)) for d in days])
    result: Floats = found / np.sum(slots * np.exp(-np.abs(s) / lag_days))
    return result


def _components(days: Sequence[int], mean_days: float, lag_days: float, noise_days: float) -> Floats:
    """Unit-variance variograms of regime and noise, lags by 2."""
    d = np.array(days, dtype=float)
    return np.stack([2 * (1 - _regime_correlation(d, mean_days, lag_days)), 2 * (1 - np.exp(-d / noise_days))], axis=1)


def fit(panels: Sequence[Panel], hazard_shares: tuple[float, ...] | None = None, *, source: str) -> Parameters:
    """Parameters from recorded panels."""
    from scipy.optimize import nnls

    real = statistics(panels)
    target = np.array([real.variogram[d] for d in VARIOGRAM_DAYS])
    best: tuple[float, tuple[float, float, float], Floats] | None = None
    for mean_days in (45.0, 60.0, 90.0, 120.0, 180.0):
        for lag_days in (7.0, 10.0, 14.0, 20.0, 25.0):
            for noise_days in (5.0, 8.0, 12.0, 20.0, 30.0):
                design = _components(VARIOGRAM_DAYS, mean_days, lag_days, noise_days)
                variances, _ = nnls(design / target[:, None], np.ones(len(target)))
                error = float(np.sum(np.log(np.maximum(design @ variances, 1e-12) / target) ** 2))
                if best is None or error < best[0]:
                    best = (error, (mean_days, lag_days, noise_days), variances)
    assert best is not None
    _, (mean_days, lag_days, noise_days), variances = best
    regime_share, noise_share = _shares(real, _components(CROSS_DAYS, mean_days, lag_days, noise_days), variances)
    region_level, family_level, pool_spread = _levels(panels, regime_share, float(variances[0]), mean_days, lag_days)
    clipped = np.clip(real.change_share, 0.02, 0.98)
    every = 7.0 / _slots_for(clipped)
    ratios = np.concatenate([np.exp(p.log_ratio[~np.isnan(p.log_ratio)]) for p in panels])
    fitted = Parameters(
        source=source,
        regime_sd=round(float(np.sqrt(variances[0])), 4),
        regime_mean_days=mean_days,
        regime_lag_days=lag_days,
        noise_sd=round(float(np.sqrt(variances[1])), 4),
        noise_days=noise_days,
        regime_share=regime_share,
        noise_share=noise_share,
        publish_every_hours_median=round(float(np.median(every)), 3),
        publish_every_log_sd=round(float(np.std(np.log(every))), 3),
        floor_ratio=round(float(np.quantile(ratios, 0.01)), 3),
        region_level=region_level,
        family_level=family_level,
        pool_spread=pool_spread,
    )
    if hazard_shares is not None:
        fitted = replace(fitted, hazard_per_month_shares=hazard_shares)
    return _calibrated(fitted, real, panels)


def _calibrated(fitted: Parameters, real: Statistics, panels: Sequence[Panel]) -> Parameters:
    """Move publication's rhythm until changes after 7 h agree: a published price may round to the one before."""

    def rhythm(of: Statistics) -> tuple[float, float]:
        low, middle, high = _slots_for(np.quantile(of.change_share, (0.1, 0.5, 0.9)))
        return float(middle), float(np.log(high / low))

    wanted, wanted_spread = rhythm(real)
    for _ in range(4):
        got, spread = rhythm(statistics([generated(GeneratedMarket(parameters=fitted), p) for p in panels]))
        fitted = replace(
            fitted,
            publish_every_hours_median=round(max(1.0, fitted.publish_every_hours_median * got / wanted), 3),
            publish_every_log_sd=round(fitted.publish_every_log_sd * wanted_spread / spread, 3),
        )
    return fitted


def _slots_for(change_share: Floats) -> Floats:
    """How many slots an interval must span so that it holds a publication with the given chance."""
    u = np.linspace(0.0, 2.0, 2001)
    no_change = np.where(u < 1.0, 1.0 - u + u**3 / 6.0, (2.0 - u) ** 3 / 6.0)
    result: Floats = np.interp(change_share, 1.0 - no_change, u)
    return result


def _shares(real: Statistics, unit: Floats, variances: Floats) -> tuple[dict[str, float], dict[str, float]]:
    """Variance shares of the factors in regime and noise, from covariances at several lags.

    Two pools that share nothing have the market in common; a family adds its factor, family and zone two, a type one.
    """
    from scipy.optimize import nnls

    total = unit @ variances
    weights = unit * variances / total[:, None]
    at = {name: np.array([by_days[d] for d in CROSS_DAYS]) for name, by_days in real.cross.items()}
    market = (at["nothing shared"] + at["zone only"]) / 2
    increments = {
        "market": market,
        "family": np.maximum(at["family"] - market, 0),
        "family_zone": np.maximum(at["family and zone"] - at["family"], 0),
        "type": np.maximum(at["type"] - at["family"], 0),
    }
    regime, noise = {}, {}
    for name, observed in increments.items():
        (in_regime, in_noise), _ = nnls(weights, observed)
        regime[name], noise[name] = float(in_regime), float(in_noise)
    return _completed(regime), _completed(noise)


def _completed(shares: dict[str, float]) -> dict[str, float]:
    """Shares that sum to 1, the pool's own being what the others leave (at least a tenth)."""
    common = sum(shares.values())
    scale = min(1.0, 0.9 / common) if common > 0 else 1.0
    rounded = {name: round(value * scale, 3) for name, value in shares.items()}
    return {**rounded, "pool": round(1.0 - sum(rounded.values()), 3)}


def _levels(
    panels: Sequence[Panel], regime_share: dict[str, float], regime_variance: float, mean_days: float, lag_days: float
) -> tuple[dict[str, float], dict[str, FamilyLevel], float]:
    """Long-run means by region and family, and the spread of types and pools around them.

    A mean over nine months still carries part of the regime, which the generator adds again: its variance is taken off.
    """
    region_level: dict[str, float] = {}
    by_type: dict[str, list[float]] = {}
    within: list[float] = []
    spans = [float(p.at_us[-1] - p.at_us[0]) / 8.64e10 for p in panels]
    for panel in panels:
        means = np.nanmean(panel.log_ratio, axis=0)
        region_level[panel.region] = round(float(means.mean()), 4)
        of_type: dict[str, list[float]] = {}
        for pool, mean in zip(panel.pools, means, strict=True):
            of_type.setdefault(pool.instance_type, []).append(float(mean) - region_level[panel.region])
        for name, found in of_type.items():
            by_type.setdefault(name.partition(".")[0], []).append(float(np.mean(found)))
            within += [m - float(np.mean(found)) for m in found] if len(found) > 2 else []
    lags = np.linspace(0.0, float(np.mean(spans)), 400)
    kept = float(
        2 * np.trapezoid((1 - lags / lags[-1]) * _regime_correlation(lags, mean_days, lag_days), lags) / lags[-1]
    )
    in_mean = {name: regime_variance * regime_share[name] * kept for name in FACTORS}

    def beyond(variance: float, *names: str) -> float:
        return round(float(np.sqrt(max(variance - sum(in_mean[n] for n in names), 0.03**2))), 4)

    family_level = {
        family: FamilyLevel(round(float(np.mean(found)), 4), beyond(float(np.var(found)), "type"))
        for family, found in sorted(by_type.items())
    }
    # a variance around the mean of k zones is (k - 1) / k of the true one; k is 3 to 5 here
    return region_level, family_level, beyond(float(np.var(within)) * 4 / 3, "pool", "family_zone")


def hazard_shares(advisor: Path) -> tuple[float, ...] | None:
    """Shares of the five interruption classes among the catalogue's types, from AWS's Spot Advisor; None without it."""
    if not advisor.exists():
        return None
    rows = pl.read_parquet(advisor).filter(
        (pl.col("os") == "Linux")
        & pl.col("region").is_in(list(REGIONS))
        & pl.col("instance_type").is_in(list(load_catalogue().types))
    )
    newest = rows.filter(pl.col("snapshot") == pl.col("snapshot").max())
    counts = newest.group_by("interruption_bucket").len().sort("interruption_bucket")
    by_bucket = {int(b): int(n) for b, n in counts.iter_rows()}
    total = sum(by_bucket.values())
    return tuple(round(by_bucket.get(b, 0) / total, 4) for b in range(5))


def catalogue_text(folder: Path, names: Sequence[str]) -> str:
    """catalogue.json for these types: newest list price and the zones that had a Spot price in the newest month."""
    listed = pl.read_parquet(folder / "on_demand_price.parquet").sort("valid_from")
    newest = listed.unique(["region", "instance_type"], keep="last").sort("region")
    months = [max((folder / "spot_price" / f"region={region}").glob("month=*.parquet")) for region in REGIONS]
    pools = pl.concat(
        [
            pl.read_parquet(m, columns=["availability_zone", "instance_type"], hive_partitioning=False).unique()
            for m in months
        ]
    )
    lines = []
    for name in sorted(names):
        rows = newest.filter(pl.col("instance_type") == name).rows(named=True)
        # families named …g run on Graviton; the recording does not say
        graviton = name.partition(".")[0].endswith("g")
        document = {
            "vcpus": int(rows[0]["vcpus"]),
            "memory_gib": rows[0]["memory_gib"],
            "architecture": "arm64" if graviton else "x86_64",
            "on_demand_usd_per_hour": {r["region"]: r["on_demand_price_usd"] for r in rows},
            "zone_ids": sorted(pools.filter(pl.col("instance_type") == name)["availability_zone"]),
        }
        lines.append(f"{json.dumps(name)}: {json.dumps(document)}")
    return f'{{\n"source": {json.dumps(load_catalogue().source)},\n"types": {{\n' + ",\n".join(lines) + "\n}\n}\n"


def comparison(
    panels: Sequence[Panel], parameters: Parameters, *, seeds: Sequence[int] = (1, 2, 3, 4, 5)
) -> list[dict[str, Any]]:
    """Rows of the goodness-of-fit table: recorded value, and mean, lowest and highest of the generated ones by seed."""
    real = statistics(panels).values
    made = [
        statistics([generated(GeneratedMarket(seed, parameters=parameters), p) for p in panels]).values
        for seed in seeds
    ]
    return [
        {
            "statistic": name,
            "recorded": value,
            "generated": float(np.mean([m[name] for m in made])),
            "lowest": min(m[name] for m in made),
            "highest": max(m[name] for m in made),
        }
        for name, value in real.items()
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| statistic | recorded | generated (5 seeds) | lowest to highest |", "|---|---|---|---|"]
    for row in rows:
        low, high = row["lowest"], row["highest"]
        lines.append(
            f"| {row['statistic']} | {row['recorded']:.4g} | {row['generated']:.4g} | {low:.4g} to {high:.4g} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fit the market generator to recorded Spot prices.")
    parser.add_argument(
        "folder", type=Path, help="folder with spot_price/region=…/month=….parquet and on_demand_price.parquet"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the comparison of the present parameters only")
    parser.add_argument(
        "--catalogue", action="store_true", help="write catalogue.json for the types it has, nothing else"
    )
    options = parser.parse_args(arguments)
    if not (options.folder / "on_demand_price.parquet").exists():
        parser.error(
            f"{options.folder} has no on_demand_price.parquet; see control/sandbox/market/replay.py for the layout"
        )
    if options.catalogue:
        text = catalogue_text(options.folder, list(load_catalogue().types))
        Path(__file__).with_name("catalogue.json").write_text(text)
        return 0
    panels = [recorded(options.folder, region) for region in REGIONS]
    if options.dry_run:
        parameters = GeneratedMarket().parameters
    else:
        first, last = (
            datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(m))
            for m in (panels[0].at_us[0], panels[0].at_us[-1])
        )
        source = (
            f"fitted to {sum(p.usd.shape[1] for p in panels)} Spot pools of {', '.join(p.region for p in panels)}, "
            f"{first:%Y-%m-%d} to {last:%Y-%m-%d} (public SkyPilot catalogue)"
        )
        shares = hazard_shares(options.folder.parent / "spot_advisor" / "spot_advisor.parquet")
        parameters = fit(panels, shares, source=source)
        Path(__file__).with_name("parameters.json").write_text(parameters.to_json())
    sys.stdout.write(markdown(comparison(panels, parameters)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
