"""Run the migrations from code, so that the command line, tests and `cloudoptim up` do it the same way."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from warehouse.postgres.session import driver_url

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"


def alembic_config(database_url: str) -> Config:
    """Alembic's configuration for one database."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = driver_url(database_url)
    return config


def upgrade(database_url: str, revision: str = "head") -> None:
    """Bring the schema to ``revision``. Safe to call from several processes at once."""
    command.upgrade(alembic_config(database_url), revision)


def downgrade(database_url: str, revision: str) -> None:
    """Take the schema back to ``revision`` (``base`` removes everything)."""
    command.downgrade(alembic_config(database_url), revision)


def assert_durable(database_url: str) -> None:
    """Refuse a server that acknowledges commits it may lose.

    Raises:
        RuntimeError: ``synchronous_commit`` or ``fsync`` is off.
    """
    engine = create_engine(driver_url(database_url), poolclass=NullPool)
    with engine.connect() as conn:
        for setting in ("synchronous_commit", "fsync"):
            if conn.execute(text("SELECT current_setting(:name)"), {"name": setting}).scalar_one() == "off":
                raise RuntimeError(f"Postgres has {setting} = off and may lose acknowledged commits; set it to on")
