"""State and metrics of the cluster in the server's contract: nodes as ClusterState, samples in columns.

Lists are read in pages and folded at once, so memory does not grow with the number of pods.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any
from uuid import UUID, uuid4

import zstandard

from control.agent.cluster import Cluster, Object, instance_id_of
from control.agent.config import AGENT_VERSION
from warehouse.contracts import SCHEMA_VERSION

_SUFFIXES = {
    "n": "1e-9", "u": "1e-6", "m": "1e-3", "k": "1e3", "M": "1e6", "G": "1e9", "T": "1e12", "P": "1e15",
    "Ki": str(2**10), "Mi": str(2**20), "Gi": str(2**30), "Ti": str(2**40), "Pi": str(2**50),
}  # fmt: skip


# The server takes at most this many samples in a batch (control.agents.samples).
MAX_SAMPLES = 5_000


def quantity(text: Any) -> float:
    """A Kubernetes quantity in base units (cores, bytes); unreadable or missing is 0."""
    if isinstance(text, (int, float)):
        return float(text)
    if not text:
        return 0.0
    for length in (2, 1):
        factor = _SUFFIXES.get(text[-length:])
        if factor:
            text = text[:-length]
            break
    else:
        factor = "1"
    try:
        return float(Decimal(text) * Decimal(factor))
    except InvalidOperation:
        return 0.0


def requests_of(pod_spec: Object) -> tuple[float, float]:
    """(cores, bytes) the scheduler reserves for a pod: sum of containers, at least the largest init container."""
    cpu = memory = init_cpu = init_memory = 0.0
    for container in pod_spec.get("containers") or ():
        requests = (container.get("resources") or {}).get("requests") or {}
        cpu += quantity(requests.get("cpu"))
        memory += quantity(requests.get("memory"))
    for container in pod_spec.get("initContainers") or ():
        requests = (container.get("resources") or {}).get("requests") or {}
        if container.get("restartPolicy") == "Always":
            cpu += quantity(requests.get("cpu"))
            memory += quantity(requests.get("memory"))
        else:
            init_cpu = max(init_cpu, quantity(requests.get("cpu")))
            init_memory = max(init_memory, quantity(requests.get("memory")))
    return max(cpu, init_cpu), max(memory, init_memory)


def workload_of(pod: Object) -> str:
    """`namespace/kind/name` of the workload behind a pod; a ReplicaSet's Deployment is known by its template hash."""
    metadata = pod["metadata"]
    owner = next((ref for ref in metadata.get("ownerReferences") or () if ref.get("controller")), None)
    if owner is None:
        return f"{metadata['namespace']}/Pod/{metadata['name']}"
    kind, name = owner["kind"], owner["name"]
    digest = (metadata.get("labels") or {}).get("pod-template-hash")
    if kind == "ReplicaSet" and digest and name.endswith(f"-{digest}"):
        kind, name = "Deployment", name[: -len(digest) - 1]
    return f"{metadata['namespace']}/{kind}/{name}"


def node_type_of(labels: dict[str, str]) -> str:
    """`spot` or `on-demand` by the labels of EKS node groups and Karpenter; On-Demand unless told otherwise."""
    told = labels.get("karpenter.sh/capacity-type") or labels.get("eks.amazonaws.com/capacityType") or ""
    return "spot" if told.lower() == "spot" else "on-demand"


class _Columns:
    """Samples in columns; all of one batch share a timestamp."""

    def __init__(self, ts: str) -> None:
        self._ts = ts
        self.columns: dict[str, list[Any]] = {"metric": [], "subject": [], "ts": [], "value": []}

    def add(self, metric: str, subject: str, value: float) -> None:
        self.columns["metric"].append(metric)
        self.columns["subject"].append(subject)
        self.columns["ts"].append(self._ts)
        self.columns["value"].append(round(value, 6))


