"""Seeded trials: workers killed again and again while answers get lost; afterwards everything is there exactly once.

A trial is one warning whose worker is killed with SIGKILL at a call it makes, before that was applied, after it, or
after it was answered, or at a moment nobody chose. Between the trials come what else must not do harm: nodes that end
without a word, forged warnings, an agent that reports under a lease it lost, another customer. What is counted at the
end comes from the sandbox's own records and from the tables, never from the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sqlalchemy import text

from control.agents import repository as tasks
from control.sandbox.aws.faults import Fault
from control.sandbox.aws.server import SandboxConfig
from tests.control.interruptions.harness import Stage, kill
from tests.control.interruptions.harness import stage as open_stage
from tests.control.interruptions.tenants import create_tenant
from tests.control.interruptions.test_killed_workers import exactly_one_of_everything
from tests.control.interruptions.workers import Worker, Zygote
from warehouse.contracts import OptimizationTask, TaskResult, TaskStatus
from warehouse.postgres import session
from warehouse.postgres.models import new_id

LOST_ANSWERS = 0.10
# The calls a kill may wait for; those that change something twice as often.
CALLS = (
    "ReceiveMessage", "AssumeRole", "DescribeInstances",
    "DeleteMessageBatch", "DeleteMessageBatch", "RunInstances", "RunInstances",
)  # fmt: skip
MOMENTS = ("before", "applied", "answered")
# A worker that does not make the chosen call within this time is killed where it is.
PATIENCE_SECONDS = 1.5
# an instance of an abandoned attempt is gone within five minutes.
ORPHAN_SECONDS = 300.0
SILENT_SHARE = 0.03
DECOYS = 2


@dataclass
class Summary:
    """What trials found. Everything from ``duplicates`` on must be zero."""

    trials: int = 0
    kills: int = 0
    lost_answers: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    lost: int = 0
    orphans: int = 0
    wrong_terminations: int = 0
    acted_on_forged: int = 0
    stale_reports_applied: int = 0
    seen_of_others: int = 0
    broken: list[str] = field(default_factory=list)

    def __iadd__(self, other: Summary) -> Summary:
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))
        return self

    def violations(self) -> dict[str, Any]:
        """What is not zero and must be."""
        names = [entry.name for entry in fields(self)]
        return {name: value for name in names[names.index("duplicates") :] if (value := getattr(self, name))}

    def __str__(self) -> str:
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        return (
            f"trials {self.trials}, kills {self.kills}, lost answers {self.lost_answers}, "
            f"duplicate launches {self.duplicates}, lost interruptions {self.lost}, orphans {self.orphans}, "
            f"wrong terminations {self.wrong_terminations}, {self.seconds:.0f} s ({outcomes})"
        )


async def run_lanes(
    trials: int, seed: int, database_urls: Sequence[str], redis_url: str, folder: Path, zygote: Zygote
) -> Summary:
    """Trials on several stages at once, one per database."""
    started = time.monotonic()
    lanes = len(database_urls)
    config = SandboxConfig(visibility_delay_seconds=(0.0, 5.0), describe_page_size=5)

    async def lane(number: int) -> Summary:
        logs = folder / f"lane-{number}"
        logs.mkdir()
        share = trials // lanes + (number < trials % lanes)
        async with open_stage(database_urls[number], redis_url, logs, config=config, zygote=zygote) as stage:
            return await Trials(stage, seed + number).run(share)

    total = Summary()
    for found in await asyncio.gather(*(lane(number) for number in range(lanes))):
        total += found
    total.seconds = time.monotonic() - started
    return total


class Trials:
    """Trials on one stage.

    ``hurry`` lets leases, visibility timeouts and the polls' minute run out every second, which only makes more
    workers do the same thing at once; a short run then needs no waiting for them.
    """

    def __init__(
        self, stage: Stage, seed: int, *, workers: int = 2, hurry: bool = False, settle_seconds: float = 180.0
    ) -> None:
        self.stage, self.random, self.seed = stage, random.Random(seed), seed
        self.hurry, self.settle_seconds = hurry, settle_seconds
        self.alive: list[Worker] = []
        self.workers = workers
        self.warned: list[str] = []
        self.silent: list[str] = []
        self.decoys: list[str] = []
        self.zombies: list[OptimizationTask] = []
        self.summary = Summary()

    async def run(self, trials: int) -> Summary:
        """All trials, the wait for the end of everything, and the count."""
        started = time.monotonic()
        stage = self.stage
        await stage.tenant.config("max_launches_per_hour", 100_000)
        # The customer's own machines first: the faults are for our calls.
        wanted = trials + 1 + DECOYS
        nodes = [i for start in range(0, wanted, 50) for i in await stage.launch_nodes(min(50, wanted - start))]
        self.decoys = [nodes.pop() for _ in range(DECOYS)]
        late = nodes.pop()
        mine = stage.tenant.account_id
        losses = [
            Fault("drop_after", action=action, account_id=mine, probability=LOST_ANSWERS, seed=self.seed, count=None)
            for action in ("RunInstances", "DeleteMessageBatch", "TerminateInstances", "DescribeInstances")
        ]
        for fault in losses:
            stage.aws.inject(fault)
        self.alive = [stage.start_worker() for _ in range(self.workers)]
        hurrying = asyncio.create_task(self._hurry()) if self.hurry else None
        try:
            await self._late_agent(late)
            for instance in nodes:
                await self._trial(instance)
            await self._settle()
        finally:
            if hurrying is not None:
                hurrying.cancel()
                await asyncio.gather(hurrying, return_exceptions=True)
        await self._count()
        self.summary.lost_answers = sum(fault.struck for fault in losses)
        self.summary.seconds = time.monotonic() - started
        return self.summary

    # --- what happens

    async def _trial(self, instance: str) -> None:
        stage, rng = self.stage, self.random
        victim = rng.randrange(self.workers)
        fault = Fault(
            "signal",
            action=rng.choice(CALLS),
            account_id=stage.tenant.account_id,
            pid=self.alive[victim].pid,
            moment=rng.choice(MOMENTS),  # type: ignore[arg-type]
        )
        if fault.action == "AssumeRole":
            fault.account_id = None
        stage.aws.inject(fault)
        if rng.random() < SILENT_SHARE or not self.silent:
            self.silent.append(instance)
            stage.aws.terminate(instance, reason="Server.SpotInstanceTermination")
        else:
            self.warned.append(instance)
            stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
        if rng.random() < 0.1 or self.summary.trials == 0:
            forged = stage.tenant.warning(rng.choice(self.decoys), account="999999999999")
            stage.aws.send_event(stage.queue, forged)
        with contextlib.suppress(Exception):
            # If the chosen call does not come, any moment is as good.
            await asyncio.to_thread(self.alive[victim].wait, rng.uniform(0.2, 1.0) * PATIENCE_SECONDS)
        kill(self.alive[victim])
        stage.aws.clear_faults(fault.id)
        self.summary.trials += 1
        self.summary.kills += 1
        self.alive[victim] = stage.start_worker()

    async def _late_agent(self, instance: str) -> None:
        """An agent takes a drain, goes silent, loses its lease, and reports a failure after the heir has begun."""
        stage = self.stage
        self.warned.append(instance)
        stage.agent_works = False
        # Not while the good agent is in the middle of a turn.
        await asyncio.sleep(0.1)
        stage.aws.send_event(stage.queue, stage.tenant.warning(instance))

        async def lease(agent: str) -> list[OptimizationTask]:
            async with stage.db.tenant(stage.tenant.customer_id) as conn:
                return await tasks.lease_tasks(
                    conn, cluster_id=stage.tenant.cluster_id, agent=agent, limit=1, understands=["drain_node"]
                )

        (late,) = await stage.until(lambda: lease("late"), 60)
        await stage.tenant.rows(
            "UPDATE agent_tasks SET lease_until = now() WHERE id = :id RETURNING 1", id=late.task_id
        )
        (heir,) = await lease("heir")
        self.zombies.append(late)
        await self._report(late, TaskStatus.FAILED)
        await self._report(heir, TaskStatus.DONE)
        stage.agent_works = True

    async def _report(self, task: OptimizationTask, status: TaskStatus) -> None:
        report = TaskResult(lease_epoch=task.lease_epoch, report_id=new_id(), status=status, detail={})
        async with self.stage.db.tenant(self.stage.tenant.customer_id) as conn:
            outcome = await tasks.record_report(
                conn, cluster_id=self.stage.tenant.cluster_id, task_id=task.task_id, report=report
            )
        if outcome is not None and outcome.applied and status is TaskStatus.FAILED:
            self.summary.stale_reports_applied += 1

    async def _hurry(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.stage.redeliver()
            await self.stage.pass_leases()
            await self.stage.pass_rounds()

    async def _settle(self) -> None:
        """Until every interruption is closed and no instance is left over, or nothing has moved for too long."""
        ends, last = time.monotonic() + self.settle_seconds, 0
        while time.monotonic() < ends:
            rows = await self.stage.interruptions()
            closed = {row.instance_id for row in rows if row.state == "closed"}
            if len(closed) > last:
                ends, last = time.monotonic() + self.settle_seconds, len(closed)
            if closed >= {*self.warned, *self.silent} and len(closed) == len(rows):
                break
            if self._surely_lost({row.instance_id for row in rows}):
                break
            await asyncio.sleep(0.5)
        ends = time.monotonic() + (ORPHAN_SECONDS if not self.hurry else 0.0)
        while await self._orphans() and time.monotonic() < ends:  # noqa: ASYNC110 - the cloud's doing
            await asyncio.sleep(1.0)

    def _surely_lost(self, known: set[str]) -> bool:
        """In a hurry: the queue is empty, and some warning has no row."""
        empty = self.stage.aws.queue_depth(self.stage.queue) == (0, 0)
        return self.hurry and empty and bool(set(self.warned) - known)

    # --- what became of it

    async def _orphans(self) -> list[str]:
        """Instances of ours that run and that no live attempt explains."""
        rows = await self.stage.tenant.rows(
            "SELECT instance_id FROM launch_attempts WHERE customer_id = :customer_id AND instance_id IS NOT NULL "
            "AND state IN ('launched', 'adopted', 'ready')"
        )
        known = {row.instance_id for row in rows}
        return [i.instance_id for i in self.stage.ours(alive=True) if i.instance_id not in known]

    async def _count(self) -> None:
        stage, summary = self.stage, self.summary
        rows = await stage.interruptions()
        by_instance = {row.instance_id: row for row in rows}
        summary.outcomes = Counter(row.outcome or row.state for row in rows)
        wanted = {*self.warned, *self.silent}
        summary.lost = sum(
            1 for instance in wanted if instance not in by_instance or by_instance[instance].state != "closed"
        )
        for instance in wanted:
            if instance not in by_instance or by_instance[instance].state != "closed":
                summary.broken.append(await self._story(instance))
        summary.acted_on_forged = sum(1 for instance in self.decoys if instance in by_instance)
        summary.orphans = len(await self._orphans())
        summary.duplicates = await self._duplicates()
        summary.wrong_terminations = await self._wrong_terminations()
        summary.seen_of_others = await self._seen_of_others()
        if not summary.violations():
            # What is closed as it should be still has to be complete: one drain, one Ready replacement, no hole.
            # A warning that was in the hands of one killed worker after the other until its two minutes were over
            # is missed and said to be.
            overdue = {i for i, row in by_instance.items() if row.received_at >= row.deadline_at}
            undrained = {*self.silent, *overdue}
            summary.broken = await exactly_one_of_everything(stage, undrained=undrained)
            for instance in set(self.warned) - undrained:
                if by_instance[instance].outcome not in ("handled", "handled_late"):
                    summary.broken.append(f"{by_instance[instance].outcome}: {await self._story(instance)}")

    async def _story(self, instance: str) -> str:
        """All that is known of an interruption that should be closed."""
        rows = await self.stage.tenant.rows(
            """SELECT i.state, i.version, t.state AS task, l.state AS intent, l.reason, l.next_action_at, l.lease_until,
                      a.attempt_no, a.state AS attempt, a.instance_id AS replacement, a.failure,
                      b.state AS batch, b.calls, b.error_code, b.next_action_at AS batch_due, now() AS now
               FROM interruptions i
               LEFT JOIN agent_tasks t ON t.interruption_id = i.id
               LEFT JOIN launch_intents l ON l.interruption_id = i.id
               LEFT JOIN launch_attempts a ON a.intent_id = l.id
               LEFT JOIN launch_batches b ON b.id = a.batch_id
               WHERE i.customer_id = :customer_id AND i.instance_id = :instance ORDER BY a.attempt_no""",
            instance=instance,
        )
        silent = " (nobody was told of its end)" if instance in self.silent else ""
        return f"{instance}{silent}: {[dict(row._mapping) for row in rows]}"

    async def _duplicates(self) -> int:
        """Instances beyond one that lived at the same time for the same intent, and those no attempt knows."""
        rows = await self.stage.tenant.rows(
            "SELECT intent_id, instance_id FROM launch_attempts WHERE instance_id IS NOT NULL"
        )
        intents = {row.instance_id: row.intent_id for row in rows}
        lives: dict[Any, list[tuple[float, float]]] = defaultdict(list)
        found = 0
        for instance in self.stage.ours():
            intent = intents.get(instance.instance_id)
            if intent is None:
                found += 1
                continue
            lives[intent].append((instance.launched_at, instance.shutting_down_at or float("inf")))
        for spans in lives.values():
            spans.sort()
            found += sum(1 for before, after in itertools.pairwise(spans) if after[0] < before[1])
        return found

    async def _wrong_terminations(self) -> int:
        """Instances we ended that were not ours, or that an attempt still counts on."""
        ours = {instance.instance_id for instance in self.stage.ours()}
        rows = await self.stage.tenant.rows(
            "SELECT instance_id FROM launch_attempts WHERE state IN ('launched', 'adopted', 'ready')"
        )
        wanted = {row.instance_id for row in rows}
        # Reading it back takes a while; other lanes go on meanwhile.
        calls = await asyncio.to_thread(self.stage.aws.history, action="TerminateInstances")
        ended = {instance_id for entry in calls for instance_id in entry["params"].get("InstanceId", [])}
        return len(ended - ours) + len(ended & wanted)

    async def _seen_of_others(self) -> int:
        """Rows another customer can see of this one, and what a pooled connection carries into the next transaction."""
        other = await create_tenant(self.stage.db)
        async with self.stage.db.tenant(other.customer_id) as conn:
            seen = (await conn.execute(text("SELECT count(*) FROM interruptions"))).scalar_one()
        single = session.Database(self.stage.database_url, pool_size=1, max_overflow=0)
        async with single.tenant(other.customer_id):
            pass
        async with single.engine.begin() as conn:
            left = (await conn.execute(text("SELECT current_setting('app.customer_id', true)"))).scalar_one()
        await single.close()
        return seen + bool(left)
