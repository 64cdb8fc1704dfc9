"""The `cloudoptim` command. Every subcommand runs in the foreground and imports what it needs when it is called."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from control.settings import Settings

Format = Literal["table", "json", "parquet"]

app = typer.Typer(
    name="cloudoptim",
    help="Cut Kubernetes cost on AWS with Spot instances, safely. Start with `cloudoptim up`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
sandbox_app = typer.Typer(help="An AWS account, a market and clusters that live on this machine.", no_args_is_help=True)
lake_app = typer.Typer(help="The lake of computed numbers.", no_args_is_help=True)
app.add_typer(sandbox_app, name="sandbox")
app.add_typer(lake_app, name="lake")


def fail(message: str) -> NoReturn:
    """End with one line that a person can act on."""
    print(f"cloudoptim: {message}", file=sys.stderr)  # noqa: T201
    raise SystemExit(1)


def _variable(alias: str) -> str:
    """The variable that is set, of those that mean the same setting (pydantic names the first of them)."""
    from pydantic import AliasChoices

    from control.settings import Settings

    for field in Settings.model_fields.values():
        if isinstance(field.validation_alias, AliasChoices) and alias in field.validation_alias.choices:
            return next((str(name) for name in field.validation_alias.choices if str(name) in os.environ), alias)
    return alias


def load_settings(*, running: bool = False) -> Settings:
    """The settings, or the end with one line that names the variable; ``running`` fills in a running `up`'s servers."""
    from pydantic import ValidationError

    from control.settings import Settings, SettingsError, get_settings
    from control.supervisor.errors import UpError

    try:
        if running:
            from control.commands.running import adopt_running

            adopt_running(Settings().home, os.environ)  # type: ignore[call-arg]
        return get_settings()
    except ValidationError as error:
        fail(
            "; ".join(
                f"{_variable(str(detail['loc'][0]))}: {detail['msg'].removeprefix('Value error, ')}"
                for detail in error.errors()
            )
        )
    except (SettingsError, UpError) as error:
        fail(str(error))


@app.command()
def up(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show every log line with its process's name.")
    ] = False,
    only: Annotated[str, typer.Option(help="Names, comma separated: start these and what they need.")] = "",
) -> None:
    """Start everything on this machine; with no real AWS settings, with a sandbox."""
    from control.supervisor.up import Up

    names = tuple(name.strip() for name in only.split(",") if name.strip())
    raise SystemExit(Up(load_settings(), only=names, follow=follow).run())


@app.command()
def migrate(
    with_dagster: Annotated[bool, typer.Option("--with-dagster", help="Also Dagster's schema.")] = False,
    revision: Annotated[str, typer.Option(help="Where to go.")] = "head",
    with_lake: Annotated[bool, typer.Option("--lake/--no-lake", help="Also the lake's tables.")] = True,
) -> None:
    """Bring the database's schema and the lake's tables up to date."""
    import psycopg
    from alembic.util import CommandError
    from deltalake.exceptions import DeltaError
    from sqlalchemy.exc import SQLAlchemyError

    from control.settings import SettingsError
    from control.supervisor import checks
    from control.supervisor.errors import UpError
    from warehouse.lake.errors import LakeError
    from warehouse.lake.store import Lake
    from warehouse.postgres.migrate import upgrade

    settings = load_settings(running=True)
    try:
        checks.check_database(settings.database_url)
        upgrade(settings.database_url, revision)
        if with_lake and revision == "head":
            lake = Lake(settings.lake_root, settings.database_url)
            lake.create_tables()
            lake.close()
        if with_dagster:
            from control.supervisor.dagster_home import migrate_dagster

            migrate_dagster(settings.home, settings.database_url)
    except (SettingsError, UpError, LakeError) as error:
        fail(str(error))
    except CommandError as error:
        fail(f"DATABASE_URL: {error}; correct --revision, or use the release this database was migrated with")
    except (SQLAlchemyError, psycopg.Error) as error:
        fail(_database_cause(error))
    except (DeltaError, OSError) as error:
        cause = str(error).splitlines()[0]
        fail(
            f"CLOUDOPTIM_LAKE_ROOT: the lake at {settings.lake_root} cannot be written ({cause}); "
            "check the folder's rights, or the bucket's name, region and AWS credentials"
        )


