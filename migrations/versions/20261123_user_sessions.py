"""Sessions of people: a refresh token works once, and signing out ends what was signed in.

Revision ID: 20261123_user_sessions
Revises: 20261123_interruption_path
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from warehouse.postgres.tenancy import tenant_table_statements

revision = "20261123_user_sessions"
down_revision = "20261123_interruption_path"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "user_sessions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("customer_id", sa.Uuid(), nullable=True),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("refresh_token_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_user_sessions"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_user_sessions_user_id_users", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name="fk_user_sessions_customer_id_customers", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_user_sessions_user_id", "user_sessions", ["user_id"])
    op.create_index("ix_user_sessions_expires_at", "user_sessions", ["expires_at"])
    for statement in tenant_table_statements("user_sessions"):
        op.execute(statement)


def downgrade() -> None:
    op.drop_table("user_sessions")
