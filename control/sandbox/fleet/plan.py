"""Who lives in the sandbox: two customers, three clusters, sixty nodes, and what runs on them. Data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Instances of one type and purchase option, spread over the first `zones` zones that offer the type."""

    name: str
    instance_type: str
    capacity: Literal["spot", "on-demand"]
    count: int
    zones: int = 3


@dataclass(frozen=True, slots=True)
class Workload:
    """A controller with its pods' requests, budget and load.

    `cpu_use` and `memory_use` are means as a share of the requests; `daily` is the swing of the cpu over a day
    (0.5: from half to one and a half times the mean) with its peak at `peak_hour` (UTC). `budget` is the spec of a
    PodDisruptionBudget, without its selector.
    """

    namespace: str
    name: str
    replicas: int
    cpu: str
    memory: str
    kind: Literal["Deployment", "StatefulSet", "DaemonSet"] = "Deployment"
    budget: dict[str, Any] | None = None
    cpu_use: float = 0.4
    memory_use: float = 0.65
    daily: float = 0.5
    peak_hour: float = 14.0
    grace_seconds: int = 30
    on_demand_only: bool = False
    spread: bool = False


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """One cluster of a customer."""

    name: str
    region: str
    groups: tuple[NodeGroup, ...]
    workloads: tuple[Workload, ...]


@dataclass(frozen=True, slots=True)
class CustomerPlan:
    """One customer with one AWS account."""

    company_name: str
    email: str
    account_id: str
    region: str
    clusters: tuple[ClusterPlan, ...] = field(default=())


def _system(replicas: int = 2) -> tuple[Workload, ...]:
    one = {"maxUnavailable": 1}
    return (
        Workload("kube-system", "aws-node", 0, "25m", "64Mi", "DaemonSet", cpu_use=0.3, daily=0.1),
        Workload("kube-system", "kube-proxy", 0, "100m", "64Mi", "DaemonSet", cpu_use=0.05, daily=0.1),
        Workload("kube-system", "coredns", replicas, "100m", "70Mi", budget=one, spread=True, daily=0.3),
        Workload("kube-system", "metrics-server", replicas, "100m", "200Mi", budget=one, spread=True, daily=0.1),
    )


SHOP_PROD = ClusterPlan(
    "shop-prod",
    "us-east-1",
    (
        NodeGroup("system", "m5.large", "on-demand", 3),
        NodeGroup("web", "m5.xlarge", "on-demand", 6),
        NodeGroup("web-spot", "m5.xlarge", "spot", 5),
        NodeGroup("api-spot", "c5.2xlarge", "spot", 5),
        NodeGroup("api", "c5.2xlarge", "on-demand", 3),
        NodeGroup("batch-spot", "m5a.xlarge", "spot", 4),
        NodeGroup("data", "r5.xlarge", "on-demand", 2, zones=2),
    ),
    (
        *_system(),
        Workload(
            "shop", "web", 24, "500m", "768Mi", budget={"maxUnavailable": "25%"}, cpu_use=0.45, daily=0.7, peak_hour=19
        ),
        Workload(
            "shop", "api", 16, "1", "1536Mi", budget={"maxUnavailable": "25%"}, cpu_use=0.4, daily=0.6, peak_hour=19
        ),
        Workload(
            "shop",
            "checkout",
            8,
            "750m",
            "1Gi",
            budget={"minAvailable": "75%"},
            cpu_use=0.35,
            daily=0.7,
            peak_hour=20,
            grace_seconds=60,
        ),
        Workload(
            "shop", "search", 6, "1500m", "4Gi", budget={"maxUnavailable": 1}, cpu_use=0.3, daily=0.5, peak_hour=19
        ),
        Workload("shop", "recommendations", 6, "1", "3Gi", cpu_use=0.2, daily=0.4, peak_hour=18),
        Workload("shop", "images", 8, "300m", "512Mi", cpu_use=0.5, daily=0.6, peak_hour=18),
        Workload("batch", "exports", 10, "500m", "1Gi", cpu_use=0.75, daily=0.3, peak_hour=3, grace_seconds=90),
        Workload(
            "data",
            "orders-db",
            3,
            "1",
            "6Gi",
            "StatefulSet",
            budget={"maxUnavailable": 1},
            cpu_use=0.35,
            daily=0.5,
            peak_hour=19,
            grace_seconds=60,
            on_demand_only=True,
            spread=True,
        ),
        Workload(
            "data",
            "cache",
            3,
            "500m",
            "3Gi",
            "StatefulSet",
            budget={"maxUnavailable": 1},
            cpu_use=0.3,
            daily=0.5,
            peak_hour=19,
            spread=True,
        ),
    ),
)

