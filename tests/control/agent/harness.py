"""The agent's process between a Kubernetes double and a small server that speaks the agent endpoints' contract.

The server validates every body with the shared contracts and keeps tasks in memory with the real leasing rules.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import zstandard
from kubernetes import client
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from control.agent.main import main as agent
from control.sandbox.kubernetes.kubelet import Kubelets, PodTiming
from control.sandbox.kubernetes.resources import NODES
from control.sandbox.kubernetes.server import Cluster, ServerThread, clusters_app
from tests.commands import Forked
from warehouse.contracts import AgentEvents, MetricsData, TaskResult

LEASE_SECONDS = 2.0


@dataclass
class HeldTask:
    task_id: UUID
    task_type: str
    parameters: dict[str, Any]
    deadline: datetime | None
    told: datetime | None
    epoch: int = 0
    lease_until: float = 0.0
    state: str = "queued"
    offered: int = 0
    hastened: bool = False


@dataclass
class Report:
    task_id: UUID
    result: TaskResult
    applied: bool
    at: float = field(default_factory=time.monotonic)


class TaskServer:
    """Agent endpoints with real leases.

    `failing` makes every answer a 503, `captive` an HTML page with status 200; `lose_reports` drops n answers; reports
    on tasks in `poison` and the first `poison_batches` batches are answered 500. `rejects` is what the answers to
    metrics and events say was rejected of them.
    """

    def __init__(self, cluster_id: UUID, key: str) -> None:
        self.cluster_id, self.key = cluster_id, key
        self.tasks: dict[UUID, HeldTask] = {}
        self.reports: list[Report] = []
        self.batches: list[MetricsData] = []
        self.events: list[AgentEvents] = []
        self.polls = 0
        self.failing = self.captive = False
        self.poison: set[UUID] = set()
        self.poison_batches = 0
        self.lose_reports = 0
        self.metrics_status = 200
        self.rejects: Any = []
        self._lock = threading.Lock()
        routes = [
            Route("/api/v1/client/tasks", self._guard(self._poll)),
            Route("/api/v1/client/tasks/{task_id}/result", self._guard(self._result), methods=["POST"]),
            Route("/api/v1/client/metrics", self._guard(self._metrics), methods=["POST"]),
            Route("/api/v1/client/events", self._guard(self._events), methods=["POST"]),
        ]
        self.thread = ServerThread(Starlette(routes=routes))

    def add(
        self,
        task_type: str,
        deadline_seconds: float | None = 60,
        *,
        offered_seconds: float | None = None,
        **parameters: Any,
    ) -> UUID:
        """A task to be offered; with ``offered_seconds`` its deadline was later when it was offered than it is now."""
        deadline = told = None
        if deadline_seconds is not None:
            deadline = told = datetime.now(UTC) + timedelta(seconds=deadline_seconds)
        if offered_seconds is not None:
            told = datetime.now(UTC) + timedelta(seconds=offered_seconds)
        task = HeldTask(uuid4(), task_type, parameters, deadline, told)
        with self._lock:
            self.tasks[task.task_id] = task
        return task.task_id

    def hasten(self, task_id: UUID, seconds: float, **parameters: Any) -> None:
        """Bring a task's deadline forward; its holder is offered it again."""
        task = self.tasks[task_id]
        with self._lock:
            task.deadline = task.told = datetime.now(UTC) + timedelta(seconds=seconds)
            task.parameters = {**task.parameters, **parameters}
            task.hastened = True

    def final(self, task_id: UUID) -> Report | None:
        return next(
            (r for r in self.reports if r.task_id == task_id and r.applied and r.result.status != "running"), None
        )

    def ended(self, task_id: UUID, seconds: float = 30) -> TaskResult:
        return eventually(lambda: self.final(task_id), seconds, f"an end of task {task_id}").result

    def _guard(self, endpoint: Callable) -> Callable:
        async def run(request: Request) -> Response:
            if self.failing:
                return JSONResponse({"title": "down"}, status_code=503)
            if self.captive:
                return HTMLResponse("<html>please log in</html>")
            if request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"title": "unauthenticated"}, status_code=401)
            return await endpoint(request)

        return run

    async def _poll(self, request: Request) -> Response:
        import asyncio

        assert request.query_params["cluster_id"] == str(self.cluster_id)
        understands = request.query_params["understands"].split(",")
        limit, wait = int(request.query_params["limit"]), float(request.query_params["wait"])
        self.polls += 1
        give_up = time.monotonic() + wait
        while True:
            offered = self._lease(understands, limit)
            if offered or time.monotonic() > give_up or self.failing:
                return JSONResponse({"tasks": offered})
            await asyncio.sleep(0.02)

    def _lease(self, understands: list[str], limit: int) -> list[dict[str, Any]]:
        now, offered = time.monotonic(), []
        with self._lock:
            for task in self.tasks.values():
                free = task.state == "queued" or (task.state == "leased" and task.lease_until < now)
                if not (free or task.hastened) or len(offered) >= limit or task.task_type not in understands:
                    continue
                task.epoch += free
                task.hastened = False
                task.offered += 1
                task.state, task.lease_until = "leased", now + LEASE_SECONDS
                offered.append(
                    {
                        "task_id": str(task.task_id),
                        "cluster_id": str(self.cluster_id),
                        "task_type": task.task_type,
                        "parameters": task.parameters,
                        "deadline": task.told.isoformat() if task.told else None,
                        "lease_epoch": task.epoch,
                        "lease_until": (datetime.now(UTC) + timedelta(seconds=LEASE_SECONDS)).isoformat(),
                    }
                )
        return offered

    async def _result(self, request: Request) -> Response:
        result = TaskResult.model_validate_json(await request.body())
        task = self.tasks[UUID(request.path_params["task_id"])]
        if task.task_id in self.poison:
            return JSONResponse({"title": "a bug"}, status_code=500)
        with self._lock:
            if self.lose_reports and result.status != "running":
                self.lose_reports -= 1
                return JSONResponse({"title": "lost"}, status_code=500)
            known = any(r.result.report_id == result.report_id for r in self.reports)
            applied = result.lease_epoch == task.epoch and task.state in ("leased", "queued")
            if known:
                return JSONResponse({"state": task.state})
            self.reports.append(Report(task.task_id, result, applied))
            if not applied:
                return JSONResponse({"code": "stale_lease"}, status_code=409)
            if result.status == "running":
                task.lease_until = time.monotonic() + LEASE_SECONDS
            else:
                task.state = result.status
        deadline = task.deadline.isoformat() if task.deadline else None
        return JSONResponse({"state": task.state, "deadline": deadline})

    async def _metrics(self, request: Request) -> Response:
        if self.metrics_status != 200:
            return JSONResponse({}, status_code=self.metrics_status)
        assert request.headers["content-encoding"] == "zstd"
        data = MetricsData.model_validate_json(zstandard.ZstdDecompressor().decompress(await request.body()))
        if data.seq < self.poison_batches:
            return JSONResponse({"title": "a bug"}, status_code=500)
        duplicate = any(b.batch_id == data.batch_id for b in self.batches)
        if not duplicate:
            self.batches.append(data)
        return JSONResponse({"accepted": len(data.samples.metric), "duplicate": duplicate, "rejected": self.rejects})

    async def _events(self, request: Request) -> Response:
        self.events.append(AgentEvents.model_validate_json(await request.body()))
        return JSONResponse({"accepted": 1, "rejected": self.rejects})


