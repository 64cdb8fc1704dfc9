"""Customers' caps of launches: counted and spent in one transaction, whoever launches; and the pace of a storm."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from control.gateways.aws import AwsGateway
from control.interruptions import launch_repository
from control.interruptions.caps import Caps
from control.interruptions.choosing import Pool
from control.interruptions.freezing import storm_pause
from control.interruptions.launching import Launcher
from control.interruptions.runtime import Runtime
from control.interruptions.service import Received, ingest
from control.sandbox.aws.faults import Fault
from control.sandbox.aws.server import SandboxConfig
from tests.control.interruptions.harness import DEPLOYMENT, Stage
from tests.control.interruptions.harness import stage as open_stage
from tests.control.interruptions.tenants import Tenant
from warehouse.contracts import EventSource
from warehouse.postgres.models import new_id
from warehouse.postgres.session import Database


@pytest.fixture
async def launchers(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Launcher]]:
    """The launch loops of four workers, turned by hand."""
    keys = stage.aws.credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    aws = AwsGateway(endpoint_url=stage.aws.url)
    yield [Launcher(Runtime(stage.db, stage.db, aws, stage.bells, f"w{n}", DEPLOYMENT)) for n in range(4)]
    await aws.close()


async def _clusters(stage: Stage, count: int) -> list:
    """More clusters of the same customer, each with a node that was launched like the stage's."""
    ids = []
    for number in range(count):
        ids.append(new_id())
        await stage.tenant.rows(
            "INSERT INTO clusters (id, customer_id, cluster_name, region, status) "
            "VALUES (:id, :customer_id, :name, 'us-east-1', 'active') RETURNING 1",
            id=ids[-1],
            name=f"more-{number}",
        )
    return ids


async def _warn(stage: Stage, instances: list[str]) -> None:
    messages = [Received(json.dumps(stage.tenant.warning(i)), EventSource.SQS) for i in instances]
    await ingest(stage.db, await stage.tenant.facts(), messages)


def test_each_cap_refuses_and_says_which() -> None:
    priced = Pool("m5.large", "us-east-1b", "spot", 0.04)
    count = Caps.of({"max_launches_per_hour": 2}, 1, 0.0)
    assert count.take(priced) is None
    assert "max_launches_per_hour is 2" in str(count.take(priced))
    money = Caps.of({"max_hourly_spend_usd": 0.1}, 0, 0.03)
    assert money.take(priced) is None
    assert "max_hourly_spend_usd is 0.1" in str(money.take(priced))
    assert "no price" in str(Caps.of({"max_hourly_spend_usd": 0.1}, 0, 0.0).take(Pool("m5.large", "z", "spot")))
    free = Caps.of({}, 5, 100.0)
    assert free.take(priced) is None
    assert free.take(Pool("m5.large", "z", "spot")) is None


async def test_a_cap_holds_over_workers_clusters_and_unanswered_calls(stage: Stage, launchers: list[Launcher]) -> None:
    await stage.tenant.config("max_launches_per_hour", 5)
    instances = await stage.launch_nodes(12)
    for number, cluster in enumerate(await _clusters(stage, 3)):
        await stage.tenant.rows(
            "UPDATE nodes SET cluster_id = :cluster WHERE instance_id = ANY(:ids) RETURNING 1",
            cluster=cluster,
            ids=instances[number * 3 : number * 3 + 3],
        )
    # No answer ever comes: what is under way counts as launched.
    stage.aws.inject(Fault("drop_after", action="RunInstances", count=None))
    await _warn(stage, instances)
    for _ in range(3):
        await asyncio.gather(*(launcher.plan_round() for launcher in launchers))
        await asyncio.gather(*(launcher.finish_calls(10) for launcher in launchers))
        await stage.tenant.rows("UPDATE launch_intents SET next_action_at = now() RETURNING 1")
    assert len(stage.ours()) == 5
    held = await stage.tenant.rows("SELECT reason FROM launch_intents WHERE state = 'planned'")
    assert len(held) == 7
    assert all("max_launches_per_hour is 5" in row.reason for row in held)


@pytest.mark.parametrize("answered", [True, False])
async def test_a_cap_in_money_lets_through_what_fits(stage: Stage, launchers: list[Launcher], answered: bool) -> None:
    # Two Spot nodes at 0.0344 to 0.0384 USD per hour fit, a third does not.
    await stage.tenant.config("max_hourly_spend_usd", 0.1)
    await _warn(stage, await stage.launch_nodes(4))
    if not answered:
        stage.aws.inject(Fault("drop_after", action="RunInstances", count=None))

    async def look() -> int:
        await stage.tenant.rows("UPDATE launch_intents SET next_action_at = now() RETURNING 1")
        await launchers[0].plan_round()
        await launchers[0].finish_calls(10)
        return len(stage.ours())

    assert [await look(), await look()] == [2, 2]
    reasons = await stage.tenant.rows("SELECT reason FROM launch_intents WHERE state = 'planned'")
    assert len(reasons) == 2
    assert all("max_hourly_spend_usd" in row.reason for row in reasons)
    # An hour later what was launched counts no more; what may have been launched does.
    for table in ("launch_attempts", "launch_batches"):
        await stage.tenant.rows(f"UPDATE {table} SET created_at = created_at - interval '61 minutes' RETURNING 1")
    assert await look() == (4 if answered else 2)


def test_a_storm_is_paced_by_the_accounts_calls() -> None:
    assert storm_pause(15, 0.5) == 0.0
    assert storm_pause(1000, None) == 0.0
    assert storm_pause(16, 3.0) == pytest.approx(5.0)
    assert storm_pause(60, 3.0) == pytest.approx(17.0)
    assert storm_pause(60, 30.0) == 0.0


