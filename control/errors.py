"""What services raise. They know no HTTP; ``control.problems`` turns each kind into an RFC 9457 answer.

Every message is for the person or program that asked: it names the field, says why, and what to do next. None holds
SQL, a stack, a secret or another customer's data.
"""

from __future__ import annotations

from typing import Any


class AppError(Exception):
    """Base. ``code`` is stable and part of the API; ``extra`` are further members of the answer."""

    code = "error"
    title = "The request could not be served"

    def __init__(self, detail: str, *, code: str | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or type(self).code
        self.extra = extra


class NotFound(AppError):
    """No such thing, or a thing of another customer: the two are told apart by nobody."""

    code = "not_found"
    title = "Not found"

    def __init__(self, what: str = "object") -> None:
        super().__init__(f"There is no such {what}, or it is not yours to see.")


class Invalid(AppError):
    """The request contradicts the contract."""

    code = "invalid"
    title = "The request is not valid"


class Conflict(AppError):
    """The request contradicts the state of things."""

    code = "conflict"
    title = "The request conflicts with the current state"


class Unauthenticated(AppError):
    """No credentials, or credentials that do not hold. Which of the two is not told."""

    code = "unauthenticated"
    title = "Authentication required"

    def __init__(self, detail: str = "Send an API key or an access token as `Authorization: Bearer …`.") -> None:
        super().__init__(detail)


class Forbidden(AppError):
    """The role may not do this to anything."""

    code = "forbidden"
    title = "Not allowed for this role"


class TooLarge(AppError):
    """A body over its limit."""

    code = "too_large"
    title = "The body is too large"


class UnsupportedMedia(AppError):
    """A content type or encoding that this route does not read."""

    code = "unsupported_media_type"
    title = "Unsupported content type or encoding"


class UpgradeRequired(AppError):
    """A client that speaks a newer or older contract than the server."""

    code = "unsupported_schema_version"
    title = "Unsupported schema version"


class TooMany(AppError):
    """A limit was reached; ``retry_after`` is in seconds."""

    code = "rate_limited"
    title = "Too many requests"

    def __init__(self, detail: str, *, retry_after: float, code: str | None = None) -> None:
        super().__init__(detail, code=code)
        self.retry_after = retry_after


class Unavailable(AppError):
    """Something the server needs does not answer right now; ``retry_after`` is in seconds."""

    code = "unavailable"
    title = "Temporarily unavailable"

    def __init__(self, detail: str, *, retry_after: float = 2.0) -> None:
        super().__init__(detail)
        self.retry_after = retry_after
