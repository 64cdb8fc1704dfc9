"""/auth, /users and /api-keys."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response

from control.context import Context
from control.security import service
from control.security.access import CUSTOMER_ADMINS, require
from control.security.principal import Principal
from control.security.schemas import (
    ApiKeyAnswer,
    ApiKeyCreate,
    ApiKeyList,
    NewApiKeyAnswer,
    RefreshRequest,
    TokenAnswer,
    TokenRequest,
    UserAnswer,
    UserChange,
    UserCreate,
    UserList,
)

router = APIRouter()

Admin = Annotated[Principal, Depends(require(*CUSTOMER_ADMINS))]
Limit = Annotated[int, Query(ge=1, le=500)]


@router.post("/auth/token", tags=["auth"])
async def sign_in(body: TokenRequest, request: Request, context: Context, response: Response) -> TokenAnswer:
    """Sign in with e-mail address and password."""
    response.headers["Cache-Control"] = "no-store"
    address = context.authenticator.address(request)
    return await service.sign_in(context, email=body.email, password=body.password.get_secret_value(), address=address)


@router.post("/auth/refresh", tags=["auth"])
async def refresh(body: RefreshRequest, context: Context, response: Response) -> TokenAnswer:
    """Exchange a refresh token for new tokens. It works once."""
    response.headers["Cache-Control"] = "no-store"
    return await service.refresh(context, body.refresh_token.get_secret_value())


@router.post("/auth/logout", tags=["auth"], status_code=204)
async def sign_out(body: RefreshRequest, context: Context) -> None:
    """End the session of a refresh token, its access tokens included."""
    await service.sign_out(context, body.refresh_token.get_secret_value())


@router.get("/users", tags=["people and keys"])
async def list_users(
    principal: Admin, context: Context, customer_id: UUID | None = None, after: UUID | None = None, limit: Limit = 100
) -> UserList:
    """People, in order of creation."""
    users = await service.list_users(context, principal, customer_id, after, limit)
    return UserList(
        users=[UserAnswer.model_validate(user) for user in users], next=users[-1].id if len(users) == limit else None
    )


@router.post("/users", tags=["people and keys"], status_code=201)
async def create_user(body: UserCreate, principal: Admin, context: Context) -> UserAnswer:
    """A new person."""
    return UserAnswer.model_validate(await service.create_user(context, principal, body))


@router.get("/users/{user_id}", tags=["people and keys"])
async def get_user(user_id: UUID, principal: Admin, context: Context) -> UserAnswer:
    """One person."""
    return UserAnswer.model_validate(await service.get_user(context, principal, user_id))


@router.patch("/users/{user_id}", tags=["people and keys"])
async def change_user(user_id: UUID, body: UserChange, principal: Admin, context: Context) -> UserAnswer:
    """Change a person's password, role, or whether they may sign in; ends their sign-ins."""
    return UserAnswer.model_validate(await service.change_user(context, principal, user_id, body))


@router.delete("/users/{user_id}", tags=["people and keys"], status_code=204)
async def delete_user(user_id: UUID, principal: Admin, context: Context) -> None:
    """Remove a person."""
    await service.delete_user(context, principal, user_id)


@router.get("/api-keys", tags=["people and keys"])
async def list_keys(
    principal: Admin, context: Context, customer_id: UUID | None = None, after: UUID | None = None, limit: Limit = 100
) -> ApiKeyList:
    """Keys without their secrets, in order of creation."""
    keys = await service.list_keys(context, principal, customer_id, after, limit)
    return ApiKeyList(
        api_keys=[ApiKeyAnswer.model_validate(key) for key in keys], next=keys[-1].id if len(keys) == limit else None
    )


@router.post("/api-keys", tags=["people and keys"], status_code=201)
async def create_key(body: ApiKeyCreate, principal: Admin, context: Context, response: Response) -> NewApiKeyAnswer:
    """A new key. Its secret is in this answer and nowhere else."""
    response.headers["Cache-Control"] = "no-store"
    return await service.create_key(context, principal, body)


@router.get("/api-keys/{key_id}", tags=["people and keys"])
async def get_key(key_id: UUID, principal: Admin, context: Context) -> ApiKeyAnswer:
    """One key without its secret."""
    return ApiKeyAnswer.model_validate(await service.get_key(context, principal, key_id))


@router.delete("/api-keys/{key_id}", tags=["people and keys"], status_code=204)
async def revoke_key(key_id: UUID, principal: Admin, context: Context) -> None:
    """Revoke a key; open sockets end within five seconds."""
    await service.revoke_key(context, principal, key_id)
