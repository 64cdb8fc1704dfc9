"""The default network of every account: one VPC, one subnet per zone, one security group.

Ids are digests of (account, region, zone) and zone names are shuffled per account, as AWS does: us-east-1a of one
account is not us-east-1a of another. Deriving them needs no storage: a frozen launch request stays valid after a
restart.
"""

import hashlib
import random
from dataclasses import dataclass

from control.sandbox.market.catalogue import ZONE_IDS


@dataclass(frozen=True, slots=True)
class Subnet:
    subnet_id: str
    vpc_id: str
    zone_name: str
    zone_id: str
    cidr: str


def _digest(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def zone_names(account_id: str, region: str) -> dict[str, str]:
    """Zone id to zone name for one account, for example {"use1-az4": "us-east-1a", …}; empty for an unknown region."""
    ids = list(ZONE_IDS.get(region, ()))
    random.Random(f"{account_id}/{region}").shuffle(ids)
    return {zone_id: f"{region}{'abcdef'[i]}" for i, zone_id in enumerate(ids)}


def zone_ids(account_id: str, region: str) -> dict[str, str]:
    """Zone name to zone id for one account."""
    return {name: zone_id for zone_id, name in zone_names(account_id, region).items()}


def vpc_id(account_id: str, region: str) -> str:
    return "vpc-" + _digest("vpc", account_id, region)[:17]


def security_group_id(account_id: str, region: str) -> str:
    return "sg-" + _digest("sg", account_id, region)[:17]


def subnets(account_id: str, region: str) -> list[Subnet]:
    """One subnet per zone, by zone name."""
    names = sorted(zone_ids(account_id, region).items())
    return [
        Subnet(
            "subnet-" + _digest("subnet", account_id, region, zone_id)[:17],
            vpc_id(account_id, region),
            name,
            zone_id,
            f"10.{i}.0.0/16",
        )
        for i, (name, zone_id) in enumerate(names)
    ]
