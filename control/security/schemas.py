"""Requests and answers of authentication, people and keys."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, StringConstraints

from control.security.passwords import MIN_PASSWORD_LENGTH
from control.security.principal import Role

Email = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True,
        to_lower=True,
        max_length=254,
        pattern=r"^[^@\s\x00]+@[^@\s\x00]+\.[^@\s\x00]+$|^[^@\s\x00]+@localhost$",
    ),
]
Text = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")
]
Password = Annotated[SecretStr, Field(min_length=MIN_PASSWORD_LENGTH, max_length=256)]
# A person or program role that a key or user may be given here; agent keys are made with their cluster.
PersonRole = Literal[Role.PLATFORM_ADMIN, Role.CUSTOMER_ADMIN, Role.ANALYST]


class Request(BaseModel):
    """Base of request bodies: unknown fields are refused, so nothing is assigned by accident."""

    model_config = ConfigDict(extra="forbid")


class TokenRequest(Request):
    """Sign in."""

    email: Email
    password: Annotated[SecretStr, Field(max_length=256)]


class RefreshRequest(Request):
    """Exchange a refresh token; it works once."""

    refresh_token: Annotated[SecretStr, Field(max_length=4096)]


class TokenAnswer(BaseModel):
    """Tokens; ``expires_in`` is the access token's life in seconds."""

    access_token: str
    refresh_token: str
    token_type: Literal["bearer"] = "bearer"
    expires_in: int
    email: str
    role: Role
    customer_id: UUID | None


class UserCreate(Request):
    """A new person. Without ``customer_id`` the caller's own customer is meant; platform admins have none."""

    email: Email
    password: Password
    role: PersonRole
    customer_id: UUID | None = None


class UserChange(Request):
    """What may change; a changed password, role or a disabling ends all sign-ins of the person."""

    password: Password | None = None
    role: PersonRole | None = None
    disabled: bool | None = None


class UserAnswer(BaseModel):
    """A person."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    customer_id: UUID | None
    email: str
    role: Role
    disabled_at: datetime | None
    created_at: datetime


class UserList(BaseModel):
    """A page of people; pass ``next`` as ``after`` for the following one."""

    users: list[UserAnswer]
    next: UUID | None


class ApiKeyCreate(Request):
    """A new key. Role ``agent`` takes ``cluster_id`` and is bound to that cluster."""

    name: Text
    role: Role
    customer_id: UUID | None = None
    cluster_id: UUID | None = None
    expires_at: AwareDatetime | None = None


class ApiKeyAnswer(BaseModel):
    """A key without its secret."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    customer_id: UUID | None
    cluster_id: UUID | None
    name: str
    role: Role
    prefix: str
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    created_at: datetime


class NewApiKeyAnswer(ApiKeyAnswer):
    """A new key; ``key`` is shown this once."""

    key: str


class ApiKeyList(BaseModel):
    """A page of keys; pass ``next`` as ``after`` for the following one."""

    api_keys: list[ApiKeyAnswer]
    next: UUID | None
