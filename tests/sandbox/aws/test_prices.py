"""Price endpoints through boto3: what AWS's own paginator makes of them."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.exceptions import ClientError

from control.sandbox.aws import SandboxAWSThread, SandboxConfig, network
from control.sandbox.aws.protocol import Call, Caller
from control.sandbox.aws.spot_history import SpotHistory
from control.sandbox.market import GeneratedMarket
from tests.sandbox.aws.conftest import ACCOUNT


def history(ec2: Any, **asked: Any) -> list[dict[str, Any]]:
    pages = ec2.get_paginator("describe_spot_price_history").paginate(**asked)
    return [row for page in pages for row in page["SpotPriceHistory"]]


def test_paged_history_is_the_markets_newest_first_with_zone_names_of_the_account(
    market: GeneratedMarket, clients: Callable[..., Any]
) -> None:
    with SandboxAWSThread(SandboxConfig(market=market, price_page_size=100)) as aws:
        aws.add_account(ACCOUNT, external_id="x")
        ec2 = clients(aws, "ec2", aws.credentials(ACCOUNT), region="us-east-2")
        end = datetime.now(UTC).replace(microsecond=0)
        start = end - timedelta(days=45)
        rows = history(ec2, StartTime=start, EndTime=end, InstanceTypes=["m5.large", "c5.xlarge"])
    expected = {
        (c.pools[i].zone_id, c.pools[i].instance_type, at, usd)
        for c in market.changes("us-east-2", start, end, instance_types=["m5.large", "c5.xlarge"])
        for i, at, usd in zip(c.pool.tolist(), c.at.tolist(), c.usd_per_hour.tolist(), strict=True)
    }
    names = network.zone_names(ACCOUNT, "us-east-2")
    seen = {
        (r["AvailabilityZoneId"], r["InstanceType"], int(r["Timestamp"].timestamp()) * 1_000_000, float(r["SpotPrice"]))
        for r in rows
    }
    assert seen == expected
    assert len(rows) == len(expected) > 300
    assert all(names[r["AvailabilityZoneId"]] == r["AvailabilityZone"] for r in rows)
    assert [r["Timestamp"] for r in rows] == sorted((r["Timestamp"] for r in rows), reverse=True)
    # one record per pool lies before StartTime: the price in force then
    before = Counter((r["AvailabilityZone"], r["InstanceType"]) for r in rows if r["Timestamp"] <= start)
    assert len(before) == 6
    assert set(before.values()) == {1}


def test_start_time_now_answers_the_current_price_of_every_pool(aws: SandboxAWSThread, ec2: Any) -> None:
    rows = history(ec2, StartTime=datetime.now(UTC), ProductDescriptions=["Linux/UNIX"])
    pools = aws.market.pools("us-east-1")
    assert Counter((r["AvailabilityZoneId"], r["InstanceType"]) for r in rows) == Counter(
        (p.zone_id, p.instance_type) for p in pools
    )


def test_filters_products_and_zones(ec2: Any) -> None:
    now = datetime.now(UTC)
    assert history(ec2, StartTime=now, ProductDescriptions=["Windows"]) == []
    assert history(ec2, StartTime=now, Filters=[{"Name": "product-description", "Values": ["Linux/UNIX (Amazon VPC)"]}])
    (zone,) = {
        r["AvailabilityZone"] for r in history(ec2, StartTime=now, AvailabilityZone=_offering_zone(ec2), MaxResults=50)
    }
    assert zone == _offering_zone(ec2)
    some = history(ec2, StartTime=now, Filters=[{"Name": "instance-type", "Values": ["c5.*"]}])
    assert {r["InstanceType"] for r in some} == {"c5.large", "c5.xlarge", "c5.2xlarge", "c5.4xlarge", "c5.9xlarge"}
    with pytest.raises(ClientError, match="InvalidParameterValue"):
        history(ec2, StartTime=now, AvailabilityZone="us-east-1z")
    with pytest.raises(ClientError, match="InvalidNextToken"):
        ec2.describe_spot_price_history(NextToken="nonsense")


def _offering_zone(ec2: Any) -> str:
    names = {z["ZoneId"]: z["ZoneName"] for z in ec2.describe_availability_zones()["AvailabilityZones"]}
    return str(names["use1-az1"])


def test_history_ends_ninety_days_back(ec2: Any) -> None:
    now = datetime.now(UTC)
    rows = history(ec2, StartTime=now - timedelta(days=400), InstanceTypes=["m5.large"])
    oldest = min(r["Timestamp"] for r in rows)
    assert timedelta(days=89) < now - oldest < timedelta(days=95)


def test_the_same_page_asked_again_is_the_same(market: GeneratedMarket, clients: Callable[..., Any]) -> None:
    with SandboxAWSThread(SandboxConfig(market=market)) as aws:
        aws.add_account(ACCOUNT, external_id="x")
        ec2 = clients(aws, "ec2", aws.credentials(ACCOUNT))
        first = ec2.describe_spot_price_history(StartTime=datetime.now(UTC) - timedelta(days=30), MaxResults=1000)
        token, pages = first["NextToken"], []
        for _ in range(8):
            page = ec2.describe_spot_price_history(NextToken=token)
            pages.append((token, page["SpotPriceHistory"]))
            token = page["NextToken"]
        # the oldest of them was dropped meanwhile and is made again
        for asked, rows in (pages[0], pages[-1]):
            assert ec2.describe_spot_price_history(NextToken=asked)["SpotPriceHistory"] == rows


def test_price_list_pages_and_has_the_traps(aws: SandboxAWSThread, clients: Callable[..., Any]) -> None:
    pricing = clients(aws, "pricing", aws.credentials())

    def products(**fields: str) -> list[dict[str, Any]]:
        filters = [{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in fields.items()]
        pages = pricing.get_paginator("get_products").paginate(ServiceCode="AmazonEC2", Filters=filters)
        return [json.loads(text) for page in pages for text in page["PriceList"]]

    def prices(found: list[dict[str, Any]]) -> list[float]:
        return [
            float(d["pricePerUnit"]["USD"])
            for p in found
            for o in p["terms"]["OnDemand"].values()
            for d in o["priceDimensions"].values()
        ]

    assert len(pricing.get_products(ServiceCode="AmazonEC2", MaxResults=100)["PriceList"]) == 100
    everything = products(regionCode="eu-west-1")
    assert len(everything) > 700
    assert len({p["product"]["sku"] for p in everything}) == len(everything)
    usual = {
        "regionCode": "us-east-1",
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "capacitystatus": "Used",
        "preInstalledSw": "NA",
    }
    assert sorted(prices(products(instanceType="p4d.24xlarge", **usual))) == [0.0, 32.7726]
    assert prices(products(instanceType="p4d.24xlarge", marketoption="OnDemand", **usual)) == [32.7726]
    assert 0.0 in prices(products(instanceType="m5.large", regionCode="us-east-1"))
    assert prices(products(instanceType="m5.large", **usual)) == [0.096]


def test_queries_that_nobody_reads_on_hold_a_few_pages_each(market: GeneratedMarket) -> None:
    prices, now = SpotHistory(market), datetime.now(UTC)
    list(market.changes("us-east-1", now - timedelta(days=30), now))  # its blocks are kept, whoever asks

    def ask(minutes: int) -> str:
        start, end = (now - timedelta(days=days, minutes=minutes) for days in (30, 0))
        params = {"StartTime": start.isoformat(), "EndTime": end.isoformat()}
        caller = Caller(ACCOUNT, "", "")
        return prices.handle(Call("ec2", "us-east-1", "DescribeSpotPriceHistory", params, caller, False)).body.decode()

    page_bytes = len(ask(0))
    tracemalloc.start()
    try:
        for minutes in range(1, 5):
            assert "<nextToken></" not in ask(minutes)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / 4 < 8 * page_bytes
