"""The interruption path: launch templates, standing of pools, the deployment's mark, lookup of nodes by instance.

Revision ID: 20261123_interruption_path
Revises: 20261123_partition_coverage
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from warehouse.postgres.tenancy import platform_table_statements, tenant_table_statements

revision = "20261123_interruption_path"
down_revision = "20261123_partition_coverage"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("interruptions", sa.Column("drain_pending", sa.Boolean(), server_default="false", nullable=False))
    # An event is matched by instance id before its customer's cluster is known, and across customers on purpose: an
    # id that belongs to another tenant is an alarm.
    op.create_index("ix_nodes_by_instance", "nodes", ["instance_id"])
    op.create_table(
        "launch_templates",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("template", postgresql.JSONB(), nullable=False),
        sa.Column("instance_ids", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id", "cluster_id"],
            ["clusters.customer_id", "clusters.id"],
            name="fk_launch_templates_customer_id_cluster_id_clusters",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_launch_templates"),
        sa.UniqueConstraint("cluster_id", "fingerprint", name="uq_launch_templates_cluster_id_fingerprint"),
    )
    op.create_index("ix_launch_templates_instances", "launch_templates", ["instance_ids"], postgresql_using="gin")
    op.create_table(
        "pool_standings",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("region", sa.Text(), nullable=False),
        sa.Column("availability_zone", sa.Text(), nullable=False),
        sa.Column("instance_type", sa.Text(), nullable=False),
        sa.Column("penalty", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("interruptions", sa.Integer(), server_default="0", nullable=False),
        sa.Column("refusals", sa.Integer(), server_default="0", nullable=False),
        sa.Column("rebalances", sa.Integer(), server_default="0", nullable=False),
        sa.Column("last_reason", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name="fk_pool_standings_customer_id_customers", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint(
            "customer_id", "region", "availability_zone", "instance_type", name="pk_pool_standings"
        ),
    )
    op.create_table(
        "deployments",
        sa.Column("deployment_id", sa.Text(), nullable=False),
        sa.Column("adopt_only", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("deployment_id", name="pk_deployments"),
    )
    for table in ("launch_templates", "pool_standings"):
        for statement in tenant_table_statements(table):
            op.execute(statement)
    for statement in platform_table_statements("deployments"):
        op.execute(statement)


def downgrade() -> None:
    op.drop_table("deployments")
    op.drop_table("pool_standings")
    op.drop_table("launch_templates")
    op.drop_index("ix_nodes_by_instance", "nodes")
    op.drop_column("interruptions", "drain_pending")
