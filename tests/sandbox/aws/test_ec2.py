"""EC2 of the sandbox through boto3: what moto does not do and controllers are broken by."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError

from control.sandbox.aws import Credentials, Fault, SandboxAWSThread, SandboxConfig
from control.sandbox.market import GeneratedMarket
from tests.sandbox.aws.conftest import ACCOUNT, OTHER_ACCOUNT, account, assume, spot_request


def launched(answer: dict[str, Any]) -> list[str]:
    return [i["InstanceId"] for i in answer["Instances"]]


def code(error: pytest.ExceptionInfo[ClientError]) -> str:
    return str(error.value.response["Error"]["Code"])


def zone_with(aws: SandboxAWSThread, kind: str, number: int = 0, account_id: str = ACCOUNT) -> str:
    """The name of a zone that offers the type, in the account's own naming."""
    from control.sandbox.aws import network

    names = network.zone_names(account_id, "us-east-1")
    offered = sorted(names[p.zone_id] for p in aws.market.pools("us-east-1") if p.instance_type == kind)
    return offered[number]


def test_same_token_and_parameters_give_the_same_instance(aws: SandboxAWSThread, ec2: Any) -> None:
    request = spot_request(Placement={"AvailabilityZone": zone_with(aws, "m5.large")})
    first, second = launched(ec2.run_instances(**request)), launched(ec2.run_instances(**request))
    assert first == second
    assert len(aws.instances()) == 1


