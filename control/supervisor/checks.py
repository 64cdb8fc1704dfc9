"""Is what the server needs there? Each check answers with nothing, or raises one line: cause, setting, what to do."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from control.supervisor.environment import PORTS, listen_error, with_config_file
from control.supervisor.errors import UpError

CONNECT_TIMEOUT_SECONDS = 5
MIN_FREE_BYTES = 256 << 20
MIN_POSTGRES_VERSION = 150000
MIN_REDIS_VERSION = (6, 2)


def where(url: str) -> str:
    """Host, port and path of a URL, without the credentials."""
    parts = urlsplit(url)
    return f"{parts.hostname or 'localhost'}:{parts.port or ''}{parts.path}"


def check_home(home: Path) -> None:
    """The home can be written and has room."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / ".write-probe"
        probe.write_bytes(b"\0" * 65536)
        probe.unlink()
    except OSError as error:
        raise UpError(
            f"cannot write to {home}: {error.strerror}; free space or permissions there, or set CLOUDOPTIM_HOME"
        ) from error
    if (free := shutil.disk_usage(home).free) < MIN_FREE_BYTES:
        raise UpError(
            f"the disk of {home} is full ({free >> 20} MB free, {MIN_FREE_BYTES >> 20} MB needed); "
            "free space or set CLOUDOPTIM_HOME to a larger disk"
        )


def check_port(name: str, port: int, environ: Mapping[str, str] | None = None) -> None:
    """``name`` can listen on its port, at the address its own setting names (in ``environ``, else the process's)."""
    environ = with_config_file(os.environ) if environ is None else environ
    if error := listen_error(port, PORTS[name].host(environ)):
        raise UpError(port_cause(error, name, port, environ)) from error


def port_cause(error: OSError, name: str, port: int, environ: Mapping[str, str]) -> str:
    """Why ``name`` cannot listen, and the setting to change."""
    rule = PORTS[name]
    variable, host = rule.variable(environ), rule.host(environ)
    if error.errno == errno.EADDRINUSE:
        user = _user_of(port)
        return f"port {port} for {name} is in use{user}; stop what uses it or set {variable} to a free port"
    if error.errno == errno.EACCES:
        return f"port {port} for {name} needs root, as ports below 1024 do; set {variable} to a higher one"
    if rule.host_variable and (isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL):
        return (
            f"{name} cannot listen on {host}: it is no address of this machine; "
            f"set {rule.host_variable} to one of its addresses"
        )
    return f"{name} cannot listen on port {port} of {host} ({error.strerror}); see {variable}"


def _user_of(port: int) -> str:
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == "LISTEN" and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        return ""
    return ""


def check_database(url: str, setting: str = "DATABASE_URL") -> None:
    """Postgres answers, is new enough, and does not lose commits."""
    import psycopg

    form = f"{setting} is not a Postgres address; form: postgresql://user:password@host:5432/database"
    try:
        where(url)
    except ValueError as error:
        raise UpError(form) from error
    try:
        with psycopg.connect(url, connect_timeout=CONNECT_TIMEOUT_SECONDS) as connection:
            version = connection.info.server_version
            row = connection.execute(
                "SELECT current_setting('synchronous_commit'), current_setting('fsync')"
            ).fetchone()
    except psycopg.ProgrammingError as error:
        raise UpError(form) from error
    except psycopg.OperationalError as error:
        raise UpError(_postgres_cause(str(error), url, setting)) from error
    if version < MIN_POSTGRES_VERSION:
        raise UpError(f"{setting}: Postgres {version // 10000} is too old; 15 or newer is needed")
    if row and "off" in row:
        raise UpError(
            f"{setting}: this Postgres may lose acknowledged commits (synchronous_commit={row[0]}, fsync={row[1]}); "
            "set both to on"
        )


def _postgres_cause(text: str, url: str, setting: str) -> str:
    parts = urlsplit(url)
    if "password authentication failed" in text or "no password supplied" in text:
        who = f"user {parts.username!r}"
        return f"{setting}: Postgres at {where(url)} refuses the password of {who}; correct it in {setting}"
    if "does not exist" in text:
        return f"{setting}: {text.rpartition('FATAL:')[2].strip()} at {where(url)}; create it or correct {setting}"
    if "Connection refused" in text or "timeout" in text or "timed out" in text:
        return f"{setting}: no Postgres answers at {where(url)}; start it or correct {setting}"
    reason = text.strip().splitlines()[-1].strip()
    return f"{setting}: Postgres at {where(url)}: {reason}; correct {setting}"


def check_redis(url: str, setting: str = "REDIS_URL") -> None:
    """Redis answers and is new enough."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:
        with redis.Redis.from_url(
            url, socket_connect_timeout=CONNECT_TIMEOUT_SECONDS, retry=Retry(NoBackoff(), 0)
        ) as client:
            version = client.info("server")["redis_version"]
    except ValueError as error:
        raise UpError(f"{setting} is not a Redis address ({error}); form: redis://:password@host:6379/0") from error
    except redis.AuthenticationError as error:
        raise UpError(f"{setting}: Redis at {where(url)} refuses the password; correct it in {setting}") from error
    except redis.RedisError as error:
        if "NOAUTH" in str(error):
            raise UpError(f"{setting}: Redis at {where(url)} wants a password; add it to {setting}") from error
        raise UpError(
            f"{setting}: no Redis answers at {where(url)} ({error}); start it or correct {setting}"
        ) from error
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_REDIS_VERSION:
        raise UpError(f"{setting}: Redis {version} is too old; 6.2 or newer is needed")
