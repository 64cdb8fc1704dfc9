"""Who the sandbox's customers are: ids, accounts and secrets, made at the first start and kept (0600) ever after."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import UUID, uuid4

from uuid_utils.compat import uuid7

from control.sandbox.fleet.plan import CustomerPlan


@dataclass(frozen=True, slots=True)
class ClusterIdentity:
    """One cluster with its agent's key and the token of its Kubernetes API."""

    cluster_id: str
    cluster_name: str
    region: str
    agent_key: str
    k8s_token: str

    def __repr__(self) -> str:
        return f"ClusterIdentity({self.cluster_name}, {self.cluster_id})"


@dataclass(frozen=True, slots=True)
class CustomerIdentity:
    """One customer with its account."""

    customer_id: str
    company_name: str
    email: str
    account_id: str
    region: str
    external_id: str
    clusters: tuple[ClusterIdentity, ...]

    @property
    def uuid(self) -> UUID:
        """The customer's id."""
        return UUID(self.customer_id)


def load_or_make(file: Path, customers: Iterable[CustomerPlan]) -> tuple[CustomerIdentity, ...]:
    """The identities of the planned customers; those that `file` does not know yet are made and added to it."""
    known = {row["account_id"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    identities = tuple(_identity(plan, known.get(plan.account_id, {})) for plan in customers)
    if [asdict(identity) for identity in identities] != list(known.values()):
        write_private(file, json.dumps([asdict(identity) for identity in identities], indent=1))
    return identities


def _identity(plan: CustomerPlan, known: dict) -> CustomerIdentity:
    clusters = {row["cluster_name"]: row for row in known.get("clusters", ())}
    return CustomerIdentity(
        customer_id=known.get("customer_id") or str(uuid7()),
        company_name=plan.company_name,
        email=plan.email,
        account_id=plan.account_id,
        region=plan.region,
        external_id=known.get("external_id") or str(uuid4()),
        clusters=tuple(
            ClusterIdentity(
                cluster_id=clusters.get(cluster.name, {}).get("cluster_id") or str(uuid7()),
                cluster_name=cluster.name,
                region=cluster.region,
                agent_key=clusters.get(cluster.name, {}).get("agent_key") or agent_key(),
                k8s_token=clusters.get(cluster.name, {}).get("k8s_token") or secrets.token_urlsafe(32),
            )
            for cluster in plan.clusters
        ),
    )


def agent_key() -> str:
    """A key in the product's own form (control.security.keys); its HMAC is stored when the database is known."""
    return f"co_{secrets.token_hex(8)}.{secrets.token_urlsafe(32)}"


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner reads, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)
    part.write_text(text)
    part.replace(file)
