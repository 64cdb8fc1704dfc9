"""Find the servers of a running `cloudoptim up` from another terminal."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any


def read_addresses(home: Path) -> dict[str, Any] | None:
    """``run/addresses.json`` of the home, or None when nothing runs there (or another user's)."""
    try:
        return json.loads((home / "run" / "addresses.json").read_text())
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return None


def adopt_running(home: Path, environ: MutableMapping[str, str]) -> None:
    """Point the settings that are unset at what runs in this home, so that commands work beside `cloudoptim up`."""
    document = read_addresses(home)
    if document is None:
        return
    addresses = document["addresses"]
    if not environ.get("DB_HOST"):
        _adopt(environ, "DATABASE_URL", addresses.get("postgres"))
    if not environ.get("REDIS_HOST"):
        _adopt(environ, "REDIS_URL", addresses.get("redis"))
    _adopt(environ, "CLOUDOPTIM_CONTROL_URL", addresses.get("control"))
    _adopt(environ, "CLOUDOPTIM_DAGSTER_URL", addresses.get("dagster"))
    _adopt(environ, "CLOUDOPTIM_ADMIN_API_KEY", document.get("admin_api_key"))


def _adopt(environ: MutableMapping[str, str], variable: str, value: str | None) -> None:
    if value and not environ.get(variable):
        environ[variable] = value
