"""What every asset works with: Postgres, the lake and the settings, opened for one run and closed after it."""

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import dagster as dg
from pydantic import PrivateAttr

from control.settings import get_settings
from warehouse.lake.query import LakeReader, Limits
from warehouse.lake.releases import Release
from warehouse.lake.staging import Staged
from warehouse.lake.store import Lake, PartitionWrite
from warehouse.postgres.session import SyncDatabase

# What DuckDB may hold in memory; beyond it spills to disk.
READER_MEMORY = "1GB"


@cache
def code_version() -> str:
    """Version of the installed package, written into every release of the lake."""
    try:
        return version("cloudoptim")
    except PackageNotFoundError:
        return "unknown"


class Warehouse(dg.ConfigurableResource):
    """Postgres and the lake. Empty fields take the process's settings, so no address or password is in a run's config.

    ``as_of`` (ISO time) replaces the clock, for replays and tests.
    """

    database_url: str = ""
    lake_root: str = ""
    aws_endpoint_url: str = ""
    as_of: str = ""

    _database: SyncDatabase | None = PrivateAttr(default=None)
    _lake: Lake | None = PrivateAttr(default=None)
    _reader: LakeReader | None = PrivateAttr(default=None)

    @property
    def dsn(self) -> str:
        """libpq address of Postgres."""
        return self.database_url or get_settings().database_url

    @property
    def database(self) -> SyncDatabase:
        """Scoped connections to Postgres."""
        if self._database is None:
            self._database = SyncDatabase(self.dsn)
        return self._database

    @property
    def lake(self) -> Lake:
        """The lake; its tables are made by ``cloudoptim migrate``."""
        if self._lake is None:
            self._lake = Lake(self.lake_root or get_settings().lake_root, self.dsn)
        return self._lake

    @property
    def reader(self) -> LakeReader:
        """DuckDB over the lake, one for a run: its plans of unchanged tables are used again by the next asset."""
        if self._reader is None:
            self._reader = LakeReader(self.lake, Limits(memory=READER_MEMORY))
        return self._reader

    @property
    def aws_endpoint(self) -> str | None:
        """Where AWS is, when it is not the real one."""
        return self.aws_endpoint_url or get_settings().aws_endpoint_url or None

    def now(self) -> datetime:
        """The current time in UTC."""
        return datetime.fromisoformat(self.as_of) if self.as_of else datetime.now(UTC)

    def publish(self, writes: Sequence[PartitionWrite | Staged], run_id: str) -> Release:
        """Replace partitions in one release."""
        return self.lake.publish(writes, run_id=run_id, code_version=code_version())

    def close(self) -> None:
        """Close every connection."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._lake is not None:
            self._lake.close()
            self._lake = None
        if self._database is not None:
            self._database.close()
            self._database = None

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Called by Dagster at the end of a run."""
        self.close()
