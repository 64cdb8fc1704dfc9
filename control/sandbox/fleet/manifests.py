"""Kubernetes objects from the plan and from instances: nodes as EKS registers them, workloads with budgets."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from control.sandbox.aws import Instance
from control.sandbox.fleet.plan import Workload
from control.sandbox.market import InstanceType

Object = dict[str, Any]

CLUSTER_TAG_PREFIX = "kubernetes.io/cluster/"
# Pods a node takes with the AWS VPC CNI, by size: what its network interfaces have addresses for.
_MAX_PODS = {"medium": 17, "large": 29, "xlarge": 58, "2xlarge": 58, "4xlarge": 234, "9xlarge": 234, "24xlarge": 737}
LABEL_COMPONENT = "app.kubernetes.io/name"


def cluster_of(instance: Instance) -> str | None:
    """The cluster an instance is meant for, by its `kubernetes.io/cluster/<name>` tag."""
    for key in instance.tags:
        if key.startswith(CLUSTER_TAG_PREFIX):
            return key.removeprefix(CLUSTER_TAG_PREFIX)
    return instance.tags.get("eks:cluster-name")


def max_pods(instance_type: str) -> int:
    """Pods a node of this type takes."""
    return _MAX_PODS.get(instance_type.rpartition(".")[2], 110)


def reserved_cpu_cores(vcpus: int) -> float:
    """What EKS keeps of the cores: 6 % of the first, 1 % of the second, 0.5 % of two more, 0.25 % of the rest."""
    shares = [0.06, 0.01, 0.005, 0.005]
    return sum(shares[:vcpus]) + max(0, vcpus - 4) * 0.0025


def node_object(instance: Instance, kind: InstanceType, *, ready: bool, now: datetime) -> Object:
    """The Node a kubelet of an EKS machine registers for an instance."""
    pods = max_pods(kind.name)
    memory_mebibytes = int(kind.memory_gib * 1024)
    # The kernel takes a little; EKS keeps 255 MiB and 11 MiB a pod, the kubelet 100 MiB for evictions.
    usable = int(memory_mebibytes * 0.97)
    allocatable = usable - 255 - 11 * pods - 100
    capacity = {
        "cpu": str(kind.vcpus),
        "memory": f"{usable * 1024}Ki",
        "pods": str(pods),
        "ephemeral-storage": "83873772Ki",
        "hugepages-2Mi": "0",
        "hugepages-1Gi": "0",
    }
    architecture = "arm64" if kind.architecture == "arm64" else "amd64"
    spot = instance.lifecycle == "spot"
    labels = {
        "beta.kubernetes.io/arch": architecture,
        "beta.kubernetes.io/instance-type": kind.name,
        "beta.kubernetes.io/os": "linux",
        "eks.amazonaws.com/capacityType": "SPOT" if spot else "ON_DEMAND",
        "failure-domain.beta.kubernetes.io/region": instance.region,
        "failure-domain.beta.kubernetes.io/zone": instance.zone_name,
        "karpenter.sh/capacity-type": "spot" if spot else "on-demand",
        "kubernetes.io/arch": architecture,
        "kubernetes.io/hostname": instance.private_dns_name,
        "kubernetes.io/os": "linux",
        "node.kubernetes.io/instance-type": kind.name,
        "topology.k8s.aws/zone-id": instance.zone_id,
        "topology.kubernetes.io/region": instance.region,
        "topology.kubernetes.io/zone": instance.zone_name,
    }
    if group := instance.tags.get("eks:nodegroup-name"):
        labels["eks.amazonaws.com/nodegroup"] = group
    node: Object = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": instance.private_dns_name,
            "labels": labels,
            "annotations": {
                "node.alpha.kubernetes.io/ttl": "0",
                "volumes.kubernetes.io/controller-managed-attach-detach": "true",
            },
            "creationTimestamp": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
        "spec": {"providerID": f"aws:///{instance.zone_name}/{instance.instance_id}"},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": instance.private_ip},
                {"type": "InternalDNS", "address": instance.private_dns_name},
                {"type": "Hostname", "address": instance.private_dns_name},
            ],
            "capacity": capacity,
            "allocatable": {
                **capacity,
                "cpu": f"{round((kind.vcpus - reserved_cpu_cores(kind.vcpus)) * 1000)}m",
                "memory": f"{allocatable * 1024}Ki",
            },
            "conditions": node_conditions(ready=ready, now=now),
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "nodeInfo": {
                "architecture": architecture,
                "bootID": "",
                "containerRuntimeVersion": "containerd://1.7.27",
                "kernelVersion": "6.1.134-150.224.amzn2023.x86_64",
                "kubeProxyVersion": "",
                "kubeletVersion": "v1.34.0-eks-3025e55",
                "machineID": instance.instance_id,
                "operatingSystem": "linux",
                "osImage": "Amazon Linux 2023",
                "systemUUID": instance.instance_id,
            },
        },
    }
    if not ready:
        node["spec"]["taints"] = [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]
    return node


def node_conditions(*, ready: bool, now: datetime, unknown: bool = False) -> list[Object]:
    """The five conditions; `unknown` is what the node controller writes when a kubelet has fallen silent."""
    at = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def condition(kind: str, status: str, reason: str, message: str) -> Object:
        return {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": at,
            "lastTransitionTime": at,
        }

    if unknown:
        return [
            condition(kind, "Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.")
            for kind in ("MemoryPressure", "DiskPressure", "PIDPressure", "Ready")
        ]
    return [
        condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        condition("Ready", "True", "KubeletReady", "kubelet is posting ready status")
        if ready
        else condition("Ready", "False", "KubeletNotReady", "container runtime network not ready"),
    ]


def workload_object(workload: Workload) -> Object:
    """The Deployment, StatefulSet or DaemonSet of a workload."""
    labels = {"app": workload.name, LABEL_COMPONENT: workload.name}
    resources = {"requests": {"cpu": workload.cpu, "memory": workload.memory}, "limits": {"memory": workload.memory}}
    pod_spec: Object = {
        "terminationGracePeriodSeconds": workload.grace_seconds,
        "containers": [
            {
                "name": workload.name,
                "image": f"registry.example/{workload.namespace}/{workload.name}:1.0",
                "resources": resources,
            }
        ],
    }
    affinity: Object = {}
    if workload.on_demand_only:
        term = {
            "matchExpressions": [{"key": "eks.amazonaws.com/capacityType", "operator": "In", "values": ["ON_DEMAND"]}]
        }
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    if workload.spread:
        affinity["podAntiAffinity"] = {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"labelSelector": {"matchLabels": {"app": workload.name}}, "topologyKey": "kubernetes.io/hostname"}
            ]
        }
    if affinity:
        pod_spec["affinity"] = affinity
    if workload.kind == "DaemonSet":
        pod_spec["priority"] = 2000001000
        pod_spec["priorityClassName"] = "system-node-critical"
        pod_spec["tolerations"] = [{"operator": "Exists"}]
    spec: Object = {
        "selector": {"matchLabels": {"app": workload.name}},
        "template": {"metadata": {"labels": labels}, "spec": pod_spec},
    }
    if workload.kind != "DaemonSet":
        spec["replicas"] = workload.replicas
    if workload.kind == "StatefulSet":
        spec["serviceName"] = workload.name
    return {"metadata": {"name": workload.name, "labels": labels}, "spec": spec}


def budget_object(workload: Workload) -> Object:
    """The PodDisruptionBudget of a workload."""
    return {
        "metadata": {"name": workload.name},
        "spec": {"selector": {"matchLabels": {"app": workload.name}}, **(workload.budget or {})},
    }
