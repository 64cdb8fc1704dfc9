"""A Kubernetes double on a real socket, helpers that put it into a state, and object builders."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from kubernetes import client
from starlette.applications import Starlette

from control.sandbox.kubernetes.resources import DISRUPTION_BUDGETS, NODES, PODS
from control.sandbox.kubernetes.server import Cluster, ServerThread, clusters_app

TOKEN = "token-of-the-test"
_numbers = itertools.count()


class Double:
    """Two fresh clusters on a server that runs already; helpers put them into a state, the official client looks."""

    def __init__(self, server: ServerThread, app: Starlette) -> None:
        number = next(_numbers)
        self.clusters = [
            Cluster(
                f"one-{number}",
                tokens=[TOKEN],
                read_only_tokens=["reader"],
                bookmark_seconds=0.3,
                orphan_pod_seconds=0.2,
            ),
            Cluster(f"two-{number}", tokens=["another-token"]),
        ]
        self.server, self._app = server, app
        self._mounts = clusters_app(self.clusters).routes
        app.router.routes.extend(self._mounts)
        self.store = self.clusters[0].store

    def close(self) -> None:
        for cluster in self.clusters:
            self.call(cluster.controllers.stop)
            self.call(cluster.store.close)
        for mount in self._mounts:
            self._app.router.routes.remove(mount)

    def client(self, cluster: int = 0, token: str = TOKEN) -> client.ApiClient:
        configuration = client.Configuration(host=f"{self.server.url}/clusters/{self.clusters[cluster].name}")
        configuration.api_key["authorization"] = f"Bearer {token}"
        configuration.retries = False
        return client.ApiClient(configuration)

    def call(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        return self.server.call(lambda: function(*arguments, **options))

    def start_controllers(self) -> None:
        self.call(self.clusters[0].controllers.start)

    def node(self, name: str, *, cpu: str = "4", memory: str = "16Gi", labels: dict | None = None) -> None:
        self.call(self.store.load, NODES, node_object(name, cpu=cpu, memory=memory, labels=labels))

    def run_pods(self, *, ready: bool = True) -> int:
        """Play the kubelet once: every bound pod that is Pending runs, every terminating one goes."""

        def play() -> int:
            changed = 0
            for pod in self.store.objects(PODS):
                if pod["metadata"].get("deletionTimestamp"):
                    self.store.delete(
                        PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], {"gracePeriodSeconds": 0}
                    )
                    changed += 1
                elif pod["spec"].get("nodeName") and pod["status"].get("phase") == "Pending":
                    self.store.edit(
                        PODS,
                        pod,
                        lambda draft: draft.__setitem__("status", running_status(ready)),
                        subresource="status",
                    )
                    changed += 1
            return changed

        return self.call(play)

    def budget_processed(self, name: str, namespace: str = "default") -> bool:
        budget = self.call(self.store.get, DISRUPTION_BUDGETS, namespace, name)
        return budget["status"]["observedGeneration"] == budget["metadata"]["generation"]


def node_object(name: str, *, cpu: str = "4", memory: str = "16Gi", labels: dict | None = None) -> dict:
    resources = {"cpu": cpu, "memory": memory, "pods": "110"}
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
        "spec": {"providerID": f"aws:///us-east-1a/i-{name}"},
        "status": {
            "capacity": resources,
            "allocatable": resources,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
        },
    }


def running_status(ready: bool = True) -> dict:
    return {
        "phase": "Running",
        "qosClass": "Burstable",
        "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
    }


def pod_object(
    name: str, *, node: str | None = None, labels: dict | None = None, cpu: str = "100m", **spec: Any
) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels or {"app": "web"}},
        "spec": {
            **({"nodeName": node} if node else {}),
            "containers": [
                {"name": "main", "image": "web:1", "resources": {"requests": {"cpu": cpu, "memory": "64Mi"}}}
            ],
            **spec,
        },
    }


def deployment_object(name: str, replicas: int, *, cpu: str = "500m", **pod_spec: Any) -> dict:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": pod_object(name, cpu=cpu, **pod_spec)["spec"],
            },
        },
    }


def eventually(check: Callable[[], Any], seconds: float = 30.0, what: str = "") -> Any:
    """Poll until `check` returns something true, and return it."""
    give_up = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > give_up:
            raise AssertionError(f"not within {seconds} s: {what or check}")
        time.sleep(0.02)
