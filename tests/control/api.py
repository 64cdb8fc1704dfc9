"""The real application behind a real socket, with helpers that speak to it as its clients do."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import uvicorn
from fastapi import FastAPI

from control.app import create_app
from control.settings import Settings
from warehouse.postgres.session import Database

ADMIN_KEY = secrets.token_hex(32)
_accounts = itertools.count(100_000_000_000 + secrets.randbelow(10**11))


def settings_for(database_url: str, redis_url: str, **changes: Any) -> Settings:
    values = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "JWT_SECRET_KEY": "jwt-" + "j" * 40,
        "API_KEY_SALT": "pepper-" + "p" * 40,
        "CLOUDOPTIM_MASTER_KEY": "master-" + "m" * 40,
        "CLOUDOPTIM_ADMIN_API_KEY": ADMIN_KEY,
        "CLOUDOPTIM_LOG_LEVEL": "WARNING",
        "CORS_ORIGINS": "https://app.example.com",
        "CLOUDOPTIM_SANDBOX": False,
    }
    return Settings(**(values | changes))


@dataclass
class Tenant:
    """A customer with one cluster, its agent's key and a key of each role."""

    customer_id: UUID
    cluster_id: UUID
    agent_key: str
    admin_key: str
    analyst_key: str


@dataclass
class Api:
    """A running server and a client of it."""

    app: FastAPI
    url: str
    http: httpx.AsyncClient
    settings: Settings
    db: Database
    tenants: list[Tenant] = field(default_factory=list)

    async def call(self, method: str, path: str, key: str | None = ADMIN_KEY, **options: Any) -> httpx.Response:
        headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **options.pop("headers", {})}
        return await self.http.request(method, f"/api/v1{path}", headers=headers, **options)

    async def ok(self, method: str, path: str, key: str | None = ADMIN_KEY, **options: Any) -> Any:
        answer = await self.call(method, path, key, **options)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    async def tenant(self, name: str = "Acme") -> Tenant:
        account = next(_accounts)
        customer = await self.ok(
            "POST",
            "/customers",
            json={
                "company_name": name,
                "email": f"ops-{account}@example.com",
                "aws_role_arn": f"arn:aws:iam::{account}:role/cloudoptim",
                "sqs_queue_url": f"https://sqs.us-east-1.amazonaws.com/{account}/cloudoptim-events",
            },
        )
        cluster = await self.ok(
            "POST",
            "/clusters",
            json={"customer_id": customer["id"], "cluster_name": "main", "region": "us-east-1"},
        )
        keys = {
            role: (
                await self.ok("POST", "/api-keys", json={"name": role, "role": role, "customer_id": customer["id"]})
            )["key"]
            for role in ("customer_admin", "analyst")
        }
        tenant = Tenant(
            UUID(customer["id"]), UUID(cluster["id"]), cluster["agent_key"], keys["customer_admin"], keys["analyst"]
        )
        self.tenants.append(tenant)
        return tenant


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Api]:
    """The application on a free port until the block ends."""
    app = create_app(settings)
    # asyncio switches Nagle off only on sockets that name their protocol; without it every answer takes 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws_max_size=1024 * 1024,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
        lifespan="on",
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    database = Database(settings.database_url, pool_size=2)
    # Given up well before the server closes an idle connection (uvicorn: 5 s): or a request may meet its end.
    limits = httpx.Limits(keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False, limits=limits) as client:
        async with asyncio.timeout(20):
            while not server.started:
                if task.done():
                    task.result()
                await asyncio.sleep(0.02)
        yield Api(app, url, client, settings, database)
    server.should_exit = True
    await task
    await database.close()


def batch(cluster_id: UUID, samples: Any = None, **changes: Any) -> dict[str, Any]:
    """A metrics body."""
    body = {
        "batch_id": str(uuid4()),
        "seq": 1,
        "cluster_id": str(cluster_id),
        "sent_at": datetime.now(UTC).isoformat(),
        "samples": samples if samples is not None else {"metric": [], "subject": [], "ts": [], "value": []},
    }
    return body | changes


def columns(*rows: tuple[str, str, Any, Any]) -> dict[str, list[Any]]:
    """Rows of (metric, subject, ts, value) as columns."""
    names = ("metric", "subject", "ts", "value")
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def node_state(number: int, **changes: Any) -> dict[str, Any]:
    values = {
        "node_name": f"node-{number}",
        "instance_id": f"i-{number:017x}",
        "instance_type": "m5.large",
        "availability_zone": "us-east-1a",
        "node_type": "spot",
        "ready": True,
        "cpu_cores": 2.0,
        "memory_bytes": 8 << 30,
        "labels": {"topology.k8s.aws/zone-id": "use1-az1"},
    }
    return values | changes


def cluster_state(cluster_id: UUID, nodes: list[dict[str, Any]], captured_at: datetime | None = None) -> dict[str, Any]:
    return {
        "cluster_id": str(cluster_id),
        "node_count": len(nodes),
        "total_cpu": 2.0 * len(nodes),
        "total_memory": (8 << 30) * len(nodes),
        "pod_count": 0,
        "spot_node_count": len(nodes),
        "on_demand_node_count": 0,
        "nodes": nodes,
        "captured_at": (captured_at or datetime.now(UTC)).isoformat(),
    }
