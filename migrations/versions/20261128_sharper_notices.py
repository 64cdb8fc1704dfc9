"""Interruptions keep the first notice beside the sharpest; one of an instance is under way at a time.

Revision ID: 20261128_sharper_notices
Revises: 20261127_tenant_walls
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261128_sharper_notices"
down_revision = "20261127_tenant_walls"
branch_labels = None
depends_on = None

# Where two were begun at the same moment, the one that ends sooner goes on.
_CLOSE_SECONDS = """
    WITH second AS (
        SELECT id, customer_id, row_number() OVER (
            PARTITION BY customer_id, instance_id ORDER BY deadline_at, id) AS number
        FROM interruptions WHERE state <> 'closed'
    ), closed AS (
        UPDATE interruptions i SET state = 'closed', outcome = 'cancelled', closed_at = now(), drain_pending = false,
            reason = 'another interruption of the instance is under way', version = i.version + 1
        FROM second s WHERE s.id = i.id AND s.number > 1
        RETURNING i.id, i.customer_id, i.version, i.reason
    )
    INSERT INTO interruption_history (customer_id, interruption_id, version, at, event, state, detail)
    SELECT customer_id, id, version, now(), 'closed', 'closed',
           jsonb_build_object('outcome', 'cancelled', 'reason', reason)
    FROM closed
"""


def upgrade() -> None:
    op.add_column("interruptions", sa.Column("first_notice_at", sa.DateTime(timezone=True), nullable=True))
    op.execute(_CLOSE_SECONDS)
    op.create_index(
        "uq_interruptions_under_way",
        "interruptions",
        ["customer_id", "instance_id"],
        unique=True,
        postgresql_where=sa.text("state <> 'closed'"),
    )


def downgrade() -> None:
    op.drop_index("uq_interruptions_under_way", "interruptions")
    op.drop_column("interruptions", "first_notice_at")
