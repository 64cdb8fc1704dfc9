"""Tasks end to end: agent process, official client against the Kubernetes double, real leases at the server."""

from __future__ import annotations

import signal
import time

import httpx
import pytest
from kubernetes.client import ApiException

from control.embedded import free_port
from tests.control.agent.harness import World, eventually


def budget(world: World, app: str, **rule: object) -> None:
    world.policy.create_namespaced_pod_disruption_budget(
        "default", {"metadata": {"name": app}, "spec": {"selector": {"matchLabels": {"app": app}}, **rule}}
    )
    eventually(lambda: world.policy.read_namespaced_pod_disruption_budget(app, "default").status.observed_generation)


def test_a_drain_cordons_reports_it_and_moves_every_pod(world: World) -> None:
    instance = world.add_node("n1")
    world.add_node("n2")
    world.deploy("web", 6)
    assert world.pods("web", node="n1")
    world.start_agent()
    task = world.server.add("drain_node", node_name="n1", instance_id=instance)
    result = world.server.ended(task)
    assert result.status == "done", result
    assert result.detail["cordoned"] is True
    assert result.detail["evicted"] >= 1
    assert world.core.read_node("n1").spec.unschedulable is True
    assert world.pods("web", node="n1") == []
    eventually(lambda: len(world.pods("web", running=True, node="n2")) == 6)
    progress = [r for r in world.server.reports if r.result.status == "running"]
    assert progress[0].result.detail == {"progress": "cordoned"}
    assert progress[0].at < world.server.final(task).at