async def test_one_storm_is_one_call_per_pool(stage: Stage, launchers: list[Launcher]) -> None:
    await _warn(stage, await stage.launch_nodes(45))
    await launchers[0].plan_round()
    await launchers[0].finish_calls(10)
    calls = [call for call in stage.aws.history(action="RunInstances") if call["session"]]
    pools = {(c["params"]["InstanceType"], c["params"]["Placement"]["AvailabilityZone"]) for c in calls}
    assert len(stage.ours()) == 45
    assert len(calls) == len(pools) <= 3


async def test_a_call_that_is_filled_in_part_sends_the_rest_to_other_pools(
    stage: Stage, launchers: list[Launcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = await stage.launch_nodes(5)
    monkeypatch.setattr(stage.aws._ec2, "capacity_errors", True)
    monkeypatch.setattr(stage.aws._ec2.market, "capacity", lambda *_args, **_options: 2)
    await _warn(stage, lost)

    async def all_launched() -> bool:
        await launchers[0].plan_round()
        await launchers[0].finish_calls(10)
        return not await stage.tenant.rows("SELECT 1 FROM launch_intents WHERE state <> 'launched'")

    await stage.until(all_launched, 10)
    attempts = await stage.tenant.rows("SELECT intent_id, state, failure, instance_id FROM launch_attempts")
    launched = {attempt.instance_id: attempt.intent_id for attempt in attempts if attempt.state == "launched"}
    assert launched.keys() == {instance.instance_id for instance in stage.ours()}
    assert len(set(launched.values())) == 5
    assert sum(attempt.failure == "PartialFill" for attempt in attempts) >= 3
    assert await stage.tenant.rows("SELECT 1 FROM pool_standings WHERE last_reason = 'refusal'")


async def test_an_account_that_does_not_answer_holds_up_nobody_else(
    stage: Stage, launchers: list[Launcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control.interruptions.launching.ROUND_SECONDS", 0.3)
    (quick,) = await stage.launch_nodes()
    await _warn(stage, [quick])
    await launchers[0].plan_round()
    await launchers[0].finish_calls(10)
    assert len(stage.ours()) == 1

    slow = await stage.tenant.node("i-0aaaabbbbccccdddd")
    (cluster,) = await _clusters(stage, 1)
    await stage.tenant.rows("UPDATE nodes SET cluster_id = :c WHERE instance_id = :i RETURNING 1", c=cluster, i=slow)
    stage.aws.inject(Fault("hang", action="DescribeInstances", match={"Filter": slow}, seconds=2.0, count=None))
    (second,) = await stage.launch_nodes()
    await _warn(stage, [slow, second])
    await asyncio.wait_for(launchers[0].plan_round(), 1.5)
    planned = await stage.tenant.rows(
        "SELECT requirements ->> 'instance_id' AS i FROM launch_intents l JOIN launch_attempts a ON a.intent_id = l.id"
    )
    assert {row.i for row in planned} == {quick, second}
    await launchers[0].finish_calls(10)


@pytest.mark.storm
@pytest.mark.timeout(300)
async def test_two_hundred_launches_in_a_minute_take_few_calls(
    database_url: str, clean_redis_url: str, tmp_path: Path
) -> None:
    """L-12: 200 notices over three zones in 60 s, against a bucket that refills with two calls a second."""
    config = SandboxConfig(rate_limits={"RunInstances": (5.0, 2.0)})
    async with open_stage(database_url, clean_redis_url, tmp_path, config=config) as stage:
        await stage.launch_nodes(3)
        zones = sorted({stage.zone_of(instance) for instance in stage.tenant.instances})
        nodes = [await stage.tenant.node(availability_zone=zones[n % len(zones)]) for n in range(200)]
        for _ in range(2):
            stage.start_worker()
        rng, began = random.Random(12), time.monotonic()
        for node, moment in zip(nodes, sorted(rng.uniform(0, 60) for _ in nodes), strict=True):
            await asyncio.sleep(max(0.0, began + moment - time.monotonic()))
            stage.aws.send_event(stage.queue, stage.tenant.warning(node))

        async def all_launched() -> bool:
            return len(stage.ours()) >= 200

        await stage.until(all_launched, 60)
        await asyncio.sleep(5)
        calls = [call for call in stage.aws.history(action="RunInstances") if call["session"]]
        ours = [call for call in calls if "cloudoptim:batch" in str(call["params"])]
        throttled = [call for call in ours if "RequestLimitExceeded" in call["outcome"]]
        print(f"\n{len(stage.ours())} instances by {len(ours)} calls, {len(throttled)} throttled")  # noqa: T201
        assert len(stage.ours()) == 200
        assert len(ours) <= 40


async def test_one_customers_unanswered_calls_do_not_keep_anothers_waiting(
    db: Database, tenant: Tenant, other_tenant: Tenant
) -> None:
    unanswered = text(
        "INSERT INTO launch_batches (id, customer_id, cluster_id, region, client_token, request_json, size, state, "
        "next_action_at) SELECT gen_random_uuid(), :customer_id, :cluster_id, 'us-east-1', gen_random_uuid(), '{}', 1, "
        "'unknown', now() - make_interval(secs => :age) FROM generate_series(1, :count)"
    )
    async with db.system() as conn:
        for who, count, age in ((tenant, 40, 60), (other_tenant, 1, 1)):
            values = {"customer_id": who.customer_id, "cluster_id": who.cluster_id, "count": count, "age": age}
            await conn.execute(unanswered, values)
        claimed = await launch_repository.claim_batches(conn, worker="w", limit=20)
        # Nobody is to make these calls.
        await conn.rollback()
    assert len(claimed) == 20
    assert other_tenant.customer_id in {batch.customer_id for batch in claimed}
