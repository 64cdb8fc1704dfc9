"""Every route of the API with who may call it and how to call it about a given tenant.

The matrices of tests read this table; a route that is not in it fails them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from tests.control.api import Tenant, batch

PLATFORM, CUSTOMER, ANALYST, ML, AGENT = "platform_admin", "customer_admin", "analyst", "ml_server", "agent"
PUSHER = "event_pusher"
READERS = frozenset({PLATFORM, CUSTOMER, ANALYST})
ADMINS = frozenset({PLATFORM, CUSTOMER})
AGENTS = frozenset({AGENT})
PUBLIC = frozenset({"anonymous"})


@dataclass(frozen=True)
class Ids:
    """Ids of one tenant's things."""

    tenant: Tenant
    user: str
    key: str
    task: str
    interruption: str
    message: str
    fill: str


@dataclass(frozen=True)
class Call:
    """How to call a route about a tenant. ``scoped`` routes name something of a tenant, so that a stranger must get a
    404; the others answer with the caller's own things only."""

    roles: frozenset[str]
    scoped: bool = True
    path: Callable[[Ids], str] | None = None
    params: Callable[[Ids], dict[str, Any]] | None = None
    body: Callable[[Ids], Any] | None = None


def _task_result(ids: Ids) -> dict[str, Any]:
    return {"lease_epoch": 1, "report_id": str(uuid4()), "status": "done"}


def _customer(ids: Ids) -> dict[str, Any]:
    return {"customer_id": str(ids.tenant.customer_id)}


def _cluster(ids: Ids) -> dict[str, Any]:
    return {"cluster_id": str(ids.tenant.cluster_id)}


SWITCH = {"engaged": False, "reason": "test"}

