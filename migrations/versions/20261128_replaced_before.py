"""What replaced an instance before is looked up by the instance.

Revision ID: 20261128_replaced_before
Revises: 20261128_offered_deadline
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261128_replaced_before"
down_revision = "20261128_offered_deadline"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_launch_intents_lost",
        "launch_intents",
        ["customer_id", sa.text("(requirements ->> 'instance_id')")],
    )


def downgrade() -> None:
    op.drop_index("ix_launch_intents_lost", table_name="launch_intents")
