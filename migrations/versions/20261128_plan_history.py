"""The history of plans: every change of a plan is a row, versions without a hole.

Revision ID: 20261128_plan_history
Revises: 20261128_event_pusher
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from warehouse.postgres.tenancy import tenant_table_statements

revision = "20261128_plan_history"
down_revision = "20261128_event_pusher"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "plan_history",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("plan_id", sa.Uuid(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("detail", postgresql.JSONB(), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id", "plan_id"],
            ["optimization_history.customer_id", "optimization_history.id"],
            name=op.f("fk_plan_history_customer_id_plan_id_optimization_history"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("plan_id", "version", name=op.f("pk_plan_history")),
    )
    for statement in tenant_table_statements("plan_history"):
        op.execute(statement)
    # What was before the history was kept: the versions are there, what they were is not.
    op.execute("""
        INSERT INTO plan_history (customer_id, plan_id, version, at, event, status, detail)
        SELECT customer_id, id, number, coalesce(finished_at, created_at), 'not_recorded', status, '{}'
        FROM optimization_history, generate_series(1, version) AS number
    """)


def downgrade() -> None:
    op.drop_table("plan_history")
