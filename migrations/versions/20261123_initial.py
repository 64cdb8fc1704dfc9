"""The initial schema: all tables, roles with forced row-level security, and the ML server's views.

Revision ID: 20261123_initial
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from warehouse.postgres.session import ML_ROLE, SYSTEM_ROLE, TENANT_ROLE
from warehouse.postgres.tenancy import platform_table_statements, role_statements, tenant_table_statements

revision = "20261123_initial"
down_revision = None
branch_labels = None
depends_on = None


TENANT_TABLES = (
    "customers",
    "customer_config",
    "intake_health",
    "clusters",
    "nodes",
    "inbox_messages",
    "spot_events",
    "interruptions",
    "interruption_history",
    "launch_intents",
    "launch_batches",
    "launch_attempts",
    "agent_tasks",
    "task_reports",
    "optimization_history",
    "plan_steps",
    "metric_batches",
    "metric_samples",
    "metrics_summary",
    "predictions",
    "data_gaps",
    "gap_fills",
    "savings_statements",
    "users",
    "api_keys",
    "audit_log",
    "outbox",
    "notifications",
)
APPEND_ONLY = ("audit_log", "task_reports", "interruption_history")
PLATFORM_TABLES = ("dirty_partitions", "lake_releases")
PUBLISHED_TABLES = ("spot_price_current", "on_demand_price", "ml_models")

# Daily partitions are made and dropped by functions, so that the roles need no right to change the schema. Nobody
# may read a partition directly (row-level security stands on the parent); the system role may COPY into one, which
# Postgres does not allow into a table with row-level security.
FUNCTIONS = """
CREATE FUNCTION ensure_metric_partitions(first_day date, last_day date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    day date;
    partition text;
BEGIN
    IF last_day - first_day > 400 THEN
        RAISE EXCEPTION 'ensure_metric_partitions: more than 400 days asked for';
    END IF;
    FOR day IN SELECT generate_series(first_day, last_day, interval '1 day')::date LOOP
        partition := 'metric_samples_' || to_char(day, 'YYYYMMDD');
        IF to_regclass(partition) IS NULL THEN
            PERFORM pg_advisory_xact_lock(hashtext('ensure_metric_partitions'));
            IF to_regclass(partition) IS NULL THEN
                EXECUTE format(
                    'CREATE TABLE %I PARTITION OF metric_samples FOR VALUES FROM (%L) TO (%L)',
                    partition,
                    to_char(day, 'YYYY-MM-DD') || ' 00:00:00+00',
                    to_char(day + 1, 'YYYY-MM-DD') || ' 00:00:00+00'
                );
                EXECUTE format('GRANT INSERT ON %I TO cloudoptim_system', partition);
            END IF;
        END IF;
    END LOOP;
END $$;

CREATE FUNCTION drop_metric_partitions(before date) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    partition text;
    dropped integer := 0;
BEGIN
    IF before > current_date - 1 THEN
        RAISE EXCEPTION 'drop_metric_partitions: % is not in the past', before;
    END IF;
    FOR partition IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'metric_samples'::regclass
          AND c.relname < 'metric_samples_' || to_char(before, 'YYYYMMDD')
    LOOP
        EXECUTE format('DROP TABLE %I', partition);
        dropped := dropped + 1;
    END LOOP;
    RETURN dropped;
END $$;

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
END $$;

CREATE FUNCTION keep_external_id() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.external_id IS DISTINCT FROM OLD.external_id THEN
        RAISE EXCEPTION 'customers.external_id never changes' USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NEW;
END $$;
"""

# What the ML server may read. The views belong to the system role, so ml_readonly needs no right on any table.
ML_VIEWS = {
    "interruptions": """
        SELECT i.id, i.customer_id, i.cluster_id, i.region, i.instance_type, i.availability_zone, i.instance_action,
               i.kind, i.notice_at, i.outcome, i.closed_at
        FROM interruptions i""",
    "nodes": """
        SELECT n.id, n.customer_id, n.cluster_id, c.region, n.instance_type, n.availability_zone, n.zone_id, n.node_type,
               n.status, n.cpu_cores, n.memory_bytes, n.created_at, n.ready_at, n.terminated_at
        FROM nodes n JOIN clusters c ON c.id = n.cluster_id""",
    "spot_prices": "SELECT * FROM spot_price_current",
    "on_demand_prices": "SELECT * FROM on_demand_price",
    "metrics": "SELECT * FROM metrics_summary",
    "optimizations": """
        SELECT id, customer_id, cluster_id, optimization_type, recommendations, execution_plan, estimated_savings,
               actual_savings, status, executed_at
        FROM optimization_history""",
}


def upgrade() -> None:
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("customer_id", sa.Uuid(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("detail", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("previous_hash", sa.LargeBinary(), nullable=False),
        sa.Column("entry_hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )
    op.create_index("ix_audit_log_customer", "audit_log", ["customer_id", "id"], unique=False)
    op.create_table(
        "customers",
        sa.Column("company_name", sa.Text(), nullable=False),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("aws_role_arn", sa.Text(), nullable=True),
        sa.Column("aws_account_id", sa.Text(), nullable=True),
        sa.Column("sqs_queue_url", sa.Text(), nullable=True),
        sa.Column("external_id", sa.Uuid(), nullable=False),
        sa.Column("status", sa.Text(), server_default="pending", nullable=False),
        sa.Column("kill_switch", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("data_key", sa.LargeBinary(), nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "status IN ('pending', 'active', 'degraded', 'suspended', 'offboarded')", name=op.f("ck_customers_status")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_customers")),
        sa.UniqueConstraint("aws_account_id", name=op.f("uq_customers_aws_account_id")),
        sa.UniqueConstraint("external_id", name=op.f("uq_customers_external_id")),
    )
    op.create_table(
        "dirty_partitions",
        sa.Column("table_name", sa.Text(), nullable=False),
        sa.Column("partition_key", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("marked_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("table_name", "partition_key", name=op.f("pk_dirty_partitions")),
    )
    op.create_table(
        "lake_releases",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("released_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("versions", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("replaced", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("code_version", sa.Text(), nullable=False),
        sa.Column("kept", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("expired_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("note", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lake_releases")),
    )
    op.create_index("ix_lake_releases_kept", "lake_releases", ["id"], unique=False, postgresql_where=sa.text("kept"))
    op.create_index("ix_lake_releases_released_at", "lake_releases", ["released_at"], unique=False)
    op.create_table(
        "metric_samples",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("ts", sa.DateTime(timezone=True), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        postgresql_partition_by="RANGE (ts)",
    )
    op.create_index("ix_metric_samples_ts", "metric_samples", ["ts"], unique=False, postgresql_using="brin")
    op.create_table(
        "ml_models",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("format", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("trained_from", sa.DateTime(timezone=True), nullable=True),
        sa.Column("trained_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("state", sa.Text(), server_default="uploaded", nullable=False),
        sa.Column("uploaded_by", sa.Text(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("state IN ('uploaded', 'tested', 'active', 'retired')", name=op.f("ck_ml_models_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ml_models")),
        sa.UniqueConstraint("name", "version", name=op.f("uq_ml_models_name_version")),
    )
    op.create_table(
        "on_demand_price",
        sa.Column("region", sa.Text(), nullable=False),
        sa.Column("instance_type", sa.Text(), nullable=False),
        sa.Column("product", sa.Text(), nullable=False),
        sa.Column("price_usd_per_hour", sa.Numeric(precision=18, scale=8), nullable=False),
        sa.Column("vcpus", sa.Double(), nullable=True),
        sa.Column("memory_gib", sa.Double(), nullable=True),
        sa.Column("effective_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("fetched_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("region", "instance_type", "product", name=op.f("pk_on_demand_price")),
    )
    op.create_table(
        "spot_price_current",
        sa.Column("region", sa.Text(), nullable=False),
        sa.Column("zone_id", sa.Text(), nullable=False),
        sa.Column("instance_type", sa.Text(), nullable=False),
        sa.Column("product", sa.Text(), nullable=False),
        sa.Column("availability_zone", sa.Text(), nullable=True),
        sa.Column("price_usd_per_hour", sa.Numeric(precision=18, scale=8), nullable=False),
        sa.Column("effective_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("fetched_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("region", "zone_id", "instance_type", "product", name=op.f("pk_spot_price_current")),
    )
    op.create_table(
        "clusters",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("cluster_name", sa.Text(), nullable=False),
        sa.Column("k8s_api_endpoint", sa.Text(), nullable=True),
        sa.Column("k8s_ca", sa.Text(), nullable=True),
        sa.Column("k8s_token", sa.LargeBinary(), nullable=True),
        sa.Column("region", sa.Text(), nullable=False),
        sa.Column("node_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("status", sa.Text(), server_default="pending", nullable=False),
        sa.Column("kill_switch", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("agent_version", sa.Text(), nullable=True),
        sa.Column("agent_understands", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("state", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("last_seen_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("status IN ('pending', 'active', 'away', 'deleted')", name=op.f("ck_clusters_status")),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_clusters_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_clusters")),
        sa.UniqueConstraint("customer_id", "cluster_name", name=op.f("uq_clusters_customer_id_cluster_name")),
        sa.UniqueConstraint("customer_id", "id", name=op.f("uq_clusters_customer_id_id")),
    )
    op.create_table(
        "customer_config",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("config_key", sa.Text(), nullable=False),
        sa.Column("config_value", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_customer_config_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("customer_id", "config_key", name=op.f("pk_customer_config")),
    )
    op.create_table(
        "data_gaps",
        sa.Column("customer_id", sa.Uuid(), nullable=True),
        sa.Column("table_name", sa.Text(), nullable=False),
        sa.Column("series", sa.Text(), nullable=False),
        sa.Column("partition_key", sa.Text(), nullable=False),
        sa.Column("gap_start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("gap_end", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expected_points", sa.Integer(), nullable=False),
        sa.Column("missing_points", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="open", nullable=False),
        sa.Column("found_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("filled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("fill_id", sa.Uuid(), nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.CheckConstraint("state IN ('open', 'filling', 'filled', 'unfillable')", name=op.f("ck_data_gaps_state")),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_data_gaps_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_data_gaps")),
        sa.UniqueConstraint(
            "table_name",
            "series",
            "gap_start",
            name=op.f("uq_data_gaps_table_name_series_gap_start"),
            postgresql_nulls_not_distinct=True,
        ),
    )
    op.create_index("ix_data_gaps_state", "data_gaps", ["state", "table_name"], unique=False)
    op.create_table(
        "gap_fills",
        sa.Column("customer_id", sa.Uuid(), nullable=True),
        sa.Column("requested_by", sa.Text(), nullable=False),
        sa.Column("table_name", sa.Text(), nullable=False),
        sa.Column("partitions", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("state", sa.Text(), server_default="requested", nullable=False),
        sa.Column("dagster_run_id", sa.Text(), nullable=True),
        sa.Column("dagster_backfill_id", sa.Text(), nullable=True),
        sa.Column("records_filled", sa.Integer(), nullable=True),
        sa.Column("sources_used", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "state IN ('requested', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("ck_gap_fills_state")
        ),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_gap_fills_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_gap_fills")),
    )
    op.create_table(
        "inbox_messages",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("dedupe_key", sa.Text(), nullable=False),
        sa.Column("sqs_message_id", sa.Text(), nullable=True),
        sa.Column("receive_count", sa.Integer(), server_default="1", nullable=False),
        sa.Column("body_sha256", sa.Text(), nullable=False),
        sa.Column("event_type", sa.Text(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("received_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("replayed_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "outcome IN ('handled', 'dropped', 'quarantined', 'waiting')", name=op.f("ck_inbox_messages_outcome")
        ),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_inbox_messages_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("customer_id", "source", "dedupe_key", name=op.f("pk_inbox_messages")),
    )
    op.create_index(
        "ix_inbox_messages_quarantine",
        "inbox_messages",
        ["customer_id", "received_at"],
        unique=False,
        postgresql_where=sa.text("outcome = 'quarantined'"),
    )
    op.create_index("ix_inbox_messages_received_at", "inbox_messages", ["received_at"], unique=False)
    op.create_table(
        "intake_health",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("detector", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("remedy", sa.Text(), nullable=True),
        sa.Column("changed_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("last_ok_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('ok', 'degraded')", name=op.f("ck_intake_health_state")),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_intake_health_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("customer_id", "detector", name=op.f("pk_intake_health")),
    )
    op.create_table(
        "interruptions",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=True),
        sa.Column("node_id", sa.Uuid(), nullable=True),
        sa.Column("region", sa.Text(), nullable=False),
        sa.Column("interruption_key", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=True),
        sa.Column("instance_id", sa.Text(), nullable=False),
        sa.Column("instance_type", sa.Text(), nullable=True),
        sa.Column("availability_zone", sa.Text(), nullable=True),
        sa.Column("instance_action", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("notice_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("detected_by", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("instance_gone_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "(state = 'closed') = (outcome IS NOT NULL)", name=op.f("ck_interruptions_closed_has_outcome")
        ),
        sa.CheckConstraint(
            "outcome IN ('handled', 'handled_late', 'missed', 'cancelled', 'unmatched')",
            name=op.f("ck_interruptions_outcome"),
        ),
        sa.CheckConstraint("state IN ('unmatched', 'open', 'closed')", name=op.f("ck_interruptions_state")),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_interruptions_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_interruptions")),
        sa.UniqueConstraint("customer_id", "id", name=op.f("uq_interruptions_customer_id_id")),
        sa.UniqueConstraint(
            "customer_id",
            "region",
            "interruption_key",
            name=op.f("uq_interruptions_customer_id_region_interruption_key"),
        ),
    )
    op.create_index(
        "ix_interruptions_cluster", "interruptions", ["customer_id", "cluster_id", "notice_at"], unique=False
    )
    op.create_index("ix_interruptions_instance", "interruptions", ["customer_id", "instance_id"], unique=False)
    op.create_index(
        "ix_interruptions_open",
        "interruptions",
        ["deadline_at"],
        unique=False,
        postgresql_where=sa.text("state <> 'closed'"),
    )
    op.create_table(
        "notifications",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("dedupe_key", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("state IN ('pending', 'sent', 'quarantined')", name=op.f("ck_notifications_state")),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_notifications_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notifications")),
        sa.UniqueConstraint(
            "customer_id", "channel", "dedupe_key", name=op.f("uq_notifications_customer_id_channel_dedupe_key")
        ),
    )
    op.create_index(
        "ix_notifications_pending",
        "notifications",
        ["next_attempt_at"],
        unique=False,
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_table(
        "outbox",
        sa.Column("customer_id", sa.Uuid(), nullable=True),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("payload", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_outbox_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index(
        "ix_outbox_pending",
        "outbox",
        ["next_attempt_at"],
        unique=False,
        postgresql_where=sa.text("published_at IS NULL"),
    )
    op.create_index("ix_outbox_published_at", "outbox", ["published_at"], unique=False)
    op.create_table(
        "predictions",
        sa.Column("customer_id", sa.Uuid(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("window_start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("window_end", sa.DateTime(timezone=True), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("lower", sa.Double(), nullable=True),
        sa.Column("upper", sa.Double(), nullable=True),
        sa.Column("model_version", sa.Text(), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("made_by", sa.Text(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.CheckConstraint("made_by IN ('ml_server', 'advisor')", name=op.f("ck_predictions_made_by")),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_predictions_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_predictions")),
    )
    op.create_index("ix_predictions_window", "predictions", ["kind", "window_end"], unique=False)
    op.create_table(
        "savings_statements",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("period", sa.Text(), nullable=False),
        sa.Column("period_start", sa.Date(), nullable=False),
        sa.Column("period_end", sa.Date(), nullable=False),
        sa.Column("revision", sa.Integer(), server_default="1", nullable=False),
        sa.Column("baseline_name", sa.Text(), nullable=False),
        sa.Column("baseline_usd", sa.Numeric(precision=18, scale=8), nullable=False),
        sa.Column("actual_usd", sa.Numeric(precision=18, scale=8), nullable=False),
        sa.Column("net_savings_usd", sa.Numeric(precision=18, scale=8), nullable=False),
        sa.Column("fee_usd", sa.Numeric(precision=18, scale=8), nullable=False),
        sa.Column("coverage", sa.Double(), nullable=False),
        sa.Column("lake_release_id", sa.BigInteger(), nullable=False),
        sa.Column("body", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id"],
            ["customers.id"],
            name=op.f("fk_savings_statements_customer_id_customers"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_savings_statements")),
        sa.UniqueConstraint(
            "customer_id",
            "period",
            "period_start",
            "revision",
            name=op.f("uq_savings_statements_customer_id_period_period_start_revision"),
        ),
    )
    op.create_table(
        "spot_events",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=True),
        sa.Column("event_type", sa.Text(), nullable=False),
        sa.Column("instance_id", sa.Text(), nullable=True),
        sa.Column("received_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("dedupe_key", sa.Text(), nullable=False),
        sa.Column("interruption_id", sa.Uuid(), nullable=True),
        sa.Column("action_taken", sa.Text(), nullable=True),
        sa.Column("replacement_instance_id", sa.Text(), nullable=True),
        sa.Column("payload", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_spot_events_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_spot_events")),
        sa.UniqueConstraint(
            "customer_id", "source", "dedupe_key", name=op.f("uq_spot_events_customer_id_source_dedupe_key")
        ),
    )
    op.create_index("ix_spot_events_cluster", "spot_events", ["customer_id", "cluster_id", "received_at"], unique=False)
    op.create_index("ix_spot_events_instance", "spot_events", ["customer_id", "instance_id"], unique=False)
    op.create_table(
        "users",
        sa.Column("customer_id", sa.Uuid(), nullable=True),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "role IN ('platform_admin', 'customer_admin', 'analyst', 'ml_server', 'agent')", name=op.f("ck_users_role")
        ),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_users_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("email", name=op.f("uq_users_email")),
    )
    op.create_table(
        "agent_tasks",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=False),
        sa.Column("interruption_id", sa.Uuid(), nullable=True),
        sa.Column("task_type", sa.Text(), nullable=False),
        sa.Column("parameters", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("priority", sa.Integer(), server_default="100", nullable=False),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("state", sa.Text(), server_default="queued", nullable=False),
        sa.Column("dedupe_key", sa.Text(), nullable=False),
        sa.Column("lease_epoch", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("leased_by", sa.Text(), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("first_leased_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cordoned_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("result", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("result_epoch", sa.Integer(), nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "state IN ('queued', 'leased', 'done', 'failed', 'refused', 'expired', 'superseded')",
            name=op.f("ck_agent_tasks_state"),
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "cluster_id"],
            ["clusters.customer_id", "clusters.id"],
            name=op.f("fk_agent_tasks_customer_id_cluster_id_clusters"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_agent_tasks")),
        sa.UniqueConstraint(
            "customer_id", "cluster_id", "dedupe_key", name=op.f("uq_agent_tasks_customer_id_cluster_id_dedupe_key")
        ),
        sa.UniqueConstraint("customer_id", "id", name=op.f("uq_agent_tasks_customer_id_id")),
    )
    op.create_index("ix_agent_tasks_interruption", "agent_tasks", ["interruption_id"], unique=False)
    op.create_index(
        "ix_agent_tasks_work",
        "agent_tasks",
        ["cluster_id", "deadline_at", "priority"],
        unique=False,
        postgresql_where=sa.text("state IN ('queued', 'leased')"),
    )
    op.create_table(
        "api_keys",
        sa.Column("customer_id", sa.Uuid(), nullable=True),
        sa.Column("cluster_id", sa.Uuid(), nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("secret_hmac", sa.LargeBinary(), nullable=False),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "role <> 'agent' OR (customer_id IS NOT NULL AND cluster_id IS NOT NULL)",
            name=op.f("ck_api_keys_agent_bound"),
        ),
        sa.CheckConstraint(
            "role IN ('platform_admin', 'customer_admin', 'analyst', 'ml_server', 'agent')",
            name=op.f("ck_api_keys_role"),
        ),
        sa.ForeignKeyConstraint(
            ["cluster_id"], ["clusters.id"], name=op.f("fk_api_keys_cluster_id_clusters"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_api_keys_customer_id_customers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("prefix", name=op.f("uq_api_keys_prefix")),
    )
    op.create_table(
        "interruption_history",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("interruption_id", sa.Uuid(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("detail", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id", "interruption_id"],
            ["interruptions.customer_id", "interruptions.id"],
            name=op.f("fk_interruption_history_customer_id_interruption_id_interruptions"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("interruption_id", "version", name=op.f("pk_interruption_history")),
    )
    op.create_table(
        "launch_batches",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=False),
        sa.Column("region", sa.Text(), nullable=False),
        sa.Column("client_token", sa.Text(), nullable=False),
        sa.Column("request_json", sa.Text(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), server_default="calling", nullable=False),
        sa.Column("calls", sa.Integer(), server_default="0", nullable=False),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("first_called_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("lease_epoch", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("leased_by", sa.Text(), nullable=True),
        sa.Column("next_action_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "state IN ('calling', 'unknown', 'answered', 'failed', 'abandoned')", name=op.f("ck_launch_batches_state")
        ),
        sa.CheckConstraint("length(client_token) BETWEEN 1 AND 64", name=op.f("ck_launch_batches_client_token_length")),
        sa.ForeignKeyConstraint(
            ["customer_id", "cluster_id"],
            ["clusters.customer_id", "clusters.id"],
            name=op.f("fk_launch_batches_customer_id_cluster_id_clusters"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_launch_batches")),
        sa.UniqueConstraint("client_token", name=op.f("uq_launch_batches_client_token")),
        sa.UniqueConstraint("customer_id", "id", name=op.f("uq_launch_batches_customer_id_id")),
    )
    op.create_index(
        "ix_launch_batches_work",
        "launch_batches",
        ["next_action_at"],
        unique=False,
        postgresql_where=sa.text("state IN ('calling', 'unknown')"),
    )
    op.create_table(
        "launch_intents",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=False),
        sa.Column("interruption_id", sa.Uuid(), nullable=True),
        sa.Column("plan_id", sa.Uuid(), nullable=True),
        sa.Column("step_no", sa.Integer(), nullable=True),
        sa.Column("requirements", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("state", sa.Text(), server_default="planned", nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("decided_by", sa.Text(), nullable=True),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("lease_epoch", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("leased_by", sa.Text(), nullable=True),
        sa.Column("next_action_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "state IN ('planned', 'launching', 'launched', 'ready', 'exhausted', 'cancelled', 'blocked')",
            name=op.f("ck_launch_intents_state"),
        ),
        sa.CheckConstraint("(interruption_id IS NULL) <> (plan_id IS NULL)", name=op.f("ck_launch_intents_one_origin")),
        sa.ForeignKeyConstraint(
            ["customer_id", "cluster_id"],
            ["clusters.customer_id", "clusters.id"],
            name=op.f("fk_launch_intents_customer_id_cluster_id_clusters"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_launch_intents")),
        sa.UniqueConstraint("customer_id", "id", name=op.f("uq_launch_intents_customer_id_id")),
        sa.UniqueConstraint(
            "customer_id", "interruption_id", name=op.f("uq_launch_intents_customer_id_interruption_id")
        ),
        sa.UniqueConstraint(
            "customer_id", "plan_id", "step_no", name=op.f("uq_launch_intents_customer_id_plan_id_step_no")
        ),
    )
    op.create_index(
        "ix_launch_intents_work",
        "launch_intents",
        ["next_action_at"],
        unique=False,
        postgresql_where=sa.text("state IN ('planned', 'launching', 'launched', 'blocked')"),
    )
    op.create_table(
        "metric_batches",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=False),
        sa.Column("batch_id", sa.Uuid(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("body_sha256", sa.Text(), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("rejected", sa.Integer(), nullable=False),
        sa.Column("late", sa.Integer(), server_default="0", nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id", "cluster_id"],
            ["clusters.customer_id", "clusters.id"],
            name=op.f("fk_metric_batches_customer_id_cluster_id_clusters"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("cluster_id", "batch_id", name=op.f("pk_metric_batches")),
    )
    op.create_index("ix_metric_batches_received_at", "metric_batches", ["received_at"], unique=False)
    op.create_index("ix_metric_batches_seq", "metric_batches", ["cluster_id", "seq"], unique=False)
    op.create_table(
        "metrics_summary",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=False),
        sa.Column("resolution", sa.Text(), nullable=False),
        sa.Column("metric_type", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("timestamp", sa.DateTime(timezone=True), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("min", sa.Double(), nullable=False),
        sa.Column("max", sa.Double(), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.CheckConstraint("resolution IN ('5m', '1h')", name=op.f("ck_metrics_summary_resolution")),
        sa.ForeignKeyConstraint(
            ["customer_id", "cluster_id"],
            ["clusters.customer_id", "clusters.id"],
            name=op.f("fk_metrics_summary_customer_id_cluster_id_clusters"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint(
            "cluster_id", "resolution", "metric_type", "subject", "timestamp", name=op.f("pk_metrics_summary")
        ),
    )
    op.create_table(
        "nodes",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=False),
        sa.Column("node_name", sa.Text(), nullable=False),
        sa.Column("instance_id", sa.Text(), nullable=False),
        sa.Column("instance_type", sa.Text(), nullable=False),
        sa.Column("availability_zone", sa.Text(), nullable=False),
        sa.Column("zone_id", sa.Text(), nullable=True),
        sa.Column("node_type", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), server_default="pending", nullable=False),
        sa.Column("cpu_cores", sa.Double(), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("ready_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("terminated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("node_type IN ('spot', 'on-demand')", name=op.f("ck_nodes_node_type")),
        sa.CheckConstraint(
            "status IN ('pending', 'ready', 'not_ready', 'cordoned', 'terminated')", name=op.f("ck_nodes_status")
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "cluster_id"],
            ["clusters.customer_id", "clusters.id"],
            name=op.f("fk_nodes_customer_id_cluster_id_clusters"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_nodes")),
        sa.UniqueConstraint("cluster_id", "instance_id", name=op.f("uq_nodes_cluster_id_instance_id")),
    )
    op.create_index("ix_nodes_instance_id", "nodes", ["customer_id", "instance_id"], unique=False)
    op.create_index(
        "ix_nodes_live", "nodes", ["cluster_id"], unique=False, postgresql_where=sa.text("terminated_at IS NULL")
    )
    op.create_table(
        "optimization_history",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("cluster_id", sa.Uuid(), nullable=False),
        sa.Column("optimization_type", sa.Text(), nullable=False),
        sa.Column("dry_run", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("recommendations", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("execution_plan", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("safety_report", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("state_hash", sa.Text(), nullable=True),
        sa.Column("decided_by", sa.Text(), nullable=True),
        sa.Column("estimated_savings", sa.Numeric(precision=18, scale=8), nullable=True),
        sa.Column("actual_savings", sa.Numeric(precision=18, scale=8), nullable=True),
        sa.Column("status", sa.Text(), server_default="draft", nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("requested_by", sa.Text(), nullable=False),
        sa.Column("approved_by", sa.Text(), nullable=True),
        sa.Column("stop_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("executed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "status IN ('draft', 'refused', 'validated', 'approved', 'running', 'succeeded', 'compensating', 'rolled_back', 'stuck', 'stopped')",
            name=op.f("ck_optimization_history_status"),
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "cluster_id"],
            ["clusters.customer_id", "clusters.id"],
            name=op.f("fk_optimization_history_customer_id_cluster_id_clusters"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_optimization_history")),
        sa.UniqueConstraint("customer_id", "id", name=op.f("uq_optimization_history_customer_id_id")),
        sa.UniqueConstraint(
            "customer_id", "idempotency_key", name=op.f("uq_optimization_history_customer_id_idempotency_key")
        ),
    )
    op.create_index(
        "uq_optimization_history_running",
        "optimization_history",
        ["customer_id", "cluster_id"],
        unique=True,
        postgresql_where=sa.text("status IN ('running', 'compensating')"),
    )
    op.create_table(
        "launch_attempts",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("intent_id", sa.Uuid(), nullable=False),
        sa.Column("attempt_no", sa.Integer(), nullable=False),
        sa.Column("batch_id", sa.Uuid(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("instance_type", sa.Text(), nullable=False),
        sa.Column("availability_zone", sa.Text(), nullable=False),
        sa.Column("node_type", sa.Text(), nullable=False),
        sa.Column("price_usd_per_hour", sa.Double(), nullable=True),
        sa.Column("state", sa.Text(), server_default="planned", nullable=False),
        sa.Column("instance_id", sa.Text(), nullable=True),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.Column("launched_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ready_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("node_type IN ('spot', 'on-demand')", name=op.f("ck_launch_attempts_node_type")),
        sa.CheckConstraint(
            "state IN ('planned', 'calling', 'unknown', 'launched', 'adopted', 'ready', 'failed', 'terminating', 'terminated', 'abandoned')",
            name=op.f("ck_launch_attempts_state"),
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "batch_id"],
            ["launch_batches.customer_id", "launch_batches.id"],
            name=op.f("fk_launch_attempts_customer_id_batch_id_launch_batches"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "intent_id"],
            ["launch_intents.customer_id", "launch_intents.id"],
            name=op.f("fk_launch_attempts_customer_id_intent_id_launch_intents"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_launch_attempts")),
        sa.UniqueConstraint("batch_id", "slot", name=op.f("uq_launch_attempts_batch_id_slot")),
        sa.UniqueConstraint("customer_id", "instance_id", name=op.f("uq_launch_attempts_customer_id_instance_id")),
        sa.UniqueConstraint("intent_id", "attempt_no", name=op.f("uq_launch_attempts_intent_id_attempt_no")),
    )
    op.create_index(
        "uq_launch_attempts_live",
        "launch_attempts",
        ["intent_id"],
        unique=True,
        postgresql_where=sa.text("state IN ('planned', 'calling', 'unknown', 'launched', 'adopted', 'ready')"),
    )
    op.create_table(
        "plan_steps",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("plan_id", sa.Uuid(), nullable=False),
        sa.Column("step_no", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("parameters", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("effect_key", sa.Text(), nullable=False),
        sa.Column("compensation", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("before_snapshot", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column("result", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.CheckConstraint(
            "state IN ('pending', 'running', 'done', 'failed', 'skipped', 'superseded', 'compensated')",
            name=op.f("ck_plan_steps_state"),
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "plan_id"],
            ["optimization_history.customer_id", "optimization_history.id"],
            name=op.f("fk_plan_steps_customer_id_plan_id_optimization_history"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("plan_id", "step_no", name=op.f("pk_plan_steps")),
        sa.UniqueConstraint("customer_id", "effect_key", name=op.f("uq_plan_steps_customer_id_effect_key")),
    )
    op.create_table(
        "task_reports",
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("lease_epoch", sa.Integer(), nullable=False),
        sa.Column("report_id", sa.Uuid(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("detail", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("applied", sa.Boolean(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("received_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id", "task_id"],
            ["agent_tasks.customer_id", "agent_tasks.id"],
            name=op.f("fk_task_reports_customer_id_task_id_agent_tasks"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("task_id", "lease_epoch", "report_id", name=op.f("pk_task_reports")),
    )

    for statement in role_statements():
        op.execute(statement)
    op.execute(f"GRANT USAGE ON SCHEMA public TO {TENANT_ROLE}, {SYSTEM_ROLE}")
    for table in TENANT_TABLES:
        for statement in tenant_table_statements(table, append_only=table in APPEND_ONLY):
            op.execute(statement)
    for table in PLATFORM_TABLES + PUBLISHED_TABLES:
        for statement in platform_table_statements(table, readable_by_tenants=table in PUBLISHED_TABLES):
            op.execute(statement)
    op.execute(FUNCTIONS)
    op.execute("REVOKE ALL ON FUNCTION ensure_metric_partitions, drop_metric_partitions FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION ensure_metric_partitions, drop_metric_partitions TO {SYSTEM_ROLE}")
    op.execute("SELECT ensure_metric_partitions(current_date - 1, current_date + 2)")
    for table in APPEND_ONLY:
        # A customer's removal may cascade; the audit log has no foreign key and outlives its customer.
        events = "UPDATE OR DELETE OR TRUNCATE" if table == "audit_log" else "UPDATE OR TRUNCATE"
        op.execute(f"CREATE TRIGGER append_only BEFORE {events} ON {table} EXECUTE FUNCTION refuse_change()")
    op.execute(
        "CREATE TRIGGER keep_external_id BEFORE UPDATE ON customers FOR EACH ROW EXECUTE FUNCTION keep_external_id()"
    )
    op.execute("CREATE SCHEMA ml")
    op.execute(f"GRANT USAGE, CREATE ON SCHEMA ml TO {SYSTEM_ROLE}")
    op.execute(f"GRANT USAGE ON SCHEMA ml TO {ML_ROLE}")
    for view, query in ML_VIEWS.items():
        op.execute(f"CREATE VIEW ml.{view} AS {query}")
        op.execute(f"ALTER VIEW ml.{view} OWNER TO {SYSTEM_ROLE}")
        op.execute(f"GRANT SELECT ON ml.{view} TO {ML_ROLE}")
    op.execute(f"REVOKE CREATE ON SCHEMA ml FROM {SYSTEM_ROLE}")


def downgrade() -> None:
    op.execute("DROP SCHEMA ml CASCADE")
    op.drop_table("task_reports")
    op.drop_table("plan_steps")
    op.drop_index(
        "uq_launch_attempts_live",
        table_name="launch_attempts",
        postgresql_where=sa.text("state IN ('planned', 'calling', 'unknown', 'launched', 'adopted', 'ready')"),
    )
    op.drop_table("launch_attempts")
    op.drop_index(
        "uq_optimization_history_running",
        table_name="optimization_history",
        postgresql_where=sa.text("status IN ('running', 'compensating')"),
    )
    op.drop_table("optimization_history")
    op.drop_index("ix_nodes_live", table_name="nodes", postgresql_where=sa.text("terminated_at IS NULL"))
    op.drop_index("ix_nodes_instance_id", table_name="nodes")
    op.drop_table("nodes")
    op.drop_table("metrics_summary")
    op.drop_index("ix_metric_batches_seq", table_name="metric_batches")
    op.drop_index("ix_metric_batches_received_at", table_name="metric_batches")
    op.drop_table("metric_batches")
    op.drop_index(
        "ix_launch_intents_work",
        table_name="launch_intents",
        postgresql_where=sa.text("state IN ('planned', 'launching', 'launched', 'blocked')"),
    )
    op.drop_table("launch_intents")
    op.drop_index(
        "ix_launch_batches_work",
        table_name="launch_batches",
        postgresql_where=sa.text("state IN ('calling', 'unknown')"),
    )
    op.drop_table("launch_batches")
    op.drop_table("interruption_history")
    op.drop_table("api_keys")
    op.drop_index(
        "ix_agent_tasks_work", table_name="agent_tasks", postgresql_where=sa.text("state IN ('queued', 'leased')")
    )
    op.drop_index("ix_agent_tasks_interruption", table_name="agent_tasks")
    op.drop_table("agent_tasks")
    op.drop_table("users")
    op.drop_index("ix_spot_events_instance", table_name="spot_events")
    op.drop_index("ix_spot_events_cluster", table_name="spot_events")
    op.drop_table("spot_events")
    op.drop_table("savings_statements")
    op.drop_index("ix_predictions_window", table_name="predictions")
    op.drop_table("predictions")
    op.drop_index("ix_outbox_published_at", table_name="outbox")
    op.drop_index("ix_outbox_pending", table_name="outbox", postgresql_where=sa.text("published_at IS NULL"))
    op.drop_table("outbox")
    op.drop_index("ix_notifications_pending", table_name="notifications", postgresql_where=sa.text("state = 'pending'"))
    op.drop_table("notifications")
    op.drop_index("ix_interruptions_open", table_name="interruptions", postgresql_where=sa.text("state <> 'closed'"))
    op.drop_index("ix_interruptions_instance", table_name="interruptions")
    op.drop_index("ix_interruptions_cluster", table_name="interruptions")
    op.drop_table("interruptions")
    op.drop_table("intake_health")
    op.drop_index("ix_inbox_messages_received_at", table_name="inbox_messages")
    op.drop_index(
        "ix_inbox_messages_quarantine", table_name="inbox_messages", postgresql_where=sa.text("outcome = 'quarantined'")
    )
    op.drop_table("inbox_messages")
    op.drop_table("gap_fills")
    op.drop_index("ix_data_gaps_state", table_name="data_gaps")
    op.drop_table("data_gaps")
    op.drop_table("customer_config")
    op.drop_table("clusters")
    op.drop_table("spot_price_current")
    op.drop_table("on_demand_price")
    op.drop_table("ml_models")
    op.drop_index("ix_metric_samples_ts", table_name="metric_samples", postgresql_using="brin")
    op.drop_table("metric_samples")
    op.drop_index("ix_lake_releases_released_at", table_name="lake_releases")
    op.drop_index("ix_lake_releases_kept", table_name="lake_releases", postgresql_where=sa.text("kept"))
    op.drop_table("lake_releases")
    op.drop_table("dirty_partitions")
    op.drop_table("customers")
    op.drop_index("ix_audit_log_customer", table_name="audit_log")
    op.drop_table("audit_log")
    op.execute("DROP FUNCTION ensure_metric_partitions, drop_metric_partitions, refuse_change, keep_external_id")
    op.execute(f"REVOKE ALL ON SCHEMA public FROM {TENANT_ROLE}, {SYSTEM_ROLE}")