def _database_cause(error: Exception) -> str:
    """One line for what Postgres refused."""
    import psycopg

    from warehouse.postgres.session import ML_ROLE, SYSTEM_ROLE, TENANT_ROLE

    cause = getattr(error, "orig", None) or error
    text = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    if isinstance(cause, psycopg.errors.InsufficientPrivilege):
        return (
            f"DATABASE_URL: its user may not do this ({text}); let it own the database and have CREATEROLE, "
            f"for the roles {TENANT_ROLE}, {SYSTEM_ROLE} and {ML_ROLE}"
        )
    return f"DATABASE_URL: Postgres could not do this ({text}); correct that and run it again"


@app.command()
def control() -> None:
    """The REST API, WebSockets and event bus (one ASGI app)."""
    import uvicorn

    settings = load_settings()
    uvicorn.run(
        "control.app:served",
        factory=True,
        host=settings.host,
        port=settings.control_port,
        workers=settings.workers,
        log_level=settings.log_level.lower(),
        access_log=False,
        # The application itself decides whose X-Forwarded-For to believe (CLOUDOPTIM_TRUSTED_PROXIES).
        proxy_headers=False,
        server_header=False,
        # uvicorn's default is 16 MiB a frame.
        ws_max_size=1024 * 1024,
        timeout_graceful_shutdown=2,
    )


@app.command()
def worker() -> None:
    """Interruptions, plans, reconcilers, outbox and notifications; any number may run."""
    from control.worker import main

    load_settings()
    main()


@app.command()
def dashboards() -> None:
    """The pages for people."""
    # The one place that looks up: the command line starts the wing above, nothing else here knows it.
    from importlib import import_module

    import_module("dashboards.app").main()


_OWN_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(add_help_option=False, context_settings=_OWN_FLAGS)
def agent(context: typer.Context) -> None:
    """The reference agent of one cluster; its own flags are listed by `cloudoptim agent --help`."""
    from control.agent.main import main

    main(context.args)


@app.command("node-watch", add_help_option=False, context_settings=_OWN_FLAGS)
def node_watch(context: typer.Context) -> None:
    """Reads one node's instance metadata for interruption notices; its own flags: `cloudoptim node-watch --help`."""
    from control.agent.node_watch import main

    main(context.args)


@sandbox_app.command("run")
def sandbox_run() -> None:
    """Run the sandbox in the foreground."""
    from control.sandbox.main import run

    run(load_settings())


@sandbox_app.command("nodes")
def sandbox_nodes() -> None:
    """List the sandbox's nodes with their instances."""
    from control.sandbox.client import SandboxAbsent, nodes

    try:
        rows = nodes(load_settings().home)
    except SandboxAbsent as error:
        fail(str(error))
    _print_table(rows)


@sandbox_app.command("interrupt")
def sandbox_interrupt(
    node: Annotated[str | None, typer.Option(help="Name or instance id of one Spot node.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Random Spot nodes of this cluster.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many random nodes.")] = 1,
    behaviour: Annotated[str, typer.Option(help="terminate, stop, or hibernate (at once).")] = "terminate",
) -> None:
    """Let AWS take Spot nodes back now: warning on the queue, two minutes, then the instance is gone or stopped."""
    from control.sandbox.client import SandboxAbsent, interrupt

    try:
        rows = interrupt(load_settings().home, node=node, cluster=cluster, count=count, behaviour=behaviour)
    except SandboxAbsent as error:
        fail(str(error))
    _print_table(rows)


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*(rows[0] if rows else ()))
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    # Written to a file or a pipe, no column loses half of its ids.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@sandbox_app.command("replay")
def sandbox_replay(
    prices: Annotated[Path, typer.Option(help="Folder with spot_price/region=…/month=….parquet.", exists=True)],
    start: Annotated[
        datetime, typer.Option("--from", help="What the clock says at first (UTC).", formats=["%Y-%m-%d"])
    ],
    speed: Annotated[float, typer.Option(help="Seconds of the recording that pass per second.", min=0.0)] = 1.0,
    port: Annotated[int, typer.Option(envvar="CLOUDOPTIM_SANDBOX_PORT", help="Port of the AWS endpoint.")] = 14566,
    again: Annotated[bool, typer.Option("--again", help="Begin at --from, not where the last replay stopped.")] = False,
) -> None:
    """Serve recorded Spot prices through AWS's price endpoints, in the foreground.

    `cloudoptim up` replays a recording in the whole product when CLOUDOPTIM_SANDBOX_REPLAY_PRICES names its folder.
    """
    import asyncio

    from control.sandbox.aws.replay import serve_replay

    home = load_settings().home / "sandbox" / "replay"
    try:
        asyncio.run(
            serve_replay(
                prices, start.replace(tzinfo=UTC), speed=speed, host="127.0.0.1", port=port, home=home, again=again
            )
        )
    except (OSError, ValueError) as error:
        fail(str(error))


