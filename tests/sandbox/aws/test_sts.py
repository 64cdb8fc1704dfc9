"""Roles, external ids and whose credentials they are."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError

from control.sandbox.aws import Credentials, SandboxAWSThread
from tests.sandbox.aws.conftest import ACCOUNT, OTHER_ACCOUNT, account, assume


def code(error: pytest.ExceptionInfo[ClientError]) -> str:
    return str(error.value.response["Error"]["Code"])


@pytest.mark.parametrize(
    "given", [{}, {"ExternalId": "external-2"}, {"ExternalId": "External-1"}], ids=["missing", "other's", "case"]
)
def test_missing_or_wrong_external_id_is_denied(
    aws: SandboxAWSThread, clients: Callable[..., Any], given: dict[str, str]
) -> None:
    sts = clients(aws, "sts", aws.credentials())
    with pytest.raises(ClientError) as error:
        sts.assume_role(RoleArn=account(aws).role_arn, RoleSessionName="cloudoptim", **given)
    assert code(error) == "AccessDenied"


def test_unknown_role_is_denied_like_a_wrong_external_id(aws: SandboxAWSThread, clients: Callable[..., Any]) -> None:
    with pytest.raises(ClientError) as error:
        clients(aws, "sts", aws.credentials()).assume_role(
            RoleArn="arn:aws:iam::333333333333:role/CloudOptim", RoleSessionName="cloudoptim", ExternalId="external-1"
        )
    assert code(error) == "AccessDenied"


def test_a_customer_cannot_assume_another_customers_role_even_with_its_external_id(
    aws: SandboxAWSThread, clients: Callable[..., Any]
) -> None:
    sts = clients(aws, "sts", aws.credentials(OTHER_ACCOUNT))
    with pytest.raises(ClientError) as error:
        sts.assume_role(RoleArn=account(aws).role_arn, RoleSessionName="thief", ExternalId="external-1")
    assert code(error) == "AccessDenied"


def test_assumed_credentials_are_the_customers_and_calls_are_attributed_to_the_session(
    aws: SandboxAWSThread, clients: Callable[..., Any], customer: Credentials
) -> None:
    identity = clients(aws, "sts", customer).get_caller_identity()
    assert identity["Account"] == ACCOUNT
    assert identity["Arn"] == f"arn:aws:sts::{ACCOUNT}:assumed-role/CloudOptim/cloudoptim"
    clients(aws, "ec2", customer).describe_instances()
    (call,) = aws.history(action="DescribeInstances")
    assert (call["account"], call["session"], call["outcome"]) == (ACCOUNT, "cloudoptim", "ok")


def test_history_has_no_secrets(aws: SandboxAWSThread, clients: Callable[..., Any], customer: Credentials) -> None:
    ec2 = clients(aws, "ec2", customer)
    ec2.run_instances(ImageId="ami-1", InstanceType="m5.large", MinCount=1, MaxCount=1, UserData="join-token=hush")
    text = repr(aws.history())
    assert "external-1" not in text
    assert "hush" not in text
    assert customer.secret_access_key not in text
    assert str(customer.session_token) not in text


def test_tampered_and_expired_tokens_are_refused(
    aws: SandboxAWSThread, clients: Callable[..., Any], customer: Credentials
) -> None:
    token = str(customer.session_token)
    forged = Credentials(
        customer.access_key_id, customer.secret_access_key, token[:-1] + ("0" if token[-1] != "0" else "1")
    )
    with pytest.raises(ClientError) as error:
        clients(aws, "ec2", forged).describe_instances()
    assert code(error) == "AuthFailure"
    aws.expire_credentials(ACCOUNT)
    with pytest.raises(ClientError) as error:
        clients(aws, "ec2", customer).describe_instances()
    assert code(error) == "RequestExpired"
    with pytest.raises(ClientError) as error:
        clients(aws, "sqs", customer).list_queues()
    assert code(error) == "ExpiredToken"
    fresh = assume(clients, aws, account(aws))
    assert clients(aws, "ec2", fresh).describe_instances()["Reservations"] == []


def test_removed_role_denies_new_and_old_sessions_until_it_is_back(
    aws: SandboxAWSThread, clients: Callable[..., Any], customer: Credentials
) -> None:
    aws.revoke_role(ACCOUNT)
    with pytest.raises(ClientError) as error:
        assume(clients, aws, account(aws))
    assert code(error) == "AccessDenied"
    with pytest.raises(ClientError) as error:
        clients(aws, "ec2", customer).describe_instances()
    assert code(error) == "UnauthorizedOperation"
    aws.revoke_role(ACCOUNT, revoked=False)
    assert assume(clients, aws, account(aws)).session_token


def test_session_lives_between_a_quarter_of_an_hour_and_twelve(
    aws: SandboxAWSThread, clients: Callable[..., Any]
) -> None:
    sts = clients(aws, "sts", aws.credentials())
    with pytest.raises(ClientError) as error:
        sts.assume_role(
            RoleArn=account(aws).role_arn, RoleSessionName="cloudoptim", ExternalId="external-1", DurationSeconds=43201
        )
    assert code(error) == "ValidationError"


def test_the_control_api_tells_nobody_an_external_id(aws: SandboxAWSThread) -> None:
    known = {a.account_id: a.external_id for a in aws.accounts()}
    listed = httpx.get(f"{aws.url}/_sandbox/accounts")
    assert [row["account_id"] for row in listed.json()] == list(known)
    assert listed.json()[0]["queue_url"] == account(aws).queue_url
    new = {"account_id": "555566667777", "external_id": "a-secret-of-the-customer"}
    added = httpx.post(f"{aws.url}/_sandbox/accounts", json=new)
    assert added.json()["role_arn"] == "arn:aws:iam::555566667777:role/CloudOptim"
    assert not any(secret in listed.text + added.text for secret in (*known.values(), new["external_id"]))