def test_fifty_parallel_calls_with_one_token_launch_once(aws: SandboxAWSThread, ec2: Any) -> None:
    request = spot_request(Placement={"AvailabilityZone": zone_with(aws, "m5.large")})
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.extend(launched(ec2.run_instances(**request)))) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 50
    assert len(set(seen)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"InstanceType": "m5.xlarge"},
        {"MaxCount": 2},
        {"ImageId": "ami-0fedcba9876543210"},
        {"TagSpecifications": []},
        {"InstanceMarketOptions": {"MarketType": "spot", "SpotOptions": {"MaxPrice": "9"}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_same_token_with_other_parameters_is_refused(aws: SandboxAWSThread, ec2: Any, change: dict[str, Any]) -> None:
    zone = {"Placement": {"AvailabilityZone": zone_with(aws, "m5.large")}}
    ec2.run_instances(**spot_request(**zone))
    with pytest.raises(ClientError) as error:
        ec2.run_instances(**spot_request(**zone, **change))
    assert code(error) == "IdempotentParameterMismatch"
    assert len(aws.instances()) == 1


def test_same_token_in_another_zone_is_another_launch(aws: SandboxAWSThread, ec2: Any) -> None:
    ids = {
        launched(ec2.run_instances(**spot_request(Placement={"AvailabilityZone": zone_with(aws, "m5.large", n)})))[0]
        for n in (0, 1)
    }
    assert len(ids) == 2


def test_token_of_a_terminated_instance_is_refused(aws: SandboxAWSThread, ec2: Any) -> None:
    request = spot_request(Placement={"AvailabilityZone": zone_with(aws, "m5.large")})
    ec2.terminate_instances(InstanceIds=launched(ec2.run_instances(**request)))
    with pytest.raises(ClientError) as error:
        ec2.run_instances(**request)
    assert code(error) == "IdempotentInstanceTerminated"


def test_lost_response_then_retry_with_the_token_gives_the_instance_that_was_made(
    aws: SandboxAWSThread, clients: Callable[..., Any], customer: Credentials
) -> None:
    aws.inject(Fault(mode="drop_after", action="RunInstances"))
    request = spot_request(Placement={"AvailabilityZone": zone_with(aws, "m5.large")})
    ids = launched(clients(aws, "ec2", customer, retries=3).run_instances(**request))
    assert ids == [i.instance_id for i in aws.instances()]
    outcomes = [c["outcome"] for c in aws.history(action="RunInstances")]
    assert outcomes == ["fault:drop_after", "ok"]


def test_counts_are_honoured_up_to_the_pools_capacity(clients: Callable[..., Any]) -> None:
    market = GeneratedMarket(seed=7)
    # a pool that is neither short nor bottomless right now
    now = market.now()
    pool, depth = min(
        ((p, market.capacity(p, now, spot=True)) for p in market.pools("us-east-1") if not market.scarce(p, now)),
        key=lambda found: found[1],
    )
    with SandboxAWSThread(SandboxConfig(market=market, capacity_errors=True)) as aws:
        aws.add_account(ACCOUNT, external_id="x")
        ec2 = clients(aws, "ec2", aws.credentials(ACCOUNT))
        placed = {"InstanceType": pool.instance_type, "Placement": {"AvailabilityZoneId": pool.zone_id}}
        answer = ec2.run_instances(**spot_request(MinCount=1, MaxCount=depth + 5, **placed))
        assert len(answer["Instances"]) == depth
        with pytest.raises(ClientError) as error:
            ec2.run_instances(**spot_request(ClientToken="2", MinCount=depth + 1, MaxCount=depth + 1, **placed))
        assert code(error) == "InsufficientInstanceCapacity"
        assert len(aws.instances()) == depth


def test_refused_launch_does_not_use_up_its_token(aws: SandboxAWSThread, ec2: Any) -> None:
    request = spot_request(Placement={"AvailabilityZone": zone_with(aws, "m5.large")})
    aws.inject(Fault(mode="ice", action="RunInstances"))
    with pytest.raises(ClientError) as error:
        ec2.run_instances(**request)
    assert code(error) == "InsufficientInstanceCapacity"
    assert len(launched(ec2.run_instances(**request))) == 1


def test_scarce_pool_refuses_spot_and_gives_a_little_on_demand(clients: Callable[..., Any]) -> None:
    # 3 % of half-days are short in some 70 families and zones: the first seed or two have a shortage right now
    market, pool = next(
        (market, pool)
        for market in (GeneratedMarket(seed=seed) for seed in range(50))
        for region in market.regions()
        for pool in market.pools(region)
        if market.scarce(pool, market.now())
    )
    with SandboxAWSThread(SandboxConfig(market=market, capacity_errors=True)) as aws:
        aws.add_account(ACCOUNT, external_id="x")
        ec2 = clients(aws, "ec2", aws.credentials(ACCOUNT), region=pool.region)
        placed = {"InstanceType": pool.instance_type, "Placement": {"AvailabilityZoneId": pool.zone_id}}
        with pytest.raises(ClientError) as error:
            ec2.run_instances(**spot_request(**placed))
        assert code(error) == "InsufficientInstanceCapacity"
        on_demand = spot_request(ClientToken="od", **placed)
        del on_demand["InstanceMarketOptions"]
        assert len(ec2.run_instances(**on_demand)["Instances"]) == 1


def test_spot_instance_carries_its_request_its_lifecycle_and_its_tags_from_birth(
    aws: SandboxAWSThread, ec2: Any
) -> None:
    (made,) = ec2.run_instances(**spot_request(Placement={"AvailabilityZone": zone_with(aws, "m5.large")}))["Instances"]
    assert made["InstanceLifecycle"] == "spot"
    assert made["Tags"] == [{"Key": "cloudoptim:attempt", "Value": "attempt-1"}]
    (found,) = ec2.describe_instances(Filters=[{"Name": "tag:cloudoptim:attempt", "Values": ["attempt-*"]}])[
        "Reservations"
    ]
    assert found["Instances"][0]["InstanceId"] == made["InstanceId"]
    (request,) = ec2.describe_spot_instance_requests(SpotInstanceRequestIds=[made["SpotInstanceRequestId"]])[
        "SpotInstanceRequests"
    ]
    assert request["Status"]["Code"] == "fulfilled"
    assert ec2.describe_instances(Filters=[{"Name": "client-token", "Values": ["token-1"]}])["Reservations"]


def test_interrupted_instance_shows_it_before_it_goes(aws: SandboxAWSThread, ec2: Any) -> None:
    (instance_id,) = launched(
        ec2.run_instances(**spot_request(Placement={"AvailabilityZone": zone_with(aws, "m5.large")}))
    )
    aws.interrupt(instance_id, notice_seconds=0.4, send_event=False)

    def status() -> str:
        return str(ec2.describe_spot_instance_requests()["SpotInstanceRequests"][0]["Status"]["Code"])

    assert status() == "marked-for-termination"
    # a second warning neither postpones nor changes what was announced
    aws.interrupt(instance_id, notice_seconds=600, behaviour="stop", send_event=False)
    assert status() == "marked-for-termination"
    assert ec2.describe_instance_status()["InstanceStatuses"][0]["InstanceState"]["Name"] == "running"
    deadline = time.monotonic() + 5
    while status() == "marked-for-termination" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert status() == "instance-terminated-no-capacity"
    (instance,) = ec2.describe_instances(InstanceIds=[instance_id])["Reservations"][0]["Instances"]
    assert instance["State"]["Name"] == "shutting-down"
    assert instance["StateReason"]["Code"] == "Server.SpotInstanceTermination"
    assert ec2.describe_instance_status()["InstanceStatuses"] == []
    states = [c["params"]["state"] for c in aws.history(action="StateChange")]
    assert states == ["running", "shutting-down"]


def test_terminating_twice_is_no_error_and_unknown_ids_are(aws: SandboxAWSThread, ec2: Any) -> None:
    ids = launched(ec2.run_instances(**spot_request(Placement={"AvailabilityZone": zone_with(aws, "m5.large")})))
    ec2.terminate_instances(InstanceIds=ids)
    (row,) = ec2.terminate_instances(InstanceIds=ids)["TerminatingInstances"]
    assert row["CurrentState"]["Name"] == row["PreviousState"]["Name"] == "shutting-down"
    with pytest.raises(ClientError) as error:
        ec2.terminate_instances(InstanceIds=["i-0123456789abcdef0"])
    assert code(error) == "InvalidInstanceID.NotFound"


def test_new_instance_stays_invisible_for_the_configured_time(
    market: GeneratedMarket, clients: Callable[..., Any]
) -> None:
    with SandboxAWSThread(SandboxConfig(market=market, visibility_delay_seconds=(0.5, 0.5))) as aws:
        aws.add_account(ACCOUNT, external_id="x")
        ec2 = clients(aws, "ec2", aws.credentials(ACCOUNT))
        ids = launched(ec2.run_instances(**spot_request(Placement={"AvailabilityZone": zone_with(aws, "m5.large")})))
        assert ec2.describe_instances()["Reservations"] == []
        with pytest.raises(ClientError) as error:
            ec2.describe_instances(InstanceIds=ids)
        assert code(error) == "InvalidInstanceID.NotFound"
        deadline = time.monotonic() + 5
        while not ec2.describe_instances()["Reservations"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ec2.describe_instances(InstanceIds=ids)["Reservations"][0]["Instances"][0]["InstanceId"] == ids[0]


def test_describe_pages_show_every_instance_once(market: GeneratedMarket, clients: Callable[..., Any]) -> None:
    with SandboxAWSThread(SandboxConfig(market=market, describe_page_size=5)) as aws:
        aws.add_account(ACCOUNT, external_id="x")
        ec2 = clients(aws, "ec2", aws.credentials(ACCOUNT))
        placed = {"Placement": {"AvailabilityZone": zone_with(aws, "m5.large")}}
        made = launched(ec2.run_instances(**spot_request(MinCount=12, MaxCount=12, **placed)))
        assert len(ec2.describe_instances()["Reservations"][0]["Instances"]) == 5
        pages = list(ec2.get_paginator("describe_instances").paginate())
        seen = [i["InstanceId"] for p in pages for r in p["Reservations"] for i in r["Instances"]]
        assert len(pages) == 3
        assert sorted(seen) == sorted(made)


def test_launches_beyond_the_accounts_bucket_are_throttled(
    market: GeneratedMarket, clients: Callable[..., Any]
) -> None:
    with SandboxAWSThread(SandboxConfig(market=market, rate_limits={"RunInstances": (2, 0.001)})) as aws:
        for account_id in (ACCOUNT, OTHER_ACCOUNT):
            aws.add_account(account_id, external_id="x")
        ec2 = clients(aws, "ec2", aws.credentials(ACCOUNT))
        zone = {"Placement": {"AvailabilityZone": zone_with(aws, "m5.large")}}
        for token in ("1", "2"):
            ec2.run_instances(**spot_request(ClientToken=token, **zone))
        with pytest.raises(ClientError) as error:
            ec2.run_instances(**spot_request(ClientToken="3", **zone))
        assert code(error) == "RequestLimitExceeded"
        # another account has a bucket of its own
        other = {"Placement": {"AvailabilityZone": zone_with(aws, "m5.large", account_id=OTHER_ACCOUNT)}}
        clients(aws, "ec2", aws.credentials(OTHER_ACCOUNT)).run_instances(**spot_request(**other))


def test_instances_of_another_account_do_not_exist(
    aws: SandboxAWSThread, ec2: Any, clients: Callable[..., Any]
) -> None:
    ids = launched(ec2.run_instances(**spot_request(Placement={"AvailabilityZone": zone_with(aws, "m5.large")})))
    stranger = clients(aws, "ec2", assume(clients, aws, account(aws, OTHER_ACCOUNT)))
    assert stranger.describe_instances()["Reservations"] == []
    for call in (stranger.terminate_instances, stranger.describe_instances):
        with pytest.raises(ClientError) as error:
            call(InstanceIds=ids)
        assert code(error) == "InvalidInstanceID.NotFound"
    assert [i.state(time.time()) for i in aws.instances()] == ["running"]


def test_type_not_offered_in_the_zone_is_unsupported_and_names_zones_that_do(aws: SandboxAWSThread, ec2: Any) -> None:
    from control.sandbox.aws import network

    names = network.zone_names(ACCOUNT, "us-east-1")
    with pytest.raises(ClientError) as error:
        ec2.run_instances(**spot_request(Placement={"AvailabilityZone": names["use1-az3"]}))
    assert code(error) == "Unsupported"
    assert zone_with(aws, "m5.large") in str(error.value)


def test_dry_run_changes_nothing(aws: SandboxAWSThread, ec2: Any) -> None:
    with pytest.raises(ClientError) as error:
        ec2.run_instances(**spot_request(), DryRun=True)
    assert code(error) == "DryRunOperation"
    assert aws.instances() == []


def test_instant_fleet_goes_on_to_the_next_override_when_the_first_has_no_capacity(
    aws: SandboxAWSThread, ec2: Any
) -> None:
    zone = zone_with(aws, "m5.large")
    answer = ec2.create_fleet(
        Type="instant",
        TargetCapacitySpecification={"TotalTargetCapacity": 2, "DefaultTargetCapacityType": "spot"},
        LaunchTemplateConfigs=[
            {
                "LaunchTemplateSpecification": {"LaunchTemplateId": "lt-0123456789abcdef0", "Version": "1"},
                "Overrides": [
                    {"InstanceType": "m5.large", "AvailabilityZone": "us-east-1z"},
                    {"InstanceType": "m5.large", "AvailabilityZone": zone},
                ],
            }
        ],
        TagSpecifications=[{"ResourceType": "instance", "Tags": [{"Key": "a", "Value": "b"}]}],
    )
    assert [e["ErrorCode"] for e in answer["Errors"]] == ["InvalidParameterValue"]
    assert len(answer["Instances"][0]["InstanceIds"]) == 2
    assert all(i.tags == {"a": "b"} and i.lifecycle == "spot" for i in aws.instances())


def test_zone_names_differ_between_accounts_and_ids_do_not(
    aws: SandboxAWSThread, ec2: Any, clients: Callable[..., Any]
) -> None:
    other = clients(aws, "ec2", aws.credentials(OTHER_ACCOUNT))
    mapping, others = (
        {z["ZoneName"]: z["ZoneId"] for z in c.describe_availability_zones()["AvailabilityZones"]} for c in (ec2, other)
    )
    assert sorted(mapping.values()) == sorted(others.values())
    assert sorted(mapping) == sorted(others) == [f"us-east-1{letter}" for letter in "abcdef"]
    assert mapping != others


def test_type_catalogue_has_sizes_and_offerings_by_zone_id(ec2: Any) -> None:
    (kind,) = ec2.describe_instance_types(InstanceTypes=["m5.xlarge"])["InstanceTypes"]
    assert kind["VCpuInfo"]["DefaultVCpus"] == 4
    assert kind["MemoryInfo"]["SizeInMiB"] == 16384
    assert kind["NetworkInfo"]["Ipv4AddressesPerInterface"] == 15
    offerings = ec2.describe_instance_type_offerings(
        LocationType="availability-zone-id", Filters=[{"Name": "instance-type", "Values": ["m5.xlarge"]}]
    )["InstanceTypeOfferings"]
    assert {o["Location"] for o in offerings} == {f"use1-az{n}" for n in (1, 2, 4, 5, 6)}


def test_volumes_and_metadata_options_are_those_of_the_launch(aws: SandboxAWSThread, ec2: Any) -> None:
    placed = {"Placement": {"AvailabilityZone": zone_with(aws, "m5.large")}}
    asked = {
        "MetadataOptions": {"HttpTokens": "required"},
        "BlockDeviceMappings": [{"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 80, "Iops": 4000}}],
    }
    (made,) = ec2.run_instances(**spot_request(**placed, **asked))["Instances"]
    assert made["MetadataOptions"]["HttpTokens"] == "required"
    assert made["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    (mapping,) = made["BlockDeviceMappings"]
    assert (mapping["DeviceName"], mapping["Ebs"]["DeleteOnTermination"]) == ("/dev/xvda", True)
    volume_id = mapping["Ebs"]["VolumeId"]
    (volume,) = ec2.describe_volumes(Filters=[{"Name": "volume-id", "Values": [volume_id]}])["Volumes"]
    assert (volume["VolumeId"], volume["Size"], volume["VolumeType"], volume["Iops"]) == (volume_id, 80, "gp3", 4000)
    refused = {"BlockDeviceMappings": [{"DeviceName": "/dev/xvda", "Ebs": {"VolumeType": "gp2", "Iops": 4000}}]}
    with pytest.raises(ClientError, match="InvalidParameterCombination"):
        ec2.run_instances(**spot_request(ClientToken="2", **placed, **refused))
