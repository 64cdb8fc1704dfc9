"""PodDisruptionBudget arithmetic and the Eviction subresource, rule for rule as kube-apiserver and the disruption
controller have them (pkg/registry/core/pod/storage/eviction.go, pkg/controller/disruption)."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any

from control.sandbox.kubernetes.resources import DEPLOYMENTS, DISRUPTION_BUDGETS, PODS, REPLICA_SETS, Object
from control.sandbox.kubernetes.resources import STATEFUL_SETS as STATEFUL
from control.sandbox.kubernetes.selectors import matches_label_selector
from control.sandbox.kubernetes.status import ApiError, success, too_many_requests
from control.sandbox.kubernetes.store import Store, controller_of, parse_timestamp, timestamp

REFUSED = "Cannot evict pod as it would violate the pod's disruption budget."
# How long an evicted pod may stay undeleted before the budget counts it as healthy again (DeletionTimeout).
DELETION_TIMEOUT = timedelta(minutes=2)


def pod_is_ready(pod: Object) -> bool:
    """True when the pod's Ready condition is True."""
    return any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in (pod.get("status") or {}).get("conditions") or ()
    )


def budgets_of(store: Store, pod: Object) -> list[Object]:
    """The PodDisruptionBudgets that select a pod."""
    labels = pod["metadata"].get("labels") or {}
    return [
        budget
        for budget in store.objects(DISRUPTION_BUDGETS, pod["metadata"]["namespace"])
        if matches_label_selector(budget["spec"].get("selector"), labels)
    ]


def scaled(value: int | str, total: int, round_up: bool = True) -> int:
    """An IntOrString against a total: "25%" of 10 is 3 (rounded up) or 2."""
    if isinstance(value, str) and value.endswith("%"):
        share = int(value[:-1]) * total / 100
        return math.ceil(share) if round_up else math.floor(share)
    return int(value)


def budget_status(store: Store, budget: Object, now: datetime) -> dict[str, Any]:
    """The status the disruption controller would write."""
    namespace = budget["metadata"]["namespace"]
    spec = budget["spec"]
    pods = [
        pod
        for pod in store.objects(PODS, namespace)
        if matches_label_selector(spec.get("selector"), pod["metadata"].get("labels") or {})
        and pod["status"].get("phase") not in ("Succeeded", "Failed")
    ]
    disrupted = {
        name: at
        for name, at in ((budget.get("status") or {}).get("disruptedPods") or {}).items()
        if any(p["metadata"]["name"] == name and not p["metadata"].get("deletionTimestamp") for p in pods)
        and parse_timestamp(at) + DELETION_TIMEOUT > now
    }
    healthy = sum(
        1
        for pod in pods
        if pod_is_ready(pod)
        and not pod["metadata"].get("deletionTimestamp")
        and pod["metadata"]["name"] not in disrupted
    )
    min_available = spec.get("minAvailable")
    if "maxUnavailable" in spec and spec["maxUnavailable"] is not None:
        expected = _expected_count(store, pods)
        desired = max(0, expected - scaled(spec["maxUnavailable"], expected))
    elif isinstance(min_available, str):
        expected = _expected_count(store, pods)
        desired = scaled(min_available, expected)
    else:
        expected, desired = len(pods), int(min_available or 0)
    allowed = max(0, healthy - desired) if expected > 0 else 0
    status = {
        "currentHealthy": healthy,
        "desiredHealthy": desired,
        "disruptionsAllowed": allowed,
        "expectedPods": expected,
        "observedGeneration": budget["metadata"].get("generation", 1),
        "conditions": [
            {
                "type": "DisruptionAllowed",
                "status": "True" if allowed > 0 else "False",
                "reason": "SufficientPods" if allowed > 0 else "InsufficientPods",
                "message": "",
                "observedGeneration": budget["metadata"].get("generation", 1),
                "lastTransitionTime": _transition(budget, allowed > 0, now),
            }
        ],
    }
    if disrupted:
        status["disruptedPods"] = disrupted
    return status


def _transition(budget: Object, allowed: bool, now: datetime) -> str:
    for condition in (budget.get("status") or {}).get("conditions") or ():
        if condition.get("status") == ("True" if allowed else "False"):
            return condition["lastTransitionTime"]
    return timestamp(now)


