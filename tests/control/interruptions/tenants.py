"""A customer with clusters and nodes in a real Postgres, and the event documents the tests send."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from control.interruptions import repository
from control.interruptions.repository import CustomerFacts
from warehouse.postgres.models import new_id
from warehouse.postgres.session import Database

_numbers = itertools.count(1)


@dataclass
class Tenant:
    """One customer with one cluster; ``node()`` adds a Ready Spot node to it."""

    db: Database
    customer_id: UUID
    cluster_id: UUID
    account_id: str
    region: str = "us-east-1"
    instances: list[str] = field(default_factory=list)

    async def facts(self) -> CustomerFacts:
        async with self.db.tenant(self.customer_id) as conn:
            facts = await repository.customer_facts(conn, self.customer_id)
        assert facts is not None
        return facts

    async def node(self, instance_id: str | None = None, **values: Any) -> str:
        (instance_id,) = await self.nodes([instance_id or f"i-{next(_numbers):017x}"], **values)
        return instance_id

    async def nodes(self, instance_ids: Sequence[str] | int, **values: Any) -> list[str]:
        """Nodes of these instances, or so many, in one statement."""
        if isinstance(instance_ids, int):
            instance_ids = [f"i-{next(_numbers):017x}" for _ in range(instance_ids)]
        rows = [self._node(instance_id, values) for instance_id in instance_ids]
        async with self.db.tenant(self.customer_id) as conn:
            await repository.insert_rows(conn, "nodes", rows, order="id")
            # The agent that reported them was heard.
            await conn.execute(text("UPDATE clusters SET last_seen_at = now() WHERE id = :id"), {"id": self.cluster_id})
        self.instances += instance_ids
        return list(instance_ids)

    def _node(self, instance_id: str, values: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": new_id(),
            "customer_id": self.customer_id,
            "cluster_id": self.cluster_id,
            "node_name": f"node-{instance_id}",
            "instance_id": instance_id,
            "instance_type": "m5.large",
            "availability_zone": f"{self.region}a",
            "node_type": "spot",
            "status": "ready",
            "cpu_cores": 2.0,
            "memory_bytes": 8 << 30,
            "last_seen_at": datetime.now(UTC),
        } | values

    async def config(self, key: str, value: Any) -> None:
        async with self.db.tenant(self.customer_id) as conn:
            row = {"customer_id": self.customer_id, "config_key": key, "config_value": value}
            await repository.insert_rows(conn, "customer_config", [row], order="config_key")

    async def rows(self, sql: str, **values: Any) -> list[Any]:
        while True:
            try:
                async with self.db.system() as conn:
                    return list((await conn.execute(text(sql), {"customer_id": self.customer_id} | values)).all())
            except DBAPIError as error:
                # On a starved machine this process may be the one that was idle, or connecting, for too long.
                starved = getattr(error.orig, "sqlstate", None) == "25P03"
                if not starved and not isinstance(error.orig, psycopg.errors.ConnectionTimeout):
                    raise

    async def row(self, sql: str, **values: Any) -> Any:
        (row,) = await self.rows(sql, **values)
        return row

    def event(self, detail_type: str, detail: dict[str, Any], **values: Any) -> dict[str, Any]:
        return {
            "version": "0",
            "id": str(new_id()),
            "detail-type": detail_type,
            "source": "aws.ec2",
            "account": self.account_id,
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "region": self.region,
            "resources": [],
            "detail": detail,
        } | values

    def warning(self, instance_id: str, action: str = "terminate", **values: Any) -> dict[str, Any]:
        detail = {"instance-id": instance_id, "instance-action": action}
        return self.event("EC2 Spot Instance Interruption Warning", detail, **values)

    def rebalance(self, instance_id: str, **values: Any) -> dict[str, Any]:
        return self.event("EC2 Instance Rebalance Recommendation", {"instance-id": instance_id}, **values)

    def state_change(self, instance_id: str, state: str, **values: Any) -> dict[str, Any]:
        detail = {"instance-id": instance_id, "state": state}
        return self.event("EC2 Instance State-change Notification", detail, **values)


async def create_tenant(db: Database, *, region: str = "us-east-1", **values: Any) -> Tenant:
    account_id = values.get("aws_account_id") or f"{next(_numbers) + 100_000_000_000}"
    tenant = Tenant(db, new_id(), new_id(), account_id, region)
    customer = {
        "id": tenant.customer_id,
        "company_name": "Test",
        "email": "ops@example.com",
        "aws_account_id": tenant.account_id,
        "aws_role_arn": f"arn:aws:iam::{tenant.account_id}:role/cloudoptim",
        "external_id": new_id(),
        "status": "active",
    } | values
    cluster = {
        "id": tenant.cluster_id,
        "customer_id": tenant.customer_id,
        "cluster_name": "one",
        "region": region,
        "status": "active",
    }
    async with db.system() as conn:
        await repository.insert_rows(conn, "customers", [customer], order="id")
        await repository.insert_rows(conn, "clusters", [cluster], order="id")
    return tenant


@asynccontextmanager
async def refusing(db: Database, instance_id: str, condition: str) -> AsyncIterator[None]:
    """Postgres refuses interruptions of one instance with an error of this condition, until the block ends."""
    name = "refuse_" + instance_id.removeprefix("i-")

    async def run(*statements: str) -> None:
        async with db.system() as conn:
            await conn.execute(text("RESET ROLE"))
            for statement in statements:
                await conn.execute(text(statement))

    await run(
        f"""
        CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.instance_id = '{instance_id}' THEN
                RAISE EXCEPTION 'no such text' USING ERRCODE = '{condition}';
            END IF;
            RETURN NEW;
        END $$
        """,
        f"CREATE TRIGGER {name} BEFORE INSERT ON interruptions FOR EACH ROW EXECUTE FUNCTION {name}()",
    )
    try:
        yield
    finally:
        await run(f"DROP TRIGGER {name} ON interruptions", f"DROP FUNCTION {name}()")
