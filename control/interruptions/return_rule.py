"""When an On-Demand node that stands in for an interrupted Spot node goes back to Spot: an explicit rule, and pure.

Every condition is a ``Check`` with what was found and what is needed. All must hold, and all are kept with the plan
that follows from them, so that anybody can see later why a node was moved, or why it was not yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from control.interruptions.caps import Caps
from control.interruptions.choosing import Limits, Market, Pool, Wanted, comparable

DEFAULT_QUIET_HOURS = 6.0
# A sighting of capacity this old says nothing any more; and a pool that nobody asked for as long is worth one try.
CAPACITY_HOURS = 24.0
# Below this share of what is paid now, moving costs more than it brings.
MIN_SAVING_RATIO = 0.10
# A node younger than this has only just taken the pods over.
SETTLED = timedelta(minutes=30)
AGENT_SEEN = timedelta(seconds=60)
# After a return that did not work out, the cluster is left alone for this long.
AFTER_FAILURE = timedelta(hours=6)


@dataclass(frozen=True, slots=True)
class StandIn:
    """An On-Demand node of ours in the place of an interrupted Spot node, and its cluster as it stands now."""

    instance_id: str
    instance_type: str
    availability_zone: str
    usd_per_hour: float | None
    ready_at: datetime
    cpu_cores: float
    memory_gib: float
    interruptions_in_flight: int
    plan_running: bool
    last_failure_at: datetime | None
    stopped: bool
    agent_seen_at: datetime | None
    nodes: int
    nodes_disturbed: int
    nodes_on_demand: int
    # The Spot node of an earlier return that could not move this node's pods: it is used, never doubled.
    spare_instance_id: str | None = None
    spare_ready: bool = False


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """What a pool did to this customer. ``troubled_at``: its last interruption, refusal or rebalance recommendation;
    ``seen_at``: when a Spot instance was last seen to run or start there."""

    troubled_at: datetime | None = None
    seen_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One condition of the rule."""

    name: str
    ok: bool
    found: str
    needed: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The best pool for a stand-in, if there is any, and every condition."""

    pool: Pool | None
    checks: tuple[Check, ...]

    @property
    def go(self) -> bool:
        """Whether every condition holds."""
        return self.pool is not None and all(check.ok for check in self.checks)

    def as_evidence(self) -> list[dict[str, Any]]:
        """The checks as they are kept."""
        return [asdict(check) for check in self.checks]


def judge(
    node: StandIn,
    market: Market,
    limits: Limits,
    records: Mapping[tuple[str, str], PoolRecord],
    caps: Caps,
    config: Mapping[str, Any],
    now: datetime,
) -> Verdict:
    """Whether a stand-in goes back to Spot now, and to which pool.

    Only its own zone counts: what its pods keep on volumes is there. The pool is the cheapest in which all conditions
    about pools hold, or else the cheapest of all, so that the answer says what is missing.
    """
    cluster = _cluster_checks(node, config, now)
    judged = [
        (pool, _pool_checks(node, pool, market, limits, records, caps, config, now))
        for pool in _pools(node, market, limits)
    ]
    if not judged:
        missing = Check("price", False, f"no Spot price in {node.availability_zone}", "a pool with a known Spot price")
        return Verdict(None, (missing, *cluster))
    pool, checks = next((found for found in judged if all(check.ok for check in found[1])), judged[0])
    return Verdict(pool, (*checks, *cluster))


def _pools(node: StandIn, market: Market, limits: Limits) -> list[Pool]:
    wanted = Wanted(node.instance_type, node.availability_zone, "spot", node.cpu_cores, node.memory_gib)
    names = {node.instance_type, *comparable(wanted, market, limits)}
    found = [
        Pool(name, node.availability_zone, "spot", market.spot[node.availability_zone, name])
        for name in names
        if (node.availability_zone, name) in market.spot
        and (not limits.instance_types or name in limits.instance_types)
    ]
    return sorted(found, key=lambda pool: (pool.price_usd_per_hour or 0.0, pool.instance_type))


def _pool_checks(
    node: StandIn,
    pool: Pool,
    market: Market,
    limits: Limits,
    records: Mapping[tuple[str, str], PoolRecord],
    caps: Caps,
    config: Mapping[str, Any],
    now: datetime,
) -> list[Check]:
    record = records.get((pool.availability_zone, pool.instance_type), PoolRecord())
    quiet_hours = _number(config.get("quiet_hours_before_spot"), DEFAULT_QUIET_HOURS)
    quiet = _hours_since(record.troubled_at, now)
    price = pool.price_usd_per_hour or 0.0
    facts = market.types.get(node.instance_type)
    paid = node.usd_per_hour if node.usd_per_hour is not None else (facts.on_demand_usd_per_hour if facts else None)
    most = None if paid is None else min(paid * limits.price_cap_ratio, paid * (1 - MIN_SAVING_RATIO))
    zone_allowed = not limits.zones or pool.availability_zone in limits.zones
    over_cap = Caps(caps.most_launches, caps.most_usd_per_hour, caps.launches, caps.usd_per_hour).take(pool)
    return [
        Check(
            "quiet_pool",
            quiet is None or quiet >= quiet_hours,
            "no trouble on record" if quiet is None else f"{quiet:.1f} h since the last trouble",
            f"{quiet_hours:g} h without an interruption, refusal or rebalance recommendation",
        ),
        Check(
            "price",
            most is not None and price <= most,
            f"{price:.4f} USD/h in {pool.instance_type} {pool.availability_zone}",
            "a known On-Demand price" if most is None else f"at most {most:.4f} USD/h; {paid:.4f} are paid now",
        ),
        _capacity(record, quiet, now),
        Check("zone_allowed", zone_allowed, pool.availability_zone, "one of allowed_zones"),
        Check("launch_caps", over_cap is None, over_cap or "free", "max_launches_per_hour and max_hourly_spend_usd"),
    ]


def _capacity(record: PoolRecord, quiet: float | None, now: datetime) -> Check:
    needed = f"a Spot instance seen there within {CAPACITY_HOURS:g} h, or nobody refused for as long"
    seen = _hours_since(record.seen_at, now)
    fresh = seen is not None and seen <= CAPACITY_HOURS
    after_trouble = record.troubled_at is None or (record.seen_at is not None and record.seen_at >= record.troubled_at)
    if fresh and after_trouble:
        return Check("capacity_seen", True, f"a Spot instance {seen:.1f} h ago", needed)
    if quiet is None or quiet >= CAPACITY_HOURS:
        return Check("capacity_seen", True, "untested, and nobody was refused lately: one try", needed)
    return Check("capacity_seen", False, "none since the last trouble", needed)


def _cluster_checks(node: StandIn, config: Mapping[str, Any], now: datetime) -> list[Check]:
    budget = _budget(config.get("disruption_budget"), node.nodes)
    floor = _floor(config.get("on_demand_floor"), node.nodes)
    agent = None if node.agent_seen_at is None else (now - node.agent_seen_at).total_seconds()
    age_minutes = (now - node.ready_at).total_seconds() / 60
    failed = _hours_since(node.last_failure_at, now)
    return [
        Check(
            "nothing_in_flight",
            node.interruptions_in_flight == 0,
            f"{node.interruptions_in_flight} interruptions in flight",
            "none in the cluster",
        ),
        Check("no_other_plan", not node.plan_running, "a plan runs" if node.plan_running else "none", "none"),
        Check(
            "disruption_budget",
            node.nodes_disturbed < budget,
            f"{node.nodes_disturbed} of {node.nodes} nodes are not ready or cordoned",
            f"fewer than {budget}",
        ),
        Check(
            "on_demand_floor",
            node.nodes_on_demand - 1 >= floor,
            f"{node.nodes_on_demand} nodes on demand",
            f"{floor} remain",
        ),
        Check(
            "disruption_window",
            window_open(config.get("disruption_windows"), now),
            f"{now:%a %H:%M} UTC",
            "disruption_windows",
        ),
        Check(
            "no_approval_needed",
            not config.get("approval_required"),
            "approval_required is set" if config.get("approval_required") else "not required",
            "a person moves it where approval_required is set",
        ),
        Check("not_stopped", not node.stopped, "the kill switch is on" if node.stopped else "off", "off"),
        Check(
            "agent_seen",
            agent is not None and agent <= AGENT_SEEN.total_seconds(),
            "never" if agent is None else f"{agent:.0f} s ago",
            f"within {AGENT_SEEN.total_seconds():.0f} s",
        ),
        Check(
            "settled",
            age_minutes >= SETTLED.total_seconds() / 60,
            f"Ready for {age_minutes:.0f} min",
            f"{SETTLED.total_seconds() / 60:.0f} min",
        ),
        Check(
            "spare_node",
            node.spare_instance_id is None or node.spare_ready,
            "none" if node.spare_instance_id is None else f"{node.spare_instance_id} of an earlier return",
            "none, or Ready: it is used again",
        ),
        Check(
            "no_recent_failure",
            failed is None or failed * 3600 >= AFTER_FAILURE.total_seconds(),
            "none" if failed is None else f"{failed:.1f} h ago",
            f"{AFTER_FAILURE.total_seconds() / 3600:.0f} h",
        ),
    ]


def window_open(windows: Any, now: datetime) -> bool:
    """Whether plans may disrupt nodes now: inside one of the customer's windows, or there are none."""
    if not isinstance(windows, Mapping) or not windows.get("windows"):
        return True
    local = now.astimezone(ZoneInfo(str(windows.get("time_zone") or "UTC")))
    return any(_inside(window, local) for window in windows["windows"])


