"""On-demand list prices from the AWS Price List, with its traps stepped over.

For one instance type the list holds a dozen products: capacity blocks and allocated reservations at $0, dedicated and
host tenancy, Windows and SQL Server, unused reservations. Asking for the first price gets a wrong one; every attribute
that separates them is named here, and checked again in the answer, since a filter AWS does not know matches everything.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import boto3
import pyarrow as pa
from botocore.config import Config
from botocore.credentials import Credentials

SCHEMA = pa.schema(
    [
        pa.field("instance_type", pa.string()),
        pa.field("product", pa.string()),
        pa.field("price_usd_per_hour", pa.decimal128(18, 8)),
        pa.field("vcpus", pa.int64()),
        pa.field("memory_gib", pa.float64()),
        pa.field("effective_at", pa.timestamp("us", tz="UTC")),
        pa.field("sku", pa.string()),
    ]
)
"""One row per instance type; `product` is in Spot's words so that the two can be joined."""

PRICE_LIST_REGION = "us-east-1"
"""The Price List API lives in three regions; it sells no instance type of its own region more than of another."""

_WANTED = {
    "operatingSystem": "Linux",
    "tenancy": "Shared",
    "capacitystatus": "Used",
    "preInstalledSw": "NA",
    "licenseModel": "No License required",
    "marketoption": "OnDemand",
}


class OnDemandPriceError(Exception):
    """The list for a region made no sense; the message says which part."""


def fetch_on_demand(
    region: str, *, endpoint_url: str | None = None, credentials: Credentials | None = None
) -> pa.Table:
    """Linux on-demand prices of a region in USD per hour, one row per instance type, in SCHEMA.

    Raises:
        OnDemandPriceError: two different prices for one type remain, or the region has none at all.
        botocore.exceptions.ClientError, BotoCoreError: AWS refused, or could not be reached after ten attempts.
    """
    keys: dict[str, Any] = {}
    if credentials is not None:
        frozen = credentials.get_frozen_credentials()
        keys = {
            "aws_access_key_id": frozen.access_key,
            "aws_secret_access_key": frozen.secret_key,
            "aws_session_token": frozen.token,
        }
    client = boto3.client(
        "pricing",
        region_name=PRICE_LIST_REGION,
        endpoint_url=endpoint_url,
        config=Config(retries={"mode": "standard", "max_attempts": 10}, connect_timeout=5, read_timeout=30),
        **keys,
    )
    try:
        wanted = {"regionCode": region, "productFamily": "Compute Instance", **_WANTED}
        filters = [{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in wanted.items()]
        pages = client.get_paginator("get_products").paginate(
            ServiceCode="AmazonEC2", FormatVersion="aws_v1", Filters=filters, PaginationConfig={"PageSize": 100}
        )
        rows: dict[str, dict[str, Any]] = {}
        for page in pages:
            for text in page["PriceList"]:
                row = on_demand_row(json.loads(text), region)
                if row is None:
                    continue
                earlier = rows.setdefault(row["instance_type"], row)
                if earlier["price_usd_per_hour"] != row["price_usd_per_hour"]:
                    raise OnDemandPriceError(
                        f"{region} {row['instance_type']} has two prices: {earlier['price_usd_per_hour']} (SKU "
                        f"{earlier['sku']}) and {row['price_usd_per_hour']} USD/h (SKU {row['sku']}); the price list "
                        "sells something this filter does not know"
                    )
    finally:
        client.close()
    if not rows:
        raise OnDemandPriceError(f"the price list has no on-demand price for {region!r}; check the region's code")
    return pa.Table.from_pylist([rows[name] for name in sorted(rows)], SCHEMA)


def on_demand_row(product: dict[str, Any], region: str) -> dict[str, Any] | None:
    """One product of the list as a row of SCHEMA; None for anything but plain Linux on-demand with a positive price."""
    attributes = product.get("product", {}).get("attributes", {})
    if any(attributes.get(name, value) != value for name, value in _WANTED.items()):
        return None
    # older lists have no marketoption: a capacity block still says so in its operation
    if attributes.get("operation") != "RunInstances" or attributes.get("regionCode", region) != region:
        return None
    if not attributes.get("instanceType"):
        return None
    for offer in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in offer.get("priceDimensions", {}).values():
            price = _positive(dimension.get("pricePerUnit", {}).get("USD"))
            if dimension.get("unit") != "Hrs" or price is None:
                continue
            return {
                "instance_type": attributes["instanceType"],
                "product": "Linux/UNIX",
                "price_usd_per_hour": price,
                "vcpus": int(attributes["vcpu"]) if str(attributes.get("vcpu", "")).isdigit() else None,
                "memory_gib": _gib(attributes.get("memory", "")),
                "effective_at": datetime.fromisoformat(offer["effectiveDate"]).astimezone(UTC),
                "sku": product["product"].get("sku", ""),
            }
    return None


def _positive(text: Any) -> Decimal | None:
    try:
        price = Decimal(str(text)).quantize(Decimal("1e-8"))
    except InvalidOperation:
        return None
    return price if price.is_finite() and price > 0 else None


def _gib(text: str) -> float | None:
    """ "1,952 GiB" and "0.5 GiB" in gibibytes."""
    number, _, unit = text.replace(",", "").partition(" ")
    try:
        return float(number) if unit == "GiB" else None
    except ValueError:
        return None
