"""The launch branch: plan, freeze, commit, call, record. Any worker may do any step of any intent.

A round claims intents, reads what a choice needs, commits one frozen batch per (cluster, template, pool) and only then
calls EC2. What the answer means is decided by ``answers`` and ``states``; this module fetches, applies and commits.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from control.gateways.aws import AwsError, Credentials, Role, client_token
from control.interruptions import answers, launch_repository, metrics, pools, repository
from control.interruptions.answers import Meaning, Reading
from control.interruptions.caps import Caps
from control.interruptions.choosing import Choice, Limits, Market, Pool, TypeFacts, Wanted, choose, choose_only
from control.interruptions.launch_repository import AttemptRow, BatchRow, ClusterFacts, IntentRow
from control.interruptions.runtime import Runtime
from control.interruptions.states import (
    Abandoned,
    Alarm,
    Attempt,
    Attempted,
    AttemptState,
    Cancel,
    Command,
    Denied,
    InstanceEnded,
    Intent,
    IntentState,
    Launched,
    LaunchEvent,
    Mismatched,
    NoCandidate,
    Plan,
    Refused,
    Unanswered,
    Unblocked,
    apply_launch,
)
from control.interruptions.templates import (
    fingerprint,
    run_instances_request,
    subnets_by_zone,
    template_of,
    user_data_group,
)
from warehouse.postgres.models import new_id

log = structlog.get_logger(__name__)

# A storm is gathered into few calls: one round takes up to this many intents, a batch this many slots.
CLAIM_LIMIT = 200
BATCH_SIZE = 50
# Within a storm EC2's bucket of launches refills with two calls a second: a round per two seconds keeps below it.
ROUND_SECONDS = 2.0
# The same token again after this long (RELIABILITY §2.5), and never after ten minutes.
RETRY_SECONDS = 20.0
THROTTLED_SECONDS = (1.0, 3.0)
GIVE_UP_AFTER = timedelta(minutes=10)
# A denied account is asked again every minute while a replacement still makes sense.
BLOCKED_SECONDS = 60.0
STOPPED_SECONDS = 10.0
# Until some node of the cluster can be looked at, or the window closes.
TEMPLATE_SECONDS = 10.0
NO_TEMPLATE = "no running instance of the cluster shows how its nodes are launched"
# More replacements interrupted than this within ten minutes: Spot is not to be had, stop trying (C-27).
MAX_CHAIN = 3
# Clusters planned at once: warnings that come in meanwhile must get their turns of the process.
PLANS_AT_ONCE = 16
# What a cap holds back is looked at again this often; an hour's window moves on by itself.
CAPPED_SECONDS = 30.0
# From so many calls of an account in a region within a minute on, a cluster's intents are gathered for longer: EC2
# refills its bucket of launches with two a second, and a call for ten slots takes no more of it than one for one.
STORM_CALLS = ((60, 20.0), (16, 8.0))
MARKET_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class _Planned:
    intent: IntentRow
    pool: Pool
    reason: str
    template: dict[str, Any]


class Launcher:
    """The launch work of one worker process."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._markets: dict[str, tuple[float, dict[str, TypeFacts], dict[tuple[str, str], float]]] = {}
        self._calls: set[asyncio.Task[None]] = set()
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
            async with self._heartbeat(keep), self._planning:
                await self._plan_cluster(cluster, intents)
        except Exception as error:
            # The intents keep their lease and are planned again, by anybody, when it ends.
            metrics.LOOP_FAILURES.labels("launch_plan", type(error).__name__).inc()
            log.warning("launch.plan_failed", cluster_id=str(cluster.cluster_id), error=str(error)[:300])

    @asynccontextmanager
    async def _heartbeat(self, keep: Callable[[AsyncConnection], Awaitable[bool]]) -> AsyncIterator[None]:
        """Keep leases alive until the block ends: slow work is not dead work."""
        task = asyncio.create_task(self._beat(keep), name="heartbeat")
        try:
            yield
        finally:
            task.cancel()

    async def _beat(self, keep: Callable[[AsyncConnection], Awaitable[bool]]) -> None:
        while True:
            await asyncio.sleep(launch_repository.HEARTBEAT_SECONDS)
            try:
                async with self.runtime.db.system() as conn:
                    if not await keep(conn):
                        return
            except (SQLAlchemyError, OSError) as error:
                log.warning("launch.heartbeat_failed", error=type(error).__name__)

    async def _plan_cluster(self, cluster: ClusterFacts, intents: list[IntentRow]) -> None:
        ids = [intent.id for intent in intents]
        if cluster.stopped:
            async with self.runtime.db.system() as conn:
                await launch_repository.postpone_intents(
                    conn, ids, worker=self.runtime.worker, seconds=STOPPED_SECONDS, reason="the kill switch is on"
                )
            return
        if cluster.leaving or cluster.customer_status == "suspended":
            await self._apply_all(ids, Cancel("the cluster or its customer is gone"))
            return
        try:
            credentials = await self.credentials(cluster)
            kept, ended = await self._templates(cluster, intents, credentials)
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
            await self._apply_all(ended, Cancel("the instance was ended by its owner, not reclaimed"))
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
        batches: list[BatchRow] = []
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
            types, spot = await self._market(conn, cluster.region)
            standings = await launch_repository.standings(conn, cluster.customer_id, cluster.region)
            locked = await launch_repository.lock_intents(conn, [intent.id for intent in intents])
            attempts = await launch_repository.attempts_of(conn, list(locked))
            overtaken = await launch_repository.overtaken_intents(conn, list(locked))
            planned: list[_Planned] = []
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
                if state.state is IntentState.BLOCKED:
                    state, _ = apply_launch(state, Unblocked())
                template = templates[row.id]
                market = Market(
                    zones=sorted(template["subnets"]) or sorted({zone for zone, _ in spot}),
                    types=types,
                    spot=spot,
                    standings=standings,
                )
                choice = _choice(row, market, limits, [_pool(attempt) for attempt in attempts[row.id]])
                if isinstance(choice, str):
                    moves.move(row, attempts[row.id], state, NoCandidate(choice))
                    continue
                over = caps.take(choice.pool)
                if over:
                    held[over].append(row.id)
                    continue
                after = moves.move(row, attempts[row.id], state, Attempted(), decided_by=choice.reason)
                if after.state is IntentState.LAUNCHING:
                    planned.append(_Planned(row, choice.pool, choice.reason, template))
            rows, slots, batches = self._batches(cluster, planned, attempts)
            # The intents first: the index of live attempts then refuses what a lost race would double.
            await moves.save(conn, expect_attempts=False)
            await launch_repository.insert_batches(conn, rows, slots)
            for reason, ids in held.items():
                await launch_repository.postpone_intents(
                    conn, ids, worker=self.runtime.worker, seconds=CAPPED_SECONDS, reason=reason
                )
        for reason, ids in held.items():
            metrics.ALARMS.labels("launch_cap").inc()
            log.error("launch.capped", customer_id=str(cluster.customer_id), launches=len(ids), reason=reason)
        moves.report()
        for batch in batches:
            self.call_soon(batch, cluster)

    def _batches(
        self, cluster: ClusterFacts, planned: Sequence[_Planned], attempts: Mapping[UUID, list[AttemptRow]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[BatchRow]]:
        groups: dict[tuple[str, Pool], list[_Planned]] = defaultdict(list)
        for plan in planned:
            groups[fingerprint(plan.template), plan.pool].append(plan)
        rows, slots, batches = [], [], []
        now = self.runtime.db.now()
        for (_, pool), group in groups.items():
            for start in range(0, len(group), BATCH_SIZE):
                share = group[start : start + BATCH_SIZE]
                batch_id, token = new_id(), client_token()
                request = run_instances_request(
                    share[0].template,
                    pool,
                    count=len(share),
                    client_token=token,
                    deployment_id=self.runtime.deployment_id,
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
                        "leased_by": self.runtime.worker,
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
        return rows, slots, batches

    async def _market(
        self, conn: AsyncConnection, region: str
    ) -> tuple[dict[str, TypeFacts], dict[tuple[str, str], float]]:
        known = self._markets.get(region)
        if known is None or time.monotonic() - known[0] > MARKET_SECONDS:
            types, spot = await launch_repository.prices(conn, region)
            known = (
                time.monotonic(),
                {row[0]: TypeFacts(*row) for row in types},
                {(zone, name): price for zone, name, price in spot},
            )
            self._markets[region] = known
        return known[1], known[2]

    async def _templates(
        self, cluster: ClusterFacts, intents: Sequence[IntentRow], credentials: Credentials
    ) -> tuple[dict[UUID, dict[str, Any]], set[UUID]]:
        """The template of each intent, and the intents whose instance its owner ended."""
        async with self.runtime.db.system() as conn:
            kept = await launch_repository.templates(conn, cluster.cluster_id)
        by_instance = {instance_id: template for template, seen in reversed(kept) for instance_id in seen}
        wanted = {intent.id: str(intent.requirements["instance_id"]) for intent in intents}
        asked = {
            wanted[intent.id]
            for intent in intents
            if wanted[intent.id] not in by_instance or intent.requirements.get("verify_ended_by_aws")
        }
        described = await self.describe(cluster.region, credentials, sorted(asked)) if asked else {}
        ended = {
            intent.id
            for intent in intents
            if intent.requirements.get("verify_ended_by_aws")
            and str(described.get(wanted[intent.id], {}).get("StateReason", {}).get("Code", "")).startswith("Client.")
        }
        fresh = {
            instance_id: instance
            for instance_id, instance in described.items()
            if instance_id not in by_instance and instance.get("SubnetId")
        }
        if fresh:
            by_instance |= await self.learn_templates(cluster, list(fresh.values()), credentials)
        if not by_instance:
            # The first of a cluster, and already gone: any of its living nodes shows how it is done.
            async with self.runtime.db.system() as conn:
                others = await launch_repository.living_instances(conn, cluster.cluster_id, limit=20)
            alive = await self.describe(cluster.region, credentials, others) if others else {}
            shown = [instance for instance in alive.values() if instance.get("SubnetId")]
            by_instance |= await self.learn_templates(cluster, shown, credentials) if shown else {}
        newest = kept[0][0] if kept else next(iter(by_instance.values()), None)
        found = {intent_id: by_instance.get(instance_id, newest) for intent_id, instance_id in wanted.items()}
        return {intent_id: template for intent_id, template in found.items() if template is not None}, ended

    async def learn_templates(
        self, cluster: ClusterFacts, instances: Sequence[Mapping[str, Any]], credentials: Credentials
    ) -> dict[str, dict[str, Any]]:
        """Derive and keep the templates of running instances; returns them by instance id."""
        vpcs = sorted({instance["VpcId"] for instance in instances if instance.get("VpcId")})
        subnets: dict[str, list[dict[str, Any]]] = defaultdict(list)
        if vpcs:
            filters = [{"Name": "vpc-id", "Values": vpcs}, {"Name": "state", "Values": ["available"]}]
            async for subnet in self.runtime.aws.pages(
                "ec2",
                "DescribeSubnets",
                {"Filters": filters},
                "Subnets",
                region=cluster.region,
                credentials=credentials,
            ):
                subnets[subnet["VpcId"]].append(subnet)
        user_data: dict[tuple[str, ...], str | None] = {}
        learned: dict[str, dict[str, Any]] = {}
        rows: dict[str, dict[str, Any]] = {}
        for instance in instances:
            group = user_data_group(instance)
            if group not in user_data:
                user_data[group] = await self._user_data(cluster.region, credentials, instance["InstanceId"])
            by_zone = subnets_by_zone(subnets.get(instance.get("VpcId", ""), []))
            template = template_of(instance, by_zone, user_data[group])
            learned[instance["InstanceId"]] = template
            mark = fingerprint(template)
            row = rows.setdefault(
                mark,
                {
                    "id": new_id(),
                    "customer_id": cluster.customer_id,
                    "cluster_id": cluster.cluster_id,
                    "fingerprint": mark,
                    "template": template,
                    "instance_ids": [],
                },
            )
            row["instance_ids"].append(instance["InstanceId"])
        async with self.runtime.db.system() as conn:
            await launch_repository.save_templates(conn, list(rows.values()))
        return learned

    async def _user_data(self, region: str, credentials: Credentials, instance_id: str) -> str | None:
        try:
            answer = await self.runtime.aws.call(
                "ec2",
                "DescribeInstanceAttribute",
                {"InstanceId": instance_id, "Attribute": "userData"},
                region=region,
                credentials=credentials,
            )
        except AwsError as error:
            # Nodes that need no user data launch without this right; those that do never become Ready and alarm.
            log.warning("launch.user_data_unreadable", code=error.code)
            return None
        return answer.get("UserData", {}).get("Value") or None

    async def describe(
        self, region: str, credentials: Credentials, instance_ids: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Instances by id; those EC2 does not know are left out."""
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(instance_ids), 200):
            filters = [{"Name": "instance-id", "Values": list(instance_ids[start : start + 200])}]
            async for reservation in self.runtime.aws.pages(
                "ec2",
                "DescribeInstances",
                {"Filters": filters},
                "Reservations",
                region=region,
                credentials=credentials,
            ):
                found |= {instance["InstanceId"]: instance for instance in reservation.get("Instances", [])}
        return found

    async def credentials(self, cluster: ClusterFacts) -> Credentials:
        """Credentials of the cluster's customer, assumed with its role and external id.

        Raises:
            AwsError: ``NoCredentials`` when the customer has no role yet, else as STS answered.
        """
        if not cluster.role_arn:
            raise AwsError("AssumeRole", "NoCredentials", "the customer has no aws_role_arn")
        return await self.runtime.aws.assume(Role(cluster.customer_id, cluster.role_arn, cluster.external_id))

    # --- calling

    def call_soon(self, batch: BatchRow, cluster: ClusterFacts) -> None:
        """Make a committed call in the background; a crash leaves it to the launch reconciler."""
        self.in_background(self.call(batch, cluster), f"launch {batch.id}")

    def in_background(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Do something about one batch without waiting for it; what fails is told and harms no other."""
        task = asyncio.create_task(self._guarded(work, name), name=name)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return task

    @property
    def settling(self) -> int:
        """How many batches are being called, repeated or looked for."""
        return len(self._calls)

    async def _guarded(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except Exception as error:
            # The batch keeps its lease and is repeated with the same token when it ends.
            metrics.LOOP_FAILURES.labels("launch_call", type(error).__name__).inc()
            log.warning("launch.call_interrupted", call=name, error=str(error)[:300])

    def holding(self, batch: BatchRow) -> AbstractAsyncContextManager[None]:
        """Keep a claimed batch for as long as the block takes."""
        return self._heartbeat(partial(launch_repository.keep_batch, batch=batch))

    async def finish_calls(self, timeout: float) -> None:
        """Wait for plans and calls under way, at most ``timeout`` seconds."""
        ends = time.monotonic() + timeout
        for kind in (self._plans, self._calls, self.others):
            if kind:
                await asyncio.wait(kind, timeout=max(ends - time.monotonic(), 0.0))

    async def leave(self) -> None:
        """Stop calls under way and give back every lease, so that others go on at once."""
        for kind in (self._plans, self._calls, self.others):
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

    async def call(self, batch: BatchRow, cluster: ClusterFacts) -> None:
        """Send a frozen request, once, and record what became of it."""
        async with self.runtime.db.system() as conn:
            calls = await launch_repository.note_call(conn, batch)
            if not calls:
                return
        async with self.holding(batch):
            await self._call(batch, cluster, first=calls == 1)

    async def _call(self, batch: BatchRow, cluster: ClusterFacts, *, first: bool) -> None:
        try:
            credentials = await self.credentials(cluster)
            answer = await self.runtime.aws.call(
                "ec2",
                "RunInstances",
                json.loads(batch.request_json),
                region=batch.region,
                credentials=credentials,
            )
        except AwsError as error:
            if error.code in answers.EXPIRED_CODES and cluster.role_arn:
                self.runtime.aws.forget(Role(cluster.customer_id, cluster.role_arn, cluster.external_id))
            reading = answers.read(error)
            await self.record(batch, reading if first else answers.of_a_retry(reading))
            return
        instances = sorted(
            answer.get("Instances", []), key=lambda item: (item.get("AmiLaunchIndex", 0), item["InstanceId"])
        )
        await self.record(
            batch, Reading(Meaning.LAUNCHED, "", ""), instance_ids=[item["InstanceId"] for item in instances]
        )

    async def record(
        self,
        batch: BatchRow,
        reading: Reading,
        *,
        instance_ids: Sequence[str] = (),
        adopted: bool = False,
        abandoned: bool = False,
    ) -> None:
        """Apply one answer to a batch and all its slots in one transaction; a second answer changes nothing."""
        metrics.LAUNCH_CALLS.labels(reading.code or reading.meaning.value).inc()
        moves = Moves(self.runtime.db.now())
        async with self.runtime.db.system() as conn:
            locked = await launch_repository.lock_batch(conn, batch.id)
            if locked is None or locked[0].state not in ("calling", "unknown"):
                return
            if locked[0].lease_epoch != batch.lease_epoch:
                # We were away for longer than a lease. Whoever has it now gets the same answer with the same token.
                log.warning("launch.stale_answer", batch_id=str(batch.id), epoch=batch.lease_epoch)
                return
            _, slots = locked
            intents = await launch_repository.lock_intents(conn, [slot.intent_id for slot in slots])
            attempts = await launch_repository.attempts_of(conn, list(intents))
            signals: list[tuple[str, str, str, str]] = []
            for slot in slots:
                event = _event(reading, slot.slot, instance_ids, adopted=adopted, abandoned=abandoned)
                if event is None:
                    continue
                row = intents[slot.intent_id]
                moves.move(row, attempts[row.id], intent_of(row, attempts[row.id]), event)
                if isinstance(event, Refused) and event.code in answers.POOL_CODES and not signals:
                    signals.append((batch.region, slot.availability_zone, slot.instance_type, "refusal"))
            state, retry = _batch_after(reading, abandoned=abandoned)
            await launch_repository.update_batch(
                conn,
                batch.id,
                state=state or locked[0].state,
                error_code=reading.code or None,
                error_message=reading.message or None,
                retry_seconds=retry,
            )
            await moves.save(conn)
            await repository.add_penalties(
                conn,
                pools.penalties(batch.customer_id, signals),
                half_life_seconds=pools.HALF_LIFE_SECONDS,
                ceiling=pools.CEILING,
            )
        if instance_ids:
            metrics.LAUNCHED.labels("adopted" if adopted else "answered").inc(len(instance_ids))
        if reading.meaning is Meaning.MISMATCH:
            metrics.LAUNCH_MISMATCHES.inc()
        log.info(
            "launch.answered",
            batch_id=str(batch.id),
            customer_id=str(batch.customer_id),
            answer=reading.meaning.value,
            code=reading.code or None,
            instance_ids=list(instance_ids),
            size=batch.size,
        )
        moves.report()
        await moves.ring(self.runtime)

    async def _apply_all(self, intent_ids: Iterable[UUID], event: LaunchEvent) -> int:
        return await apply_to_intents(self.runtime, intent_ids, event)


async def apply_to_intents(runtime: Runtime, intent_ids: Iterable[UUID], event: LaunchEvent) -> int:
    """One event for several intents, committed; returns how many it moved."""
    return await apply_events(runtime, dict.fromkeys(intent_ids, event))


async def apply_events(runtime: Runtime, events: Mapping[UUID, LaunchEvent]) -> int:
    """One event per intent, committed together; returns how many moved."""
    if not events:
        return 0
    moves = Moves(runtime.db.now())
    async with runtime.db.system() as conn:
        rows = await launch_repository.lock_intents(conn, sorted(events))
        attempts = await launch_repository.attempts_of(conn, list(rows))
        for intent_id, row in rows.items():
            moves.move(row, attempts[intent_id], intent_of(row, attempts[intent_id]), events[intent_id])
        await moves.save(conn)
    moves.report()
    await moves.ring(runtime)
    return len(moves.intents)


class Moves:
    """Changes of intents and attempts in one transaction, and what to do once it is committed."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.intents: list[dict[str, Any]] = []
        self.attempts: list[dict[str, Any]] = []
        self.commands: list[tuple[IntentRow, Command]] = []
        self.ended = False

    def move(
        self,
        row: IntentRow,
        attempts: Sequence[AttemptRow],
        before: Intent,
        event: LaunchEvent,
        *,
        decided_by: str | None = None,
    ) -> Intent:
        after, commands = apply_launch(before, event)
        stored = intent_of(row, attempts)
        if after == stored:
            return after
        next_action = self.now
        if after.state is IntentState.BLOCKED:
            next_action = self.now + timedelta(seconds=BLOCKED_SECONDS)
        self.intents.append(
            {
                "id": row.id,
                "version": row.version,
                "state": after.state.value,
                "reason": after.reason,
                "decided_by": decided_by,
                "next_action_at": next_action,
            }
        )
        for known, attempt in zip(attempts, after.attempts, strict=False):
            if (known.state, known.instance_id, known.failure) != (
                attempt.state,
                attempt.instance_id,
                attempt.failure,
            ):
                self.attempts.append(
                    {
                        "id": known.id,
                        "state": attempt.state.value,
                        "instance_id": attempt.instance_id,
                        "failure": attempt.failure,
                    }
                )
        self.commands += [(row, command) for command in commands]
        self.ended = self.ended or after.state.value in ("ready", "exhausted", "cancelled")
        return after

    async def save(self, conn: AsyncConnection, *, expect_attempts: bool = True) -> None:
        """Write all changes; the intents are locked, so a version that moved is a defect, not a race."""
        moved = await launch_repository.update_intents(conn, self.intents)
        if len(moved) != len(self.intents):
            raise RuntimeError("a locked launch intent changed its version")
        await launch_repository.update_attempts(conn, self.attempts)

    def report(self) -> None:
        """Tell people what they should know."""
        for row, command in self.commands:
            if isinstance(command, Alarm):
                metrics.ALARMS.labels("launch").inc()
                log.error(
                    "launch.alarm",
                    reason=command.reason,
                    intent_id=str(row.id),
                    customer_id=str(row.customer_id),
                    cluster_id=str(row.cluster_id),
                )

    async def ring(self, runtime: Runtime) -> None:
        """Wake whoever goes on from here."""
        if any(isinstance(command, Plan) for _, command in self.commands):
            await runtime.bells.ring("launches")
        if self.ended:
            await runtime.bells.ring("interruptions")


# --- pure helpers -----------------------------------------------------------------------------------------------


def _event(
    reading: Reading, slot: int, instance_ids: Sequence[str], *, adopted: bool, abandoned: bool
) -> LaunchEvent | None:
    if abandoned:
        return Abandoned()
    match reading.meaning:
        case Meaning.LAUNCHED if slot < len(instance_ids):
            return Launched(instance_ids[slot], adopted)
        case Meaning.LAUNCHED:
            return Refused("PartialFill")
        case Meaning.REFUSED:
            return Refused(reading.code)
        case Meaning.DENIED:
            return Denied(f"{reading.code}: {reading.message}"[:300])
        case Meaning.MISMATCH:
            return Mismatched()
        case Meaning.ENDED:
            return InstanceEnded()
        case Meaning.UNKNOWN:
            return Unanswered()
        case Meaning.THROTTLED:
            return None


def _batch_after(reading: Reading, *, abandoned: bool) -> tuple[str | None, float]:
    """The batch's next state (None: as it was) and the seconds until it is repeated."""
    if abandoned:
        return "abandoned", 0.0
    match reading.meaning:
        case Meaning.LAUNCHED:
            return "answered", 0.0
        case Meaning.REFUSED | Meaning.DENIED | Meaning.ENDED:
            return "failed", 0.0
        case Meaning.THROTTLED:
            return None, random.uniform(*THROTTLED_SECONDS)
        case _:
            return "unknown", RETRY_SECONDS


def intent_of(row: IntentRow, attempts: Sequence[AttemptRow]) -> Intent:
    return Intent(
        IntentState(row.state),
        tuple(
            Attempt(attempt.attempt_no, AttemptState(attempt.state), attempt.instance_id, attempt.failure)
            for attempt in attempts
        ),
        row.reason,
    )


def _pool(attempt: AttemptRow) -> Pool:
    return Pool(attempt.instance_type, attempt.availability_zone, attempt.node_type)


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


def _choice(row: IntentRow, market: Market, limits: Limits, tried: Sequence[Pool]) -> Choice | str:
    pool = row.requirements.get("pool")
    if pool is not None:
        # A plan names its one pool; what the plan was judged by must still hold.
        return choose_only(_wanted(row), pool["instance_type"], pool["availability_zone"], market, limits, tried)
    return choose(_wanted(row), market, limits, tried)
