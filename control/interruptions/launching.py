"""The launch branch's planning: claim, choose, freeze, commit, call. Any worker may do any step of any intent.

A round claims intents, reads what a choice needs, commits one frozen batch per (cluster, template, pool) and only then
calls EC2. ``accounts`` reads the customer's account, ``freezing`` makes the rows and requests, ``calling`` sends them
and records the answers, ``moving`` commits what changed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from control.gateways.aws import AwsError
from control.interruptions import answers, launch_repository, market_repository, metrics, wanted_repository
from control.interruptions.accounts import Accounts
from control.interruptions.answers import Meaning
from control.interruptions.calling import THROTTLED_SECONDS, Calls, heartbeat
from control.interruptions.caps import Caps
from control.interruptions.choosing import Market, TypeFacts
from control.interruptions.freezing import Planned, choice_for, freeze, limits_of, storm_pause, tried
from control.interruptions.launch_repository import ClusterFacts, IntentRow
from control.interruptions.market_repository import SpotPrice
from control.interruptions.moving import Moves, apply_events, intent_of
from control.interruptions.runtime import Runtime
from control.interruptions.states import Attempted, Cancel, IntentState, NoCandidate, Unblocked, apply_launch

log = structlog.get_logger(__name__)

# A storm is gathered into few calls: one round takes up to this many intents.
CLAIM_LIMIT = 200
# Within a storm EC2's bucket of launches refills with two calls a second: a round per two seconds keeps below it.
ROUND_SECONDS = 2.0
STOPPED_SECONDS = 10.0
# Until some node of the cluster can be looked at, or the window closes.
TEMPLATE_SECONDS = 10.0
NO_TEMPLATE = "no running instance of the cluster shows how its nodes are launched"
COMING = "another launch takes its place and is under way"
IN_FLIGHT = "an interruption in the cluster is in flight, and goes first"
# More replacements interrupted than this within ten minutes: Spot is not to be had, stop trying (C-27).
MAX_CHAIN = 3
# Clusters planned at once: warnings that come in meanwhile must get their turns of the process.
PLANS_AT_ONCE = 16
# What a cap holds back is looked at again this often; an hour's window moves on by itself.
CAPPED_SECONDS = 30.0
MARKET_SECONDS = 30.0


class Launcher:
    """The launch work of one worker process."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.accounts = Accounts(runtime)
        self.calls = Calls(runtime, self.accounts)
        self._markets: dict[str, tuple[float, dict[str, TypeFacts], list[SpotPrice]]] = {}
        self._plans: set[asyncio.Task[None]] = set()
        # What other loops do in the background for one account: stopped with the launches.
        self.others: set[asyncio.Task[int]] = set()
        self._planning = asyncio.Semaphore(PLANS_AT_ONCE)

    # --- planning

    async def plan_round(self) -> int:
        """Claim intents, commit batches for them and start their calls; returns how many intents were claimed.

        An account whose EC2 answers slowly, or not at all, is planned on in the background: the others do not wait.
        """
        async with self.runtime.db.system() as conn:
            intents = await launch_repository.claim_intents(conn, worker=self.runtime.worker, limit=CLAIM_LIMIT)
            if not intents:
                return 0
            clusters = await launch_repository.cluster_facts(conn, sorted({i.cluster_id for i in intents}))
        by_cluster: dict[UUID, list[IntentRow]] = defaultdict(list)
        for intent in intents:
            by_cluster[intent.cluster_id].append(intent)
        plans = {
            asyncio.create_task(self._plan(clusters[cluster_id], group), name=f"plan {cluster_id}")
            for cluster_id, group in by_cluster.items()
        }
        self._plans |= plans
        for plan in plans:
            plan.add_done_callback(self._plans.discard)
        await asyncio.wait(plans, timeout=ROUND_SECONDS)
        return len(intents)

    async def _plan(self, cluster: ClusterFacts, intents: list[IntentRow]) -> None:
        ids = [intent.id for intent in intents]
        try:
            keep = partial(launch_repository.keep_intents, ids=ids, worker=self.runtime.worker)
            async with heartbeat(self.runtime, keep), self._planning:
                await self._plan_cluster(cluster, intents)
        except Exception as error:
            # The intents keep their lease and are planned again, by anybody, when it ends.
            metrics.LOOP_FAILURES.labels("launch_plan", type(error).__name__).inc()
            log.warning("launch.plan_failed", cluster_id=str(cluster.cluster_id), error=str(error)[:300])

    async def _plan_cluster(self, cluster: ClusterFacts, intents: list[IntentRow]) -> None:
        ids = [intent.id for intent in intents]
        if cluster.stopped:
            async with self.runtime.db.system() as conn:
                await launch_repository.postpone_intents(
                    conn, ids, worker=self.runtime.worker, seconds=STOPPED_SECONDS, reason="the kill switch is on"
                )
            return
        if cluster.leaving or cluster.customer_status == "suspended":
            await apply_events(self.runtime, dict.fromkeys(ids, Cancel("the cluster or its customer is gone")))
            return
        try:
            credentials = await self.accounts.credentials(cluster)
            kept, ended = await self.accounts.templates_of(cluster, intents, credentials)
        except AwsError as error:
            reading = answers.read(error)
            log.warning("launch.template_failed", cluster_id=str(cluster.cluster_id), code=error.code)
            denied = reading.meaning is Meaning.DENIED
            async with self.runtime.db.system() as conn:
                await launch_repository.postpone_intents(
                    conn,
                    ids,
                    worker=self.runtime.worker,
                    seconds=60.0 if denied else random.uniform(*THROTTLED_SECONDS),
                    reason=f"{error.code}: {error.message}"[:300],
                )
            return
        if ended:
            reason = "the instance was ended by its owner, not reclaimed"
            await apply_events(self.runtime, dict.fromkeys(ended, Cancel(reason)))
            intents = [intent for intent in intents if intent.id not in ended]
        unknown = [intent.id for intent in intents if intent.id not in kept]
        if unknown:
            async with self.runtime.db.system() as conn:
                await launch_repository.postpone_intents(
                    conn, unknown, worker=self.runtime.worker, seconds=TEMPLATE_SECONDS, reason=NO_TEMPLATE
                )
        await self._commit_plan(cluster, [intent for intent in intents if intent.id in kept], kept)

    async def _commit_plan(
        self, cluster: ClusterFacts, intents: list[IntentRow], templates: Mapping[UUID, dict[str, Any]]
    ) -> None:
        on_demand_only = cluster.recent_replacements_interrupted >= MAX_CHAIN
        limits = limits_of(cluster.config, on_demand_only=on_demand_only)
        held: dict[str, list[UUID]] = defaultdict(list)
        async with self.runtime.db.system() as conn:
            # One at a time per customer, in any process: what a cap allows is counted and spent in one transaction.
            await launch_repository.lock_launches(conn, cluster.customer_id)
            recent = await launch_repository.recent_launches(
                conn, cluster.customer_id, cluster.region, cluster.cluster_id
            )
            pause = storm_pause(recent.calls_last_minute, recent.seconds_since_last_call)
            if pause > 0:
                await launch_repository.postpone_intents(
                    conn, [intent.id for intent in intents], worker=self.runtime.worker, seconds=pause
                )
                return
            caps = Caps.of(cluster.config, recent.launches_last_hour, recent.spend_last_hour_usd)
            types, prices = await self._market(conn, cluster.region)
            zone_names = await market_repository.zone_names(conn, cluster.cluster_id)
            spot = market_repository.spot_by_pool(prices, zone_names)
            standings = await market_repository.standings(conn, cluster.customer_id, cluster.region)
            locked = await launch_repository.lock_intents(conn, [intent.id for intent in intents])
            attempts = await launch_repository.attempts_of(conn, list(locked))
            overtaken = await wanted_repository.overtaken_intents(conn, list(locked))
            replaced = await wanted_repository.replaced_intents(conn, list(locked))
            spare = await wanted_repository.spare_intents(conn, list(locked))
            held_returns = await wanted_repository.held_returns(conn, list(locked))
            planned: list[Planned] = []
            waiting: dict[UUID, str] = {}
            moves = Moves(self.runtime.db.now())
            for claimed in intents:
                row = locked.get(claimed.id)
                # Somebody else took it over while we asked EC2: theirs now.
                if row is None or row.lease_epoch != claimed.lease_epoch:
                    continue
                state = intent_of(row, attempts[row.id])
                if row.id in overtaken:
                    reason = "its replacement was interrupted too, and is replaced for that interruption"
                    moves.move(row, attempts[row.id], state, Cancel(reason))
                    continue
                if row.id in spare:
                    reason = f"{spare[row.id]}, which it was to take back to Spot, still lives"
                    moves.move(row, attempts[row.id], state, Cancel(reason))
                    continue
                if row.id in replaced:
                    replacement = replaced[row.id]
                    if replacement is None:
                        waiting[row.id] = COMING
                    else:
                        moves.move(row, attempts[row.id], state, Cancel(f"{replacement} has replaced it already"))
                    continue
                if row.id in held_returns:
                    waiting[row.id] = IN_FLIGHT
                    continue
                if state.state is IntentState.BLOCKED:
                    state, _ = apply_launch(state, Unblocked())
                template = templates[row.id]
                market = Market(
                    zones=sorted(template["subnets"]) or sorted({zone for zone, _ in spot}),
                    types=types,
                    spot=spot,
                    standings=standings,
                )
                choice = choice_for(row, market, limits, tried(attempts[row.id]))
                if isinstance(choice, str):
                    moves.move(row, attempts[row.id], state, NoCandidate(choice))
                    continue
                over = caps.take(choice.pool)
                if over:
                    held[over].append(row.id)
                    continue
                after = moves.move(row, attempts[row.id], state, Attempted(), decided_by=choice.reason)
                if after.state is IntentState.LAUNCHING:
                    planned.append(Planned(row, choice.pool, template))
            frozen = freeze(
                cluster,
                planned,
                attempts,
                worker=self.runtime.worker,
                deployment_id=self.runtime.deployment_id,
                now=self.runtime.db.now(),
            )
            # The intents first: the index of live attempts then refuses what a lost race would double.
            await moves.save(conn, expect_attempts=False)
            await launch_repository.insert_batches(conn, frozen.rows, frozen.slots)
            for reason, ids in held.items():
                await launch_repository.postpone_intents(
                    conn, ids, worker=self.runtime.worker, seconds=CAPPED_SECONDS, reason=reason
                )
            for reason in set(waiting.values()):
                ids = [intent_id for intent_id, why in waiting.items() if why == reason]
                await launch_repository.postpone_intents(
                    conn, ids, worker=self.runtime.worker, seconds=ROUND_SECONDS, reason=reason
                )
        for reason, ids in held.items():
            metrics.ALARMS.labels("launch_cap").inc()
            log.error("launch.capped", customer_id=str(cluster.customer_id), launches=len(ids), reason=reason)
        moves.report()
        for batch in frozen.batches:
            self.calls.call_soon(batch, cluster)

    async def _market(self, conn: AsyncConnection, region: str) -> tuple[dict[str, TypeFacts], list[SpotPrice]]:
        known = self._markets.get(region)
        if known is None or time.monotonic() - known[0] > MARKET_SECONDS:
            known = (time.monotonic(), *await market_repository.prices(conn, region))
            self._markets[region] = known
        return known[1], known[2]

    async def finish_calls(self, timeout: float) -> None:
        """Wait for plans and calls under way, at most ``timeout`` seconds."""
        ends = time.monotonic() + timeout
        for kind in (self._plans, self.calls.under_way, self.others):
            if kind:
                await asyncio.wait(kind, timeout=max(ends - time.monotonic(), 0.0))

    async def leave(self) -> None:
        """Stop calls under way and give back every lease, so that others go on at once."""
        for kind in (self._plans, self.calls.under_way, self.others):
            for work in list(kind):
                work.cancel()
            await asyncio.gather(*kind, return_exceptions=True)
        try:
            async with self.runtime.db.system() as conn:
                released = await launch_repository.release_leases(conn, self.runtime.worker)
        except (SQLAlchemyError, OSError) as error:
            # They run out by themselves.
            log.warning("launch.leases_kept", error=type(error).__name__)
            return
        if released:
            log.info("launch.leases_released", leases=released)
            await self.runtime.bells.ring("launches")
            await self.runtime.bells.ring("launch_calls")