def _inside(window: Mapping[str, Any], local: datetime) -> bool:
    start, end = time.fromisoformat(window["start"]), time.fromisoformat(window["end"])
    at, days = local.time(), window["days"]
    if start < end:
        return _day(local) in days and start <= at < end
    # Over midnight: the evening of a day named, or the morning after it.
    return (_day(local) in days and at >= start) or (_day(local - timedelta(days=1)) in days and at < end)


def _day(moment: datetime) -> str:
    return ("mon", "tue", "wed", "thu", "fri", "sat", "sun")[moment.weekday()]


def _budget(config: Any, nodes: int) -> int:
    ratio, least = (config.get("ratio", 0.1), config.get("nodes", 1)) if isinstance(config, Mapping) else (0.1, 1)
    return max(int(nodes * ratio), int(least))


def _floor(config: Any, nodes: int) -> int:
    if not isinstance(config, Mapping):
        return 0
    return max(int(config.get("nodes", 0)), math.ceil(nodes * config.get("ratio", 0.0)))


def _hours_since(moment: datetime | None, now: datetime) -> float | None:
    return None if moment is None else (now - moment).total_seconds() / 3600


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default


# --- the plan that follows --------------------------------------------------------------------------------------

STEPS: Sequence[str] = ("launch", "drain", "terminate")
# The agent said the node is drained; its next reports must show the node cordoned.
SHOWN_WITHIN = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a plan stands, from tables alone."""

    launch: str
    drain: str | None
    drained_at: datetime | None
    terminating: bool
    old_gone: bool
    old_cordoned: bool
    new_ready: bool
    interruptions_in_flight: int
    stopped: bool
    stop_requested: bool


@dataclass(frozen=True, slots=True)
class Move:
    """What to do next. ``end``: the plan's last status; ``uncordon``: give the old node back."""

    do: str
    reason: str
    end: str | None = None
    uncordon: bool = False


