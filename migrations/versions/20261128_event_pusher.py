"""Keys that may hand in a customer's events and nothing else.

Revision ID: 20261128_event_pusher
Revises: 20261128_leaving
"""

from __future__ import annotations

from alembic import op

revision = "20261128_event_pusher"
down_revision = "20261128_leaving"
branch_labels = None
depends_on = None

ROLES = "'platform_admin', 'customer_admin', 'analyst', 'ml_server', 'agent'"


def upgrade() -> None:
    op.drop_constraint(op.f("ck_api_keys_role"), "api_keys", type_="check")
    op.create_check_constraint(op.f("ck_api_keys_role"), "api_keys", f"role IN ({ROLES}, 'event_pusher')")
    op.create_check_constraint(
        op.f("ck_api_keys_pusher_has_customer"), "api_keys", "role <> 'event_pusher' OR customer_id IS NOT NULL"
    )


def downgrade() -> None:
    # A key of a role that is not known any more opens nothing.
    op.execute("DELETE FROM api_keys WHERE role = 'event_pusher'")
    op.drop_constraint(op.f("ck_api_keys_pusher_has_customer"), "api_keys", type_="check")
    op.drop_constraint(op.f("ck_api_keys_role"), "api_keys", type_="check")
    op.create_check_constraint(op.f("ck_api_keys_role"), "api_keys", f"role IN ({ROLES})")
