"""What a drain meets: graceful deletion, evictions under budgets, controllers that make pods again elsewhere."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from kubernetes import client
from kubernetes.client import ApiException

from tests.sandbox.kubernetes.harness import (
    Double,
    deployment_object,
    eventually,
    pod_object,
)


def evict(core: client.CoreV1Api, name: str, namespace: str = "default", **options: object) -> object:
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": namespace}}
    if options:
        eviction["deleteOptions"] = options
    return core.create_namespaced_pod_eviction(name, namespace, eviction)


def budget(name: str, app: str, **rule: object) -> dict:
    return {"metadata": {"name": name}, "spec": {"selector": {"matchLabels": {"app": app}}, **rule}}


def running_pods(double: Double, core: client.CoreV1Api, app: str, count: int) -> list[client.V1Pod]:
    def check() -> list[client.V1Pod] | None:
        double.run_pods()
        pods = core.list_namespaced_pod("default", label_selector=f"app={app}").items
        up = [p for p in pods if p.status.phase == "Running" and p.metadata.deletion_timestamp is None]
        return up if len(up) == len(pods) == count else None

    return eventually(check, what=f"{count} running pods of {app}")


def test_without_a_kubelet_an_evicted_pod_stays_terminating_until_deleted_with_grace_0(
    double: Double, core: client.CoreV1Api
) -> None:
    double.node("n1")
    core.create_namespaced_pod("default", pod_object("p", node="n1", terminationGracePeriodSeconds=20))
    double.run_pods()
    evict(core, "p")
    pod = core.read_namespaced_pod("p", "default")
    assert pod.metadata.deletion_grace_period_seconds == 20
    assert pod.metadata.deletion_timestamp > pod.metadata.creation_timestamp + timedelta(seconds=19)
    assert any(c.type == "DisruptionTarget" and c.reason == "EvictionByEvictionAPI" for c in pod.status.conditions)
    evict(core, "p")  # again: nothing changes, no error
    assert core.read_namespaced_pod("p", "default").metadata.resource_version == pod.metadata.resource_version
    core.delete_namespaced_pod("p", "default", grace_period_seconds=5)
    shorter = core.read_namespaced_pod("p", "default").metadata
    assert shorter.deletion_grace_period_seconds == 5
    assert pod.metadata.deletion_timestamp - shorter.deletion_timestamp == timedelta(seconds=15)
    core.delete_namespaced_pod("p", "default", grace_period_seconds=600)  # never longer again
    assert core.read_namespaced_pod("p", "default").metadata.deletion_grace_period_seconds == 5
    core.delete_namespaced_pod("p", "default", grace_period_seconds=0)
    with pytest.raises(ApiException) as gone:
        core.read_namespaced_pod("p", "default")
    assert gone.value.status == 404


def test_an_eviction_may_name_a_shorter_grace_period(double: Double, core: client.CoreV1Api) -> None:
    double.node("n1")
    core.create_namespaced_pod("default", pod_object("p", node="n1", terminationGracePeriodSeconds=600))
    double.run_pods()
    evict(core, "p", gracePeriodSeconds=30)
    assert core.read_namespaced_pod("p", "default").metadata.deletion_grace_period_seconds == 30


def test_a_pod_never_bound_to_a_node_goes_at_once(core: client.CoreV1Api) -> None:
    core.create_namespaced_pod("default", pod_object("p", cpu="900"))
    evict(core, "p")
    assert core.list_namespaced_pod("default").items == []


def test_an_exhausted_budget_answers_429_with_the_real_message(
    double: Double, core: client.CoreV1Api, policy: client.PolicyV1Api
) -> None:
    double.start_controllers()
    double.node("n1")
    for name in ("p1", "p2"):
        core.create_namespaced_pod("default", pod_object(name, node="n1"))
    policy.create_namespaced_pod_disruption_budget("default", budget("web", "web", minAvailable=1))
    double.run_pods()
    eventually(lambda: policy.read_namespaced_pod_disruption_budget("web", "default").status.disruptions_allowed == 1)
    evict(core, "p1")
    # The message tells the healthy pods that the controller has counted.
    eventually(lambda: policy.read_namespaced_pod_disruption_budget("web", "default").status.current_healthy == 1)
    with pytest.raises(ApiException) as refused:
        evict(core, "p2")
    assert refused.value.status == 429
    answer = json.loads(refused.value.body)
    assert answer["message"] == "Cannot evict pod as it would violate the pod's disruption budget."
    assert answer["reason"] == "TooManyRequests"
    assert answer["details"]["causes"] == [
        {"reason": "DisruptionBudget", "message": "The disruption budget web needs 1 healthy pods and has 1 currently"}
    ]
    assert core.read_namespaced_pod("p2", "default").metadata.deletion_timestamp is None


def test_a_budget_nobody_has_processed_yet_answers_429_with_retry_after(
    double: Double, core: client.CoreV1Api, policy: client.PolicyV1Api
) -> None:
    double.node("n1")
    core.create_namespaced_pod("default", pod_object("p", node="n1"))
    policy.create_namespaced_pod_disruption_budget("default", budget("web", "web", maxUnavailable=1))
    double.run_pods()
    with pytest.raises(ApiException) as refused:
        evict(core, "p")
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "10")
    assert "is still being processed by the server" in refused.value.body


def test_two_budgets_over_one_pod_are_refused_with_500(
    double: Double, core: client.CoreV1Api, policy: client.PolicyV1Api
) -> None:
    double.node("n1")
    core.create_namespaced_pod("default", pod_object("p", node="n1"))
    for name in ("a", "b"):
        policy.create_namespaced_pod_disruption_budget("default", budget(name, "web", minAvailable=0))
    double.run_pods()
    with pytest.raises(ApiException) as refused:
        evict(core, "p")
    assert refused.value.status == 500
    assert "more than one PodDisruptionBudget" in refused.value.body


def test_unready_pods_may_be_evicted_when_the_policy_always_allows(
    double: Double, core: client.CoreV1Api, policy: client.PolicyV1Api
) -> None:
    double.start_controllers()
    double.node("n1")
    core.create_namespaced_pod("default", pod_object("p", node="n1"))
    policy.create_namespaced_pod_disruption_budget(
        "default", budget("web", "web", minAvailable=1, unhealthyPodEvictionPolicy="AlwaysAllow")
    )
    double.run_pods(ready=False)
    eventually(lambda: double.budget_processed("web"))
    evict(core, "p")
    assert core.read_namespaced_pod("p", "default").metadata.deletion_timestamp


@pytest.mark.parametrize(
    ("rule", "desired"),
    [
        ({"minAvailable": "50%"}, 3),
        ({"maxUnavailable": "25%"}, 3),
        ({"maxUnavailable": 1}, 4),
        ({"minAvailable": 2}, 2),
    ],
)
def test_budget_arithmetic_counts_the_controllers_replicas(
    double: Double, core: client.CoreV1Api, apps: client.AppsV1Api, policy: client.PolicyV1Api, rule: dict, desired: int
) -> None:
    double.start_controllers()
    double.node("n1")
    apps.create_namespaced_deployment("default", deployment_object("web", 5))
    policy.create_namespaced_pod_disruption_budget("default", budget("web", "web", **rule))
    running_pods(double, core, "web", 5)
    status = eventually(
        lambda: (s := policy.read_namespaced_pod_disruption_budget("web", "default").status).current_healthy == 5 and s
    )
    assert (status.desired_healthy, status.expected_pods, status.disruptions_allowed) == (desired, 5, 5 - desired)


def test_a_drained_node_pods_come_back_on_other_nodes(
    double: Double, core: client.CoreV1Api, apps: client.AppsV1Api
) -> None:
    double.start_controllers()
    for name in ("n1", "n2"):
        double.node(name)
    apps.create_namespaced_deployment("default", deployment_object("web", 6))
    pods = running_pods(double, core, "web", 6)
    assert {p.spec.node_name for p in pods} == {"n1", "n2"}
    core.patch_node("n1", {"spec": {"unschedulable": True}})
    taint = eventually(lambda: core.read_node("n1").spec.taints)[0]
    assert (taint.key, taint.effect) == ("node.kubernetes.io/unschedulable", "NoSchedule")
    for pod in pods:
        if pod.spec.node_name == "n1":
            evict(core, pod.metadata.name)
    assert {p.spec.node_name for p in running_pods(double, core, "web", 6)} == {"n2"}
    core.patch_node("n1", {"spec": {"unschedulable": None}})
    eventually(lambda: core.read_node("n1").spec.taints is None)


def test_pods_wait_with_a_reason_when_nothing_fits_and_start_when_something_does(
    double: Double, core: client.CoreV1Api, apps: client.AppsV1Api
) -> None:
    double.start_controllers()
    double.node("n1", cpu="2")
    apps.create_namespaced_deployment("default", deployment_object("big", 3, cpu="1500m"))

    def waiting() -> list[client.V1Pod]:
        pods = core.list_namespaced_pod("default").items
        return [p for p in pods if p.status.conditions and p.status.conditions[0].reason == "Unschedulable"]

    pods = eventually(lambda: len(waiting()) == 2 and waiting())
    assert pods[0].status.conditions[0].message == "0/1 nodes are available: 1 Insufficient cpu."
    assert eventually(lambda: core.list_namespaced_event("default", field_selector="reason=FailedScheduling").items)
    double.node("n2", cpu="4")
    running_pods(double, core, "big", 3)


def test_a_new_template_rolls_through_the_pods_within_its_limits(
    double: Double, core: client.CoreV1Api, apps: client.AppsV1Api
) -> None:
    double.start_controllers()
    double.node("n1", cpu="16")
    apps.create_namespaced_deployment("default", deployment_object("web", 4))
    running_pods(double, core, "web", 4)
    container = {"name": "main", "resources": {"requests": {"cpu": "250m"}}}
    apps.patch_namespaced_deployment("web", "default", {"spec": {"template": {"spec": {"containers": [container]}}}})

    def rolled() -> bool:
        pods = core.list_namespaced_pod("default").items
        alive = [p for p in pods if p.metadata.deletion_timestamp is None]
        assert sum(p.status.phase == "Running" for p in alive) >= 3  # 25 % of 4 may be missing
        assert len(alive) <= 5
        double.run_pods()
        return len(pods) == 4 and all(p.spec.containers[0].resources.requests["cpu"] == "250m" for p in pods)

    eventually(rolled)
    assert len(apps.list_namespaced_replica_set("default").items) == 2


def test_daemon_and_stateful_sets_behave(double: Double, core: client.CoreV1Api, apps: client.AppsV1Api) -> None:
    double.start_controllers()
    for name in ("n1", "n2"):
        double.node(name)
    template = deployment_object("agent", 1)["spec"]
    apps.create_namespaced_daemon_set(
        "default",
        {"metadata": {"name": "agent"}, "spec": {"selector": template["selector"], "template": template["template"]}},
    )
    pods = running_pods(double, core, "agent", 2)
    assert {p.spec.node_name for p in pods} == {"n1", "n2"}
    core.patch_node("n1", {"spec": {"unschedulable": True}})  # daemons stay on cordoned nodes
    stateful = deployment_object("db", 2)["spec"]
    apps.create_namespaced_stateful_set(
        "default", {"metadata": {"name": "db"}, "spec": {**stateful, "serviceName": "db"}}
    )
    assert {p.metadata.name for p in running_pods(double, core, "db", 2)} == {"db-0", "db-1"}
    assert len(running_pods(double, core, "agent", 2)) == 2
    uid = core.read_namespaced_pod("db-0", "default").metadata.uid
    evict(core, "db-0")
    assert core.read_namespaced_pod("db-0", "default").metadata.uid == uid  # no second db-0 while the first terminates
    running_pods(double, core, "db", 2)
    assert core.read_namespaced_pod("db-0", "default").metadata.uid != uid


def test_pods_of_a_node_that_is_gone_are_collected(double: Double, core: client.CoreV1Api) -> None:
    double.start_controllers()
    double.node("n1")
    core.create_namespaced_pod("default", pod_object("p", node="n1"))
    double.run_pods()
    core.delete_node("n1")
    eventually(lambda: core.list_namespaced_pod("default").items == [])


def test_deleting_a_deployment_collects_its_dependents(
    double: Double, core: client.CoreV1Api, apps: client.AppsV1Api
) -> None:
    double.start_controllers()
    double.node("n1")
    apps.create_namespaced_deployment("default", deployment_object("web", 2))
    running_pods(double, core, "web", 2)
    apps.delete_namespaced_deployment("web", "default")

    def nothing_left() -> bool:
        double.run_pods()
        return not core.list_namespaced_pod("default").items and not apps.list_namespaced_replica_set("default").items

    eventually(nothing_left)


def test_not_ready_taint_evicts_after_the_tolerated_time(double: Double, core: client.CoreV1Api) -> None:
    double.start_controllers()
    double.node("n1")
    patience = [
        {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1}
    ]
    core.create_namespaced_pod("default", pod_object("hasty", node="n1", tolerations=patience))
    core.create_namespaced_pod("default", pod_object("patient", node="n1"))  # 300 s by default
    double.run_pods()
    taint = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}
    core.patch_node("n1", {"spec": {"taints": [taint | {"timeAdded": datetime.now(UTC).isoformat()}]}})
    eventually(lambda: core.read_namespaced_pod("hasty", "default").metadata.deletion_timestamp)
    assert core.read_namespaced_pod("patient", "default").metadata.deletion_timestamp is None
