"""The API resources the double serves: names, scope, subresources, selectable fields and creation defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from control.sandbox.kubernetes.quantities import parse_quantity

Object = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    """One REST resource of one API group version."""

    group: str
    version: str
    kind: str
    plural: str
    singular: str
    namespaced: bool
    short_names: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    extra_fields: Callable[[Object], dict[str, str]] | None = None
    extra_field_names: tuple[str, ...] = ()
    defaults: Callable[[Object], None] | None = None
    unconditional_update: bool = True  # False: a PUT without resourceVersion is refused (PodDisruptionBudget)
    returns_deleted_object: bool = False  # else a deletion answers with a Status
    field_names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "field_names", frozenset(("metadata.name", "metadata.namespace", *self.extra_field_names))
        )

    @property
    def api_version(self) -> str:
        """`v1` or `apps/v1`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def described(self) -> str:
        """The schema.GroupVersionResource text used in error messages."""
        return f"{self.group}/{self.version}, Resource={self.plural}"

    def fields(self, obj: Object) -> dict[str, str]:
        """The selectable fields of an object."""
        metadata = obj["metadata"]
        values = {"metadata.name": metadata["name"], "metadata.namespace": metadata.get("namespace", "")}
        if self.extra_fields is not None:
            values.update(self.extra_fields(obj))
        return values


