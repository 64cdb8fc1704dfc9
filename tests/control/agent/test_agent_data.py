"""Metrics, state and events on their way to the server: contract, order, outages, limits."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.control.agent.harness import World, eventually
from warehouse.contracts import METRICS, EventKind, NodeType


def test_state_and_samples_follow_the_contract(world: World) -> None:
    instance = world.add_node("n1")
    world.add_node("n2", **{"eks.amazonaws.com/capacityType": "ON_DEMAND"})
    world.deploy("web", 4)
    world.core.create_namespaced_pod(
        "default",
        {
            "metadata": {"name": "huge"},
            "spec": {"containers": [{"name": "c", "image": "i", "resources": {"requests": {"cpu": "64"}}}]},
        },
    )
    world.start_agent()
    batch = eventually(lambda: world.server.batches)[0]
    state = batch.state
    assert (state.node_count, state.spot_node_count, state.on_demand_node_count) == (2, 1, 1)
    assert (state.total_cpu, state.total_memory, state.pod_count) == (8.0, 2 * 16 * 2**30, 5)
    node = next(n for n in state.nodes if n.node_name == "n1")
    assert (node.instance_id, node.instance_type, node.node_type) == (instance, "m5.xlarge", NodeType.SPOT)
    assert (node.availability_zone, node.zone_id, node.ready, node.schedulable) == (
        "us-east-1a",
        "use1-az4",
        True,
        True,
    )
    assert node.cpu_requested_cores == 0.1 * node.pod_count
    assert len(state.state_hash) == 64
    samples = {
        (metric, subject): value
        for metric, subject, value in zip(batch.samples.metric, batch.samples.subject, batch.samples.value, strict=True)
    }
    assert {metric for metric, _ in samples} == set(METRICS)
    assert samples["node_cpu_capacity_cores", "n1"] == 4.0
    assert samples["workload_replicas", "default/Deployment/web"] == 4
    assert samples["workload_cpu_requested_cores", "default/Deployment/web"] == 0.4
    assert samples["workload_cpu_usage_cores", "default/Deployment/web"] == 0.2
    assert samples["cluster_pending_pods", str(world.cluster_id)] == 1
    assert set(batch.samples.ts) == {state.captured_at}


def test_the_state_hash_moves_with_schedulability_only(world: World) -> None:
    world.add_node("n1")
    world.start_agent(CLOUDOPTIM_AGENT_METRICS_SECONDS="0.3")
    eventually(lambda: len(world.server.batches) >= 2)
    assert len({b.state.state_hash for b in world.server.batches}) == 1
    world.core.patch_node("n1", {"spec": {"unschedulable": True}})
    eventually(lambda: len({b.state.state_hash for b in world.server.batches}) == 2)


def test_batches_wait_on_disk_through_an_outage_and_kill_9_and_arrive_once_in_order(world: World) -> None:
    world.add_node("n1")
    world.server.failing = True
    world.start_agent(CLOUDOPTIM_AGENT_METRICS_SECONDS="0.2")
    spool = world.state_dir / "metrics"
    eventually(lambda: spool.exists() and len(list(spool.glob("*.zst"))) >= 4)
    world.kill_agent()
    world.server.failing = False
    world.start_agent(CLOUDOPTIM_AGENT_METRICS_SECONDS="0.2")
    eventually(lambda: len(world.server.batches) >= 8)
    sequence = [batch.seq for batch in world.server.batches]
    assert sequence == list(range(len(sequence)))  # no hole, no repetition, oldest first
    eventually(lambda: len(list(spool.glob("*.zst"))) <= 1)


def test_a_rejected_batch_is_dropped_and_does_not_block_the_next(world: World) -> None:
    world.add_node("n1")
    world.server.metrics_status = 422
    world.start_agent(CLOUDOPTIM_AGENT_METRICS_SECONDS="0.2")
    eventually(lambda: "was rejected and is dropped" in world.log.read_text())
    world.server.metrics_status = 200
    eventually(lambda: world.server.batches)
    assert world.server.batches[0].seq > 0


def test_what_the_server_rejects_of_a_batch_is_said_and_the_batch_is_not_sent_again(world: World) -> None:
    world.add_node("n1")
    world.server.rejects = [{"index": 0, "reason": "older than 24 hours"}]
    world.start_agent(CLOUDOPTIM_AGENT_METRICS_SECONDS="0.3")
    eventually(lambda: len(world.server.batches) >= 3)
    sample = world.server.batches[0].samples
    said = f"the server rejected {sample.metric[0]} of {sample.subject[0]}: older than 24 hours"
    eventually(lambda: said in world.log.read_text())
    assert len({batch.batch_id for batch in world.server.batches}) == len(world.server.batches)


@pytest.mark.parametrize("rejects", [[{"index": 0, "reason": "no such kind"}], [{"index": 9}], {"0": "?"}, ["?"]])
def test_a_rejected_event_is_said_and_not_sent_again_whatever_the_answer_looks_like(
    world: World, rejects: object
) -> None:
    instance = world.add_node("n1")
    world.start_agent()
    eventually(lambda: world.server.batches)
    world.server.rejects = rejects
    notice = {"cloudoptim.io/imds-rebalance": json.dumps({"noticeTime": "2026-01-02T03:04:05Z"})}
    world.core.patch_node("n1", {"metadata": {"annotations": notice}})
    understood = rejects == [{"index": 0, "reason": "no such kind"}]
    said = (
        f"rebalance_recommendation of {instance}: no such kind" if understood else "something in words not understood"
    )
    eventually(lambda: f"send-events the server rejected {said}" in world.log.read_text(), 10)
    time.sleep(1.5)  # the second try would be after half a second
    assert len(world.server.events) == 1
    assert not list((world.state_dir / "events").iterdir())


def test_a_notice_on_a_node_reaches_the_server_within_seconds(world: World) -> None:
    instance = world.add_node("n1")
    world.start_agent()
    eventually(lambda: world.server.batches)
    acts_at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=118)
    notice = {"action": "terminate", "time": acts_at.strftime("%Y-%m-%dT%H:%M:%SZ")}
    annotation = {"cloudoptim.io/imds-spot-instance-action": json.dumps(notice)}
    told = time.monotonic()
    world.core.patch_node("n1", {"metadata": {"annotations": annotation}})
    (event,) = eventually(lambda: world.server.events)[0].events
    assert time.monotonic() - told < 3
    assert (event.event_type, event.instance_id, event.node_name) == (EventKind.SPOT_INTERRUPTION, instance, "n1")
    assert event.occurred_at == acts_at - timedelta(seconds=120)
    assert event.detail == notice
    world.core.patch_node("n1", {"metadata": {"labels": {"unrelated": "change"}}})
    rebalance = {"cloudoptim.io/imds-rebalance": json.dumps({"noticeTime": "2026-01-02T03:04:05Z"})}
    world.core.patch_node("n1", {"metadata": {"annotations": rebalance}})
    (second,) = eventually(lambda: world.server.events[1:])[0].events
    assert second.event_type == EventKind.REBALANCE_RECOMMENDATION  # the first one was not sent again


def test_the_agent_keeps_asking_while_the_server_is_away_and_says_so(world: World) -> None:
    instance = world.add_node("n1")
    world.server.failing = True
    world.start_agent()
    eventually(lambda: world.log.read_text().count("no tasks from the server") >= 2)
    world.server.failing = False
    result = world.server.ended(world.server.add("cordon_node", node_name="n1", instance_id=instance), 10)
    assert result.status == "done"


def test_memory_stays_below_80_megabytes(world: World) -> None:
    for index in range(20):
        world.add_node(f"n{index}")
    world.deploy("web", 200)
    process = world.start_agent(measured=True, CLOUDOPTIM_AGENT_METRICS_SECONDS="0.2")
    eventually(lambda: len(world.server.batches) >= 20, 60)
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
    assert rss < 80, f"the agent uses {rss:.0f} MB"