class World:
    """A cluster with kubelets, a task server and the agent's process."""

    TOKEN = "kubernetes-token"

    def __init__(self, state_dir: Path, timing: PodTiming) -> None:
        self.cluster_id = uuid4()
        self.cluster = Cluster("prod", tokens=[self.TOKEN])
        self.store = self.cluster.store
        self.kubelets = Kubelets(self.store, timing=timing)
        self.kubernetes = ServerThread(clusters_app([self.cluster]))
        self.server = TaskServer(self.cluster_id, "agent-key-of-the-test")
        self.state_dir = state_dir
        self.process: Forked | subprocess.Popen[bytes] | None = None
        self.log = state_dir.with_suffix(".log")

    def start(self) -> None:
        self.kubernetes.start()
        self.server.thread.start()
        self.call(self.cluster.controllers.start)
        self.call(self.kubelets.start)
        configuration = client.Configuration(host=f"{self.kubernetes.url}/clusters/prod")
        configuration.api_key["authorization"] = f"Bearer {self.TOKEN}"
        self.api_client = client.ApiClient(configuration)
        self.core = client.CoreV1Api(self.api_client)
        self.apps = client.AppsV1Api(self.api_client)
        self.policy = client.PolicyV1Api(self.api_client)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.api_client.close()
        self.call(self.kubelets.stop)
        self.call(self.cluster.controllers.stop)
        self.call(self.store.close)
        self.kubernetes.stop()
        self.server.failing = True
        self.server.thread.stop()

    def call(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        return self.kubernetes.call(lambda: function(*arguments, **options))

    def start_agent(self, *, measured: bool = False, **environment: str) -> Forked | subprocess.Popen[bytes]:
        """Start the agent; ``measured`` as a process that shares no memory with another."""
        settings = {
            "CLOUDOPTIM_CONTROL_URL": self.server.thread.url,
            "CLOUDOPTIM_AGENT_CLUSTER_ID": str(self.cluster_id),
            "CLOUDOPTIM_AGENT_KEY": self.server.key,
            "CLOUDOPTIM_AGENT_K8S_ENDPOINT": f"{self.kubernetes.url}/clusters/prod",
            "CLOUDOPTIM_AGENT_K8S_TOKEN": self.TOKEN,
            "CLOUDOPTIM_AGENT_STATE_DIR": str(self.state_dir),
            "CLOUDOPTIM_AGENT_METRICS_SECONDS": "60",
            "CLOUDOPTIM_AGENT_POLL_WAIT_SECONDS": "5",
            "MALLOC_ARENA_MAX": "2",
            **environment,
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CLOUDOPTIM_")}
        if not measured:
            self.process = Forked(partial(agent, []), {**inherited, **settings}, self.log, self.log)
            return self.process
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "control.agent"], env={**inherited, **settings}, stdout=log, stderr=log
            )
        return self.process

    def kill_agent(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def add_node(self, name: str, instance_id: str = "", **labels: str) -> str:
        instance_id = instance_id or f"i-{uuid4().hex[:17]}"
        resources = {"cpu": "4", "memory": "16Gi", "pods": "58"}
        node = {
            "metadata": {
                "name": name,
                "labels": {
                    "kubernetes.io/hostname": name,
                    "node.kubernetes.io/instance-type": "m5.xlarge",
                    "topology.kubernetes.io/zone": "us-east-1a",
                    "topology.k8s.aws/zone-id": "use1-az4",
                    "eks.amazonaws.com/capacityType": "SPOT",
                    **labels,
                },
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {"providerID": f"aws:///us-east-1a/{instance_id}"},
            "status": {
                "capacity": resources,
                "allocatable": resources,
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }
        self.call(self.store.load, NODES, node)
        return instance_id

    def deploy(self, name: str, replicas: int, *, node: str | None = None, **pod_spec: Any) -> None:
        spec = {
            **({"nodeSelector": {"kubernetes.io/hostname": node}} if node else {}),
            "containers": [
                {"name": "main", "image": "app:1", "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}}}
            ],
            **pod_spec,
        }
        self.apps.create_namespaced_deployment(
            "default",
            {
                "metadata": {"name": name},
                "spec": {
                    "replicas": replicas,
                    "selector": {"matchLabels": {"app": name}},
                    "template": {"metadata": {"labels": {"app": name}}, "spec": spec},
                },
            },
        )
        eventually(lambda: len(self.pods(name, running=True)) == replicas, what=f"{replicas} pods of {name}")

    def pods(self, app: str, *, running: bool = False, node: str | None = None) -> list[client.V1Pod]:
        found = self.core.list_namespaced_pod("default", label_selector=f"app={app}").items
        return [
            pod
            for pod in found
            if (not running or (pod.status.phase == "Running" and pod.metadata.deletion_timestamp is None))
            and (node is None or pod.spec.node_name == node)
        ]


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
