"""The Price List (`pricing:GetProducts`), shaped as AWS shapes it, traps included.

For one instance type AWS sells many products that differ in tenancy, operating system, pre-installed software, capacity
status and market option; several cost $0.00. Whoever takes "the first price" gets a wrong one here too.
"""

import hashlib
import json
from datetime import datetime
from typing import Any

import msgspec

from control.sandbox.aws.protocol import Answer, AwsError, Call, json_answer
from control.sandbox.market.catalogue import REGIONS, Catalogue
from control.sandbox.market.interface import Market

ON_DEMAND_TERM = "JRTCKXETXF"
HOURLY_RATE = "6YS6EN2CT7"
LARGEST_PAGE = 100
_PREFIX = {"us-east-1": "", "us-east-2": "USE2-", "eu-west-1": "EU-"}
_VARIANTS: tuple[tuple[dict[str, str], str, float], ...] = (
    # attributes that differ, usage type, price as a multiple of the on-demand price
    ({}, "BoxUsage", 1.0),
    ({"capacitystatus": "UnusedCapacityReservation"}, "UnusedBox", 1.0),
    ({"capacitystatus": "AllocatedCapacityReservation"}, "Reservation", 0.0),
    ({"tenancy": "Dedicated"}, "DedicatedUsage", 1.06),
    ({"tenancy": "Host"}, "HostBoxUsage", 0.0),
    ({"operatingSystem": "Windows", "operation": "RunInstances:0002"}, "BoxUsage", 1.92),
    ({"operatingSystem": "RHEL", "operation": "RunInstances:0010"}, "BoxUsage", 1.3),
    ({"preInstalledSw": "SQL Std", "operation": "RunInstances:0004"}, "BoxUsage", 3.5),
)
_CAPACITY_BLOCK = ({"marketoption": "CapacityBlock", "operation": "RunInstances:CB"}, "BoxUsage", 0.0)


class PriceList:
    """Answers the `pricing` service."""

    def __init__(self, market: Market, catalogue: Catalogue) -> None:
        self.market, self.catalogue = market, catalogue
        self._products: dict[str, tuple[dict[str, tuple[float, datetime]], list[dict[str, Any]]]] = {}

    def handle(self, call: Call) -> Answer:
        if call.action == "DescribeServices":
            return json_answer(
                {
                    "Services": [{"ServiceCode": "AmazonEC2", "AttributeNames": ["instanceType"]}],
                    "FormatVersion": "aws_v1",
                },
                version="1.1",
            )
        if call.action != "GetProducts":
            raise AwsError("InvalidParameterException", f"The sandbox's Price List has no action {call.action}")
        p = call.params
        if p.get("ServiceCode") != "AmazonEC2":
            raise AwsError(
                "InvalidParameterException", f"The sandbox's Price List has no service {p.get('ServiceCode')}"
            )
        size = min(int(p.get("MaxResults") or LARGEST_PAGE), LARGEST_PAGE)
        if size < 1:
            raise AwsError("InvalidParameterException", "MaxResults must be between 1 and 100")
        rows = [row for region in REGIONS for row in self._of(region)]
        for condition in p.get("Filters") or []:
            if condition.get("Type") != "TERM_MATCH":
                raise AwsError(
                    "InvalidParameterException", f"Filter type {condition.get('Type')} is not known to the sandbox"
                )
            field, value = condition["Field"], condition["Value"]
            rows = [r for r in rows if _attribute(r, field).lower() == str(value).lower()]
        try:
            first = int(p.get("NextToken") or 0)
        except ValueError:
            raise AwsError(
                "InvalidNextTokenException", "The pagination token is invalid. Try again without it."
            ) from None
        page = rows[first : first + size]
        answer: dict[str, Any] = {"FormatVersion": "aws_v1", "PriceList": [json.dumps(r) for r in page]}
        if first + size < len(rows):
            answer["NextToken"] = str(first + size)
        call.result["count"] = len(page)
        return json_answer(answer, version="1.1")

    def _of(self, region: str) -> list[dict[str, Any]]:
        now = self.market.now()
        names = {p.instance_type for p in self.market.pools(region)} | set(self.catalogue.types)
        prices = {
            n: (usd, self.market.on_demand_since(region, n, now))
            for n in sorted(names)
            if (usd := self.market.on_demand_usd_per_hour(region, n, now)) is not None
        }
        cached = self._products.get(region)
        if cached is None or cached[0] != prices:
            cached = (prices, [r for n, listed in prices.items() for r in self._type(region, n, *listed)])
            self._products[region] = cached
        return cached[1]

    def _type(self, region: str, name: str, usd: float, since: datetime) -> list[dict[str, Any]]:
        variants = list(_VARIANTS)
        if name.startswith(("p4d.", "p5.")):
            variants.insert(0, _CAPACITY_BLOCK)
        return [self._product(region, name, differs, usage, usd * factor, since) for differs, usage, factor in variants]

    def _product(
        self, region: str, name: str, differs: dict[str, str], usage: str, usd: float, since: datetime
    ) -> dict[str, Any]:
        vcpus, memory_gib = self.market.size(name) or (None, None)
        attributes = {
            "servicecode": "AmazonEC2",
            "servicename": "Amazon Elastic Compute Cloud",
            "location": REGIONS[region],
            "locationType": "AWS Region",
            "regionCode": region,
            "instanceType": name,
            "instanceFamily": "General purpose",
            "currentGeneration": "Yes",
            "vcpu": str(vcpus) if vcpus else "NA",
            "memory": f"{memory_gib:g} GiB" if memory_gib else "NA",
            "operatingSystem": "Linux",
            "licenseModel": "No License required",
            "tenancy": "Shared",
            "capacitystatus": "Used",
            "marketoption": "OnDemand",
            "preInstalledSw": "NA",
            "operation": "RunInstances",
            "usagetype": f"{_PREFIX[region]}{usage}:{name}",
            **differs,
        }
        sku = hashlib.sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()[:16].upper()
        rate = f"{sku}.{ON_DEMAND_TERM}.{HOURLY_RATE}"
        dimension = {
            "unit": "Hrs",
            "endRange": "Inf",
            "beginRange": "0",
            "description": f"${usd:.4f} per {attributes['operatingSystem']} {name} Instance Hour",
            "appliesTo": [],
            "rateCode": rate,
            "pricePerUnit": {"USD": f"{usd:.10f}"},
        }
        offer = {
            "sku": sku,
            "offerTermCode": ON_DEMAND_TERM,
            "effectiveDate": since.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "termAttributes": {},
            "priceDimensions": {rate: dimension},
        }
        return {
            "product": {"productFamily": "Compute Instance", "attributes": attributes, "sku": sku},
            "serviceCode": "AmazonEC2",
            "terms": {"OnDemand": {f"{sku}.{ON_DEMAND_TERM}": offer}},
            "version": "20230901000000",
            "publicationDate": "2023-09-01T00:00:00Z",
        }


def _attribute(row: dict[str, Any], field: str) -> str:
    if field in ("productFamily", "sku"):
        return str(row["product"][field])
    if field == "ServiceCode":
        return str(row["serviceCode"])
    return str(row["product"]["attributes"].get(field, ""))


def decode(body: bytes) -> dict[str, Any]:
    """A JSON request body; raises AwsError when it is none."""
    try:
        document = msgspec.json.decode(body or b"{}")
    except msgspec.DecodeError:
        document = None
    if not isinstance(document, dict):
        raise AwsError("SerializationException", "The request body is not a JSON object")
    return document