def test_daemon_pods_stay_and_a_second_drain_has_nothing_to_do(world: World) -> None:
    instance = world.add_node("n1")
    template = {"metadata": {"labels": {"app": "ds"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    world.apps.create_namespaced_daemon_set(
        "default",
        {"metadata": {"name": "ds"}, "spec": {"selector": {"matchLabels": {"app": "ds"}}, "template": template}},
    )
    eventually(lambda: world.pods("ds", running=True))
    world.start_agent()
    for _ in range(2):
        result = world.server.ended(world.server.add("drain_nodes", node_name="n1", instance_id=instance))
        assert (result.status, result.detail["evicted"]) == ("done", 0)
    assert len(world.pods("ds", running=True)) == 1


def test_a_missing_node_is_done_and_another_instance_of_that_name_is_refused(world: World) -> None:
    world.add_node("reused", "i-0000000000newone1")
    world.deploy("web", 2)
    world.start_agent()
    gone = world.server.ended(world.server.add("drain_node", node_name="ghost", instance_id="i-0123456789abcdef0"))
    assert (gone.status, gone.detail["reason"]) == ("done", "node not found, skipping")
    wrong = world.server.ended(world.server.add("drain_node", node_name="reused", instance_id="i-0000000000oldone1"))
    assert wrong.status == "refused"
    assert "is instance i-0000000000newone1, not i-0000000000oldone1" in wrong.detail["reason"]
    nameless = world.server.ended(world.server.add("drain_node", node_name="reused"))
    assert nameless.status == "refused"
    assert world.core.read_node("reused").spec.unschedulable is None
    assert len(world.pods("web", running=True)) == 2


@pytest.mark.parametrize("task_type", ["cordon_node", "uncordon_node", "update_labels", "delete_node"])
def test_no_task_touches_another_instance_of_that_name(world: World, task_type: str) -> None:
    world.add_node("reused", "i-0000000000newone1")
    if task_type == "uncordon_node":
        world.core.patch_node("reused", {"spec": {"unschedulable": True}})
    before = world.core.read_node("reused")
    world.start_agent()
    old = {"node_name": "reused", "instance_id": "i-0000000000oldone1"}
    result = world.server.ended(world.server.add(task_type, **old, labels={"pool": "a"}))
    assert (result.status, "not i-0000000000oldone1" in result.detail["reason"]) == ("refused", True)
    after = world.core.read_node("reused")
    assert (after.metadata.uid, after.metadata.labels) == (before.metadata.uid, before.metadata.labels)
    assert after.spec.unschedulable == before.spec.unschedulable


def test_a_name_that_is_used_again_in_the_middle_of_a_drain_ends_it(world: World) -> None:
    instance = world.add_node("n1")
    world.deploy("web", 1)
    budget(world, "web", minAvailable=1)
    world.start_agent()
    task = world.server.add("drain_node", node_name="n1", instance_id=instance)
    eventually(lambda: world.core.read_node("n1").spec.unschedulable)
    world.core.delete_node("n1")
    world.add_node("n1", "i-0000000000newone1")
    assert world.server.ended(task, 10).status in ("done", "refused"), "gone, or another by the time it looked again"
    assert world.core.read_node("n1").spec.unschedulable is None


def test_evictions_wait_for_a_budget_and_then_finish(world: World) -> None:
    instance = world.add_node("n1")
    world.deploy("web", 3)
    budget(world, "web", maxUnavailable=1)
    world.start_agent()
    task = world.server.add("drain_node", node_name="n1", instance_id=instance)
    # one pod may go; its replacement finds no other node, so the budget blocks the rest
    eventually(lambda: len(world.pods("web", running=True)) == 2)
    time.sleep(0.5)
    assert len(world.pods("web", running=True)) == 2
    assert world.server.final(task) is None
    world.add_node("n2")
    assert world.server.ended(task).status == "done"
    eventually(lambda: len(world.pods("web", running=True, node="n2")) == 3)


def test_at_the_deadline_a_blocked_pod_is_left_alone_unless_the_task_says_force(world: World) -> None:
    instance = world.add_node("n1")
    world.deploy("web", 1)
    budget(world, "web", minAvailable=1)
    (pod,) = world.pods("web")
    world.start_agent()
    eventually(lambda: world.server.polls)
    result = world.server.ended(world.server.add("drain_node", 6, node_name="n1", instance_id=instance))
    assert result.status == "failed"
    assert result.detail["remaining"][0]["pod"] == f"default/{pod.metadata.name}"
    assert "disruption budget" in result.detail["remaining"][0]["reason"]
    assert [p.metadata.uid for p in world.pods("web", running=True)] == [pod.metadata.uid]
    forced = world.server.ended(
        world.server.add("drain_node", 6, node_name="n1", instance_id=instance, force_at_deadline=True)
    )
    assert (forced.status, forced.detail["forced"]) == ("done", 1)
    assert world.pods("web", node="n1") == []


def test_a_drain_under_way_learns_of_an_earlier_end_with_the_answer_to_its_report(world: World) -> None:
    instance = world.add_node("n1")
    world.deploy("web", 1)
    budget(world, "web", minAvailable=1)
    world.start_agent()
    task = world.server.add(
        "drain_node", 10, offered_seconds=900, node_name="n1", instance_id=instance, force_at_deadline=True
    )
    assert world.server.ended(task, 10).detail["forced"] == 1


def test_a_drain_under_way_learns_of_an_earlier_end_through_its_open_poll(world: World) -> None:
    instance = world.add_node("n1")
    world.deploy("web", 1)
    budget(world, "web", minAvailable=1)
    world.start_agent()
    task = world.server.add("drain_node", 900, node_name="n1", instance_id=instance, force_at_deadline=True)
    eventually(lambda: world.core.read_node("n1").spec.unschedulable)
    started = time.monotonic()
    world.server.hasten(task, 10, grace_seconds=1)
    assert world.server.ended(task, 10).detail["forced"] == 1
    assert time.monotonic() - started < 4.0, "before its next report was due"


def test_a_drain_under_way_takes_a_shorter_grace_period_and_no_longer_one(world: World) -> None:
    instance = world.add_node("n1")
    world.deploy("slow", 1, terminationGracePeriodSeconds=600)
    budget(world, "slow", minAvailable=1)
    world.call(world.kubelets.stop)  # pods keep terminating: their deletion grace can be read
    world.start_agent()
    task = world.server.add("drain_node", 900, node_name="n1", instance_id=instance, grace_seconds=100)
    eventually(lambda: world.core.read_node("n1").spec.unschedulable)
    for grace_seconds in (5, 50):  # hibernation begins at once, whatever comes after it
        world.server.hasten(task, 300, grace_seconds=grace_seconds)
        eventually(lambda: not world.server.tasks[task].hastened)
    time.sleep(0.5)
    world.policy.delete_namespaced_pod_disruption_budget("slow", "default")
    (pod,) = eventually(lambda: [p for p in world.pods("slow") if p.metadata.deletion_timestamp])
    assert pod.metadata.deletion_grace_period_seconds == 5


def test_a_task_past_its_deadline_is_not_executed(world: World) -> None:
    instance = world.add_node("n1")
    world.start_agent()
    result = world.server.ended(world.server.add("drain_node", -1, node_name="n1", instance_id=instance))
    assert result.status == "refused"
    assert "deadline" in result.detail["reason"]
    assert world.core.read_node("n1").spec.unschedulable is None


def test_pods_never_get_more_grace_than_is_left(world: World) -> None:
    instance = world.add_node("n1")
    world.call(world.kubelets.stop)  # pods keep terminating: their deletion grace can be read
    world.call(world.kubelets.start)
    world.deploy("slow", 1, terminationGracePeriodSeconds=600)
    world.call(world.kubelets.stop)
    world.start_agent()
    eventually(lambda: world.server.polls)
    world.server.add("drain_node", 40, node_name="n1", instance_id=instance)
    (pod,) = eventually(lambda: [p for p in world.pods("slow") if p.metadata.deletion_timestamp])
    assert 30 <= pod.metadata.deletion_grace_period_seconds <= 37


def test_a_drain_that_comes_with_seconds_left_lets_pods_end_by_themselves(world: World) -> None:
    instance = world.add_node("n1")
    world.deploy("web", 1)
    world.call(world.kubelets.stop)  # a pod deleted with a grace stays, one deleted without is gone at once
    world.start_agent()
    eventually(lambda: world.server.polls)
    task = world.server.add("drain_node", 2.9, node_name="n1", instance_id=instance, force_at_deadline=True)
    (pod,) = eventually(lambda: [p for p in world.pods("web", node="n1") if p.metadata.deletion_timestamp], 3)
    assert pod.metadata.deletion_grace_period_seconds == 1
    assert (world.server.ended(task, 5).status, world.pods("web", node="n1")) == ("done", [])


def test_cordon_uncordon_labels_and_delete(world: World) -> None:
    instance = world.add_node("n1")
    world.deploy("web", 1)
    world.start_agent()
    me = {"node_name": "n1", "instance_id": instance}

    def run(task_type: str, **parameters: object):
        return world.server.ended(world.server.add(task_type, **me, **parameters))

    assert run("cordon_node").detail == {"node_name": "n1", "cordoned": True, "changed": True}
    assert run("cordon_node").detail["changed"] is False
    assert run("uncordon_node").detail["changed"] is True
    assert not world.core.read_node("n1").spec.unschedulable
    assert run("update_labels", labels={"pool": "a", "old": None}).detail["changed"] == ["pool"]
    assert world.core.read_node("n1").metadata.labels["pool"] == "a"
    assert run("update_labels", labels={"kubernetes.io/hostname": "x"}).status == "refused"
    refused = run("delete_node")
    assert (refused.status, "drain it first" in refused.detail["reason"]) == ("refused", True)
    assert run("drain_node").status == "done"
    assert run("delete_node").detail["changed"] is True
    with pytest.raises(ApiException) as gone:
        world.core.read_node("n1")
    assert gone.value.status == 404
    assert run("delete_node").detail["reason"] == "node not found, skipping"


def test_resize_changes_the_template_once_and_refuses_nonsense(world: World) -> None:
    world.add_node("n1")
    world.deploy("web", 2)
    world.start_agent()
    target = {"namespace": "default", "kind": "Deployment", "name": "web"}
    first = world.server.ended(world.server.add("resize_workload", **target, requests={"cpu": "250m"}))
    assert (first.status, first.detail["changed"]) == ("done", True)
    assert first.detail["before"]["main"]["requests"]["cpu"] == "100m"
    again = world.server.ended(world.server.add("resize", **target, requests={"cpu": "250m"}))
    assert again.detail["changed"] is False

    def resized() -> bool:
        pods = world.pods("web", running=True)
        return len(pods) == 2 and all(p.spec.containers[0].resources.requests["cpu"] == "250m" for p in pods)

    eventually(resized)
    for bad in (
        {**target, "requests": {"cpu": "lots"}},
        {**target, "container": "nobody", "requests": {"cpu": "1"}},
        {**target, "name": "../../secrets", "requests": {"cpu": "1"}},
        {**target, "name": "ghost", "requests": {"cpu": "1"}},
        {**target},
    ):
        assert world.server.ended(world.server.add("resize_workload", **bad)).status == "refused"


def test_launching_is_not_announced_and_would_be_refused(world: World) -> None:
    world.add_node("n1")
    world.start_agent()
    task = world.server.add("launch_nodes", count=1)
    state = world.server.ended(world.server.add("collect_state"))
    assert state.detail["node_count"] == 1
    assert world.server.tasks[task].offered == 0


def test_many_drains_run_at_the_same_time(world: World) -> None:
    instances = {f"n{index}": world.add_node(f"n{index}") for index in range(12)}
    world.add_node("spare-1")
    world.add_node("spare-2")
    world.deploy("web", 24)
    world.start_agent()
    started = time.monotonic()
    tasks = [world.server.add("drain_node", node_name=n, instance_id=i) for n, i in instances.items()]
    assert {world.server.ended(task, 60).status for task in tasks} == {"done"}
    assert time.monotonic() - started < 25
    eventually(lambda: len(world.pods("web", running=True)) == 24)
    assert {p.spec.node_name for p in world.pods("web")} <= {"spare-1", "spare-2"}


def test_killed_in_the_middle_of_a_drain_another_life_finishes_it(world: World) -> None:
    instance = world.add_node("n1")
    world.deploy("web", 4)
    budget(world, "web", maxUnavailable=1)
    world.start_agent()
    task = world.server.add("drain_node", node_name="n1", instance_id=instance)
    eventually(lambda: len(world.pods("web", running=True)) == 3)
    world.kill_agent()
    world.add_node("n2")
    world.start_agent()
    result = world.server.ended(task)
    assert result.status == "done"
    assert result.lease_epoch >= 2
    eventually(lambda: len(world.pods("web", running=True, node="n2")) == 4)


@pytest.mark.parametrize("offered_again", [False, True])
def test_a_report_the_server_did_not_take_survives_kill_9_and_is_not_done_again(
    world: World, offered_again: bool
) -> None:
    instance = world.add_node("n1")
    world.add_node("n2")
    world.deploy("web", 2)
    world.start_agent()
    world.server.lose_reports = 1000
    task = world.server.add("cordon_node", node_name="n1", instance_id=instance)
    eventually(lambda: world.server.lose_reports < 1000)
    world.kill_agent()
    world.core.patch_node("n1", {"spec": {"unschedulable": None}})  # somebody took the cordon back meanwhile
    if offered_again:
        # Its lease is over before the report gets through: what was done is told under the new one.
        world.server.tasks[task].lease_until = 0.0
    else:
        world.server.lose_reports = 0
    world.start_agent()
    if offered_again:
        eventually(lambda: world.server.tasks[task].epoch == 2)
        world.server.lose_reports = 0
    result = world.server.ended(task)
    assert result.lease_epoch == 1 + offered_again
    assert (result.status, result.detail["changed"]) == ("done", True)
    time.sleep(0.5)
    assert not world.core.read_node("n1").spec.unschedulable  # the finished task was reported, not repeated


def test_a_report_under_a_lease_that_was_lost_is_not_repeated(world: World) -> None:
    instance = world.add_node("n1")
    world.deploy("web", 1)
    budget(world, "web", minAvailable=1)
    world.start_agent()
    task = world.server.add("drain_node", node_name="n1", instance_id=instance)
    eventually(lambda: any(r.result.detail.get("progress") for r in world.server.reports))
    held = world.server.tasks[task]
    held.epoch, held.lease_until = 99, time.monotonic() + 3600  # another agent has it now
    eventually(lambda: any(not r.applied for r in world.server.reports), 15, "a heartbeat that is told 409")
    world.policy.delete_namespaced_pod_disruption_budget("web", "default")
    time.sleep(2)
    assert len(world.pods("web", running=True)) == 1  # it stopped evicting
    assert world.server.final(task) is None


def test_the_agent_stops_within_five_seconds_of_sigterm(world: World) -> None:
    world.add_node("n1")
    process = world.start_agent()
    eventually(lambda: world.server.polls)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert time.monotonic() - started < 5


def test_a_cluster_that_does_not_answer_is_waited_for_until_the_deadline(world: World) -> None:
    instance = world.add_node("n1")
    world.start_agent()
    eventually(lambda: world.server.batches)
    world.cluster.api.tokens.clear()  # every answer is 401 now, as while a token is rotated
    me = {"node_name": "n1", "instance_id": instance}
    short, long = world.server.add("cordon_node", 2, **me), world.server.add("cordon_node", 60, **me)
    failed = world.server.ended(short)
    assert (failed.status, "401" in failed.detail["reason"]) == ("failed", True)
    world.cluster.api.tokens.add(World.TOKEN)
    assert world.server.ended(long).status == "done"


def test_health_is_served_on_request(world: World) -> None:
    world.add_node("n1")
    port = free_port()
    world.start_agent(CLOUDOPTIM_AGENT_HEALTH_PORT=str(port))
    eventually(lambda: world.server.polls)

    def healthy() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    eventually(healthy)
    assert httpx.get(f"http://127.0.0.1:{port}/other", timeout=2).status_code == 404
