"""Where a pending pod goes: a pure function over nodes and pods with the filters of kube-scheduler's defaults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from control.sandbox.kubernetes.quantities import parse_quantity, pod_requests
from control.sandbox.kubernetes.resources import Object
from control.sandbox.kubernetes.selectors import matches_expression, matches_label_selector


@dataclass
class NodeRoom:
    """One node's allocatable resources and what its pods reserve."""

    node: Object
    cpu: float
    memory: float
    pods: int
    used_cpu: float = 0.0
    used_memory: float = 0.0
    residents: list[Object] = field(default_factory=list)

    @property
    def labels(self) -> dict[str, str]:
        """The node's labels."""
        return self.node["metadata"].get("labels") or {}

    def take(self, pod: Object) -> None:
        """Reserve what `pod` requests."""
        cpu, memory = pod_requests(pod["spec"])
        self.used_cpu += cpu
        self.used_memory += memory
        self.residents.append(pod)


def rooms(nodes: Iterable[Object], pods: Iterable[Object]) -> dict[str, NodeRoom]:
    """Free room by node name; finished pods hold nothing, terminating ones still do."""
    by_name = {}
    for node in nodes:
        allocatable = (node.get("status") or {}).get("allocatable") or {}
        by_name[node["metadata"]["name"]] = NodeRoom(
            node,
            parse_quantity(allocatable.get("cpu")),
            parse_quantity(allocatable.get("memory")),
            int(parse_quantity(allocatable.get("pods", 110))),
        )
    for pod in pods:
        room = by_name.get(pod["spec"].get("nodeName", ""))
        if room is not None and pod["status"].get("phase") not in ("Succeeded", "Failed"):
            room.take(pod)
    return by_name


def tolerates(tolerations: Iterable[dict[str, Any]], taint: dict[str, Any]) -> bool:
    """True when one of the tolerations covers the taint."""
    for toleration in tolerations:
        if toleration.get("effect") not in (None, "", taint["effect"]):
            continue
        key = toleration.get("key")
        if toleration.get("operator", "Equal") == "Exists":
            if key in (None, "", taint["key"]):
                return True
        elif key == taint["key"] and toleration.get("value", "") == taint.get("value", ""):
            return True
    return False


def repelled(pod_spec: dict[str, Any], node: Object) -> dict[str, Any] | None:
    """The first NoSchedule or NoExecute taint the pod does not tolerate."""
    tolerations = pod_spec.get("tolerations") or ()
    for taint in (node.get("spec") or {}).get("taints") or ():
        if taint["effect"] in ("NoSchedule", "NoExecute") and not tolerates(tolerations, taint):
            return taint
    return None


def selects_node(pod_spec: dict[str, Any], node: Object) -> bool:
    """nodeSelector and required node affinity."""
    labels = node["metadata"].get("labels") or {}
    if any(labels.get(key) != value for key, value in (pod_spec.get("nodeSelector") or {}).items()):
        return False
    affinity = ((pod_spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    )
    if not affinity:
        return True
    name = {"metadata.name": node["metadata"]["name"]}
    return any(
        all(matches_expression(e, labels) for e in term.get("matchExpressions") or ())
        and all(matches_expression(e, name) for e in term.get("matchFields") or ())
        for term in affinity.get("nodeSelectorTerms") or ()
    )


def _anti_affinity_blocks(pod: Object, room: NodeRoom, all_rooms: dict[str, NodeRoom]) -> bool:
    terms = (((pod["spec"].get("affinity") or {}).get("podAntiAffinity")) or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or ()
    for term in terms:
        domain = room.labels.get(term["topologyKey"])
        for other in all_rooms.values():
            if other.labels.get(term["topologyKey"]) != domain:
                continue
            for resident in other.residents:
                if resident["metadata"]["namespace"] == pod["metadata"]["namespace"] and matches_label_selector(
                    term.get("labelSelector"), resident["metadata"].get("labels") or {}
                ):
                    return True
    return False


def _preference(pod_spec: dict[str, Any], room: NodeRoom) -> int:
    preferred = ((pod_spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "preferredDuringSchedulingIgnoredDuringExecution"
    ) or ()
    return sum(
        int(term.get("weight", 0))
        for term in preferred
        if all(matches_expression(e, room.labels) for e in term["preference"].get("matchExpressions") or ())
    )


def choose_node(pod: Object, all_rooms: dict[str, NodeRoom]) -> tuple[str | None, str]:
    """(node name, "") for a pod that fits somewhere, else (None, the FailedScheduling message).

    Among nodes that fit: most preferred, then fewest pods of the same owner, then least allocated. Not modelled:
    pod affinity, topology spread constraints, volumes, preemption.
    """
    spec = pod["spec"]
    cpu, memory = pod_requests(spec)
    owner = next((ref["uid"] for ref in pod["metadata"].get("ownerReferences") or () if ref.get("controller")), None)
    reasons: Counter[str] = Counter()
    best: tuple[tuple[float, ...], str] | None = None
    for name, room in all_rooms.items():
        taint = repelled(spec, room.node)
        if room.node["spec"].get("unschedulable") and taint is None and not _tolerates_cordon(spec):
            reasons["node(s) were unschedulable"] += 1
        elif taint is not None:
            if taint["key"] == "node.kubernetes.io/unschedulable":
                reasons["node(s) were unschedulable"] += 1
            else:
                value = taint.get("value")
                reasons[f"node(s) had untolerated taint {{{taint['key']}: {value or ''}}}"] += 1
        elif not selects_node(spec, room.node):
            reasons["node(s) didn't match Pod's node affinity/selector"] += 1
        elif room.used_cpu + cpu > room.cpu + 1e-9:
            reasons["Insufficient cpu"] += 1
        elif room.used_memory + memory > room.memory:
            reasons["Insufficient memory"] += 1
        elif len(room.residents) >= room.pods:
            reasons["Too many pods"] += 1
        elif _anti_affinity_blocks(pod, room, all_rooms):
            reasons["node(s) didn't match pod anti-affinity rules"] += 1
        else:
            siblings = sum(
                1
                for resident in room.residents
                if owner and any(ref["uid"] == owner for ref in resident["metadata"].get("ownerReferences") or ())
            )
            allocated = max(
                (room.used_cpu + cpu) / room.cpu if room.cpu else 1.0,
                (room.used_memory + memory) / room.memory if room.memory else 1.0,
            )
            score = (-_preference(spec, room), siblings, allocated)
            if best is None or score < best[0]:
                best = (score, name)
    if best is not None:
        return best[1], ""
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return (
        None,
        f"0/{len(all_rooms)} nodes are available: {listed}." if listed else "no nodes available to schedule pods",
    )


def _tolerates_cordon(spec: dict[str, Any]) -> bool:
    return tolerates(spec.get("tolerations") or (), {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"})
