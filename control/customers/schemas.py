"""Requests and answers about customers."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from control.security.schemas import Email, Request, Text

RoleArn = Annotated[
    str, StringConstraints(pattern=r"^arn:aws(-cn|-us-gov)?:iam::\d{12}:role/[A-Za-z0-9_+=,.@/-]+$", max_length=600)
]
QueueUrl = Annotated[str, StringConstraints(strip_whitespace=True, max_length=1024, pattern=r"^https?://\S+$")]


class CustomerCreate(Request):
    """A new customer. The external id is made by the server and cannot be chosen."""

    company_name: Text
    email: Email
    aws_role_arn: RoleArn | None = None
    sqs_queue_url: QueueUrl | None = None


class CustomerChange(Request):
    """What may change; ``null`` leaves a field as it is. A new role or queue has to be verified again."""

    company_name: Text | None = None
    email: Email | None = None
    aws_role_arn: RoleArn | None = None
    sqs_queue_url: QueueUrl | None = None
    suspended: bool | None = None


class IntakeState(BaseModel):
    """What a detector last learned about the customer's account."""

    model_config = ConfigDict(from_attributes=True)

    detector: str
    state: str
    reason: str | None
    remedy: str | None
    changed_at: datetime
    last_ok_at: datetime | None


class CustomerAnswer(BaseModel):
    """A customer."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    company_name: str
    email: str
    aws_role_arn: str | None
    aws_account_id: str | None
    sqs_queue_url: str | None
    external_id: UUID
    status: str
    kill_switch: bool
    created_at: datetime


class AdoptOnly(BaseModel):
    """Since when, and why, nothing of this customer is terminated; the instances of ours that no row explains."""

    model_config = ConfigDict(from_attributes=True)

    since: datetime
    reason: str | None
    instances: list[str]


class InFlight(BaseModel):
    """What an off-boarding still waits for: the role is kept until each is 0 and no instance is left."""

    model_config = ConfigDict(from_attributes=True)

    unanswered_launches: int
    unfinished_replacements: int
    running_plans: int
    instances: list[str]


class CustomerDetail(CustomerAnswer):
    """A customer with the health of its event intake and of what runs in its account."""

    intake: list[IntakeState]
    adopt_only: AdoptOnly | None = None
    in_flight: InFlight | None = None


class Offboarding(BaseModel):
    """An off-boarding that is not finished: the secrets are gone, and this still has to end."""

    status: str
    in_flight: InFlight


class LiftAdoptOnly(Request):
    """Terminations are allowed again; ``reason`` says who compared what."""

    reason: Text


class CustomerList(BaseModel):
    """A page of customers; pass ``next`` as ``after`` for the following one."""

    customers: list[CustomerAnswer]
    next: UUID | None


class Check(BaseModel):
    """One probe: what was tried, whether it is as it must be, and what to do when not."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None


class VerifyAnswer(BaseModel):
    """What works and what does not, and everything the customer has to apply."""

    ok: bool
    status: str
    checks: list[Check]
    trust_policy: dict[str, Any]
    iam_policy: dict[str, Any]
    cloudformation: str
    terraform: str


class ConfigValue(Request):
    """Body of PUT …/config/{key}."""

    value: Any


class ConfigEntry(BaseModel):
    """One key of the registry with the customer's value, or the default when ``configured`` is false."""

    key: str
    value: Any
    configured: bool
    updated_at: datetime | None
    description: str
    value_schema: dict[str, Any] = Field(serialization_alias="schema")


class ConfigList(BaseModel):
    """All keys of the registry."""

    config: list[ConfigEntry]


class KillSwitchRequest(Request):
    """``engaged`` stops plans, launches and every task that is no part of an interruption."""

    engaged: bool
    reason: Text
