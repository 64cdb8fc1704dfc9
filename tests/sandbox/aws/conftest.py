"""A sandbox AWS per test, with two customers' accounts, and boto3 clients that are closed again."""

from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config

from control.sandbox.aws import Account, Credentials, SandboxAWSThread, SandboxConfig
from control.sandbox.market import GeneratedMarket

ACCOUNT, OTHER_ACCOUNT = "111111111111", "222222222222"


@pytest.fixture(scope="session")
def market() -> GeneratedMarket:
    """One market for all tests: its blocks are made once."""
    return GeneratedMarket(seed=7)


@pytest.fixture
def aws(market: GeneratedMarket) -> Iterator[SandboxAWSThread]:
    with SandboxAWSThread(SandboxConfig(market=market)) as running:
        running.add_account(ACCOUNT, external_id="external-1")
        running.add_account(OTHER_ACCOUNT, external_id="external-2")
        yield running


@pytest.fixture
def clients() -> Iterator[Callable[..., Any]]:
    """client(aws, service, credentials, region=…, retries=…): boto3 clients against a sandbox."""
    made: list[Any] = []

    def make(
        aws: SandboxAWSThread, service: str, credentials: Credentials, region: str = "us-east-1", retries: int = 1
    ) -> Any:
        config = Config(retries={"total_max_attempts": retries, "mode": "standard"}, read_timeout=25, connect_timeout=5)
        client = boto3.client(service, endpoint_url=aws.url, region_name=region, config=config, **credentials.boto3())
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


def assume(
    clients: Callable[..., Any], aws: SandboxAWSThread, account: Account, session: str = "cloudoptim"
) -> Credentials:
    """Temporary credentials of an account's role, as the server gets them."""
    sts = clients(aws, "sts", aws.credentials())
    answer = sts.assume_role(RoleArn=account.role_arn, RoleSessionName=session, ExternalId=account.external_id)
    given = answer["Credentials"]
    return Credentials(given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"])


def account(aws: SandboxAWSThread, account_id: str = ACCOUNT) -> Account:
    found: Account = next(a for a in aws.accounts() if a.account_id == account_id)
    return found


@pytest.fixture
def customer(aws: SandboxAWSThread, clients: Callable[..., Any]) -> Credentials:
    """The first customer's role, assumed."""
    return assume(clients, aws, account(aws))


@pytest.fixture
def ec2(aws: SandboxAWSThread, clients: Callable[..., Any], customer: Credentials) -> Any:
    return clients(aws, "ec2", customer)


def spot_request(**changes: Any) -> dict[str, Any]:
    """Parameters of a Spot launch with a token, a zone and tags from birth."""
    return {
        "ImageId": "ami-0123456789abcdef0",
        "InstanceType": "m5.large",
        "MinCount": 1,
        "MaxCount": 1,
        "ClientToken": "token-1",
        "Placement": {"AvailabilityZone": "us-east-1a"},
        "InstanceMarketOptions": {"MarketType": "spot"},
        "TagSpecifications": [
            {"ResourceType": "instance", "Tags": [{"Key": "cloudoptim:attempt", "Value": "attempt-1"}]}
        ],
        **changes,
    }
