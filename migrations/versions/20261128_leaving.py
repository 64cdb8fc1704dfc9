"""Off-boarding that finishes what is in flight, instances EC2 would not end, and adopt-only per customer.

Revision ID: 20261128_leaving
Revises: 20261128_sharper_notices
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from warehouse.postgres.tenancy import platform_table_statements, tenant_table_statements

revision = "20261128_leaving"
down_revision = "20261128_sharper_notices"
branch_labels = None
depends_on = None

STATUSES = "'pending', 'active', 'degraded', 'suspended'"


def upgrade() -> None:
    op.drop_constraint(op.f("ck_customers_status"), "customers", type_="check")
    op.create_check_constraint(
        op.f("ck_customers_status"), "customers", f"status IN ({STATUSES}, 'offboarding', 'offboarded')"
    )
    op.add_column("customers", sa.Column("adopt_only_since", sa.DateTime(timezone=True), nullable=True))
    op.add_column("customers", sa.Column("adopt_only_reason", sa.Text(), nullable=True))
    # What held for the whole deployment holds for each of its customers until it is lifted there.
    op.execute("""
        UPDATE customers SET adopt_only_since = d.updated_at, adopt_only_reason = d.reason
        FROM (SELECT * FROM deployments WHERE adopt_only ORDER BY updated_at LIMIT 1) d
    """)
    op.drop_table("deployments")
    op.create_table(
        "refused_endings",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("instance_id", sa.Text(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=True),
        sa.Column("region", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("lasting", sa.Boolean(), nullable=False),
        sa.Column("tries", sa.Integer(), server_default="1", nullable=False),
        sa.Column("first_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("last_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id"],
            ["customers.id"],
            name=op.f("fk_refused_endings_customer_id_customers"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("customer_id", "instance_id", name=op.f("pk_refused_endings")),
        sa.CheckConstraint("why IN ('replacement', 'orphan', 'return_to_spot')", name=op.f("ck_refused_endings_why")),
    )
    for statement in tenant_table_statements("refused_endings"):
        op.execute(statement)


def downgrade() -> None:
    op.drop_table("refused_endings")
    op.create_table(
        "deployments",
        sa.Column("deployment_id", sa.Text(), nullable=False),
        sa.Column("adopt_only", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("deployment_id", name="pk_deployments"),
    )
    for statement in platform_table_statements("deployments"):
        op.execute(statement)
    op.drop_column("customers", "adopt_only_reason")
    op.drop_column("customers", "adopt_only_since")
    op.execute("UPDATE customers SET status = 'offboarded' WHERE status = 'offboarding'")
    op.drop_constraint(op.f("ck_customers_status"), "customers", type_="check")
    op.create_check_constraint(op.f("ck_customers_status"), "customers", f"status IN ({STATUSES}, 'offboarded')")
