"""The price gateways against an AWS endpoint over a real socket, and what price pages may do to them."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import boto3
import polars as pl
import pytest
from botocore.credentials import Credentials

from control.gateways import spot_prices
from control.gateways.on_demand_prices import OnDemandPriceError, fetch_on_demand, on_demand_row
from control.gateways.spot_prices import FetchReport, SpotPriceError, fetch_spot_prices
from control.sandbox.aws import Fault, SandboxAWSThread, SandboxConfig
from control.sandbox.market import GeneratedMarket

END = datetime.now(UTC).replace(microsecond=0)
TYPES = ["m5.large", "m5.xlarge"]


@pytest.fixture(scope="module")
def running() -> Iterator[SandboxAWSThread]:
    with SandboxAWSThread(SandboxConfig(market=GeneratedMarket(seed=7), price_page_size=200)) as aws:
        yield aws


@pytest.fixture
def aws(running: SandboxAWSThread, monkeypatch: pytest.MonkeyPatch) -> SandboxAWSThread:
    running.clear_faults()
    # back-off is what is tested, not the waiting
    monkeypatch.setattr(spot_prices, "FIRST_BACK_OFF_SECONDS", 0.01)
    return running


@pytest.fixture
def keys(running: SandboxAWSThread) -> Credentials:
    given = running.credentials()
    return Credentials(given.access_key_id, given.secret_access_key)


def fetched(
    aws: SandboxAWSThread, keys: Credentials, report: FetchReport | None = None, days: int = 20, **options: object
) -> pl.DataFrame:
    batches = fetch_spot_prices(
        "us-east-1",
        END - timedelta(days=days),
        END,
        endpoint_url=aws.url,
        credentials=keys,
        instance_types=TYPES,
        report=report,
        **options,  # type: ignore[arg-type]
    )
    frames = [pl.DataFrame(pl.from_arrow(batch)) for batch in batches]
    return pl.concat(frames)


KEY = ["zone_id", "instance_type", "ts"]


def test_rows_are_those_of_boto3s_paginator(aws: SandboxAWSThread, keys: Credentials) -> None:
    ours = fetched(aws, keys).sort(KEY)
    client = boto3.client(
        "ec2", endpoint_url=aws.url, region_name="us-east-1", aws_access_key_id=keys.access_key,
        aws_secret_access_key=keys.secret_key,
    )  # fmt: skip
    pages = client.get_paginator("describe_spot_price_history").paginate(
        StartTime=END - timedelta(days=20), EndTime=END, InstanceTypes=TYPES, ProductDescriptions=["Linux/UNIX"]
    )
    theirs = pl.DataFrame([row for page in pages for row in page["SpotPriceHistory"]]).rename(
        {"AvailabilityZoneId": "zone_id", "InstanceType": "instance_type", "Timestamp": "ts"}
    )
    client.close()
    theirs = theirs.with_columns(pl.col("ts").dt.convert_time_zone("UTC").dt.cast_time_unit("us")).sort(KEY)
    assert ours.height == theirs.height > 300
    assert ours.select(KEY).equals(theirs.select(KEY))
    assert ours["availability_zone"].to_list() == theirs["AvailabilityZone"].to_list()
    difference = ours["price_usd_per_hour"].cast(pl.Float64) - theirs["SpotPrice"].cast(pl.Float64)
    assert difference.abs().max() <= 1e-9  # type: ignore[operator]
    assert set(ours["region"]) == {"us-east-1"}


def test_windows_together_are_the_whole_and_nothing_comes_twice(aws: SandboxAWSThread, keys: Credentials) -> None:
    whole = fetched(aws, keys, window=timedelta(days=60))
    pieces = fetched(aws, keys, window=timedelta(days=3))
    assert pieces.sort(KEY).equals(whole.sort(KEY))
    assert whole.select(KEY).n_unique() == whole.height


@pytest.mark.parametrize("price", ["", "0", "-1", "NaN", "1e9", "0,0123", "0.123456789012"])
def test_a_strange_price_is_handed_on_as_it_was_written(aws: SandboxAWSThread, keys: Credentials, price: str) -> None:
    expected = fetched(aws, keys, days=2).height
    aws.inject(
        Fault(
            mode="rewrite", pattern=r"(?s)<spotPrice>[^<]*<(.*)", replacement=rf"<spotPrice>{price}<\1", nth=1, count=1
        )
    )
    rows = fetched(aws, keys, days=2)
    assert rows.height == expected
    assert rows["price_usd_per_hour"].to_list().count(price) == 1


def test_items_that_are_no_record_are_left_out_and_counted(aws: SandboxAWSThread, keys: Credentials) -> None:
    expected = fetched(aws, keys, days=2).height
    aws.inject(Fault(mode="rewrite", pattern=r"(?s)<timestamp>[^<]*<(.*)", replacement=r"<timestamp>yesterday<\1"))
    report = FetchReport()
    assert fetched(aws, keys, report, days=2).height == expected - 1
    assert report.rejected == {"unreadable timestamp": 1}
    assert report.examples == {"unreadable timestamp": "'yesterday'"}
    aws.inject(Fault(mode="rewrite", pattern=r"(?s)<instanceType>[^<]*</instanceType>(.*)", replacement=r"\1"))
    report = FetchReport()
    assert fetched(aws, keys, report, days=2).height == expected - 1
    assert report.rejected == {"no instanceType": 1}
    assert report.slow_pages == 1


def test_other_layouts_of_the_same_page_read_the_same(aws: SandboxAWSThread, keys: Credentials) -> None:
    expected = fetched(aws, keys, days=2)
    for pattern, replacement in (
        (r"><", ">\n  <"),  # indented, as AWS itself writes
        (r"(<instanceType>[^<]*</instanceType>)(<productDescription>[^<]*</productDescription>)", r"\2\1"),
        (r"(<item>)", r"\1<somethingNew>x</somethingNew>"),
        (r"\.000Z<", "+00:00<"),  # another way to write the time
        (r"m5\.large", "m5&#46;large"),  # escaped: lxml's turn
    ):
        aws.inject(Fault(mode="rewrite", pattern=pattern, replacement=replacement, count=None))
        assert fetched(aws, keys, days=2).equals(expected), pattern
        aws.clear_faults()


def test_answers_without_zone_ids_are_completed_by_asking_for_zones(aws: SandboxAWSThread, keys: Credentials) -> None:
    expected = fetched(aws, keys, days=2)
    aws.inject(
        Fault(
            mode="rewrite", action="DescribeSpotPriceHistory", count=None,
            pattern=r"<availabilityZoneId>[^<]*</availabilityZoneId>", replacement="",
        )
    )  # fmt: skip
    assert fetched(aws, keys, days=2).equals(expected)


def test_unknown_types_products_and_zones_are_no_error(aws: SandboxAWSThread, keys: Credentials) -> None:
    aws.inject(Fault(mode="rewrite", pattern=r"m5\.large", replacement="q9.tremendous", count=None))
    aws.inject(Fault(mode="rewrite", pattern="Linux/UNIX", replacement="BeOS", count=None))
    assert "q9.tremendous" in set(fetched(aws, keys, days=2)["instance_type"])


@pytest.mark.parametrize(
    "fault",
    [
        Fault(mode="throttle", count=2),
        Fault(mode="http_error", status=502, count=2),
        Fault(mode="error", code="InternalError", status=500, count=2),
        Fault(mode="drop_before", count=2),
        Fault(mode="truncate", count=2),
        Fault(mode="garbage", count=2),
    ],
    ids=lambda fault: fault.mode,
)
def test_passing_trouble_is_ridden_out(aws: SandboxAWSThread, keys: Credentials, fault: Fault) -> None:
    expected = fetched(aws, keys)
    report = FetchReport()
    from dataclasses import replace

    aws.inject(replace(fault, nth=2))
    assert fetched(aws, keys, report).equals(expected)
    assert sum(report.retries.values()) == 2


def test_lasting_trouble_ends_with_awss_own_code(
    aws: SandboxAWSThread, keys: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spot_prices, "ATTEMPTS", 3)
    aws.inject(Fault(mode="throttle", count=None))
    report = FetchReport()
    with pytest.raises(SpotPriceError) as error:
        fetched(aws, keys, report)
    assert error.value.code == "RequestLimitExceeded"
    assert report.retries["RequestLimitExceeded"] == 2
    aws.clear_faults()
    aws.inject(Fault(mode="error", code="UnauthorizedOperation", status=403, count=None))
    report = FetchReport()
    with pytest.raises(SpotPriceError) as error:
        fetched(aws, keys, report)
    assert error.value.code == "UnauthorizedOperation"
    assert sum(report.retries.values()) == 0, "a refusal is not asked again"


def test_expired_page_token_restarts_the_window_without_doubles(aws: SandboxAWSThread, keys: Credentials) -> None:
    expected = fetched(aws, keys)
    aws.inject(Fault(mode="error", code="InvalidNextToken", status=400, nth=2))
    report = FetchReport()
    assert fetched(aws, keys, report).equals(expected)
    assert report.restarted_windows == 1


def test_page_tokens_in_a_circle_are_noticed(aws: SandboxAWSThread, keys: Credentials) -> None:
    body = spot_prices._Client("us-east-1", aws.url, keys, FetchReport())._call(
        {"Action": "DescribeSpotPriceHistory", "Version": "2016-11-15"}, paging=False
    )
    token = re.search(rb"<nextToken>([^<]+)<", body)
    assert token
    repeated = f"<nextToken>{token.group(1).decode()}</nextToken>"
    aws.inject(Fault(mode="rewrite", pattern=r"<nextToken>[^<]*</nextToken>", replacement=repeated, count=None))
    with pytest.raises(SpotPriceError) as error:
        fetched(aws, keys)
    assert error.value.code == "TokenLoop"


def test_an_empty_page_in_the_middle_does_not_end_the_reading(aws: SandboxAWSThread, keys: Credentials) -> None:
    expected = fetched(aws, keys, window=timedelta(days=60))
    aws.inject(Fault(mode="rewrite", pattern=r"(?s)<item>.*</item>", replacement="", nth=1))
    rows = fetched(aws, keys, window=timedelta(days=60))
    assert rows.height == expected.height - 200


def test_more_than_ninety_days_are_clipped_by_aws(aws: SandboxAWSThread, keys: Credentials) -> None:
    rows = fetched(aws, keys, days=120, window=timedelta(days=60))
    assert END - timedelta(days=95) < rows["ts"].min() < END - timedelta(days=89)  # type: ignore[operator]


def test_times_without_a_zone_and_missing_credentials_are_named(
    aws: SandboxAWSThread, keys: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="time zone"):
        next(fetch_spot_prices("us-east-1", END.replace(tzinfo=None), END, endpoint_url=aws.url, credentials=keys))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(SpotPriceError, match="set AWS_ACCESS_KEY_ID"):
        next(fetch_spot_prices("us-east-1", END - timedelta(days=1), END, endpoint_url=aws.url))


def test_on_demand_prices_step_over_the_traps(aws: SandboxAWSThread, keys: Credentials) -> None:
    table = pl.DataFrame(pl.from_arrow(fetch_on_demand("us-east-1", endpoint_url=aws.url, credentials=keys)))
    assert table["instance_type"].n_unique() == table.height == 96
    prices = dict(table.select("instance_type", "price_usd_per_hour").iter_rows())
    assert prices["m5.large"] == Decimal("0.096")
    # the zero-dollar capacity block comes first in the list
    assert prices["p4d.24xlarge"] == Decimal("32.7726")
    (row,) = table.filter(pl.col("instance_type") == "m5.large").iter_rows(named=True)
    assert (row["vcpus"], row["memory_gib"], row["product"]) == (2, 8.0, "Linux/UNIX")
    assert row["effective_at"].tzinfo is not None


def test_region_without_prices_is_named(aws: SandboxAWSThread, keys: Credentials) -> None:
    with pytest.raises(OnDemandPriceError, match="'us-moon-1'"):
        fetch_on_demand("us-moon-1", endpoint_url=aws.url, credentials=keys)


def _product(**attributes: str) -> dict[str, object]:
    usual = {
        "instanceType": "m5.large", "regionCode": "us-east-1", "operatingSystem": "Linux", "tenancy": "Shared",
        "capacitystatus": "Used", "preInstalledSw": "NA", "operation": "RunInstances", "memory": "1,952 GiB",
        "vcpu": "2",
    }  # fmt: skip
    dimension = {"unit": "Hrs", "pricePerUnit": {"USD": "0.0960000000"}}
    offer = {"effectiveDate": "2024-01-01T00:00:00Z", "priceDimensions": {"a": dimension}}
    return {"product": {"sku": "S", "attributes": {**usual, **attributes}}, "terms": {"OnDemand": {"o": offer}}}


def test_products_that_a_filter_let_through_are_still_refused() -> None:
    plain = on_demand_row(_product(), "us-east-1")
    assert plain is not None
    assert plain["memory_gib"] == 1952.0
    for wrong in (
        {"operatingSystem": "Windows"},
        {"tenancy": "Dedicated"},
        {"capacitystatus": "AllocatedCapacityReservation"},
        {"preInstalledSw": "SQL Std"},
        {"marketoption": "CapacityBlock"},
        {"operation": "RunInstances:CB"},
        {"regionCode": "us-east-2"},
        {"licenseModel": "Bring your own license"},
    ):
        assert on_demand_row(_product(**wrong), "us-east-1") is None, wrong
    assert on_demand_row({}, "us-east-1") is None
