"""Since when a source refuses: a region that denies us its prices is asked ever less often.

Revision ID: 20261128_failing_since
Revises: 20261128_source_failures
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261128_failing_since"
down_revision = "20261128_source_failures"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "source_failures",
        sa.Column("failing_since", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    )
    op.execute("UPDATE source_failures SET failing_since = failed_at")


def downgrade() -> None:
    op.drop_column("source_failures", "failing_since")
