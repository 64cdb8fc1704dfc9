"""Shared rows are read-only for tenants; keys and sign-ins belong to their customer's rows; what a launch costs is money.

Revision ID: 20261127_tenant_walls
Revises: 20261124_lifecycle_actions
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from warehouse.postgres.tenancy import SHARED_WHEN_NULL, tenant_policy_statements

revision = "20261127_tenant_walls"
down_revision = "20261124_lifecycle_actions"
branch_labels = None
depends_on = None

# Alembic's naming convention was applied to names that had it already.
RENAMED_CHECKS = {
    "ck_lifecycle_actions_ck_lifecycle_actions_state": "ck_lifecycle_actions_state",
    "ck_lifecycle_actions_ck_lifecycle_actions_transition": "ck_lifecycle_actions_transition",
}


def upgrade() -> None:
    for table in sorted(SHARED_WHEN_NULL):
        op.execute(f"DROP POLICY tenant ON {table}")
        op.execute(f"DROP POLICY IF EXISTS shared ON {table}")
        for statement in tenant_policy_statements(table):
            op.execute(statement)
    op.drop_constraint("fk_api_keys_cluster_id_clusters", "api_keys", type_="foreignkey")
    op.create_foreign_key(
        op.f("fk_api_keys_customer_id_cluster_id_clusters"),
        "api_keys",
        "clusters",
        ["customer_id", "cluster_id"],
        ["customer_id", "id"],
        ondelete="CASCADE",
    )
    op.create_check_constraint("cluster_has_customer", "api_keys", "cluster_id IS NULL OR customer_id IS NOT NULL")
    op.create_unique_constraint(op.f("uq_users_customer_id_id"), "users", ["customer_id", "id"])
    op.create_foreign_key(
        op.f("fk_user_sessions_customer_id_user_id_users"),
        "user_sessions",
        "users",
        ["customer_id", "user_id"],
        ["customer_id", "id"],
        ondelete="CASCADE",
    )
    op.alter_column("launch_attempts", "price_usd_per_hour", type_=sa.Numeric(18, 8))
    # A recommendation or a maintenance is not the instance's end (control.interruptions.policies.interruption_key).
    op.execute(
        "UPDATE interruptions SET interruption_key = instance_id || '@' || kind "
        "WHERE kind IN ('rebalance_recommendation', 'scheduled_change') AND interruption_key = instance_id"
    )
    op.create_index("ix_spot_events_received_at", "spot_events", ["received_at"], postgresql_using="brin")
    op.create_index("ix_interruptions_received_at", "interruptions", ["received_at"], postgresql_using="brin")
    for wrong, right in RENAMED_CHECKS.items():
        op.execute(f"ALTER TABLE lifecycle_actions RENAME CONSTRAINT {wrong} TO {right}")


def downgrade() -> None:
    for wrong, right in RENAMED_CHECKS.items():
        op.execute(f"ALTER TABLE lifecycle_actions RENAME CONSTRAINT {right} TO {wrong}")
    op.drop_index("ix_interruptions_received_at", "interruptions")
    op.drop_index("ix_spot_events_received_at", "spot_events")
    op.alter_column("launch_attempts", "price_usd_per_hour", type_=sa.Double())
    op.drop_constraint(op.f("fk_user_sessions_customer_id_user_id_users"), "user_sessions", type_="foreignkey")
    op.drop_constraint(op.f("uq_users_customer_id_id"), "users", type_="unique")
    op.drop_constraint(op.f("ck_api_keys_cluster_has_customer"), "api_keys", type_="check")
    op.drop_constraint(op.f("fk_api_keys_customer_id_cluster_id_clusters"), "api_keys", type_="foreignkey")
    op.create_foreign_key(
        op.f("fk_api_keys_cluster_id_clusters"), "api_keys", "clusters", ["cluster_id"], ["id"], ondelete="CASCADE"
    )
    # The policies stay as strict as they are.
