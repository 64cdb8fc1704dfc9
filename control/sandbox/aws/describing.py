"""Filters and page tokens, as all Describe calls have them."""

import base64
import fnmatch
import json
from typing import Any

from control.sandbox.aws.protocol import AwsError


def filters(p: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(name, values) of every Filter."""
    return [(f.get("Name", ""), f.get("Value", [])) for f in p.get("Filter", [])]


def matches_any(value: str, patterns: list[str]) -> bool:
    """AWS filter values know * and ?."""
    return any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns)


def sealed(value: Any) -> str:
    """A page token that carries `value`: nothing is remembered, tokens outlive a restart."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


def opened(token: str) -> Any:
    """What `sealed` put in; raises InvalidNextToken for anything else."""
    try:
        return json.loads(base64.urlsafe_b64decode(token))
    except ValueError:
        raise AwsError("InvalidNextToken", "The token provided is invalid.") from None


def paged(rows: list[dict[str, Any]], p: dict[str, Any], largest: int) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of the page that is asked for, and the token of the next."""
    size = min(int(p.get("MaxResults") or largest), largest)
    first = int(opened(p["NextToken"])) if p.get("NextToken") else 0
    following = first + size
    return rows[first:following], sealed(following) if following < len(rows) else None
