"""From choices to frozen RunInstances calls: which pool an intent gets, and the rows and requests of its batch.

Nothing here reads a clock, a table or the network: what comes out is stored first and sent byte for byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from control.gateways.aws import client_token
from control.interruptions import launch_repository
from control.interruptions.choosing import Choice, Limits, Market, Pool, Wanted, choose, choose_only
from control.interruptions.launch_repository import AttemptRow, BatchRow, ClusterFacts, IntentRow
from control.interruptions.states import WITHDRAWN
from control.interruptions.templates import fingerprint, run_instances_request
from warehouse.postgres.models import new_id

# A storm is gathered into few calls: a batch takes up to this many slots.
BATCH_SIZE = 50
# From so many calls of an account in a region within a minute on, a cluster's intents are gathered for longer: EC2
# refills its bucket of launches with two a second, and a call for ten slots takes no more of it than one for one.
STORM_CALLS = ((60, 20.0), (16, 8.0))


@dataclass(frozen=True, slots=True)
class Planned:
    """An intent with the pool it gets, and how its nodes are launched."""

    intent: IntentRow
    pool: Pool
    template: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Frozen:
    """Rows of batches and of the attempts in their slots, and the batches to call once those are committed."""

    rows: list[dict[str, Any]]
    slots: list[dict[str, Any]]
    batches: list[BatchRow]


def freeze(
    cluster: ClusterFacts,
    planned: Sequence[Planned],
    attempts: Mapping[UUID, list[AttemptRow]],
    *,
    worker: str,
    deployment_id: str,
    now: datetime,
) -> Frozen:
    """One call per template and pool, at most ``BATCH_SIZE`` slots each, leased to ``worker``."""
    groups: dict[tuple[str, Pool], list[Planned]] = defaultdict(list)
    for plan in planned:
        groups[fingerprint(plan.template), plan.pool].append(plan)
    rows: list[dict[str, Any]] = []
    slots: list[dict[str, Any]] = []
    batches: list[BatchRow] = []
    for (_, pool), group in groups.items():
        for start in range(0, len(group), BATCH_SIZE):
            share = group[start : start + BATCH_SIZE]
            batch_id, token = new_id(), client_token()
            request = run_instances_request(
                share[0].template,
                pool,
                count=len(share),
                client_token=token,
                deployment_id=deployment_id,
                customer_id=cluster.customer_id,
                cluster_id=cluster.cluster_id,
                cluster_name=cluster.cluster_name,
                batch_id=batch_id,
            )
            lease = now + timedelta(seconds=launch_repository.LEASE_SECONDS)
            rows.append(
                {
                    "id": batch_id,
                    "customer_id": cluster.customer_id,
                    "cluster_id": cluster.cluster_id,
                    "region": cluster.region,
                    "client_token": token,
                    "request_json": request,
                    "size": len(share),
                    "state": "calling",
                    "lease_epoch": 1,
                    "lease_until": lease,
                    "leased_by": worker,
                    "next_action_at": lease,
                }
            )
            slots += [
                {
                    "id": new_id(),
                    "customer_id": cluster.customer_id,
                    "intent_id": plan.intent.id,
                    "attempt_no": len(attempts[plan.intent.id]) + 1,
                    "batch_id": batch_id,
                    "slot": slot,
                    "instance_type": pool.instance_type,
                    "availability_zone": pool.availability_zone,
                    "node_type": pool.node_type,
                    "price_usd_per_hour": pool.price_usd_per_hour,
                    "state": "calling",
                }
                for slot, plan in enumerate(share)
            ]
            batches.append(
                BatchRow(
                    batch_id,
                    cluster.customer_id,
                    cluster.cluster_id,
                    cluster.region,
                    token,
                    request,
                    len(share),
                    "calling",
                    0,
                    None,
                    now,
                    1,
                )
            )
    return Frozen(rows, slots, batches)


def tried(attempts: Sequence[AttemptRow]) -> list[Pool]:
    """The pools that EC2 was asked for, in order."""
    return [
        Pool(attempt.instance_type, attempt.availability_zone, attempt.node_type)
        for attempt in attempts
        if attempt.failure != WITHDRAWN
    ]


def _wanted(row: IntentRow) -> Wanted:
    needs = row.requirements
    return Wanted(
        instance_type=needs["instance_type"],
        availability_zone=needs["availability_zone"],
        node_type=needs["node_type"],
        cpu_cores=float(needs.get("cpu_cores") or 0.0),
        memory_gib=float(needs.get("memory_gib") or 0.0),
    )


def limits_of(config: Mapping[str, Any], *, on_demand_only: bool = False) -> Limits:
    """A customer's limits from its configuration."""
    types, zones = config.get("allowed_instance_types"), config.get("allowed_zones")
    cap = config.get("price_cap_ratio")
    return Limits(
        instance_types=frozenset(types) if isinstance(types, list) else frozenset(),
        zones=frozenset(zones) if isinstance(zones, list) else frozenset(),
        price_cap_ratio=min(float(cap), 1.0) if isinstance(cap, int | float) and cap > 0 else 1.0,
        on_demand_only=on_demand_only,
    )


def storm_pause(calls_last_minute: int, seconds_since_last_call: float | None) -> float:
    """Seconds until a cluster's next round of launches may go out."""
    if seconds_since_last_call is None:
        return 0.0
    for calls, round_seconds in STORM_CALLS:
        if calls_last_minute >= calls:
            return max(round_seconds - seconds_since_last_call, 0.0)
    return 0.0


def choice_for(row: IntentRow, market: Market, limits: Limits, tried: Sequence[Pool]) -> Choice | str:
    pool = row.requirements.get("pool")
    if pool is not None:
        # A plan names its one pool; what the plan was judged by must still hold.
        return choose_only(_wanted(row), pool["instance_type"], pool["availability_zone"], market, limits, tried)
    return choose(_wanted(row), market, limits, tried)
