"""Clusters and their nodes."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from warehouse.postgres.models.base import Base, HasCreatedAt, HasId, one_of


class Cluster(HasId, HasCreatedAt, Base):
    """A Kubernetes cluster with an agent. ``k8s_token`` is envelope-encrypted (warehouse.postgres.codec)."""

    __tablename__ = "clusters"
    __table_args__ = (
        UniqueConstraint("customer_id", "cluster_name"),
        UniqueConstraint("customer_id", "id"),
        CheckConstraint(one_of("status", "pending", "active", "away", "deleted"), name="status"),
    )

    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    cluster_name: Mapped[str]
    k8s_api_endpoint: Mapped[str | None]
    k8s_ca: Mapped[str | None]
    k8s_token: Mapped[bytes | None] = mapped_column(LargeBinary)
    region: Mapped[str]
    node_count: Mapped[int] = mapped_column(server_default="0")
    status: Mapped[str] = mapped_column(server_default="pending")
    kill_switch: Mapped[bool] = mapped_column(server_default="false")
    agent_version: Mapped[str | None]
    agent_understands: Mapped[list[Any] | None]
    state: Mapped[dict[str, Any] | None]
    last_seen_at: Mapped[datetime | None]


class Node(HasId, HasCreatedAt, Base):
    """One EC2 instance as a node of a cluster, from launch to end. An instance id is a node once."""

    __tablename__ = "nodes"
    __table_args__ = (
        UniqueConstraint("cluster_id", "instance_id"),
        ForeignKeyConstraint(
            ["customer_id", "cluster_id"], ["clusters.customer_id", "clusters.id"], ondelete="CASCADE"
        ),
        Index("ix_nodes_instance_id", "customer_id", "instance_id"),
        Index("ix_nodes_by_instance", "instance_id"),
        Index("ix_nodes_live", "cluster_id", postgresql_where=text("terminated_at IS NULL")),
        CheckConstraint(one_of("node_type", "spot", "on-demand"), name="node_type"),
        CheckConstraint(one_of("status", "pending", "ready", "not_ready", "cordoned", "terminated"), name="status"),
    )

    customer_id: Mapped[UUID]
    cluster_id: Mapped[UUID]
    node_name: Mapped[str]
    instance_id: Mapped[str]
    instance_type: Mapped[str]
    availability_zone: Mapped[str]
    zone_id: Mapped[str | None]
    node_type: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="pending")
    cpu_cores: Mapped[float]
    memory_bytes: Mapped[int] = mapped_column(BigInteger)
    ready_at: Mapped[datetime | None]
    last_seen_at: Mapped[datetime] = mapped_column(server_default=func.now())
    terminated_at: Mapped[datetime | None]
