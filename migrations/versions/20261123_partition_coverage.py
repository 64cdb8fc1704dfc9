"""Coverage of every partition, kept when it is written: the gap finder reads it instead of the lake.

Revision ID: 20261123_partition_coverage
Revises: 20261123_initial
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from warehouse.postgres.tenancy import tenant_table_statements

revision = "20261123_partition_coverage"
down_revision = "20261123_initial"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "partition_coverage",
        sa.Column("table_name", sa.Text(), nullable=False),
        sa.Column("partition_key", sa.Text(), nullable=False),
        sa.Column("series", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Uuid(), nullable=True),
        sa.Column("covered_from", sa.DateTime(timezone=True), nullable=False),
        sa.Column("covered_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expected_points", sa.BigInteger(), nullable=False),
        sa.Column("present_points", sa.BigInteger(), nullable=False),
        sa.Column("detail", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("written_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id"],
            ["customers.id"],
            name=op.f("fk_partition_coverage_customer_id_customers"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("table_name", "partition_key", "series", name=op.f("pk_partition_coverage")),
    )
    for statement in tenant_table_statements("partition_coverage"):
        op.execute(statement)


def downgrade() -> None:
    op.drop_table("partition_coverage")
