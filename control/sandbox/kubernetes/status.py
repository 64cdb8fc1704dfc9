"""metav1.Status: the errors and acknowledgements of a kube-apiserver, with its wording and details."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An error answered as a metav1.Status; `headers` carries Retry-After where the real server sends it."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        details: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message
        self.details, self.headers, self.metadata = details, headers or {}, metadata or {}

    def status(self) -> dict[str, Any]:
        """The body of the answer."""
        body: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": self.metadata,
            "status": "Failure",
            "message": self.message,
        }
        if self.reason:
            body["reason"] = self.reason
        if self.details:
            body["details"] = self.details
        body["code"] = self.code
        return body


def success(details: dict[str, Any] | None = None, code: int | None = None) -> dict[str, Any]:
    """The Status a deletion or an eviction answers with."""
    body: dict[str, Any] = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
    if details:
        body["details"] = details
    if code:
        body["code"] = code
    return body


def _details(plural: str, name: str, group: str = "", **more: Any) -> dict[str, Any]:
    details: dict[str, Any] = {"name": name, **({"group": group} if group else {}), "kind": plural, **more}
    return details


def _qualified(plural: str, group: str) -> str:
    return f"{plural}.{group}" if group else plural


def not_found(plural: str, name: str, group: str = "") -> ApiError:
    """404 with the real wording: `pods "x" not found`."""
    return ApiError(404, "NotFound", f'{_qualified(plural, group)} "{name}" not found', _details(plural, name, group))


def already_exists(plural: str, name: str, group: str = "") -> ApiError:
    """409 on a create whose name is taken."""
    return ApiError(
        409, "AlreadyExists", f'{_qualified(plural, group)} "{name}" already exists', _details(plural, name, group)
    )


def conflict(plural: str, name: str, group: str = "", why: str | None = None) -> ApiError:
    """409 on a write against an old resourceVersion or a failed precondition."""
    why = why or "the object has been modified; please apply your changes to the latest version and try again"
    return ApiError(
        409,
        "Conflict",
        f'Operation cannot be fulfilled on {_qualified(plural, group)} "{name}": {why}',
        _details(plural, name, group),
    )


def invalid(kind: str, name: str, group: str, field: str, reason: str, message: str) -> ApiError:
    """422 with one cause, as field validation answers."""
    return ApiError(
        422,
        "Invalid",
        f'{_qualified(kind, group)} "{name}" is invalid: {field}: {message}',
        _details(kind, name, group, causes=[{"reason": reason, "message": message, "field": field}]),
    )


def bad_request(message: str) -> ApiError:
    """400."""
    return ApiError(400, "BadRequest", message)


def expired(message: str, continue_token: str | None = None) -> ApiError:
    """410: the resourceVersion or the continue token is older than the history that is kept."""
    return ApiError(410, "Expired", message, metadata={"continue": continue_token} if continue_token else None)


def too_many_requests(message: str, retry_after_seconds: int, cause: str) -> ApiError:
    """429 of the Eviction subresource under a PodDisruptionBudget.

    The real server sends Retry-After only when it has a figure to suggest: 10 while a budget is still being
    processed, none when the budget is simply used up (pkg/registry/core/pod/storage/eviction.go).
    """
    details: dict[str, Any] = {"causes": [{"reason": "DisruptionBudget", "message": cause}]}
    headers = {}
    if retry_after_seconds > 0:
        details["retryAfterSeconds"] = retry_after_seconds
        headers["Retry-After"] = str(retry_after_seconds)
    return ApiError(429, "TooManyRequests", message, details, headers)
