"""Instance types, their on-demand prices and the zones that offer them, for the three regions of the sandbox.

`catalogue.json` holds facts: AWS list prices (Linux, shared tenancy) and Spot pools seen between 2022-12 and 2023-08 in
the public SkyPilot catalogue (skypilot-org/skypilot-catalog, `catalogs/v5/aws/vms.csv`). `fit.py` writes it.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

REGIONS: dict[str, str] = {
    "us-east-1": "US East (N. Virginia)",
    "us-east-2": "US East (Ohio)",
    "eu-west-1": "EU (Ireland)",
}
"""Region code to the location name that the Price List uses."""

ZONE_IDS: dict[str, tuple[str, ...]] = {
    "us-east-1": tuple(f"use1-az{i}" for i in range(1, 7)),
    "us-east-2": tuple(f"use2-az{i}" for i in range(1, 4)),
    "eu-west-1": tuple(f"euw1-az{i}" for i in range(1, 4)),
}


@dataclass(frozen=True, slots=True)
class Pool:
    """One Spot pool: an instance type in one zone, named by zone *id* because zone names differ between accounts."""

    region: str
    zone_id: str
    instance_type: str

    @property
    def family(self) -> str:
        return self.instance_type.partition(".")[0]


@dataclass(frozen=True, slots=True)
class InstanceType:
    """One type with its on-demand price in USD per hour by region and the zone ids that offer it."""

    name: str
    vcpus: int
    memory_gib: float
    architecture: str
    on_demand_usd_per_hour: dict[str, float]
    zone_ids: tuple[str, ...]

    @property
    def family(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All types by name, with the pools that follow from them."""

    source: str
    types: dict[str, InstanceType]

    def pools(self, region: str) -> tuple[Pool, ...]:
        """Every pool of a region in a fixed order (type, then zone id); empty for an unknown region."""
        return tuple(
            Pool(region, zone_id, kind.name)
            for kind in self.types.values()
            for zone_id in kind.zone_ids
            if zone_id in ZONE_IDS.get(region, ())
        )

    def on_demand_usd_per_hour(self, region: str, instance_type: str) -> float | None:
        """List price in USD per hour, or None where the type is not sold."""
        kind = self.types.get(instance_type)
        return None if kind is None else kind.on_demand_usd_per_hour.get(region)


@functools.cache
def load_catalogue(path: Path | None = None) -> Catalogue:
    """Read `catalogue.json` (the one in the package by default)."""
    document = json.loads((path or Path(__file__).with_name("catalogue.json")).read_text())
    types = {
        name: InstanceType(
            name=name,
            vcpus=int(row["vcpus"]),
            memory_gib=float(row["memory_gib"]),
            architecture=row["architecture"],
            on_demand_usd_per_hour=dict(row["on_demand_usd_per_hour"]),
            zone_ids=tuple(row["zone_ids"]),
        )
        for name, row in sorted(document["types"].items())
    }
    return Catalogue(document["source"], types)
