"""Why an instance was adopted, what it is, and whether it still runs.

Revision ID: 20261128_adopted_reasons
Revises: 20261128_replaced_before
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261128_adopted_reasons"
down_revision = "20261128_replaced_before"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("adopted_instances", sa.Column("reason", sa.Text(), server_default="restored", nullable=False))
    op.add_column("adopted_instances", sa.Column("instance_type", sa.Text(), nullable=True))
    op.add_column("adopted_instances", sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True))
    op.create_check_constraint(
        op.f("ck_adopted_instances_reason"), "adopted_instances", "reason IN ('restored', 'node', 'copied')"
    )


def downgrade() -> None:
    op.drop_constraint(op.f("ck_adopted_instances_reason"), "adopted_instances", type_="check")
    op.drop_column("adopted_instances", "ended_at")
    op.drop_column("adopted_instances", "instance_type")
    op.drop_column("adopted_instances", "reason")
