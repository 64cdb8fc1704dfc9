"""Alembic environment: one transaction per upgrade, guarded by an advisory lock so that replicas may all call it."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from warehouse.postgres.models import Base

MIGRATION_LOCK = 0x636C6F7564  # "cloud"


def include_object(obj, name, type_, reflected, compare_to) -> bool:
    """Daily partitions of metric_samples are made at run time and are no part of the models."""
    return not (type_ == "table" and name.startswith("metric_samples_"))


def run() -> None:
    """Connect and migrate."""
    url = context.config.attributes.get("url") or context.get_x_argument(as_dictionary=True)["url"]
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as conn:
        context.configure(connection=conn, target_metadata=Base.metadata, include_object=include_object)
        with context.begin_transaction():
            conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            context.run_migrations()
    engine.dispose()


run()
