"""The control service's REST API as the dashboards use it: the only way they change anything."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import httpx

TIMEOUT = httpx.Timeout(10.0, connect=2.0)


class ApiError(Exception):
    """The control service refused or could not be reached; the message is fit for a person. ``status`` is 0 when
    there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Caller(Protocol):
    """In whose name a call is made: an access token or key, and what renews the token."""

    credential: str
    refresh_token: str | None


class ControlApi:
    """A client shared by all sessions; every call is made in the name of one person."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        # trust_env off: a proxy variable of the machine must not see people's tokens.
        self._client = httpx.AsyncClient(base_url=f"{base_url}/api/v1", timeout=TIMEOUT, trust_env=False)
        # A refresh token works once: two calls of one page must not spend it together.
        self._renewing = asyncio.Lock()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def token(self, email: str, password: str) -> dict[str, Any]:
        """Answer of POST /auth/token.

        Raises:
            ApiError: wrong credentials, or the service cannot be reached.
        """
        try:
            answer = await self._send("POST", "/auth/token", "", json={"email": email, "password": password})
        except ApiError as error:
            if error.status in (400, 401, 403, 422):
                raise ApiError("E-mail or password is wrong.", error.status) from error
            raise
        return answer.json()

    async def sign_out(self, caller: Caller) -> None:
        """End the person's session at the control service; nothing to do for a key."""
        if caller.refresh_token:
            await self._send("POST", "/auth/logout", "", json={"refresh_token": caller.refresh_token})

    async def get(self, caller: Caller, path: str, **params: Any) -> Any:
        """JSON of a GET.

        Raises:
            ApiError: with the service's own reason.
        """
        return (await self.fetch(caller, path, **params)).json()

    async def post(self, caller: Caller, path: str, body: dict[str, Any]) -> Any:
        """JSON of a POST.

        Raises:
            ApiError: with the service's own reason.
        """
        answer = await self._as(caller, "POST", path, json=body)
        return answer.json() if answer.content else {}

    async def fetch(self, caller: Caller, path: str, **params: Any) -> httpx.Response:
        """The whole answer of a GET, for files that are handed on as they are.

        Raises:
            ApiError: with the service's own reason.
        """
        return await self._as(caller, "GET", path, params=params)

    async def _as(self, caller: Caller, method: str, path: str, **options: Any) -> httpx.Response:
        """A call in the person's name. An access token that is over is renewed once with the refresh token."""
        used = caller.credential
        try:
            return await self._send(method, path, used, **options)
        except ApiError as error:
            if error.status != 401 or not caller.refresh_token:
                raise
        async with self._renewing:
            if caller.credential == used:
                fresh = (
                    await self._send("POST", "/auth/refresh", "", json={"refresh_token": caller.refresh_token})
                ).json()
                caller.credential, caller.refresh_token = fresh["access_token"], fresh["refresh_token"]
        return await self._send(method, path, caller.credential, **options)

    async def _send(self, method: str, path: str, credential: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        try:
            answer = await self._client.request(method, path, headers=headers, **options)
        except httpx.HTTPError as error:
            raise ApiError(
                f"The control service does not answer at {self.base_url} ({type(error).__name__}). "
                "See that it runs (`cloudoptim doctor`), or correct CLOUDOPTIM_CONTROL_URL."
            ) from error
        if answer.is_error:
            raise ApiError(_reason(answer), answer.status_code)
        return answer


def _reason(answer: httpx.Response) -> str:
    """The reason of a problem+json answer, else what the status says."""
    if answer.status_code == 401:
        return "Your sign-in is no longer valid at the control service; sign out and in again."
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    if isinstance(problem, dict):
        for key in ("detail", "title", "error"):
            if isinstance(problem.get(key), str) and problem[key]:
                return problem[key]
    return f"The control service answered {answer.status_code} {answer.reason_phrase}."
