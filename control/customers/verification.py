"""Probes of a customer's AWS role and queue. Reads only; messages in the queue are not touched."""

from __future__ import annotations

from uuid import UUID, uuid4

from botocore.credentials import Credentials

from control.customers.schemas import Check
from control.gateways.aws import AwsError, AwsGateway

PROBE_SESSION_SECONDS = 900
# Refusals of STS that mean "not with these credentials", as opposed to "something is broken".
REFUSALS = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"})


def account_of(role_arn: str) -> str:
    """The account in a role's ARN."""
    return role_arn.split(":")[4]


async def probe(
    aws: AwsGateway, *, customer_id: UUID, role_arn: str | None, external_id: UUID, queue_url: str | None, region: str
) -> list[Check]:
    """Everything that must hold before a customer's account is acted on.

    A role that can be assumed without its external id, or with any other, could be used by us on behalf of somebody
    else (confused deputy); it is refused even though it works.
    """
    if role_arn is None:
        return [
            Check(
                name="role",
                ok=False,
                detail="No role is registered.",
                remedy="Apply the template, then set aws_role_arn to its RoleArn output.",
            )
        ]
    session = f"cloudoptim-{customer_id.hex}"
    checks: list[Check] = []
    credentials = await _assume(aws, checks, role_arn, str(external_id), session)
    checks.append(await _must_refuse(aws, role_arn, None, session, "role_without_external_id"))
    checks.append(await _must_refuse(aws, role_arn, str(uuid4()), session, "role_with_another_external_id"))
    if credentials is None:
        return checks
    checks.append(await _identity(aws, credentials, role_arn, region))
    checks.append(await _queue(aws, credentials, role_arn, queue_url))
    checks.append(await _ec2(aws, credentials, region))
    return checks


async def _assume(
    aws: AwsGateway, checks: list[Check], role_arn: str, external_id: str, session: str
) -> Credentials | None:
    try:
        credentials, _ = await aws.assume_role(
            role_arn, external_id=external_id, session_name=session, seconds=PROBE_SESSION_SECONDS
        )
    except AwsError as error:
        checks.append(
            Check(
                name="role_with_external_id",
                ok=False,
                detail=f"The role cannot be assumed with the external id ({error.code}).",
                remedy="Apply the trust policy of this answer to the role, with exactly this external id.",
            )
        )
        return None
    checks.append(Check(name="role_with_external_id", ok=True, detail="The role can be assumed with its external id."))
    return credentials


async def _must_refuse(aws: AwsGateway, role_arn: str, external_id: str | None, session: str, name: str) -> Check:
    how = "without an external id" if external_id is None else "with another external id"
    try:
        await aws.assume_role(role_arn, external_id=external_id, session_name=session, seconds=PROBE_SESSION_SECONDS)
    except AwsError as error:
        if error.code in REFUSALS or error.status == 403:
            return Check(name=name, ok=True, detail=f"AWS refuses the role {how}, as it must.")
        return Check(
            name=name,
            ok=False,
            detail=f"Whether the role works {how} could not be found out ({error.code}).",
            remedy="Try again; the customer is not accepted before this is known.",
        )
    return Check(
        name=name,
        ok=False,
        detail=f"The role can be assumed {how}: anybody who knows its ARN could have us act on it.",
        remedy="Add the condition on sts:ExternalId of the trust policy in this answer, then verify again.",
    )


async def _identity(aws: AwsGateway, credentials: Credentials, role_arn: str, region: str) -> Check:
    try:
        answer = await aws.call("sts", "GetCallerIdentity", {}, region=region, credentials=credentials)
    except AwsError as error:
        return Check(name="account", ok=False, detail=f"STS did not say whose role it is ({error.code}).")
    same = answer.get("Account") == account_of(role_arn)
    return Check(
        name="account",
        ok=same,
        detail="The role belongs to the account in its ARN." if same else "The role belongs to another account.",
        remedy=None if same else "Set aws_role_arn to a role of the customer's own account.",
    )


async def _queue(aws: AwsGateway, credentials: Credentials, role_arn: str, queue_url: str | None) -> Check:
    if queue_url is None:
        return Check(
            name="queue",
            ok=False,
            detail="No queue is registered; interruptions would be found by polling only.",
            remedy="Set sqs_queue_url to the template's QueueUrl output.",
        )
    try:
        queue = aws.queue(queue_url)
    except ValueError as error:
        return Check(name="queue", ok=False, detail=str(error), remedy="Correct sqs_queue_url.")
    if queue.account_id != account_of(role_arn):
        return Check(
            name="queue",
            ok=False,
            detail="The queue and the role belong to different accounts.",
            remedy="Register the queue of the role's account.",
        )
    try:
        await aws.call(
            "sqs",
            "GetQueueAttributes",
            {"QueueUrl": queue_url, "AttributeNames": ["ApproximateNumberOfMessages"]},
            region=queue.region,
            credentials=credentials,
        )
    except AwsError as error:
        return Check(
            name="queue",
            ok=False,
            detail=f"The queue cannot be read with the role ({error.code}).",
            remedy="Check that the queue exists and that the IAM policy of this answer is attached to the role.",
        )
    return Check(name="queue", ok=True, detail="The queue can be read with the role.")


async def _ec2(aws: AwsGateway, credentials: Credentials, region: str) -> Check:
    try:
        await aws.call("ec2", "DescribeInstances", {"MaxResults": 5}, region=region, credentials=credentials)
    except AwsError as error:
        return Check(
            name="ec2",
            ok=False,
            detail=f"Instances cannot be listed with the role ({error.code}).",
            remedy="Attach the IAM policy of this answer to the role.",
        )
    return Check(name="ec2", ok=True, detail="Instances can be listed with the role.")
