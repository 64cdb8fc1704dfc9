"""What each task type does to the cluster. Every one is safe to run again: it looks first, and changes what differs."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from control.agent.cluster import Cluster, ClusterError, Object
from control.agent.drain import Drain, Finished, Step, identify, must_leave, refused
from warehouse.contracts import TASK_TYPE_ALIASES, OptimizationTask, TaskStatus, TaskType

# launch_nodes is left out: launching is the server's job through EC2, with its own keys against doing it twice.
UNDERSTOOD: tuple[str, ...] = (
    TaskType.CORDON_NODE,
    TaskType.DRAIN_NODE,
    TaskType.UNCORDON_NODE,
    TaskType.UPDATE_LABELS,
    TaskType.DELETE_NODE,
    TaskType.RESIZE_WORKLOAD,
    TaskType.COLLECT_STATE,
    *TASK_TYPE_ALIASES,
)

_WORKLOADS = {"Deployment": "deployments", "StatefulSet": "statefulsets", "DaemonSet": "daemonsets"}
_NAME = re.compile(r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")
_QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")
# Labels of these prefixes belong to Kubernetes and the cloud; changing them would move pods or break billing.
_PROTECTED_PREFIXES = ("kubernetes.io/", "k8s.io/", "node-role.kubernetes.io/", "topology.kubernetes.io/")
_PROTECTED_SUFFIXES = (".kubernetes.io/", ".k8s.io/")

# The cluster, the time and the deadline, which may come nearer while the task is under way.
Stepper = Callable[[Cluster, datetime, datetime | None], Step]


def make_stepper(task: OptimizationTask, now: datetime, collect: Callable[[], dict[str, Any]]) -> Stepper:
    """The step function of a task. `collect` posts a fresh batch of state and metrics and returns a summary."""
    parameters = task.parameters
    if task.task_type is TaskType.DRAIN_NODE:
        return Drain(parameters, now).step
    single: dict[TaskType, Callable[[Cluster], Finished]] = {
        TaskType.CORDON_NODE: lambda cluster: _schedulable(cluster, parameters, unschedulable=True),
        TaskType.UNCORDON_NODE: lambda cluster: _schedulable(cluster, parameters, unschedulable=False),
        TaskType.UPDATE_LABELS: lambda cluster: _update_labels(cluster, parameters),
        TaskType.DELETE_NODE: lambda cluster: _delete_node(cluster, parameters),
        TaskType.RESIZE_WORKLOAD: lambda cluster: _resize(cluster, parameters),
        TaskType.COLLECT_STATE: lambda cluster: Finished(TaskStatus.DONE, collect()),
    }
    act = single.get(task.task_type, lambda cluster: refused(f"this agent does not do {task.task_type} tasks"))
    return lambda cluster, now, deadline: act(cluster)


def _schedulable(cluster: Cluster, parameters: dict[str, Any], *, unschedulable: bool) -> Finished:
    node = identify(cluster, parameters)
    if isinstance(node, Finished):
        return node
    changed = bool(node["spec"].get("unschedulable")) is not unschedulable
    if changed:
        cluster.patch_node(node, {"spec": {"unschedulable": True if unschedulable else None}})
    state = {"cordoned": True} if unschedulable else {"schedulable": True}
    return Finished(TaskStatus.DONE, {"node_name": parameters["node_name"], **state, "changed": changed})


def _update_labels(cluster: Cluster, parameters: dict[str, Any]) -> Finished:
    labels = parameters.get("labels")
    if not isinstance(labels, dict) or not labels:
        return refused("parameters must hold labels: {name: value, or null to remove}")
    for name in labels:
        prefix = f"{name.split('/')[0]}/" if "/" in name else ""
        if prefix in _PROTECTED_PREFIXES or prefix.endswith(_PROTECTED_SUFFIXES):
            return refused(f"label {name} belongs to Kubernetes and is not changed")
    node = identify(cluster, parameters)
    if isinstance(node, Finished):
        return node
    current = node["metadata"].get("labels") or {}
    changed = {name: value for name, value in labels.items() if current.get(name) != value}
    if changed:
        cluster.patch_node(node, {"metadata": {"labels": changed}})
    return Finished(TaskStatus.DONE, {"node_name": parameters["node_name"], "changed": sorted(changed)})


def _delete_node(cluster: Cluster, parameters: dict[str, Any]) -> Finished:
    """Removes the Node object; refused while pods that a drain would move still run there."""
    node = identify(cluster, parameters)
    if isinstance(node, Finished):
        return node
    name = node["metadata"]["name"]
    left = [pod for pod in cluster.pods_on(name) if must_leave(pod)]
    if left and not parameters.get("force"):
        return refused(f"{len(left)} pods still run on {name}; drain it first", node_name=name)
    cluster.delete_node(node)
    return Finished(TaskStatus.DONE, {"node_name": name, "changed": True})


def _resize(cluster: Cluster, parameters: dict[str, Any]) -> Finished:
    """Set requests and limits in a workload's pod template; the workload's own controller rolls the pods.

    Parameters: namespace, kind, name, and either container + requests + limits, or containers: a list of those.
    """
    namespace, name = str(parameters.get("namespace", "")), str(parameters.get("name", ""))
    plural = _WORKLOADS.get(str(parameters.get("kind", "")))
    if plural is None or not _NAME.match(namespace) or not _NAME.match(name):
        return refused(f"parameters must name kind ({', '.join(_WORKLOADS)}), namespace and name of a workload")
    path = f"/apis/apps/v1/namespaces/{namespace}/{plural}/{name}"
    try:
        workload = cluster.get(path)
    except ClusterError as error:
        if error.status == 404:
            return refused(f"there is no {parameters['kind']} {namespace}/{name}")
        raise
    present = {container["name"]: container for container in workload["spec"]["template"]["spec"]["containers"]}
    wanted = parameters.get("containers") or [
        {
            "name": parameters.get("container") or next(iter(present)),
            "requests": parameters.get("requests") or {},
            "limits": parameters.get("limits") or {},
        }
    ]
    patches: list[Object] = []
    before: dict[str, Any] = {}
    for entry in wanted:
        container = present.get(entry.get("name"))
        if container is None:
            return refused(f"{namespace}/{name} has no container {entry.get('name')!r}")
        resources = {part: entry[part] for part in ("requests", "limits") if entry.get(part)}
        for values in resources.values():
            for resource, quantity in values.items():
                if resource not in ("cpu", "memory") or not _QUANTITY.match(str(quantity)):
                    return refused(f"{resource}: {quantity!r} is not a cpu or memory quantity such as 250m or 512Mi")
        if not resources:
            return refused("parameters must hold requests or limits to set")
        current = container.get("resources") or {}
        before[container["name"]] = {part: current.get(part) or {} for part in resources}
        if any(
            (current.get(part) or {}).get(resource) != str(quantity)
            for part, values in resources.items()
            for resource, quantity in values.items()
        ):
            texts = {part: {k: str(v) for k, v in values.items()} for part, values in resources.items()}
            patches.append({"name": container["name"], "resources": texts})
    if patches:
        cluster.patch(path, {"spec": {"template": {"spec": {"containers": patches}}}}, strategic=True)
    return Finished(
        TaskStatus.DONE,
        {"workload": f"{namespace}/{parameters['kind']}/{name}", "changed": bool(patches), "before": before},
    )