def _expected_count(store: Store, pods: list[Object]) -> int:
    """Desired replicas of the controllers behind the pods; pods without a scalable controller count as themselves."""
    expected, seen = 0, set()
    for pod in pods:
        owner = controller_of(pod)
        if owner is None:
            expected += 1
            continue
        if owner["uid"] in seen:
            continue
        seen.add(owner["uid"])
        resource = {"ReplicaSet": REPLICA_SETS, "StatefulSet": STATEFUL}.get(owner["kind"])
        found = store.find(resource, pod["metadata"]["namespace"], owner["name"]) if resource else None
        if found is None:
            expected += sum(1 for other in pods if (controller_of(other) or {}).get("uid") == owner["uid"])
            continue
        parent = controller_of(found)
        if parent is not None and parent["kind"] == "Deployment":
            if parent["uid"] in seen:
                continue
            seen.add(parent["uid"])
            deployment = store.find(DEPLOYMENTS, pod["metadata"]["namespace"], parent["name"])
            if deployment is not None:
                found = deployment
        expected += int(found["spec"].get("replicas", 1))
    return expected


def evict(store: Store, namespace: str, name: str, eviction: dict[str, Any], *, dry_run: bool = False) -> dict:
    """Evict one pod: a Status of success (201), or an ApiError 404, 429 (budget) or 500 (two budgets)."""
    pod = store.get(PODS, namespace, name)
    options = dict(eviction.get("deleteOptions") or {})
    dry_run = dry_run or bool(options.get("dryRun"))
    finished = pod["status"].get("phase") in ("Succeeded", "Failed", "Pending")
    if not finished and not pod["metadata"].get("deletionTimestamp"):
        budgets = budgets_of(store, pod)
        if len(budgets) > 1:
            raise ApiError(
                500,
                "",
                "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
            )
        if budgets and not _unhealthy_pod_may_go(pod, budgets[0]):
            _spend(store, budgets[0], name, dry_run)
    if not dry_run:
        current = store.get(PODS, namespace, name)
        preconditions = options.get("preconditions") or {}
        if preconditions.get("uid") in (None, current["metadata"]["uid"]):
            store.edit(PODS, current, lambda draft: _mark_disrupted(draft, store.clock()), subresource="status")
    store.delete(PODS, namespace, name, options, dry_run=dry_run)
    return success(code=201)


def _unhealthy_pod_may_go(pod: Object, budget: Object) -> bool:
    if pod_is_ready(pod):
        return False
    if budget["spec"].get("unhealthyPodEvictionPolicy") == "AlwaysAllow":
        return True
    status = budget.get("status") or {}
    desired = status.get("desiredHealthy", 0)
    return status.get("currentHealthy", 0) >= desired and desired > 0


def _spend(store: Store, budget: Object, pod_name: str, dry_run: bool) -> None:
    """checkAndDecrement: take one disruption from the budget or refuse."""
    status, name = budget.get("status") or {}, budget["metadata"]["name"]
    if status.get("observedGeneration", 0) < budget["metadata"].get("generation", 1):
        raise too_many_requests(REFUSED, 10, f"The disruption budget {name} is still being processed by the server.")
    if status.get("disruptionsAllowed", 0) <= 0:
        raise too_many_requests(
            REFUSED,
            0,
            f"The disruption budget {name} needs {status.get('desiredHealthy', 0)} healthy pods and has "
            f"{status.get('currentHealthy', 0)} currently",
        )
    if dry_run:
        return

    def take(draft: Object) -> None:
        draft["status"]["disruptionsAllowed"] -= 1
        draft["status"].setdefault("disruptedPods", {})[pod_name] = timestamp(store.clock())

    store.edit(DISRUPTION_BUDGETS, budget, take, subresource="status")


def _mark_disrupted(pod: Object, now: datetime) -> None:
    if any(c.get("type") == "DisruptionTarget" for c in pod["status"].get("conditions") or ()):
        return  # as UpdatePodCondition: the same condition again changes nothing, its time included
    conditions = list(pod["status"].get("conditions") or ())
    conditions.append(
        {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "EvictionByEvictionAPI",
            "message": "Eviction API: evicting",
            "lastProbeTime": None,
            "lastTransitionTime": timestamp(now),
        }
    )
    pod["status"]["conditions"] = conditions
