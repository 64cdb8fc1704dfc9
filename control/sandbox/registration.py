"""Tell the server about the sandbox's customers, clusters and agent keys, as an operator would once.

Idempotent: ids are the sandbox's own, addresses and secrets are brought up to date, what an operator changed otherwise
(status, kill switches, configuration) stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from control.sandbox.identity import CustomerIdentity


@dataclass(frozen=True, slots=True)
class Registered:
    """Where a customer's account and clusters can be reached in this run of the sandbox."""

    identity: CustomerIdentity
    role_arn: str
    queue_url: str
    endpoints: dict[str, str]


def register(database_url: str, master_key: str, pepper: str, customers: Sequence[Registered]) -> None:
    """Write customers, clusters and agent keys to Postgres in one transaction.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the database does not answer or is not migrated.
    """
    from sqlalchemy import select
    from sqlalchemy.dialects.postgresql import insert

    from control.security import keys
    from warehouse.postgres.codec import Codec
    from warehouse.postgres.models import ApiKey, Cluster, Customer, new_id
    from warehouse.postgres.session import SyncDatabase

    codec = Codec(master_key)
    database = SyncDatabase(database_url)
    try:
        with database.system() as connection:

            def upsert(table: Any, values: dict[str, Any], update: tuple[str, ...], key: str = "id") -> None:
                statement = insert(table).values(**values)
                changes = {name: statement.excluded[name] for name in update}
                connection.execute(statement.on_conflict_do_update(index_elements=[key], set_=changes))

            for customer in customers:
                identity, customer_id = customer.identity, customer.identity.uuid
                upsert(
                    Customer.__table__,
                    {
                        "id": customer_id,
                        "company_name": identity.company_name,
                        "email": identity.email,
                        "aws_role_arn": customer.role_arn,
                        "aws_account_id": identity.account_id,
                        "sqs_queue_url": customer.queue_url,
                        "external_id": UUID(identity.external_id),
                        "status": "active",
                        "data_key": codec.new_data_key(customer_id),
                    },
                    ("aws_role_arn", "sqs_queue_url"),
                )
                stored = select(Customer.__table__.c.data_key).where(Customer.__table__.c.id == customer_id)
                data_key = bytes(connection.execute(stored).scalar_one())
                for cluster in identity.clusters:
                    cluster_id = UUID(cluster.cluster_id)
                    token = codec.encrypt(
                        cluster.k8s_token,
                        data_key=data_key,
                        customer_id=customer_id,
                        table="clusters",
                        column="k8s_token",
                        row=cluster_id,
                    )
                    upsert(
                        Cluster.__table__,
                        {
                            "id": cluster_id,
                            "customer_id": customer_id,
                            "cluster_name": cluster.cluster_name,
                            "k8s_api_endpoint": customer.endpoints[cluster.cluster_name],
                            "k8s_token": token,
                            "region": cluster.region,
                        },
                        ("k8s_api_endpoint", "k8s_token", "region"),
                    )
                    key = keys.derive(pepper.encode(), cluster.agent_key)
                    upsert(
                        ApiKey.__table__,
                        {
                            "id": new_id(),
                            "customer_id": customer_id,
                            "cluster_id": cluster_id,
                            "name": f"agent of {cluster.cluster_name}",
                            "role": "agent",
                            "prefix": key.prefix,
                            "secret_hmac": key.secret_hmac,
                        },
                        ("secret_hmac",),
                        key="prefix",
                    )
    finally:
        database.close()
