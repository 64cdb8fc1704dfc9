"""Find the servers of a running `cloudoptim up` from another terminal."""

from __future__ import annotations

import fcntl
import json
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any


def read_addresses(home: Path) -> dict[str, Any] | None:
    """``run/addresses.json`` of the home, or None when nothing runs there (or another user's).

    A killed `up` leaves the file behind; its lock went with it.
    """
    run = home / "run"
    try:
        if not _is_locked(run / "up.lock"):
            return None
        document = json.loads((run / "addresses.json").read_text())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and isinstance(document.get("addresses"), dict) else None


def _is_locked(file: Path) -> bool:
    """Whether a process holds the lock (``control.supervisor.up.only_one``). A shared try: commands may ask at once."""
    with file.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def adopt_running(home: Path, environ: MutableMapping[str, str]) -> None:
    """Point the settings that are unset at what runs in this home, so that commands work beside `cloudoptim up`.

    Raises:
        UpError: the file named by CLOUDOPTIM_CONFIG cannot be read.
    """
    document = read_addresses(home)
    if document is None:
        return
    from control.supervisor.environment import with_config_file

    addresses = document["addresses"]
    found = {
        "CLOUDOPTIM_CONTROL_URL": addresses.get("control"),
        "CLOUDOPTIM_DAGSTER_URL": addresses.get("dagster"),
        "CLOUDOPTIM_ADMIN_API_KEY": document.get("admin_api_key"),
    }
    given = with_config_file(environ)
    lake = str(addresses.get("lake") or "")
    if lake.startswith("s3://"):
        found["CLOUDOPTIM_LAKE_ROOT"] = lake
        if document.get("sandbox"):  # whose S3 takes any key
            found |= {
                "AWS_ENDPOINT_URL": addresses.get("aws"),
                "AWS_ACCESS_KEY_ID": "AKIACLOUDOPTIMSANDBX",
                "AWS_SECRET_ACCESS_KEY": "sandbox",
            }
    if not given.get("DB_HOST"):
        found["DATABASE_URL"] = addresses.get("postgres")
    if not given.get("REDIS_HOST"):
        found["REDIS_URL"] = addresses.get("redis")
    for variable, value in found.items():
        if value and not given.get(variable):
            environ[variable] = value
