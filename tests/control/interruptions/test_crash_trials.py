"""Seeded trials: workers killed again and again while answers get lost; afterwards everything is there exactly once.

    .venv/bin/pytest -m crash tests/control/interruptions --override-ini=timeout=0
    CRASH_TRIALS=1000 CRASH_SEED=7 .venv/bin/pytest -m crash tests/control/interruptions/test_crash_trials.py

A trial is one warning whose worker is killed at a random call, before or after it was applied or answered.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from control.sandbox.aws.faults import Fault
from control.sandbox.aws.server import SandboxConfig
from tests.control.interruptions.harness import Stage, kill
from tests.control.interruptions.harness import stage as open_stage
from tests.control.interruptions.test_killed_workers import exactly_one_of_everything

ACTIONS = ("ReceiveMessage", "DeleteMessageBatch", "RunInstances", "AssumeRole", "DescribeInstances")
MOMENTS = ("before", "applied", "answered")
LOST_ANSWERS = 0.10
WORKERS = 2


async def run_trials(stage: Stage, trials: int, seed: int) -> None:
    rng = random.Random(seed)
    # The customer's own machines first: the faults are for our calls.
    instances = [i for start in range(0, trials, 50) for i in await stage.launch_nodes(min(50, trials - start))]
    stage.aws.inject(Fault("drop_after", action="RunInstances", probability=LOST_ANSWERS, seed=seed, count=None))
    stage.aws.inject(Fault("drop_after", action="DeleteMessageBatch", probability=LOST_ANSWERS, seed=seed, count=None))
    alive = [stage.start_worker() for _ in range(WORKERS)]
    kills = 0
    for instance in instances:
        victim = rng.randrange(WORKERS)
        fault = Fault(
            "signal",
            action=rng.choice(ACTIONS),
            pid=alive[victim].pid,
            moment=rng.choice(MOMENTS),  # type: ignore[arg-type]
            nth=rng.randint(1, 2),
        )
        stage.aws.inject(fault)
        stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
        try:
            await asyncio.wait_for(asyncio.to_thread(alive[victim].wait, 1.5), 3)
        except Exception:
            # The call it waited for did not come: any moment is as good.
            kill(alive[victim])
        stage.aws.clear_faults(fault.id)
        kills += 1
        alive[victim] = stage.start_worker()
    assert kills == trials
    rows = await stage.closed(trials, 300)
    assert Counter(row.outcome for row in rows) == {"handled": trials}, f"seed {seed}"
    assert await exactly_one_of_everything(stage) == [], f"seed {seed}"
    assert stage.aws.queue_depth(stage.queue)[0] == 0
    foreign = [
        entry
        for entry in stage.aws.history(action="TerminateInstances")
        if not set(entry["params"].get("InstanceId", [])) <= {i.instance_id for i in stage.ours()}
    ]
    assert foreign == []


@pytest.mark.crash
@pytest.mark.timeout(0)
async def test_killed_again_and_again(database_url: str, clean_redis_url: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("CRASH_SEED", random.randrange(1 << 32)))
    trials = int(os.environ.get("CRASH_TRIALS", "60"))
    config = SandboxConfig(visibility_delay_seconds=(0.0, 5.0), describe_page_size=5)
    async with open_stage(database_url, clean_redis_url, tmp_path, config=config) as stage:
        await run_trials(stage, trials, seed)


@pytest.mark.crash
@pytest.mark.timeout(0)
async def test_a_frozen_worker_that_wakes_changes_nothing(stage: Stage) -> None:
    """C-29: a worker stopped for longer than its leases goes on as if nothing had happened."""
    frozen = stage.start_worker()
    (instance,) = await stage.launch_nodes()
    stage.aws.inject(Fault("delay", action="RunInstances", seconds=3.0))
    stage.aws.send_event(stage.queue, stage.tenant.warning(instance))

    async def calling() -> list:
        return await stage.tenant.rows("SELECT 1 FROM launch_batches WHERE calls > 0")

    await stage.until(calling)
    frozen.send_signal(signal.SIGSTOP)
    stage.start_worker()
    await stage.closed(1, 60)
    await asyncio.sleep(20)
    frozen.send_signal(signal.SIGCONT)
    await asyncio.sleep(5)
    assert frozen.poll() is None
    assert await exactly_one_of_everything(stage) == []