@lake_app.command("sql")
def lake_sql(
    query: Annotated[str, typer.Argument(help="One SELECT statement over the lake's tables.")],
    output: Annotated[Format, typer.Option("--format", help="What to write.")] = "table",
    file: Annotated[Path | None, typer.Option("--out", help="Write here instead of the screen.")] = None,
    customer: Annotated[str | None, typer.Option(help="Only this customer's rows.")] = None,
    as_of: Annotated[str | None, typer.Option(help="As published at this time (ISO 8601, UTC).")] = None,
) -> None:
    """Ask the lake, read-only, at its newest release or an older one."""
    import psycopg
    from deltalake.exceptions import DeltaError

    from control.commands.lake_sql import run_query
    from control.settings import SettingsError
    from control.supervisor import checks
    from control.supervisor.errors import UpError
    from warehouse.lake.errors import LakeError

    settings = load_settings(running=True)
    try:
        note = run_query(settings, query, output, file, customer_id=customer, as_of=as_of)
    except (LakeError, SettingsError, ValueError) as error:
        fail(str(error))
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedObject, psycopg.errors.InvalidParameterValue):
        fail("DATABASE_URL: this database has no tables of ours yet; run `cloudoptim migrate`")
    except psycopg.Error as error:
        try:
            checks.check_database(settings.database_url)
        except UpError as why:
            fail(str(why))
        fail(_database_cause(error))
    except DeltaError as error:
        fail(f"CLOUDOPTIM_LAKE_ROOT: the lake at {settings.lake_root} cannot be read ({str(error).splitlines()[0]})")
    except OSError as error:
        fail(f"{error.filename or file or settings.lake_root}: {error.strerror or error}")
    if note:
        typer.echo(note, err=True)


@app.command("adopt-only")
def adopt_only(
    lift: Annotated[str | None, typer.Option(help="Customer whose instances may be terminated again.")] = None,
    reason: Annotated[str, typer.Option(help="Why; kept in the customer's audit log.")] = "",
) -> None:
    """List customers of whom nothing is terminated because the database was restored from a backup, or lift that."""
    from uuid import UUID

    import psycopg
    from sqlalchemy.exc import SQLAlchemyError

    from control.commands import adopt_only as command

    settings = load_settings(running=True)
    try:
        if lift is not None:
            if not reason.strip():
                fail("--reason: say what was compared and why; it is kept in the customer's audit log")
            command.lift(settings, UUID(lift), reason.strip())
        rows = command.held_back(settings)
    except ValueError as error:
        fail(str(error) if lift is None or "hexadecimal" not in str(error) else f"--lift {lift}: is no customer's id")
    except (SQLAlchemyError, psycopg.Error) as error:
        fail(_database_cause(error))
    for row in rows:
        typer.echo(f"{row['customer']} ({row['company']}) since {row['since']}: {row['reason']}; {row['adopted']}")
    if not rows:
        typer.echo("Nothing is held back: instances of ours are terminated as usual.")


@app.command()
def doctor() -> None:
    """Check every dependency and setting, and say what to do."""
    from control.commands.doctor import run_doctor

    raise SystemExit(run_doctor(load_settings(running=True)))


if __name__ == "__main__":
    app()
