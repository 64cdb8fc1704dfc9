"""Errors as RFC 9457 problem+json: type, title, status, detail, request id; nothing from the inside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import DataError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from control import errors

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:cloudoptim:problem:"

STATUS: dict[type[errors.AppError], int] = {
    errors.NotFound: 404,
    errors.Invalid: 422,
    errors.Conflict: 409,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.TooLarge: 413,
    errors.UnsupportedMedia: 415,
    errors.UpgradeRequired: 426,
    errors.TooMany: 429,
    errors.Unavailable: 503,
}

HTTP_CODES = {
    400: ("bad_request", "The request could not be read"),
    401: ("unauthenticated", "Authentication required"),
    403: ("forbidden", "Not allowed"),
    404: ("not_found", "Not found"),
    405: ("method_not_allowed", "Method not allowed"),
    406: ("not_acceptable", "Not acceptable"),
    408: ("timeout", "The request took too long to arrive"),
    413: ("too_large", "The body is too large"),
    415: ("unsupported_media_type", "Unsupported content type or encoding"),
}


class Problem(BaseModel):
    """RFC 9457 problem details; ``errors`` names fields where single fields are wrong."""

    type: str = Field(examples=[f"{TYPE_PREFIX}not_found"])
    title: str
    status: int
    detail: str
    request_id: str | None = None
    errors: list[dict[str, Any]] | None = None


def problem_response(
    status: int,
    code: str,
    title: str,
    detail: str,
    *,
    request_id: str | None = None,
    headers: Mapping[str, str] | None = None,
    **extra: Any,
) -> JSONResponse:
    """One problem as an answer."""
    body = {"type": TYPE_PREFIX + code, "title": title, "status": status, "detail": detail}
    if request_id:
        body["request_id"] = request_id
    return JSONResponse(body | extra, status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def from_app_error(error: errors.AppError, request_id: str | None = None) -> JSONResponse:
    """A service's error as an answer."""
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
    headers: dict[str, str] = {}
    if isinstance(error, errors.TooMany | errors.Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return problem_response(
        status, error.code, error.title, error.detail, request_id=request_id, headers=headers, **error.extra
    )


def internal_error(request_id: str | None) -> JSONResponse:
    """The answer to anything unforeseen: an id to quote, and nothing else."""
    return problem_response(
        500,
        "internal",
        "Internal error",
        "Something went wrong on our side. It was logged; quote the request id when you report it.",
        request_id=request_id,
    )


def _request_id(request: Request) -> str | None:
    return request.scope.get("request_id")


async def _app_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.AppError)
    return from_app_error(error, _request_id(request))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code, title = HTTP_CODES.get(error.status_code, ("error", "The request could not be served"))
    detail = "There is no such path." if error.status_code == 404 else str(error.detail)
    if error.status_code == 405:
        detail = f"{request.method} is not allowed here; see /docs."
    return problem_response(
        error.status_code, code, title, detail, request_id=_request_id(request), headers=error.headers
    )


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    fields = [
        {"field": ".".join(str(part) for part in item["loc"]), "reason": item["msg"], "kind": item["type"]}
        for item in error.errors()[:50]
    ]
    first = fields[0]
    more = f" ({len(fields) - 1} more in `errors`)" if len(fields) > 1 else ""
    return problem_response(
        422,
        "invalid",
        errors.Invalid.title,
        f"{first['field']}: {first['reason']}.{more} See /docs for the fields of this request.",
        request_id=_request_id(request),
        errors=fields,
    )


async def _database_busy(request: Request, error: Exception) -> JSONResponse:
    log.warning("database.busy", error=type(error).__name__)
    return from_app_error(
        errors.Unavailable("All database connections are in use; try again.", retry_after=1), _request_id(request)
    )


async def _database_away(request: Request, error: Exception) -> JSONResponse:
    log.error("database.away", error=type(error).__name__)
    return from_app_error(
        errors.Unavailable("The database does not answer right now; try again.", retry_after=2), _request_id(request)
    )


async def _data_error(request: Request, error: Exception) -> JSONResponse:
    return from_app_error(
        errors.Invalid("A value cannot be stored: it holds a NUL character, broken Unicode or a number out of range."),
        _request_id(request),
    )


async def _integrity_error(request: Request, error: Exception) -> JSONResponse:
    log.warning("database.conflict", error=type(getattr(error, "orig", error)).__name__)
    return from_app_error(
        errors.Conflict("The change contradicts something that exists already; read the object again and retry."),
        _request_id(request),
    )


def install(app: FastAPI) -> None:
    """Answer every error of this application as a problem."""
    app.add_exception_handler(errors.AppError, _app_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(PoolTimeout, _database_busy)
    app.add_exception_handler(OperationalError, _database_away)
    app.add_exception_handler(InterfaceError, _database_away)
    app.add_exception_handler(DataError, _data_error)
    app.add_exception_handler(UnicodeEncodeError, _data_error)
    app.add_exception_handler(IntegrityError, _integrity_error)
