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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import text

from control.agents import repository as tasks
from control.gateways.aws import VISIBILITY_TIMEOUT_SECONDS
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
# R-06 in a storm: from its being visible to its drain's being offered. The trials are one, with a worker killed every
# third of a second.
TAKEN_IN_SECONDS = 10.0
# RELIABILITY §2.6, C-17: what an agent needs to pick a task up. Who is left with less may be too late, and is told so.
AGENT_SECONDS = 5.0
SILENT_SHARE = 0.03
DECOYS = 2


@dataclass
class Summary:
    """What trials found. Everything from ``duplicates`` on must be zero."""

    trials: int = 0
    kills: int = 0
    lost_answers: int = 0
    seconds: float = 0.0
    # From being sent to being taken in, the slowest, and how many readers had it in their hands; and those taken in so
    # late that no agent could come in time.
    slowest: tuple[float, int] = (0.0, 0)
    too_late: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    # Warned of, or ended without a word, and no closed interruption.
    lost: int = 0
    unfound: int = 0
    orphans: int = 0
    wrong_terminations: int = 0
    acted_on_forged: int = 0
    stale_reports_applied: int = 0
    stale_answers_applied: int = 0
    seen_of_others: int = 0
    carried_over: int = 0
    broken: list[str] = field(default_factory=list)

    def __iadd__(self, other: Summary) -> Summary:
        slowest = max(self.slowest, other.slowest)
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))
        self.slowest = slowest
        return self

    def violations(self) -> dict[str, Any]:
        """What is not zero and must be."""
        names = [entry.name for entry in fields(self)]
        return {name: value for name in names[names.index("duplicates") :] if (value := getattr(self, name))}

    def __str__(self) -> str:
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        return (
            f"trials {self.trials}, kills {self.kills}, lost answers {self.lost_answers}, "
            f"duplicate launches {self.duplicates}, lost interruptions {self.lost + self.unfound}, "
            f"orphans {self.orphans}, wrong terminations {self.wrong_terminations}, {self.seconds:.0f} s ({outcomes}; "
            f"slowest taken in by its reader {self.slowest[1]} after {self.slowest[0]:.1f} s, {self.too_late} too late "
            "for an agent)"
        )


async def run_lanes(
    trials: Sequence[int], seed: int, database_urls: Sequence[str], redis_url: str, folder: Path, zygote: Zygote
) -> Summary:
    """Trials, by number, dealt out to several stages at once, one per database."""
    started = time.monotonic()
    lanes = len(database_urls)
    config = SandboxConfig(visibility_delay_seconds=(0.0, 5.0), describe_page_size=5)

    async def lane(number: int) -> Summary:
        logs = folder / f"lane-{number}"
        logs.mkdir()
        async with open_stage(database_urls[number], redis_url, logs, config=config, zygote=zygote) as stage:
            return await Trials(stage, seed).run(trials[number::lanes])

    total = Summary()
    for found in await asyncio.gather(*(lane(number) for number in range(lanes))):
        total += found
    total.seconds = time.monotonic() - started
    return total


