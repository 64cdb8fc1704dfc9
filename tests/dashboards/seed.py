"""A small, whole world for the pages: two customers with clusters, nodes, prices, interruptions, gaps and lake tables.

Everything is written through the warehouse's public interface into a real Postgres and a real lake. Figures follow a
fixed recipe (no randomness), so tests can compute what a page has to show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
from sqlalchemy import insert

from warehouse.lake.store import Lake, PartitionWrite
from warehouse.lake.tables import TABLES
from warehouse.postgres.models import (
    AgentTask,
    Cluster,
    Customer,
    DataGap,
    Interruption,
    InterruptionHistory,
    LaunchAttempt,
    LaunchBatch,
    LaunchIntent,
    Node,
    OnDemandPrice,
    PartitionCoverage,
    SavingsStatement,
    SourceFailure,
    SpotPriceCurrent,
)
from warehouse.postgres.models.base import new_id
from warehouse.postgres.session import SyncDatabase

PRODUCT = "Linux/UNIX"
REGION = "us-east-1"
# On-demand USD per hour, cores, GiB of memory.
TYPES = {
    "m6i.large": (Decimal("0.096"), 2, 8),
    "m6i.2xlarge": (Decimal("0.384"), 8, 32),
    "c6i.xlarge": (Decimal("0.17"), 4, 8),
    "r6i.xlarge": (Decimal("0.252"), 4, 32),
}
ZONES = ("use1-az1", "use1-az2", "use1-az4")
ZONE_NAMES = dict(zip(ZONES, ("us-east-1a", "us-east-1b", "us-east-1c"), strict=True))
HOSTILE = '=<img src=x onerror="document.title=1">'


def spot_ratio(instance_type: str, zone: str, hour: int) -> Decimal:
    """Spot price as a share of on demand: a slow wave, and one shock of ten hours for c6i.xlarge in one zone."""
    base = 0.30 + 0.05 * list(TYPES).index(instance_type) + 0.03 * ZONES.index(zone)
    wave = 0.06 * math.sin(2 * math.pi * hour / 37 + ZONES.index(zone))
    shock = 0.95 if instance_type == "c6i.xlarge" and zone == "use1-az2" and 90 <= hour < 100 else 0.0
    return Decimal(f"{base + wave + shock:.4f}")


@dataclass
class Fleet:
    """One customer with its clusters and nodes."""

    id: UUID
    name: str
    clusters: dict[str, UUID] = field(default_factory=dict)
    nodes: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class World:
    """What was written."""

    now: datetime
    first: Fleet
    second: Fleet
    hours: int


def seed(database_url: str, lake_root: Path | str, *, now: datetime | None = None, hours: int = 8 * 24) -> World:
    """Write the world; ``hours`` full hours of history end with the hour before ``now``."""
    now = now or datetime.now(UTC)
    first = Fleet(new_id(), "Acme Analytics")
    second = Fleet(new_id(), "Contoso Retail")
    db = SyncDatabase(database_url)
    try:
        with db.system() as conn:
            fill_postgres(conn, now, first, {"production": 14, HOSTILE: 5}, "111111111111")
            fill_postgres(conn, now, second, {"shop": 6}, "222222222222")
            fill_prices(conn, now)
            fill_interruptions(conn, now, first)
            fill_gaps(conn, now, first, second)
            fill_statements(conn, now, first)
    finally:
        db.close()
    lake = Lake(str(lake_root), database_url)
    try:
        lake.create_tables()
        fill_lake(lake, now, hours, [first, second])
    finally:
        lake.close()
    return World(now, first, second, hours)


def fill_postgres(conn: Any, now: datetime, fleet: Fleet, clusters: dict[str, int], account: str) -> None:
    """The customer, its clusters and nodes: every third node on demand."""
    conn.execute(
        insert(Customer).values(
            id=fleet.id,
            company_name=fleet.name,
            email="ops@example.com",
            aws_account_id=account,
            status="active",
        )
    )
    for name, size in clusters.items():
        cluster_id = new_id()
        fleet.clusters[name] = cluster_id
        conn.execute(
            insert(Cluster).values(
                id=cluster_id,
                customer_id=fleet.id,
                cluster_name=name,
                region=REGION,
                status="active",
                node_count=size,
                agent_version="0.1.0",
                last_seen_at=now - timedelta(seconds=8),
            )
        )
        for index in range(size):
            instance_type = list(TYPES)[index % len(TYPES)]
            zone = ZONES[index % len(ZONES)]
            _, cores, memory_gib = TYPES[instance_type]
            node = {
                "id": new_id(),
                "customer_id": fleet.id,
                "cluster_id": cluster_id,
                "node_name": f"ip-10-0-{len(fleet.clusters)}-{index + 10}.ec2.internal",
                "instance_id": f"i-{fleet.id.hex[-6:]}{len(fleet.clusters):02d}{index:04d}",
                "instance_type": instance_type,
                "availability_zone": ZONE_NAMES[zone],
                "zone_id": zone,
                "node_type": "on-demand" if index % 3 == 2 else "spot",
                "status": "ready",
                "cpu_cores": float(cores),
                "memory_bytes": memory_gib * 2**30,
                "created_at": now - timedelta(hours=30 + index),
                "ready_at": now - timedelta(hours=30 + index) + timedelta(seconds=70),
            }
            fleet.nodes.append(node)
    conn.execute(insert(Node), fleet.nodes)


def fill_prices(conn: Any, now: datetime) -> None:
    """Newest prices of all pools and types."""
    for instance_type, (price, cores, memory_gib) in TYPES.items():
        conn.execute(
            insert(OnDemandPrice).values(
                region=REGION,
                instance_type=instance_type,
                product=PRODUCT,
                price_usd_per_hour=price,
                vcpus=cores,
                memory_gib=memory_gib,
                effective_at=now - timedelta(days=90),
                source="observed",
            )
        )
        for zone in ZONES:
            conn.execute(
                insert(SpotPriceCurrent).values(
                    region=REGION,
                    zone_id=zone,
                    instance_type=instance_type,
                    product=PRODUCT,
                    availability_zone=ZONE_NAMES[zone],
                    price_usd_per_hour=(price * spot_ratio(instance_type, zone, 0)).quantize(Decimal("0.0001")),
                    effective_at=now - timedelta(minutes=20),
                    source="observed",
                )
            )


def fill_interruptions(conn: Any, now: datetime, fleet: Fleet) -> None:
    """Six interruptions of the last days: five handled, one still open; the oldest drained before its warning."""
    cluster_id = next(iter(fleet.clusters.values()))
    spot = [node for node in fleet.nodes if node["cluster_id"] == cluster_id and node["node_type"] == "spot"]
    for index in range(6):
        node = spot[index]
        notice = now - timedelta(hours=20 * index, minutes=1)
        is_open = index == 0
        outcome = None if is_open else "handled_late" if index == 4 else "handled"
        key, batch, intent, attempt = new_id(), new_id(), new_id(), new_id()
        earlier = notice - timedelta(minutes=8) if index == 5 else None
        task_at = earlier or notice
        conn.execute(
            insert(Interruption).values(
                id=key,
                customer_id=fleet.id,
                cluster_id=cluster_id,
                node_id=node["id"],
                region=REGION,
                interruption_key=node["instance_id"],
                instance_id=node["instance_id"],
                instance_type=node["instance_type"],
                availability_zone=node["availability_zone"],
                instance_action="terminate",
                kind="spot_interruption",
                first_notice_at=earlier,
                notice_at=notice,
                received_at=notice + timedelta(milliseconds=800),
                deadline_at=notice + timedelta(seconds=120),
                detected_by=["sqs", "agent"] if index % 2 else ["sqs"],
                state="open" if is_open else "closed",
                outcome=outcome,
                closed_at=None if is_open else notice + timedelta(seconds=150 if index == 4 else 100),
            )
        )
        conn.execute(
            insert(AgentTask).values(
                customer_id=fleet.id,
                cluster_id=cluster_id,
                interruption_id=key,
                task_type="drain_node",
                parameters={"node_name": node["node_name"]},
                state="leased" if is_open else "done",
                dedupe_key=f"drain:{key}",
                created_at=task_at + timedelta(seconds=0.9),
                first_leased_at=task_at + timedelta(seconds=1.1),
                cordoned_at=task_at + timedelta(seconds=2.4),
                finished_at=None if is_open else task_at + timedelta(seconds=140 if index == 4 else 48 + index),
                deadline_at=notice + timedelta(seconds=120),
            )
        )
        conn.execute(
            insert(LaunchIntent).values(
                id=intent,
                customer_id=fleet.id,
                cluster_id=cluster_id,
                interruption_id=key,
                requirements={},
                state="launched" if is_open else "ready",
                decided_by="advisor",
                deadline_at=notice + timedelta(seconds=120),
            )
        )
        conn.execute(
            insert(LaunchBatch).values(
                id=batch,
                customer_id=fleet.id,
                cluster_id=cluster_id,
                region=REGION,
                client_token=str(batch),
                request_json="{}",
                size=1,
                state="answered",
            )
        )
        conn.execute(
            insert(LaunchAttempt).values(
                id=attempt,
                customer_id=fleet.id,
                intent_id=intent,
                attempt_no=1,
                batch_id=batch,
                slot=0,
                instance_type="m6i.large",
                availability_zone="us-east-1c",
                node_type="spot",
                price_usd_per_hour=0.034,
                state="launched" if is_open else "ready",
                instance_id=f"i-0rep{index:08d}",
                launched_at=notice + timedelta(seconds=2.2),
                ready_at=None if is_open else notice + timedelta(seconds=64 + 2 * index),
            )
        )
        conn.execute(
            insert(InterruptionHistory),
            [
                {
                    "customer_id": fleet.id,
                    "interruption_id": key,
                    "version": version,
                    "at": notice + timedelta(seconds=version),
                    "event": event,
                    "state": "open",
                    "detail": {},
                }
                for version, event in enumerate(("notice", "drain_requested", "cordoned"), start=1)
            ],
        )


def fill_gaps(conn: Any, now: datetime, first: Fleet, second: Fleet) -> None:
    """Gaps of prices (nobody's), of the first customer's metrics, and of the second's."""
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    rows: list[dict[str, Any]] = []
    for index, (customer, table, series, back, hours, state) in enumerate(
        [
            (None, "spot_prices", REGION, 3, 24, "open"),
            (None, "spot_prices", REGION, 4, 24, "open"),
            (None, "spot_prices", REGION, 9, 24, "filled"),
            (first.id, "metric_5m", str(first.clusters["production"]), 1, 2, "open"),
            (first.id, "metric_5m", str(first.clusters["production"]), 12, 5, "unfillable"),
            (second.id, "metric_5m", str(second.clusters["shop"]), 2, 3, "open"),
        ]
    ):
        start = day - timedelta(days=back)
        rows.append(
            {
                "id": new_id(),
                "customer_id": customer,
                "table_name": table,
                "series": series,
                "partition_key": f"{start:%Y-%m-%d}|{REGION}" if table == "spot_prices" else f"{start:%Y-%m-%d}",
                "gap_start": start,
                "gap_end": start + timedelta(hours=hours),
                "expected_points": 12 * hours,
                "missing_points": 12 * hours - index,
                "reason": "no_scrape" if customer else "denied",
                "state": state,
                "filled_at": now - timedelta(hours=4) if state == "filled" else None,
            }
        )
    conn.execute(insert(DataGap), rows)
    conn.execute(
        insert(SourceFailure).values(
            table_name="spot_prices",
            series=REGION,
            code="UnauthorizedOperation",
            message="UnauthorizedOperation: You are not authorized",
            denied=True,
            asked_from=now,
            failed_at=now,
        )
    )
    missing: dict[tuple[Any, str, str], int] = {}
    for row in rows:
        if row["state"] != "filled":
            cell = (row["customer_id"], row["table_name"], row["partition_key"])
            missing[cell] = missing.get(cell, 0) + int(row["missing_points"])
    coverage: list[dict[str, Any]] = []
    for back in range(30):
        start = day - timedelta(days=back)
        for customer, table, series in (
            (None, "spot_prices", REGION),
            (first.id, "metric_5m", str(first.clusters["production"])),
            (second.id, "metric_5m", str(second.clusters["shop"])),
        ):
            key = f"{start:%Y-%m-%d}|{REGION}" if table == "spot_prices" else f"{start:%Y-%m-%d}"
            coverage.append(
                {
                    "table_name": table,
                    "partition_key": key,
                    "series": series,
                    "customer_id": customer,
                    "covered_from": start,
                    "covered_until": start + timedelta(days=1),
                    "expected_points": 1000,
                    "present_points": 1000 - missing.get((customer, table, key), 0),
                    "detail": {},
                    "run_id": "seed",
                }
            )
    conn.execute(insert(PartitionCoverage), coverage)


def fill_statements(conn: Any, now: datetime, fleet: Fleet) -> None:
    """Two daily statements."""
    for back in (1, 2):
        day = (now - timedelta(days=back)).date()
        conn.execute(
            insert(SavingsStatement).values(
                customer_id=fleet.id,
                period="day",
                period_start=day,
                period_end=day + timedelta(days=1),
                baseline_name="b1_list",
                baseline_usd=Decimal("60.5"),
                actual_usd=Decimal("30.25"),
                net_savings_usd=Decimal("29.75"),
                fee_usd=Decimal("5.95"),
                coverage=0.98,
                lake_release_id=2,
                body={},
            )
        )


def conform(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as an Arrow table of the lake table's own types."""
    schema = TABLES[table].schema()
    names = [name for name in schema.names if name in rows[0]]
    return pa.table(
        {name: pa.array([row[name] for row in rows], schema.field(name).type) for name in names},
    )


def fill_lake(lake: Lake, now: datetime, hours: int, fleets: list[Fleet]) -> None:
    """Hourly costs of the nodes that run now, as if they had always run; the running hour is not complete."""
    current = now.replace(minute=0, second=0, microsecond=0)
    node_rows, cluster_rows, price_rows = [], [], []
    for back in range(hours, -1, -1):
        ts = current - timedelta(hours=back)
        minutes = 60.0 if back else max(1.0, (now - current).total_seconds() / 60)
        for fleet in fleets:
            for name, cluster_id in fleet.clusters.items():
                nodes = [node for node in fleet.nodes if node["cluster_id"] == cluster_id]
                sums: dict[str, Decimal] = {"spot": Decimal(), "on-demand": Decimal(), "b1": Decimal()}
                for node in nodes:
                    list_price = TYPES[node["instance_type"]][0]
                    ratio = spot_ratio(node["instance_type"], node["zone_id"], back)
                    price = list_price * ratio if node["node_type"] == "spot" else list_price
                    paid = (price * Decimal(str(minutes)) / 60).quantize(Decimal("0.00000001"))
                    listed = (list_price * Decimal(str(minutes)) / 60).quantize(Decimal("0.00000001"))
                    sums[node["node_type"]] += paid
                    sums["b1"] += listed
                    node_rows.append(
                        {
                            "ts": ts,
                            "customer_id": str(fleet.id),
                            "cluster_id": str(cluster_id),
                            "node_name": node["node_name"],
                            "instance_id": node["instance_id"],
                            "zone_id": node["zone_id"],
                            "availability_zone": node["availability_zone"],
                            "instance_type": node["instance_type"],
                            "lifecycle": node["node_type"],
                            "minutes": minutes,
                            "price_usd_per_hour": price.quantize(Decimal("0.00000001")),
                            "on_demand_usd_per_hour": list_price,
                            "actual_usd": paid,
                            "b1_list_usd": listed,
                            "price_basis": "spot_as_of" if node["node_type"] == "spot" else "on_demand",
                            "source": "observed",
                            "day": ts.date(),
                            "region": REGION,
                        }
                    )
                spot_nodes = sum(node["node_type"] == "spot" for node in nodes)
                partial = back == 30 and name == "production"
                cluster_rows.append(
                    {
                        "ts": ts,
                        "customer_id": str(fleet.id),
                        "cluster_id": str(cluster_id),
                        "region": REGION,
                        "actual_usd": sums["spot"] + sums["on-demand"],
                        "spot_usd": sums["spot"],
                        "on_demand_usd": sums["on-demand"],
                        "b1_list_usd": sums["b1"],
                        "node_count": len(nodes),
                        "node_minutes": minutes * len(nodes),
                        "spot_minutes": minutes * spot_nodes,
                        "coverage_ratio": 0.8 if partial else 1.0,
                        "complete": back > 0 and not partial,
                        "source": "observed",
                        "day": ts.date(),
                    }
                )
        for instance_type, (list_price, _, _) in TYPES.items():
            for zone in ZONES:
                price_rows.append(
                    {
                        "ts": ts,
                        "zone_id": zone,
                        "availability_zone": ZONE_NAMES[zone],
                        "instance_type": instance_type,
                        "product": PRODUCT,
                        "price_usd_per_hour": (list_price * spot_ratio(instance_type, zone, back)).quantize(
                            Decimal("0.0001")
                        ),
                        "source": "observed",
                        "fetched_at": ts,
                        "day": ts.date(),
                        "region": REGION,
                    }
                )
    savings = []
    for fleet in fleets:
        for cluster_id in fleet.clusters.values():
            by_day: dict[Any, list[dict[str, Any]]] = {}
            for row in cluster_rows:
                if row["cluster_id"] == str(cluster_id) and row["complete"]:
                    by_day.setdefault(row["day"], []).append(row)
            for day, rows in by_day.items():
                actual = sum((row["actual_usd"] for row in rows), Decimal())
                b1 = sum((row["b1_list_usd"] for row in rows), Decimal())
                zero = Decimal("0.00000000")
                savings.append(
                    {
                        "customer_id": str(fleet.id),
                        "cluster_id": str(cluster_id),
                        "baseline": "b1_list",
                        "stage": "realised",
                        "baseline_usd": b1,
                        "actual_usd": actual,
                        "gross_usd": b1 - actual,
                        "overlap_usd": Decimal("0.05000000"),
                        "fallback_premium_usd": zero,
                        "displaced_commitment_usd": None,
                        "rework_usd": None,
                        "net_usd": b1 - actual - Decimal("0.05"),
                        "hours_covered": len(rows),
                        "coverage_ratio": len(rows) / 24,
                        "source": "observed",
                        "day": day,
                    }
                )
    days = sorted({row["day"].isoformat() for row in cluster_rows})
    by_region = {"day": days, "region": REGION}
    lake.publish(
        [
            PartitionWrite("node_cost_hourly", by_region, conform("node_cost_hourly", node_rows)),
            PartitionWrite("cluster_cost_hourly", {"day": days}, conform("cluster_cost_hourly", cluster_rows)),
            PartitionWrite("spot_prices", by_region, conform("spot_prices", price_rows)),
            PartitionWrite("savings_daily", {"day": days}, conform("savings_daily", savings)),
        ],
        run_id="seed",
        code_version="test",
    )
