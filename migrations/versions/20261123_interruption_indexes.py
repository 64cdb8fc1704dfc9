"""Interruption path: what the loops read every second is found by index, however long the history grows.

Revision ID: 20261123_interruption_indexes
Revises: 20261123_reconcilers
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261123_interruption_indexes"
down_revision = "20261123_reconcilers"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_launch_attempts_running",
        "launch_attempts",
        ["state"],
        postgresql_where=sa.text("state IN ('launched', 'adopted', 'terminating')"),
    )
    op.create_index(
        "ix_launch_attempts_recent",
        "launch_attempts",
        ["customer_id", "created_at"],
        postgresql_where=sa.text("instance_id IS NOT NULL"),
    )
    op.create_index("ix_spot_events_interruption", "spot_events", ["interruption_id"])
    op.create_index(
        "ix_inbox_messages_waiting",
        "inbox_messages",
        ["received_at"],
        postgresql_where=sa.text("outcome = 'waiting'"),
    )


def downgrade() -> None:
    op.drop_index("ix_inbox_messages_waiting", "inbox_messages")
    op.drop_index("ix_spot_events_interruption", "spot_events")
    op.drop_index("ix_launch_attempts_recent", "launch_attempts")
    op.drop_index("ix_launch_attempts_running", "launch_attempts")