def _pod_fields(pod: Object) -> dict[str, str]:
    spec, status = pod.get("spec") or {}, pod.get("status") or {}
    return {
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.restartPolicy": spec.get("restartPolicy", ""),
        "spec.schedulerName": spec.get("schedulerName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "spec.hostNetwork": "true" if spec.get("hostNetwork") else "false",
        "status.phase": status.get("phase", ""),
        "status.podIP": status.get("podIP", ""),
        "status.nominatedNodeName": status.get("nominatedNodeName", ""),
    }


def _event_fields(event: Object) -> dict[str, str]:
    involved = event.get("involvedObject") or {}
    return {
        **{
            f"involvedObject.{name}": involved.get(name, "")
            for name in ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")
        },
        "reason": event.get("reason", ""),
        "reportingComponent": event.get("reportingComponent", ""),
        "source": (event.get("source") or {}).get("component", ""),
        "type": event.get("type", ""),
    }


_POD_FIELD_NAMES = tuple(_pod_fields({}))
_EVENT_FIELD_NAMES = tuple(_event_fields({}))

# Added by the DefaultTolerationSeconds admission plug-in.
_DEFAULT_TOLERATIONS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def default_pod_spec(spec: Object) -> None:
    """The defaults a pod template or a pod gets on creation."""
    for name, value in (
        ("restartPolicy", "Always"),
        ("terminationGracePeriodSeconds", 30),
        ("dnsPolicy", "ClusterFirst"),
        ("schedulerName", "default-scheduler"),
        ("securityContext", {}),
    ):
        spec.setdefault(name, value)
    for container in spec.get("containers") or ():
        container.setdefault("imagePullPolicy", "IfNotPresent")
        container.setdefault("resources", {})
        limits = container["resources"].get("limits")
        if limits:  # a limit without a request is also the request
            requests = container["resources"].setdefault("requests", {})
            for name, value in limits.items():
                requests.setdefault(name, value)


def _quality_of_service(spec: Object) -> str:
    resources = [container.get("resources") or {} for container in spec.get("containers") or ()]
    if not any(entry.get("requests") or entry.get("limits") for entry in resources):
        return "BestEffort"
    for entry in resources:
        requests, limits = entry.get("requests") or {}, entry.get("limits") or {}
        for name in ("cpu", "memory"):
            if name not in limits or parse_quantity(requests.get(name)) != parse_quantity(limits[name]):
                return "Burstable"
    return "Guaranteed"


def _default_pod(pod: Object) -> None:
    spec = pod.setdefault("spec", {})
    default_pod_spec(spec)
    spec.setdefault("serviceAccountName", "default")
    spec.setdefault("serviceAccount", spec["serviceAccountName"])
    spec.setdefault("enableServiceLinks", True)
    spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
    spec.setdefault("priority", 0)
    tolerations = spec.setdefault("tolerations", [])
    for key in _DEFAULT_TOLERATIONS:
        if not any(t.get("key") in (key, None) and t.get("effect") in ("NoExecute", None) for t in tolerations):
            tolerations.append({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})
    status = pod.setdefault("status", {})
    status.setdefault("phase", "Pending")
    status.setdefault("qosClass", _quality_of_service(spec))


def _default_workload(workload: Object) -> None:
    spec = workload.setdefault("spec", {})
    spec.setdefault("replicas", 1)
    default_pod_spec(spec.setdefault("template", {}).setdefault("spec", {}))
    workload.setdefault("status", {"replicas": 0})


def _default_deployment(deployment: Object) -> None:
    deployment["status"] = {}
    _default_workload(deployment)
    spec = deployment["spec"]
    spec.setdefault("revisionHistoryLimit", 10)
    spec.setdefault("progressDeadlineSeconds", 600)
    strategy = spec.setdefault("strategy", {})
    strategy.setdefault("type", "RollingUpdate")
    if strategy["type"] == "RollingUpdate":
        rolling = strategy.setdefault("rollingUpdate", {})
        rolling.setdefault("maxSurge", "25%")
        rolling.setdefault("maxUnavailable", "25%")


def _default_daemon_set(daemon_set: Object) -> None:
    default_pod_spec(daemon_set.setdefault("spec", {}).setdefault("template", {}).setdefault("spec", {}))
    daemon_set.setdefault(
        "status",
        {"currentNumberScheduled": 0, "desiredNumberScheduled": 0, "numberMisscheduled": 0, "numberReady": 0},
    )


def _default_disruption_budget(budget: Object) -> None:
    budget.setdefault("spec", {})
    # observedGeneration 0 < generation 1: evictions are refused until the disruption controller has seen the budget.
    budget["status"] = {
        "currentHealthy": 0,
        "desiredHealthy": 0,
        "disruptionsAllowed": 0,
        "expectedPods": 0,
        "observedGeneration": 0,
    }


def _default_namespace(namespace: Object) -> None:
    namespace.setdefault("spec", {}).setdefault("finalizers", ["kubernetes"])
    namespace.setdefault("status", {}).setdefault("phase", "Active")
    labels = namespace["metadata"].setdefault("labels", {})
    labels.setdefault("kubernetes.io/metadata.name", namespace["metadata"]["name"])


def _default_node(node: Object) -> None:
    node.setdefault("spec", {})
    node.setdefault("status", {})


NAMESPACES = Resource(
    "", "v1", "Namespace", "namespaces", "namespace", False, ("ns",), ("status",),
    extra_fields=lambda obj: {"status.phase": (obj.get("status") or {}).get("phase", "")},
    extra_field_names=("status.phase",), defaults=_default_namespace, returns_deleted_object=True,
)  # fmt: skip
NODES = Resource(
    "", "v1", "Node", "nodes", "node", False, ("no",), ("status",),
    extra_fields=lambda obj: {"spec.unschedulable": "true" if obj["spec"].get("unschedulable") else "false"},
    extra_field_names=("spec.unschedulable",), defaults=_default_node,
)  # fmt: skip
PODS = Resource(
    "", "v1", "Pod", "pods", "pod", True, ("po",), ("status", "eviction", "binding"), ("all",),
    extra_fields=_pod_fields, extra_field_names=_POD_FIELD_NAMES, defaults=_default_pod, returns_deleted_object=True,
)  # fmt: skip
EVENTS = Resource(
    "", "v1", "Event", "events", "event", True, ("ev",),
    extra_fields=_event_fields, extra_field_names=_EVENT_FIELD_NAMES,
)  # fmt: skip
DEPLOYMENTS = Resource(
    "apps", "v1", "Deployment", "deployments", "deployment", True, ("deploy",), ("status", "scale"), ("all",),
    defaults=_default_deployment,
)  # fmt: skip
REPLICA_SETS = Resource(
    "apps", "v1", "ReplicaSet", "replicasets", "replicaset", True, ("rs",), ("status", "scale"), ("all",),
    defaults=_default_workload,
)  # fmt: skip
STATEFUL_SETS = Resource(
    "apps", "v1", "StatefulSet", "statefulsets", "statefulset", True, ("sts",), ("status", "scale"), ("all",),
    defaults=_default_workload,
)  # fmt: skip
DAEMON_SETS = Resource(
    "apps", "v1", "DaemonSet", "daemonsets", "daemonset", True, ("ds",), ("status",), ("all",),
    defaults=_default_daemon_set,
)  # fmt: skip
DISRUPTION_BUDGETS = Resource(
    "policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", "poddisruptionbudget", True, ("pdb",), ("status",),
    defaults=_default_disruption_budget, unconditional_update=False,
)  # fmt: skip
LEASES = Resource("coordination.k8s.io", "v1", "Lease", "leases", "lease", True)
SERVICES = Resource(
    "", "v1", "Service", "services", "service", True, ("svc",), ("status",), ("all",), returns_deleted_object=True
)

RESOURCES: tuple[Resource, ...] = (
    NAMESPACES, NODES, PODS, EVENTS, SERVICES, DEPLOYMENTS, REPLICA_SETS, STATEFUL_SETS, DAEMON_SETS,
    DISRUPTION_BUDGETS, LEASES,
)  # fmt: skip
BY_PATH = {(resource.group, resource.version, resource.plural): resource for resource in RESOURCES}
