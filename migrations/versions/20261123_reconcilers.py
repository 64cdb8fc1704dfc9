"""Reconcilers: who does a round, instances adopted after a restore, launches found by their instance.

Revision ID: 20261123_reconcilers
Revises: 20261123_user_sessions
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from warehouse.postgres.tenancy import platform_table_statements, tenant_table_statements

revision = "20261123_reconcilers"
down_revision = "20261123_user_sessions"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "round_claims",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("claimed_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("claimed_by", sa.Text(), nullable=False),
        sa.Column("rounds", sa.BigInteger(), server_default="1", nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_round_claims"),
    )
    op.create_table(
        "adopted_instances",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("instance_id", sa.Text(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=True),
        sa.Column("region", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.Uuid(), nullable=True),
        sa.Column("launched_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("adopted_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name="fk_adopted_instances_customer_id_customers", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("customer_id", "instance_id", name="pk_adopted_instances"),
    )
    for statement in platform_table_statements("round_claims"):
        op.execute(statement)
    for statement in tenant_table_statements("adopted_instances"):
        op.execute(statement)


def downgrade() -> None:
    op.drop_table("adopted_instances")
    op.drop_table("round_claims")