ROUTES: dict[tuple[str, str], Call] = {
    ("POST", "/auth/token"): Call(PUBLIC, False, body=lambda ids: {"email": "a@b.co", "password": "x"}),
    ("POST", "/auth/refresh"): Call(PUBLIC, False, body=lambda ids: {"refresh_token": "x"}),
    ("POST", "/auth/logout"): Call(PUBLIC, False, body=lambda ids: {"refresh_token": "x"}),
    ("GET", "/users"): Call(ADMINS, params=_customer),
    ("POST", "/users"): Call(
        ADMINS,
        body=lambda ids: (
            _customer(ids)
            | {"email": f"{uuid4().hex}@example.com", "password": "long enough, really", "role": "analyst"}
        ),
    ),
    ("GET", "/users/{user_id}"): Call(ADMINS, path=lambda ids: ids.user),
    ("PATCH", "/users/{user_id}"): Call(ADMINS, path=lambda ids: ids.user, body=lambda ids: {"disabled": False}),
    ("DELETE", "/users/{user_id}"): Call(ADMINS, path=lambda ids: ids.user),
    ("GET", "/api-keys"): Call(ADMINS, params=_customer),
    ("POST", "/api-keys"): Call(ADMINS, body=lambda ids: _customer(ids) | {"name": "k", "role": "analyst"}),
    ("GET", "/api-keys/{key_id}"): Call(ADMINS, path=lambda ids: ids.key),
    ("DELETE", "/api-keys/{key_id}"): Call(ADMINS, path=lambda ids: ids.key),
    ("GET", "/customers"): Call(READERS, False),
    ("POST", "/customers"): Call(
        frozenset({PLATFORM}), False, body=lambda ids: {"company_name": "New", "email": "new@example.com"}
    ),
    ("GET", "/customers/{customer_id}"): Call(READERS),
    ("PATCH", "/customers/{customer_id}"): Call(frozenset({PLATFORM}), False, body=lambda ids: {}),
    ("DELETE", "/customers/{customer_id}"): Call(frozenset({PLATFORM}), False),
    ("POST", "/customers/{customer_id}/adopt-only/lift"): Call(
        frozenset({PLATFORM}), False, body=lambda ids: {"reason": "compared"}
    ),
    ("POST", "/customers/{customer_id}/verify"): Call(ADMINS),
    ("POST", "/customers/{customer_id}/kill-switch"): Call(ADMINS, body=lambda ids: SWITCH),
    ("GET", "/customers/{customer_id}/config"): Call(READERS),
    ("GET", "/customers/{customer_id}/config/{key}"): Call(READERS, path=lambda ids: "approval_required"),
    ("PUT", "/customers/{customer_id}/config/{key}"): Call(
        ADMINS, path=lambda ids: "approval_required", body=lambda ids: {"value": True}
    ),
    ("DELETE", "/customers/{customer_id}/config/{key}"): Call(ADMINS, path=lambda ids: "approval_required"),
    ("GET", "/clusters"): Call(READERS, params=_customer),
    ("POST", "/clusters"): Call(
        ADMINS,
        body=lambda ids: _customer(ids) | {"cluster_name": f"c-{uuid4().hex[:8]}", "region": "us-east-1"},
    ),
    ("GET", "/clusters/{cluster_id}"): Call(READERS),
    ("PATCH", "/clusters/{cluster_id}"): Call(ADMINS, body=lambda ids: {}),
    ("DELETE", "/clusters/{cluster_id}"): Call(ADMINS),
    ("GET", "/clusters/{cluster_id}/state"): Call(READERS),
    ("GET", "/clusters/{cluster_id}/nodes"): Call(READERS),
    ("GET", "/clusters/{cluster_id}/events"): Call(READERS),
    ("GET", "/clusters/{cluster_id}/cost"): Call(READERS),
    ("POST", "/clusters/{cluster_id}/kill-switch"): Call(ADMINS, body=lambda ids: SWITCH),
    ("GET", "/client/tasks"): Call(AGENTS, params=_cluster),
    ("POST", "/client/tasks/{task_id}/result"): Call(AGENTS, path=lambda ids: ids.task, body=_task_result),
    ("POST", "/client/metrics"): Call(AGENTS, body=lambda ids: batch(ids.tenant.cluster_id)),
    ("POST", "/client/events"): Call(AGENTS, body=lambda ids: _cluster(ids) | {"events": []}),
    ("GET", "/interruptions"): Call(READERS, params=_customer),
    ("GET", "/interruptions/rebalance-scores"): Call(READERS, params=_customer),
    ("GET", "/interruptions/returns-to-spot"): Call(READERS, params=_customer),
    ("GET", "/interruptions/{interruption_id}"): Call(READERS, path=lambda ids: ids.interruption),
    ("GET", "/quarantine"): Call(READERS, params=_customer),
    ("GET", "/quarantine/{message_id}"): Call(READERS, path=lambda ids: ids.message),
    ("POST", "/quarantine/replay"): Call(ADMINS, body=lambda ids: {"reason": "not_json"} | _customer(ids)),
    ("POST", "/quarantine/{message_id}/replay"): Call(ADMINS, path=lambda ids: ids.message),
    ("POST", "/events/aws"): Call(ADMINS | {PUSHER}, False, body=lambda ids: {}),
    ("GET", "/admin/gap-filler/gaps"): Call(frozenset({PLATFORM}), False),
    ("POST", "/admin/gap-filler/fill"): Call(
        frozenset({PLATFORM}), False, body=lambda ids: {"table_name": "spot_prices", "partitions": []}
    ),
    ("GET", "/admin/gap-filler/fills"): Call(frozenset({PLATFORM}), False),
    ("GET", "/admin/gap-filler/{fill_id}"): Call(frozenset({PLATFORM}), False, path=lambda ids: ids.fill),
    ("POST", "/admin/gap-filler/{fill_id}/cancel"): Call(frozenset({PLATFORM}), False, path=lambda ids: ids.fill),
    ("POST", "/admin/gap-filler/{fill_id}/resume"): Call(frozenset({PLATFORM}), False, path=lambda ids: ids.fill),
    ("GET", "/reports/savings"): Call(READERS, params=lambda ids: _customer(ids) | {"month": "2026-10"}),
}
