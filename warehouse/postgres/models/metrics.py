"""Raw landing of agents' metrics (7 days, partitioned by day) and the summaries decisions read."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, func
from sqlalchemy.orm import Mapped, mapped_column

from warehouse.postgres.models.base import Base, one_of


class MetricBatch(Base):
    """One batch of one cluster, counted once; the same id with another body is refused."""

    __tablename__ = "metric_batches"
    __table_args__ = (
        ForeignKeyConstraint(
            ["customer_id", "cluster_id"], ["clusters.customer_id", "clusters.id"], ondelete="CASCADE"
        ),
        Index("ix_metric_batches_received_at", "received_at"),
        Index("ix_metric_batches_seq", "cluster_id", "seq"),
    )

    customer_id: Mapped[UUID]
    cluster_id: Mapped[UUID] = mapped_column(primary_key=True)
    batch_id: Mapped[UUID] = mapped_column(primary_key=True)
    seq: Mapped[int]
    body_sha256: Mapped[str]
    samples: Mapped[int]
    rejected: Mapped[int]
    late: Mapped[int] = mapped_column(server_default="0")
    answer: Mapped[str]
    sent_at: Mapped[datetime]
    received_at: Mapped[datetime] = mapped_column(server_default=func.now())


class MetricSample(Base):
    """Raw samples, partitioned by day of ``ts``; duplicates are kept out by the batch key, not by an index."""

    __tablename__ = "metric_samples"
    __table_args__ = (
        Index("ix_metric_samples_ts", "ts", postgresql_using="brin"),
        {"postgresql_partition_by": "RANGE (ts)"},
    )
    # Partitioned and without a unique key on purpose: COPY speed (see docs on metrics ingestion).
    __mapper_args__ = {"primary_key": ["cluster_id", "subject", "metric", "ts"]}  # noqa: RUF012

    customer_id: Mapped[UUID]
    cluster_id: Mapped[UUID]
    metric: Mapped[str]
    subject: Mapped[str]
    ts: Mapped[datetime]
    value: Mapped[float]
    received_at: Mapped[datetime] = mapped_column(server_default=func.now())


class MetricsSummary(Base):
    """5-minute and hourly summaries, upserted by the pipelines and read by pages and decisions."""

    __tablename__ = "metrics_summary"
    __table_args__ = (
        CheckConstraint(one_of("resolution", "5m", "1h"), name="resolution"),
        ForeignKeyConstraint(
            ["customer_id", "cluster_id"], ["clusters.customer_id", "clusters.id"], ondelete="CASCADE"
        ),
    )

    customer_id: Mapped[UUID]
    cluster_id: Mapped[UUID] = mapped_column(primary_key=True)
    resolution: Mapped[str] = mapped_column(primary_key=True)
    metric_type: Mapped[str] = mapped_column(primary_key=True)
    subject: Mapped[str] = mapped_column(primary_key=True)
    timestamp: Mapped[datetime] = mapped_column(primary_key=True)
    value: Mapped[float]
    min: Mapped[float]
    max: Mapped[float]
    samples: Mapped[int]


class DirtyPartition(Base):
    """Partitions of computed tables that late data made stale; the next run recomputes them."""

    __tablename__ = "dirty_partitions"

    table_name: Mapped[str] = mapped_column(primary_key=True)
    partition_key: Mapped[str] = mapped_column(primary_key=True)
    reason: Mapped[str]
    marked_at: Mapped[datetime] = mapped_column(server_default=func.now())
