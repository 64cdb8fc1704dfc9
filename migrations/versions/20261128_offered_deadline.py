"""The deadline a task had when it was last offered: one that came nearer since is offered to its holder again.

Revision ID: 20261128_offered_deadline
Revises: 20261128_unmeasured_savings
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261128_offered_deadline"
down_revision = "20261128_unmeasured_savings"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("agent_tasks", sa.Column("offered_deadline_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("agent_tasks", "offered_deadline_at")
