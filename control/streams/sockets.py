"""What both WebSockets share: who may open one, from where, how many, and for how long they are trusted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from uuid import UUID

import msgspec
from fastapi import WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ValidationError

from control.agents.schemas import ErrorMessage
from control.context import AppContext
from control.errors import AppError, Forbidden, TooMany, Unauthenticated
from control.observability import SOCKETS
from control.security.access import check_limits, check_role
from control.security.authentication import credential_of
from control.security.principal import Principal, Role

FIRST_MESSAGE_SECONDS = 5.0
SEND_SECONDS = 10.0
RECHECK_SECONDS = 60.0
MAX_MESSAGE_BYTES = 1024 * 1024
PER_CALLER = 8
PER_CUSTOMER = 2000
# WebSocket close codes: policy violation, try again later.
REFUSED, BUSY = 1008, 1013

First = TypeVar("First", bound=BaseModel)

_open: Counter[tuple[str, UUID]] = Counter()


class Refused(Exception):
    """The socket was closed before it served anybody."""


def origin_allowed(context: AppContext, origin: str | None) -> bool:
    """Programs send no Origin; browsers do, and must come from a page of ours."""
    if origin is None:
        return True
    settings = context.settings
    allowed = {part.strip().rstrip("/") for part in (*settings.cors_origins.split(","), settings.frontend_url)}
    return origin.rstrip("/") in allowed - {""}


class Socket:
    """An accepted and authenticated socket."""

    def __init__(self, socket: WebSocket, context: AppContext, principal: Principal, credential: str) -> None:
        self._socket = socket
        self._context = context
        self.principal = principal
        self._credential = credential
        self._address = context.authenticator.address(socket)
        self._checked_at = time.monotonic()
        self._sending = asyncio.Lock()

    async def send(self, message: BaseModel | bytes) -> None:
        """Send one message; a reader that does not keep up is dropped.

        Raises:
            TimeoutError: the client took no data for ten seconds.
        """
        text = message.decode() if isinstance(message, bytes) else message.model_dump_json()
        async with self._sending, asyncio.timeout(SEND_SECONDS):
            await self._socket.send_text(text)

    async def receive(self) -> dict[str, Any]:
        """The next JSON object a client sent.

        Raises:
            WebSocketDisconnect: it hung up.
            ValueError: not a JSON object, or too long.
        """
        return _object(await self._socket.receive())

    async def recheck(self) -> None:
        """Ask again, once a minute and at once after a revocation, whether the caller may still be here.

        Raises:
            Unauthenticated: not any more.
        """
        if self._context.watch.is_revoked(self.principal.id):
            raise Unauthenticated("The key was revoked.")
        if time.monotonic() - self._checked_at > RECHECK_SECONDS:
            self.principal = await self._context.authenticator.check(self._credential, self._address)
            self._checked_at = time.monotonic()


def _object(message: Any) -> dict[str, Any]:
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1000))
    raw = message.get("text") or message.get("bytes") or b""
    if len(raw) > MAX_MESSAGE_BYTES:
        raise ValueError("a message may have 1 MiB")
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        raise ValueError("not valid JSON") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


@asynccontextmanager
async def opened(
    socket: WebSocket, context: AppContext, roles: tuple[Role, ...], first: type[First], kind: str
) -> AsyncIterator[tuple[Socket, First]]:
    """Authenticate by header before accepting, or by the first message within five seconds after it.

    A wrong header, a foreign Origin or too many sockets are refused before the socket is accepted (HTTP 403).

    Raises:
        Refused: it was closed; there is nothing to do.
    """
    if not origin_allowed(context, socket.headers.get("origin")):
        await socket.close(REFUSED)
        raise Refused
    credential = credential_of(socket)
    principal: Principal | None = None
    try:
        if credential is not None:
            principal = await _authenticate(socket, context, credential, roles)
    except AppError:
        await socket.close(REFUSED)
        raise Refused from None
    await socket.accept()
    try:
        async with asyncio.timeout(FIRST_MESSAGE_SECONDS):
            hello = first.model_validate(_object(await socket.receive()))
        if principal is None or credential is None:
            credential = (getattr(hello, "authorization", None) or "").removeprefix("Bearer ").strip()
            if not credential:
                raise Unauthenticated()
            principal = await _authenticate(socket, context, credential, roles)
        with _counted(principal, kind):
            yield Socket(socket, context, principal, credential), hello
    except WebSocketDisconnect:
        return
    except (Unauthenticated, Forbidden) as error:
        await _refuse(socket, REFUSED, error.code, error.detail)
    except TooMany as error:
        await _refuse(socket, BUSY, error.code, error.detail)
    except AppError as error:
        await _refuse(socket, REFUSED, error.code, error.detail)
    except (TimeoutError, ValidationError, ValueError):
        await _refuse(socket, REFUSED, "invalid", "The first message must be a valid one, within five seconds.")
    raise Refused


async def _authenticate(socket: WebSocket, context: AppContext, credential: str, roles: tuple[Role, ...]) -> Principal:
    principal = await context.authenticator.check(credential, context.authenticator.address(socket))
    await check_limits(context, principal)
    check_role(principal, roles)
    return principal


@contextlib.contextmanager
def _counted(principal: Principal, kind: str):
    owners = [("caller", principal.id, PER_CALLER)]
    if principal.customer_id is not None:
        owners.append(("customer", principal.customer_id, PER_CUSTOMER))
    for name, owner, limit in owners:
        if _open[name, owner] >= limit:
            raise TooMany(f"One {name} may have {limit} open sockets.", retry_after=10)
    for name, owner, _ in owners:
        _open[name, owner] += 1
    SOCKETS.labels(kind).inc()
    try:
        yield
    finally:
        SOCKETS.labels(kind).dec()
        for name, owner, _ in owners:
            _open[name, owner] -= 1
            if not _open[name, owner]:
                del _open[name, owner]


async def _refuse(socket: WebSocket, code: int, name: str, detail: str) -> None:
    with contextlib.suppress(RuntimeError, OSError, TimeoutError, WebSocketDisconnect):
        async with asyncio.timeout(2):
            await socket.send_text(ErrorMessage(code=name, detail=detail).model_dump_json())
            await socket.close(code)
