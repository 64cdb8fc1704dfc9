"""A small recorded market behind the sandbox's price endpoints, an empty lake, and the assets to run on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import dagster as dg
import polars as pl
import pytest
from sqlalchemy import insert, text

from cloudoptim_pipelines import defs as domains
from cloudoptim_pipelines.partitions import range_tags
from cloudoptim_pipelines.resources import Warehouse
from control.sandbox.aws import SandboxAWSThread, SandboxConfig
from control.sandbox.market import ReplayMarket
from warehouse.lake.query import LakeReader
from warehouse.lake.store import Lake
from warehouse.postgres.models import Cluster, Customer, Node, new_id

ASSETS = {
    asset.key.to_user_string(): asset
    for asset in dg.load_assets_from_package_module(domains)
    if isinstance(asset, dg.AssetsDefinition)
}
CHECKS = list(dg.load_asset_checks_from_package_module(domains))
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
# A run over many partitions logs thousands of lines.
QUIET = {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}


def at(day: int, hour: int = 0, minute: int = 0, second: int = 0) -> datetime:
    """A moment of November 2026."""
    return datetime(2026, 11, day, hour, minute, second, tzinfo=UTC)


def price(
    when: datetime, pool: str, usd: float, *, zone: str = "use1-az1", region: str = "us-east-1"
) -> dict[str, Any]:
    """One recorded price."""
    return {
        "timestamp": when,
        "region": region,
        "availability_zone": zone,
        "instance_type": pool,
        "product_description": "Linux/UNIX",
        "price_usd": usd,
    }


# A list price that always was, or the prices a type had and since when.
Listed = Mapping[str, float | Sequence[tuple[datetime, float]]]


def recording(folder: Path, prices: Sequence[Mapping[str, Any]], on_demand: Listed) -> Path:
    """A folder in the layout that the replay reads."""
    frame = pl.DataFrame(list(prices)).with_columns(pl.col("timestamp").dt.cast_time_unit("us"))
    for (region,), rows in frame.group_by("region"):
        target = folder / "spot_price" / f"region={region}"
        target.mkdir(parents=True, exist_ok=True)
        rows.drop("region").with_columns(region=pl.lit(region)).write_parquet(target / "month=all.parquet")
    regions = sorted(set(frame["region"]))
    pl.DataFrame(
        [
            {
                "valid_from": since,
                "region": region,
                "instance_type": name,
                "vcpus": 2.0,
                "memory_gib": 8.0,
                "on_demand_price_usd": usd,
            }
            for region in regions
            for name, listed in on_demand.items()
            for since, usd in ([(datetime(2026, 1, 1, tzinfo=UTC), listed)] if isinstance(listed, float) else listed)
        ]
    ).write_parquet(folder / "on_demand_price.parquet")
    return folder


@dataclass
class World:
    """An empty warehouse and what feeds it."""

    dsn: str
    folder: Path
    endpoint: str = ""
    now: datetime = NOW
    aws: SandboxAWSThread | None = None

    def warehouse(self, **changes: Any) -> Warehouse:
        """The resource as the product has it, with this world's addresses and clock."""
        given = {
            "database_url": self.dsn,
            "lake_root": str(self.folder / "lake"),
            "aws_endpoint_url": self.endpoint,
            "as_of": self.now.isoformat(),
        }
        return Warehouse(**{**given, **changes})

    def run(
        self,
        names: Sequence[str],
        first: str,
        last: str | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        checks: bool = False,
    ) -> dg.ExecuteInProcessResult:
        """Materialise assets over a range of partitions in one run, as the product does."""
        with dg.DagsterInstance.ephemeral() as instance:
            return dg.materialize(
                [*(ASSETS[name] for name in names), *(CHECKS if checks else [])],
                instance=instance,
                resources={"warehouse": self.warehouse()},
                tags={**range_tags(first, last or first), **(tags or {})},
                run_config=QUIET,
            )

    def run_unpartitioned(self, names: Sequence[str]) -> dg.ExecuteInProcessResult:
        """Materialise assets that have no partitions."""
        with dg.DagsterInstance.ephemeral() as instance:
            assets = [ASSETS[name] for name in names]
            return dg.materialize(
                assets, instance=instance, resources={"warehouse": self.warehouse()}, run_config=QUIET
            )

    def query(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        """Rows of the lake's newest release."""
        with Lake(self.folder / "lake", self.dsn) as lake:
            reader = LakeReader(lake)
            try:
                return reader.query(sql, parameters, all_customers=True).to_pylist()
            finally:
                reader.close()

    def content(self, table: str) -> str:
        """A hash of what a table says, whenever and by whichever run it was written."""
        with Lake(self.folder / "lake", self.dsn) as lake:
            reader = LakeReader(lake)
            try:
                frame = reader.pin().frame(f"SELECT * FROM {table}", all_customers=True)
            finally:
                reader.close()
        said = frame.drop("fetched_at", "filled_at", "fill_run_id", strict=False)
        columns = sorted(said.columns)
        rows = said.select(columns).sort(columns).with_columns(pl.all().cast(pl.String, strict=False))
        return hashlib.sha256(rows.write_csv().encode()).hexdigest()

    def sql(self, statement: str, **parameters: Any) -> list[Any]:
        """Rows of Postgres, or nothing for a change."""
        warehouse = self.warehouse()
        try:
            with warehouse.database.system() as connection:
                result = connection.execute(text(statement), parameters)
                return [dict(row) for row in result.mappings()] if result.returns_rows else []
        finally:
            warehouse.close()

    def insert(self, model: Any, *rows: Mapping[str, Any]) -> None:
        """Rows of a model."""
        warehouse = self.warehouse()
        try:
            with warehouse.database.system() as connection:
                connection.execute(insert(model), list(rows))
        finally:
            warehouse.close()


@dataclass(frozen=True)
class Tenant:
    """A customer with one cluster."""

    customer_id: UUID
    cluster_id: UUID

    def node(
        self, number: int, type_: str, start: datetime, end: datetime | None = None, **changes: Any
    ) -> dict[str, Any]:
        """A row of nodes."""
        return {
            "id": new_id(),
            "customer_id": self.customer_id,
            "cluster_id": self.cluster_id,
            "node_name": f"node-{number}",
            "instance_id": f"i-{number:017x}",
            "instance_type": type_,
            "availability_zone": "us-east-1a",
            "zone_id": "use1-az1",
            "node_type": "spot",
            "status": "terminated" if end else "ready",
            "cpu_cores": 2.0,
            "memory_bytes": 8 << 30,
            "created_at": start,
            "ready_at": start,
            "last_seen_at": end or NOW,
            "terminated_at": end,
            **changes,
        }


def add_tenant(world: World, *, created_at: datetime = at(1), region: str = "us-east-1") -> Tenant:
    """A new customer and cluster."""
    tenant = Tenant(new_id(), new_id())
    world.insert(
        Customer,
        {"id": tenant.customer_id, "company_name": "Example", "email": "a@example.org", "external_id": uuid4()},
    )
    world.insert(
        Cluster,
        {
            "id": tenant.cluster_id,
            "customer_id": tenant.customer_id,
            "cluster_name": "main",
            "region": region,
            "created_at": created_at,
        },
    )
    return tenant


def add_nodes(world: World, *rows: dict[str, Any]) -> None:
    """Nodes."""
    world.insert(Node, *rows)


@pytest.fixture
def world(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """An empty, migrated warehouse with an empty lake."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with Lake(tmp_path / "lake", database_url) as lake:
        lake.create_tables()
    return World(database_url, tmp_path)


@pytest.fixture
def serve(world: World) -> Iterator[Callable[..., None]]:
    """Put a recording behind the world's price endpoints; calling it again replaces the recording."""
    running: list[SandboxAWSThread] = []

    def start(prices: Sequence[Mapping[str, Any]], on_demand: Listed | None = None) -> None:
        folder = recording(world.folder / f"recording-{len(running)}", prices, on_demand or {"m5.large": 0.096})
        aws = SandboxAWSThread(SandboxConfig(market=ReplayMarket(folder, world.now, speed=0)))
        aws.start()
        running.append(aws)
        world.endpoint, world.aws = aws.url, aws

    yield start
    for aws in running:
        aws.stop()


def hourly(first: datetime, last: datetime, step: timedelta = timedelta(hours=1)) -> list[datetime]:
    """Moments from first to last."""
    return [first + i * step for i in range(int((last - first) / step) + 1)]