def collect(cluster: Cluster, cluster_id: UUID, cluster_name: str, now: datetime) -> tuple[Object, Object]:
    """(state, samples) of the cluster now, in the shapes of ClusterState and SampleColumns.

    Raises ClusterError when the Kubernetes API does not answer.
    """
    columns = _Columns(now.isoformat())
    nodes = cluster.nodes()
    cpu_requested: dict[str, float] = defaultdict(float)
    memory_requested: dict[str, float] = defaultdict(float)
    pod_count: dict[str, int] = defaultdict(int)
    workloads: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    workload_by_pod: dict[tuple[str, str], str] = {}
    pods = pending = 0
    for page in cluster.pages("/api/v1/pods"):
        for pod in page:
            phase = (pod.get("status") or {}).get("phase")
            if phase in ("Succeeded", "Failed"):
                continue
            pods += 1
            where = pod["spec"].get("nodeName")
            if not where:
                pending += 1
                continue
            cpu, memory = requests_of(pod["spec"])
            cpu_requested[where] += cpu
            memory_requested[where] += memory
            pod_count[where] += 1
            if phase == "Running":
                workload = workload_of(pod)
                totals = workloads[workload]
                totals[0] += cpu
                totals[1] += memory
                totals[2] += 1
                workload_by_pod[pod["metadata"]["namespace"], pod["metadata"]["name"]] = workload

    states = []
    for node in nodes:
        name = node["metadata"]["name"]
        allocatable = node["status"].get("allocatable") or {}
        columns.add("node_cpu_capacity_cores", name, quantity(allocatable.get("cpu")))
        columns.add("node_memory_capacity_bytes", name, quantity(allocatable.get("memory")))
        columns.add("node_cpu_requested_cores", name, cpu_requested[name])
        columns.add("node_memory_requested_bytes", name, memory_requested[name])
        columns.add("node_pod_count", name, pod_count[name])
        state = _node_state(node, cpu_requested[name], memory_requested[name], pod_count[name])
        if state is not None:
            states.append(state)
    for item in cluster.usage("nodes"):
        columns.add("node_cpu_usage_cores", item["metadata"]["name"], quantity(item["usage"]["cpu"]))
        columns.add("node_memory_usage_bytes", item["metadata"]["name"], quantity(item["usage"]["memory"]))
    for workload, (cpu, memory, count) in workloads.items():
        columns.add("workload_cpu_requested_cores", workload, cpu)
        columns.add("workload_memory_requested_bytes", workload, memory)
        columns.add("workload_replicas", workload, count)
    used: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for item in cluster.usage("pods"):
        found = workload_by_pod.get((item["metadata"]["namespace"], item["metadata"]["name"]))
        if found is not None:
            for container in item["containers"]:
                used[found][0] += quantity(container["usage"]["cpu"])
                used[found][1] += quantity(container["usage"]["memory"])
    for workload, (cpu, memory) in used.items():
        columns.add("workload_cpu_usage_cores", workload, cpu)
        columns.add("workload_memory_usage_bytes", workload, memory)
    columns.add("cluster_pending_pods", cluster_name, pending)

    spot = sum(1 for state in states if state["node_type"] == "spot")
    cluster_state = {
        "cluster_id": str(cluster_id),
        "node_count": len(states),
        "total_cpu": sum(state["cpu_cores"] for state in states),
        "total_memory": sum(state["memory_bytes"] for state in states),
        "pod_count": pods,
        "spot_node_count": spot,
        "on_demand_node_count": len(states) - spot,
        "nodes": states,
        "captured_at": now.isoformat(),
        "state_hash": state_hash(states),
    }
    return cluster_state, columns.columns


def _node_state(node: Object, cpu_requested: float, memory_requested: float, pods: int) -> Object | None:
    """NodeState; None for a node that is no EC2 instance (a control plane elsewhere, a virtual kubelet)."""
    metadata, labels = node["metadata"], node["metadata"].get("labels") or {}
    instance_id = instance_id_of(node)
    if not instance_id.startswith("i-"):
        return None
    allocatable = node["status"].get("allocatable") or {}
    conditions = node["status"].get("conditions") or ()
    return {
        "node_name": metadata["name"],
        "instance_id": instance_id,
        "instance_type": labels.get("node.kubernetes.io/instance-type", "unknown"),
        "availability_zone": labels.get("topology.kubernetes.io/zone", "unknown"),
        "zone_id": labels.get("topology.k8s.aws/zone-id"),
        "node_type": node_type_of(labels),
        "ready": any(c["type"] == "Ready" and c["status"] == "True" for c in conditions),
        "schedulable": not node["spec"].get("unschedulable", False),
        "cpu_cores": quantity(allocatable.get("cpu")),
        "memory_bytes": int(quantity(allocatable.get("memory"))),
        "pod_count": pods,
        "cpu_requested_cores": round(cpu_requested, 6),
        "memory_requested_bytes": int(memory_requested),
        "labels": labels,
        "created_at": metadata.get("creationTimestamp"),
    }


def state_hash(states: list[Object]) -> str:
    """SHA-256 over what a plan depends on: which instances there are, their kind, and where pods may go."""
    facts = sorted(
        [s["node_name"], s["instance_id"], s["instance_type"], s["node_type"], s["ready"], s["schedulable"]]
        for s in states
    )
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def split(samples: Object, most: int = MAX_SAMPLES) -> list[Object]:
    """Samples in parts that the server takes, at least one part."""
    count = len(samples["metric"])
    return [
        {name: column[start : start + most] for name, column in samples.items()}
        for start in range(0, max(count, 1), most)
    ]


def batch(state: Object | None, samples: Object, *, cluster_id: UUID, seq: int, now: datetime) -> bytes:
    """A MetricsData body, zstd-compressed; its batch_id is made here, once, and kept over every retry."""
    body = {
        "schema_version": SCHEMA_VERSION,
        "batch_id": str(uuid4()),
        "seq": seq,
        "cluster_id": str(cluster_id),
        "sent_at": now.isoformat(),
        "agent_version": AGENT_VERSION,
        "state": state,
        "samples": samples,
    }
    raw = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    return zstandard.ZstdCompressor(level=3, write_content_size=True).compress(raw)
