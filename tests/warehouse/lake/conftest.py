"""A lake of its own for each test: an empty folder, and an empty migrated database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from warehouse.lake.query import LakeReader, Limits
from warehouse.lake.store import Lake


@pytest.fixture
def lake(tmp_path: Path, database_url: str) -> Iterator[Lake]:
    """A lake with all its tables, empty."""
    with Lake(tmp_path / "lake", database_url) as lake:
        lake.create_tables()
        yield lake


@pytest.fixture
def reader(lake: Lake) -> Iterator[LakeReader]:
    """A reader of it."""
    reader = LakeReader(lake, Limits(memory="256MB"))
    yield reader
    reader.close()