WAIT = Move("wait", "")


def next_move(at: Progress, now: datetime) -> Move:
    """The next move of a plan. Nothing is begun while an interruption is in flight, or while the kill switch is on."""
    if at.terminating:
        # The call may not have been made yet: what holds for a first one holds for its repetition.
        if not at.old_gone and (at.interruptions_in_flight or at.stopped):
            return WAIT
        return Move("terminate", "again, until EC2 says it is ending")
    if at.launch in ("exhausted", "cancelled"):
        if at.old_gone or at.stop_requested:
            return Move("end", "stopped before anything was moved", "stopped")
        return Move("end", "no Spot instance could be launched; nothing was moved", "rolled_back")
    if at.old_gone:
        if at.launch in ("planned", "blocked"):
            return Move("cancel_launch", "the node ended by itself")
        return Move("end", "the node ended by itself; the Spot node takes its place", "stopped")
    if at.launch != "ready":
        if at.stop_requested and at.launch in ("planned", "blocked"):
            return Move("cancel_launch", "stopped on request")
        return WAIT
    if at.drain in ("failed", "refused", "expired", "superseded"):
        return Move("end", f"the drain is {at.drain}; both nodes are kept", "stuck", uncordon=True)
    if not at.new_ready:
        if at.interruptions_in_flight:
            return WAIT
        return Move("end", "the Spot node ended before the move was over", "rolled_back", uncordon=at.drain is not None)
    if at.drain in ("queued", "leased"):
        return WAIT
    if at.stop_requested:
        return Move("end", "stopped on request; both nodes are kept", "stopped", uncordon=at.drain is not None)
    if at.interruptions_in_flight or at.stopped:
        return WAIT
    if at.drain is None:
        return Move("drain", "the Spot node is Ready")
    if at.old_cordoned:
        return Move("terminate", "the node is drained and cordoned")
    if at.drained_at is not None and now - at.drained_at > SHOWN_WITHIN:
        return Move("end", "the agent said the node is drained, and it is not even cordoned", "stuck")
    return WAIT
