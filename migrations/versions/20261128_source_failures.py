"""Why a source refused what is missing: one row for each series that could not be read when it was last asked for.

Revision ID: 20261128_source_failures
Revises: 20261128_plan_history
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from warehouse.postgres.tenancy import platform_table_statements

revision = "20261128_source_failures"
down_revision = "20261128_plan_history"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "source_failures",
        sa.Column("table_name", sa.Text(), nullable=False),
        sa.Column("series", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("denied", sa.Boolean(), nullable=False),
        sa.Column("asked_from", sa.DateTime(timezone=True), nullable=False),
        sa.Column("failed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("table_name", "series", name=op.f("pk_source_failures")),
    )
    for statement in platform_table_statements("source_failures"):
        op.execute(statement)


def downgrade() -> None:
    op.drop_table("source_failures")
