"""A lake of its own for each test: an empty folder, and an empty migrated database."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from control.embedded import EmbeddedPostgres
from tests.warehouse.lake.lake_rows import prices
from warehouse.lake.query import LakeReader, Limits
from warehouse.lake.store import Lake, PartitionWrite


@pytest.fixture
def lake(server_folder: Path, database_url: str) -> Iterator[Lake]:
    """A lake with all its tables, empty; in memory where the servers' data is, so that fsync costs nothing."""
    root = server_folder / "lakes" / database_url.rpartition("/")[2]
    with Lake(root, database_url) as lake:
        lake.create_tables()
        yield lake
    shutil.rmtree(root)


@pytest.fixture
def reader(lake: Lake) -> Iterator[LakeReader]:
    """A reader of it."""
    reader = LakeReader(lake, Limits(memory="256MB"))
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def still_lake(server_folder: Path, postgres_server: EmbeddedPostgres) -> Iterator[Lake]:
    """A lake with three Spot prices and a release of five before them, for tests that change nothing."""
    name = f"still_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE cloudoptim_template STRATEGY file_copy')
        root = server_folder / "lakes" / name
        with Lake(root, postgres_server.url(name)) as lake:
            lake.create_tables()
            for rows in (5, 3):
                partition = {"day": "2024-01-01", "region": "us-east-1"}
                lake.publish([PartitionWrite("spot_prices", partition, prices(1, rows))], run_id="still")
            yield lake
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def still_reader(still_lake: Lake) -> Iterator[LakeReader]:
    """A reader of it."""
    reader = LakeReader(still_lake, Limits(memory="256MB"))
    yield reader
    reader.close()
