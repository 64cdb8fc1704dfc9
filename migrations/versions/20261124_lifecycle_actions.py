"""Lifecycle hooks of Auto Scaling groups that wait for our answer; a customer's newest launch calls by index.

Revision ID: 20261124_lifecycle_actions
Revises: 20261123_interruption_indexes
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from warehouse.postgres.tenancy import tenant_table_statements

revision = "20261124_lifecycle_actions"
down_revision = "20261123_interruption_indexes"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "lifecycle_actions",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("region", sa.Text(), nullable=False),
        sa.Column("group_name", sa.Text(), nullable=False),
        sa.Column("hook_name", sa.Text(), nullable=False),
        sa.Column("instance_id", sa.Text(), nullable=False),
        sa.Column("transition", sa.Text(), nullable=False),
        sa.Column("interruption_id", sa.Uuid(), nullable=True),
        sa.Column("state", sa.Text(), server_default="open", nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("heartbeats", sa.Integer(), server_default="0", nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("received_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("next_action_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("transition IN ('launching', 'terminating')", name="ck_lifecycle_actions_transition"),
        sa.CheckConstraint("state IN ('open', 'completed', 'left')", name="ck_lifecycle_actions_state"),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name="fk_lifecycle_actions_customer_id_customers", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("customer_id", "token", name="pk_lifecycle_actions"),
    )
    op.create_index(
        "ix_lifecycle_actions_open", "lifecycle_actions", ["next_action_at"], postgresql_where=sa.text("state = 'open'")
    )
    op.create_index("ix_lifecycle_actions_interruption", "lifecycle_actions", ["interruption_id"])
    op.create_index("ix_launch_batches_recent", "launch_batches", ["customer_id", "created_at"])
    for statement in tenant_table_statements("lifecycle_actions"):
        op.execute(statement)


def downgrade() -> None:
    op.drop_index("ix_launch_batches_recent", "launch_batches")
    op.drop_table("lifecycle_actions")