SHOP_STAGING = ClusterPlan(
    "shop-staging",
    "us-east-1",
    (
        NodeGroup("system", "t3.large", "on-demand", 2, zones=2),
        NodeGroup("general-spot", "m5.large", "spot", 6),
        NodeGroup("general", "c5.xlarge", "on-demand", 4),
    ),
    (
        *_system(),
        Workload(
            "shop", "web", 6, "300m", "512Mi", budget={"maxUnavailable": "50%"}, cpu_use=0.15, daily=0.8, peak_hour=13
        ),
        Workload(
            "shop", "api", 6, "500m", "1Gi", budget={"maxUnavailable": "50%"}, cpu_use=0.12, daily=0.8, peak_hour=13
        ),
        Workload("shop", "checkout", 4, "500m", "768Mi", cpu_use=0.1, daily=0.8, peak_hour=13),
        Workload("ci", "runners", 8, "750m", "1Gi", cpu_use=0.5, daily=0.9, peak_hour=14, grace_seconds=120),
        Workload("data", "orders-db", 1, "500m", "2Gi", "StatefulSet", cpu_use=0.1, on_demand_only=True),
    ),
)

ANALYTICS = ClusterPlan(
    "analytics-prod",
    "eu-west-1",
    (
        NodeGroup("system", "m6i.large", "on-demand", 2, zones=2),
        NodeGroup("query", "m5.2xlarge", "on-demand", 4),
        NodeGroup("workers-spot", "r5.2xlarge", "spot", 6),
        NodeGroup("ingest-spot", "c6i.2xlarge", "spot", 4),
        NodeGroup("storage", "r5.xlarge", "on-demand", 4),
    ),
    (
        *_system(),
        Workload(
            "query",
            "coordinator",
            2,
            "2",
            "8Gi",
            budget={"minAvailable": 1},
            cpu_use=0.25,
            daily=0.6,
            peak_hour=10,
            grace_seconds=60,
            on_demand_only=True,
            spread=True,
        ),
        Workload(
            "query",
            "workers",
            12,
            "3",
            "20Gi",
            budget={"maxUnavailable": 2},
            cpu_use=0.45,
            memory_use=0.75,
            daily=0.7,
            peak_hour=10,
            grace_seconds=90,
        ),
        Workload(
            "ingest",
            "collectors",
            12,
            "1",
            "1Gi",
            budget={"maxUnavailable": "25%"},
            cpu_use=0.55,
            daily=0.3,
            peak_hour=16,
        ),
        Workload(
            "ingest",
            "stream",
            3,
            "1",
            "4Gi",
            "StatefulSet",
            budget={"maxUnavailable": 1},
            cpu_use=0.4,
            daily=0.3,
            peak_hour=16,
            on_demand_only=True,
            spread=True,
        ),
        Workload("notebooks", "hub", 6, "500m", "4Gi", cpu_use=0.1, memory_use=0.4, daily=0.9, peak_hour=11),
        Workload("batch", "reports", 6, "1", "2Gi", cpu_use=0.6, daily=0.6, peak_hour=4),
    ),
)

CUSTOMERS: tuple[CustomerPlan, ...] = (
    CustomerPlan(
        "Northwind Outfitters", "platform@northwind.example", "111122223333", "us-east-1", (SHOP_PROD, SHOP_STAGING)
    ),
    CustomerPlan("Lumen Analytics", "infra@lumen.example", "444455556666", "eu-west-1", (ANALYTICS,)),
)