class Trials:
    """Trials on one stage. What a trial does follows from the seed and its number, so one can be made alone.

    ``hurry`` lets leases, visibility timeouts and the polls' minute run out every second, which only makes more
    workers do the same thing at once; a short run then needs no waiting for them. ``late_caller``: begin with a call
    that is answered when it is somebody else's, which takes some seconds.
    """

    def __init__(
        self,
        stage: Stage,
        seed: int,
        *,
        workers: int = 2,
        hurry: bool = False,
        settle_seconds: float = 180.0,
        late_caller: bool = True,
    ) -> None:
        self.stage, self.seed = stage, seed
        self.hurry, self.settle_seconds, self.late_caller = hurry, settle_seconds, late_caller
        self.alive: list[Worker] = []
        self.workers = workers
        self.warned: list[str] = []
        self.silent: list[str] = []
        self.decoys: list[str] = []
        self.zombies: list[OptimizationTask] = []
        # What was done to each instance's worker, and the message that warned of its end with its moment (Unix
        # seconds).
        self.told: dict[str, str] = {}
        self.messages: dict[str, tuple[str, float]] = {}
        self.summary = Summary()

    async def run(self, trials: Sequence[int]) -> Summary:
        """Trials by number, the wait for the end of everything, and the count."""
        started = time.monotonic()
        stage = self.stage
        await stage.tenant.config("max_launches_per_hour", 100_000)
        # The customer's own machines first: the faults are for our calls.
        wanted = len(trials) + 1 + self.late_caller + DECOYS
        nodes = [i for start in range(0, wanted, 50) for i in await stage.launch_nodes(min(50, wanted - start))]
        self.decoys = [nodes.pop() for _ in range(DECOYS)]
        late = nodes.pop()
        mine = stage.tenant.account_id
        await record_states(stage)
        self.alive = [stage.start_worker() for _ in range(self.workers)]
        # Times are measured from here on, and the start of the first workers is none of them.
        stage.aws.send_event(stage.queue, stage.tenant.rebalance("i-0000000000000000f"))
        await stage.until(self._queue_empty, 60)
        if self.late_caller:
            await self._late_caller(nodes.pop())
        losses = [
            Fault("drop_after", action=action, account_id=mine, probability=LOST_ANSWERS, seed=self.seed, count=None)
            for action in ("RunInstances", "DeleteMessageBatch", "TerminateInstances", "DescribeInstances")
        ]
        for fault in losses:
            stage.aws.inject(fault)
        hurrying = asyncio.create_task(self._hurry()) if self.hurry else None
        try:
            await self._late_agent(late)
            for number, instance in zip(trials, nodes, strict=True):
                await self._somebody_polls()
                await self._trial(number, instance)
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

    async def _trial(self, number: int, instance: str) -> None:
        stage, rng = self.stage, random.Random(f"{self.seed}/{number}")
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
        self.told[instance] = (
            f"trial {number} at {datetime.now(UTC):%H:%M:%S.%f}, worker {fault.pid} to be killed at {fault.action} "
            f"({fault.moment})"
        )
        stage.aws.inject(fault)
        if rng.random() < SILENT_SHARE or not self.silent:
            self.silent.append(instance)
            stage.aws.terminate(instance, reason="Server.SpotInstanceTermination")
        else:
            self.warned.append(instance)
            self._warn(instance)
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

    async def _somebody_polls(self) -> None:
        """Until one of the workers has come up, and waits at the queue with nothing in its hands.

        On a busy machine a worker takes seconds to start. Killed by the clock alone, one after the other died before
        its first poll, and nobody read the queue for half a minute: that is no trial of anything.
        """
        queue = self.stage.aws._queue(self.stage.queue)
        ends = time.monotonic() + 30
        while all(one.done() for one in queue.waiters) and time.monotonic() < ends:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)

    def _warn(self, instance: str) -> None:
        now = time.time()
        self.messages[instance] = (
            self.stage.aws.send_event(self.stage.queue, self.stage.tenant.warning(instance)),
            now,
        )

    async def _late_agent(self, instance: str) -> None:
        """An agent takes a drain, goes silent, loses its lease, and reports a failure after the heir has begun."""
        stage = self.stage
        self.warned.append(instance)
        stage.agent_works = False
        # Not while the good agent is in the middle of a turn.
        await asyncio.sleep(0.1)
        self._warn(instance)

        async def lease(agent: str) -> list[OptimizationTask]:
            async with stage.db.tenant(stage.tenant.customer_id) as conn:
                return await tasks.lease_tasks(
                    conn, cluster_id=stage.tenant.cluster_id, agent=agent, limit=1, understands=["drain_node"]
                )

        (late,) = await stage.until(lambda: lease("late"), 60)
        await stage.tenant.rows(
            "UPDATE agent_tasks SET lease_until = now() WHERE id = :id RETURNING 1", id=late.task_id
        )
        # A sweep of a worker may have its hand on it for a moment.
        (heir,) = await stage.until(lambda: lease("heir"), 10)
        self.zombies.append(late)
        await self._report(late, TaskStatus.FAILED)
        await self._report(heir, TaskStatus.DONE)
        stage.agent_works = True

    async def _late_caller(self, instance: str) -> None:
        """A call outlives its lease: when it ends without an answer, another one for the same launch is under way."""
        stage = self.stage
        stage.aws.inject(Fault("hang", action="RunInstances", account_id=stage.tenant.account_id, seconds=5.0))
        stage.aws.inject(Fault("hang_after", action="RunInstances", account_id=stage.tenant.account_id, seconds=8.0))
        self._warn(instance)

        async def calls(number: int) -> Any:
            rows = await stage.tenant.rows("SELECT calls, lease_epoch, state, leased_by FROM launch_batches")
            return [row for row in rows if row.calls >= number]

        await stage.until(lambda: calls(1), 30)
        # At once, however long the first has been under way: the second must still be when the first ends.
        await stage.pass_leases()
        (second,) = await stage.until(lambda: calls(2), 30)

        async def over() -> str | None:
            if "launch.stale_answer" in stage.logs():
                return "refused"
            (now,) = await calls(2)
            return "applied" if (now.lease_epoch, now.leased_by) != (second.lease_epoch, second.leased_by) else None

        if await stage.until(over, 30) == "applied":
            self.summary.stale_answers_applied += 1

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
            if await self._surely_lost({row.instance_id for row in rows}):
                break
            await asyncio.sleep(0.5)
        ends = time.monotonic() + (ORPHAN_SECONDS if not self.hurry else 0.0)
        while await self._orphans() and time.monotonic() < ends:  # noqa: ASYNC110 - the cloud's doing
            await asyncio.sleep(1.0)

    async def _queue_empty(self) -> bool:
        return self.stage.aws.queue_depth(self.stage.queue) == (0, 0)

    async def _surely_lost(self, known: set[str]) -> bool:
        """In a hurry: the queue is empty, and some warning has no row."""
        return self.hurry and await self._queue_empty() and bool(set(self.warned) - known)

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
        closed = {instance for instance, row in by_instance.items() if row.state == "closed"}
        summary.lost = len(set(self.warned) - closed)
        summary.unfound = len(set(self.silent) - closed)
        for instance in {*self.warned, *self.silent} - closed:
            summary.broken.append(await self._story(instance))
        summary.acted_on_forged = sum(1 for instance in self.decoys if instance in by_instance)
        summary.orphans = len(await self._orphans())
        summary.duplicates = await self._duplicates()
        summary.wrong_terminations = await self._wrong_terminations()
        summary.seen_of_others, summary.carried_over = await self._leaks()
        if not summary.violations():
            # What is closed as it should be still has to be complete: one drain, one Ready replacement, no hole.
            # A warning that was in the hands of one killed worker after the other until its two minutes were over
            # is missed and said to be.
            overdue = {i for i, row in by_instance.items() if row.received_at >= row.deadline_at}
            summary.broken = await exactly_one_of_everything(stage, undrained={*self.silent, *overdue})
            await self._judge_times(by_instance)

    async def _judge_times(self, by_instance: dict[str, Any]) -> None:
        """Each reader killed with a warning in its hands costs a visibility timeout, and nothing else costs much."""
        calls = await asyncio.to_thread(self.stage.aws.history, action="ReceiveMessage")
        handed_out: dict[str, list[float]] = defaultdict(list)
        for entry in calls:
            for message in entry["result"].get("message_ids", []):
                handed_out[message].append(datetime.fromisoformat(entry["at"]).timestamp())
        for instance, (message, sent) in self.messages.items():
            row = by_instance[instance]
            taken_in = row.received_at.timestamp()
            readers = max(sum(1 for at in handed_out[message] if at <= taken_in + 1), 1)
            took = taken_in - sent
            self.summary.slowest = max(self.summary.slowest, (took, readers))
            problem = None
            if took > readers * TAKEN_IN_SECONDS + (readers - 1) * VISIBILITY_TIMEOUT_SECONDS:
                problem = f"taken in after {took:.1f} s in the hands of {readers}"
            elif row.outcome not in ("handled", "handled_late"):
                left = row.deadline_at.timestamp() - taken_in
                if row.outcome != "missed" or left >= AGENT_SECONDS:
                    problem = f"{row.outcome}, taken in with {left:.1f} s left"
                self.summary.too_late += 1
            if problem is not None:
                self.summary.broken.append(f"{problem}: {await self._story(instance)}")

    async def _story(self, instance: str) -> str:
        """All that is known of an interruption that should be closed."""
        rows = await self.stage.tenant.rows(
            """SELECT i.state, i.version, i.outcome, i.notice_at, i.received_at, i.deadline_at, i.detected_by,
                      t.state AS task, t.created_at AS task_at, t.first_leased_at, t.finished_at, t.attempts,
                      l.state AS intent, l.reason, l.next_action_at, l.lease_until,
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
        told = [{name: str(value) for name, value in row._mapping.items() if value is not None} for row in rows]
        message, _ = self.messages.get(instance, ("", 0.0))
        received = [
            f"{entry['at'][11:26]} {entry['outcome']}"
            for entry in await asyncio.to_thread(self.stage.aws.history, action="ReceiveMessage")
            if message in entry["result"].get("message_ids", [])
        ]
        return f"{instance}{silent}: {self.told.get(instance, 'the late agent')}; handed out {received}: {told}"

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
        """Instances we ended that were not ours, or that an attempt counted on when the call came.

        What was wanted then is read from the history of the attempts, not from what became of them afterwards.
        """
        ours = {instance.instance_id: instance for instance in self.stage.ours()}
        rows = await self.stage.tenant.rows(
            "SELECT extract(epoch FROM at) AS at, attempt_id, batch_id, instance_id, state FROM attempt_states "
            "ORDER BY at, seq"
        )
        # Reading it back takes a while; other lanes go on meanwhile.
        calls = await asyncio.to_thread(self.stage.aws.history, action="TerminateInstances")
        wrong = 0
        for entry in calls:
            began = datetime.fromisoformat(entry["at"]).timestamp() - entry["duration_ms"] / 1000
            then = {row.attempt_id: row for row in rows if row.at <= began}
            named = {row.instance_id: row.state for row in then.values()}
            unanswered = {str(row.batch_id) for row in then.values() if row.state in ("planned", "calling", "unknown")}
            for instance_id in entry["params"].get("InstanceId", []):
                instance = ours.get(instance_id)
                if (
                    instance is None
                    or named.get(instance_id) in ("launched", "adopted", "ready")
                    or (instance_id not in named and instance.tags.get("cloudoptim:batch") in unanswered)
                ):
                    wrong += 1
                    self.summary.broken.append(f"{instance_id} was ended while {named.get(instance_id, 'unknown')}")
        return wrong

    async def _leaks(self) -> tuple[int, int]:
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
        return seen, int(bool(left))


STATES = """
    CREATE TABLE attempt_states (seq bigserial, at timestamptz DEFAULT clock_timestamp(), attempt_id uuid,
                                 batch_id uuid, instance_id text, state text);
    GRANT SELECT ON attempt_states TO PUBLIC;
    CREATE FUNCTION attempt_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
    BEGIN
        INSERT INTO attempt_states (attempt_id, batch_id, instance_id, state)
        VALUES (NEW.id, NEW.batch_id, NEW.instance_id, NEW.state);
        RETURN NULL;
    END $$;
    CREATE TRIGGER attempt_changed AFTER INSERT OR UPDATE ON launch_attempts
    FOR EACH ROW EXECUTE FUNCTION attempt_changed();
"""


async def record_states(stage: Stage) -> None:
    """Keep every state an attempt had from now on, with its moment, in ``attempt_states``."""
    async with await psycopg.AsyncConnection.connect(stage.database_url, autocommit=True) as connection:
        await connection.execute(STATES)
