"""Asking the running sandbox for something: what the `cloudoptim sandbox …` subcommands are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class SandboxAbsent(Exception):
    """The sandbox is not running, or refused; the message says what to do."""


def call(home: Path, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """One request to the sandbox of a home; returns the decoded answer.

    Raises:
        SandboxAbsent: it does not run, does not answer, or says that the request cannot be served.
    """
    import httpx

    file = home / "sandbox" / "addresses.json"
    if not file.exists():
        raise SandboxAbsent(f"no sandbox runs for {home}; start it with `cloudoptim up` (or `cloudoptim sandbox run`)")
    base = json.loads(file.read_text())["control_endpoint"]
    try:
        response = httpx.request(method, base + path, json=body, timeout=10, trust_env=False)
    except httpx.HTTPError as error:
        raise SandboxAbsent(f"the sandbox at {base} does not answer ({error}); see its log in {home / 'log'}") from None
    answer = response.json()
    if response.is_error:
        raise SandboxAbsent(answer.get("error", f"the sandbox answered {response.status_code}"))
    return answer


def nodes(home: Path) -> list[dict[str, Any]]:
    """All nodes of all clusters, with their instances."""
    return call(home, "GET", "/_sandbox/fleet")


def interrupt(home: Path, *, node: str | None, cluster: str | None, count: int, behaviour: str) -> list[dict[str, Any]]:
    """Interrupt a node, or some random Spot nodes of a cluster or of all; behaviour: terminate, stop or hibernate."""
    wish = {"node": node, "cluster": cluster, "count": count, "behaviour": behaviour}
    return call(home, "POST", "/_sandbox/fleet/interrupt", wish)["interrupted"]
