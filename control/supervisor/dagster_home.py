"""Dagster's home and its schema in our database."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from control.supervisor.errors import UpError

SCHEMA = "dagster"
MARK = Path("dagster") / "migrated"


def write_dagster_home(home: Path) -> None:
    """$DAGSTER_HOME with the instance's configuration."""
    folder = home / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("dagster.yaml"), folder / "dagster.yaml")


def is_migrated(home: Path) -> bool:
    """Whether this home has made Dagster's tables before."""
    return (home / MARK).exists()


def migrate_dagster(home: Path, database_url: str) -> None:
    """Create or upgrade Dagster's tables before webserver and daemon start, which would race to create them.

    Only done for a new database or another version of Dagster: it costs a Python start of some seconds.

    Raises:
        UpError: Dagster could not do it.
    """
    import psycopg

    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        row = connection.execute(
            "SELECT oid, system_identifier FROM pg_database, pg_control_system() WHERE datname = current_database()"
        ).fetchone()
    mark = hashlib.sha256(f"{row} {version('dagster-postgres')}".encode()).hexdigest()
    mark_file = home / MARK
    if mark_file.exists() and mark_file.read_text() == mark:
        return
    done = subprocess.run(
        [sys.executable, "-m", "dagster", "instance", "migrate"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise UpError(f"Dagster's schema could not be made: {words[-1]}")
    mark_file.write_text(mark)
