"""Days whose savings say zero of what nobody measures are computed again: rework and displaced commitments are null.

Revision ID: 20261128_unmeasured_savings
Revises: 20261128_failing_since
"""

from __future__ import annotations

from alembic import op

revision = "20261128_unmeasured_savings"
down_revision = "20261128_failing_since"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Every day that was computed from a cluster's metrics; those that hold null already come out the same.
    op.execute(
        """
        INSERT INTO dirty_partitions (table_name, partition_key, reason)
        SELECT DISTINCT 'node_cost_hourly', partition_key, 'savings said zero of what nobody measures'
        FROM partition_coverage WHERE table_name = 'metric_5m'
        ON CONFLICT (table_name, partition_key) DO NOTHING
        """
    )


def downgrade() -> None:
    # A day computed once more than needed is the same day.
    pass
