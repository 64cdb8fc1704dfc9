"""Seeded trials (see ``trials``), and the proof that they would notice.

.venv/bin/pytest -m crash tests/control/interruptions -s
CRASH_TRIALS=1000 CRASH_SEED=7 .venv/bin/pytest -m crash tests/control/interruptions/test_crash_trials.py -s -k again
CRASH_ONLY=17-19 CRASH_SEED=7 .venv/bin/pytest -m crash tests/control/interruptions/test_crash_trials.py -s -k again
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from pathlib import Path

import pytest
from sqlalchemy import text

from control.embedded import EmbeddedPostgres
from control.gateways.aws import Credentials
from control.interruptions.launching import Launcher
from control.interruptions.service import Received, ingest
from control.sandbox.aws.faults import Fault
from control.sandbox.aws.server import SandboxConfig
from tests.conftest import _copy_template
from tests.control.interruptions import mutations
from tests.control.interruptions.harness import Stage
from tests.control.interruptions.harness import stage as open_stage
from tests.control.interruptions.test_killed_workers import exactly_one_of_everything
from tests.control.interruptions.trials import Summary, Trials, record_states, run_lanes
from tests.control.interruptions.workers import Zygote
from warehouse.contracts import EventSource

LANES = 3
SMALL_TRIALS = 24
SMALL_SEED = 5


@pytest.mark.crash
@pytest.mark.timeout(0)
async def test_killed_again_and_again(
    postgres_server: EmbeddedPostgres, clean_redis_url: str, tmp_path: Path, zygote: Zygote
) -> None:
    seed = int(os.environ.get("CRASH_SEED", random.randrange(1 << 32)))
    first, _, last = os.environ.get("CRASH_ONLY", f"1-{os.environ.get('CRASH_TRIALS', '60')}").partition("-")
    trials = range(int(first), int(last or first) + 1)
    names = [f"lane_{number}" for number in range(LANES)]
    for name in names:
        _copy_template(postgres_server, name)
    urls = [postgres_server.url(name) for name in names]
    summary = await run_lanes(trials, seed, urls, clean_redis_url, tmp_path, zygote)
    print(f"\n{summary}; seed {seed}", *summary.broken, sep="\n")  # noqa: T201
    assert summary.kills == len(trials)
    assert summary.violations() == {}, f"seed {seed}"


async def small_run(database_url: str, redis_url: str, folder: Path, zygote: Zygote, trials: int) -> Summary:
    config = SandboxConfig(visibility_delay_seconds=(0.0, 0.5), describe_page_size=5)
    async with open_stage(database_url, redis_url, folder, config=config, zygote=zygote) as stage:
        small = Trials(stage, SMALL_SEED, workers=1, hurry=True, settle_seconds=40.0, late_caller=False)
        return await small.run(range(trials))


async def test_a_few_trials_in_a_hurry(database_url: str, clean_redis_url: str, tmp_path: Path, zygote: Zygote) -> None:
    summary = await small_run(database_url, clean_redis_url, tmp_path, zygote, 3)
    print(f"\n{summary}")  # noqa: T201
    assert summary.violations() == {}


async def test_an_instance_ended_while_it_was_wanted_counts_although_nobody_wants_it_later(
    stage: Stage, launcher: Launcher
) -> None:
    trials = Trials(stage, SMALL_SEED)
    await record_states(stage)
    for instance in await stage.launch_nodes(2):
        message = Received(json.dumps(stage.tenant.warning(instance)), EventSource.SQS)
        await ingest(stage.db, await stage.tenant.facts(), [message])
    await launcher.plan_round()
    await launcher.finish_calls(10)
    wanted, unwanted = (replacement.instance_id for replacement in stage.ours(alive=True))
    given_up = "UPDATE launch_attempts SET state = 'terminated' WHERE instance_id = :id RETURNING 1"
    await stage.tenant.rows(given_up, id=unwanted)
    keys = stage.aws.credentials(stage.tenant.account_id)
    credentials = Credentials(keys.access_key_id, keys.secret_access_key)
    for instance in (unwanted, wanted):
        await launcher.runtime.aws.call(
            "ec2", "TerminateInstances", {"InstanceIds": [instance]}, region="us-east-1", credentials=credentials
        )
    await stage.tenant.rows(given_up, id=wanted)
    assert await trials._wrong_terminations() == 1
    assert wanted in trials.summary.broken[0]


@pytest.mark.crash
@pytest.mark.parametrize("mutation", [None, *mutations.MUTATIONS])
async def test_the_same_suite_fails_when_a_guarantee_is_taken_away(
    mutation: str | None,
    database_url: str,
    clean_redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A naive launcher and each mutation: the violation it stands for. Without one the same run finds nothing."""
    mutated = Zygote(mutation)
    if mutation is not None:
        mutations.MUTATIONS[mutation](monkeypatch)
    try:
        config = SandboxConfig(visibility_delay_seconds=(0.0, 0.5), describe_page_size=5)
        async with open_stage(database_url, clean_redis_url, tmp_path, config=config, zygote=mutated) as stage:
            if mutation in mutations.DATABASES:
                async with stage.db.engine.begin() as conn:
                    await conn.execute(text(mutations.DATABASES[mutation]))
            trials = Trials(stage, SMALL_SEED, workers=1, hurry=True, settle_seconds=40.0)
            summary = await trials.run(range(SMALL_TRIALS))
    finally:
        mutated.close()
    print(f"\n{mutation}: {summary}; {summary.violations()}")  # noqa: T201
    if mutation is None:
        assert summary.violations() == {}
    else:
        assert getattr(summary, mutations.FOUND_AS[mutation]) > 0


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
