"""The sandbox's process: AWS, three Kubernetes APIs and the fleet between them, on one event loop.

State lives below `$CLOUDOPTIM_HOME/sandbox` (0700): `identity.json` (ids and secrets), `aws.sqlite`, `fleet.json`,
`clusters/<name>.json`. `addresses.json` is there while the sandbox is ready and is removed when it stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from control.sandbox.aws import SandboxAWS, SandboxConfig
from control.sandbox.aws.replay import keep_time, replay_market
from control.sandbox.fleet.fleet import Fleet, FleetConfig, control_routes
from control.sandbox.fleet.plan import CUSTOMERS
from control.sandbox.identity import CustomerIdentity, load_or_make, write_private
from control.sandbox.kubernetes.kubelet import PodTiming
from control.sandbox.kubernetes.server import QuietServer, clusters_app
from control.sandbox.market import ReplayMarket
from control.sandbox.registration import Registered, register
from control.settings import Settings

log = logging.getLogger("cloudoptim.sandbox")

# Calls kept in memory for `/_sandbox/history`; the file has them all.
HISTORY_LIMIT = 20_000
# EC2's own RunInstances bucket is larger; a sandbox that launches faster than this is in a loop.
RATE_LIMITS = {"RunInstances": (200.0, 5.0)}


class SandboxError(Exception):
    """The sandbox cannot start; the message says why and what to do."""


class SandboxSettings(BaseSettings):
    """How the sandbox behaves, from the environment."""

    model_config = SettingsConfigDict(env_prefix="CLOUDOPTIM_SANDBOX_", extra="ignore")

    port: int = 14566
    """The AWS endpoint."""
    k8s_port: int = 0
    """The Kubernetes APIs; 0: the port of the last start, else any free one."""
    interruption_scale: float = Field(default=FleetConfig().interruption_scale, ge=0)
    """Multiplies the market's hazards: 1 is the real rate, 0 none, 1000 an interruption in a minute to half an hour."""
    speed: float = Field(default=1.0, gt=0)
    """Divides every delay of nodes and pods, but not the 120 s of an interruption notice."""
    notice_seconds: float = Field(default=120.0, gt=0)
    """How long a drawn interruption is announced before; 120 on AWS."""
    replay_prices: Path | None = None
    """A folder of recorded prices (control/sandbox/market/replay.py) to be repeated; unset, prices are generated."""
    replay_from: datetime | None = None
    """The recorded moment (UTC) with which the replay begins."""
    replay_speed: float = Field(default=1.0, gt=0, le=1_000_000)
    """Seconds of the recording per second."""

    def market(self, home: Path) -> ReplayMarket | None:
        """The replay that is wished for, its clock below `home`; raises ValueError when it cannot be."""
        if self.replay_prices is None:
            return None
        if self.replay_from is None:
            raise ValueError("_FROM is not set; give it the recorded day to begin with, as 2023-03-20")
        start = self.replay_from if self.replay_from.tzinfo else self.replay_from.replace(tzinfo=UTC)
        return replay_market(self.replay_prices, start, self.replay_speed, home, in_real_time=True)

    def fleet(self) -> FleetConfig:
        """The fleet's pace."""
        plain, pods = FleetConfig(), PodTiming()

        def faster(seconds: tuple[float, float]) -> tuple[float, float]:
            return seconds[0] / self.speed, seconds[1] / self.speed

        return FleetConfig(
            join_seconds=faster(plain.join_seconds),
            ready_seconds=faster(plain.ready_seconds),
            unreachable_seconds=plain.unreachable_seconds / self.speed,
            removed_seconds=plain.removed_seconds / self.speed,
            orphan_pod_seconds=plain.orphan_pod_seconds / self.speed,
            pods=PodTiming(faster(pods.start_seconds), faster(pods.stop_seconds)),
            interruption_scale=self.interruption_scale,
            rebalance_lead_seconds=faster(plain.rebalance_lead_seconds),
            spared_seconds=plain.spared_seconds / self.speed,
            notice_seconds=self.notice_seconds,
        )


class Sandbox:
    """Everything, started and stopped in order."""

    def __init__(self, home: Path, settings: SandboxSettings, server: Settings) -> None:
        self._folder, self._settings, self._server_settings = home / "sandbox", settings, server
        self.addresses: dict[str, Any] = {}
        self._stack = contextlib.AsyncExitStack()

    @property
    def addresses_file(self) -> Path:
        """Present while the sandbox is ready."""
        return self._folder / "addresses.json"

    async def start(self) -> None:
        """Start, register and say so; raises OSError for a port that is taken."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.addresses_file.unlink(missing_ok=True)
        identities = load_or_make(self._folder / "identity.json", CUSTOMERS)
        try:
            market = self._settings.market(self._folder)
        except (OSError, ValueError) as error:
            raise SandboxError(f"CLOUDOPTIM_SANDBOX_REPLAY_…: {error}") from error
        self.aws = await self._stack.enter_async_context(
            SandboxAWS(
                SandboxConfig(
                    port=self._settings.port,
                    home=self._folder,
                    market=market,
                    boot_seconds=(3.0 / self._settings.speed, 10.0 / self._settings.speed),
                    visibility_delay_seconds=(0.0, 5.0 / self._settings.speed),
                    rate_limits=RATE_LIMITS,
                    capacity_errors=True,
                    state_change_events=True,
                    history_limit=HISTORY_LIMIT,
                )
            )
        )
        if market is not None:
            recorded = market.clock.recorded(datetime.now(UTC))
            log.info("the market repeats %s from %s on", self._settings.replay_prices, f"{recorded:%Y-%m-%d %H:%M} UTC")
            keeping = asyncio.create_task(keep_time(market, log.warning))
            self._stack.push_async_callback(_ended, keeping)
        if self._server_settings.lake_root.startswith("s3://"):
            bucket = urlsplit(self._server_settings.lake_root).netloc
            try:
                await self.aws.ensure_bucket(bucket, os.environ.get("AWS_REGION") or "us-east-1")
            except ValueError as error:
                raise SandboxError(f"CLOUDOPTIM_LAKE_ROOT: {error}") from error
        for identity in identities:
            self.aws.add_account(identity.account_id, external_id=identity.external_id, region=identity.region)
        tokens = {c.cluster_name: c.k8s_token for identity in identities for c in identity.clusters}
        self.fleet = Fleet(self.aws, CUSTOMERS, tokens=tokens, config=self._settings.fleet(), home=self._folder)
        await self.fleet.start()
        self._stack.push_async_callback(self.fleet.stop)
        base = await self._serve_kubernetes()
        registered = self._registered(identities, base)
        await self._register(registered)
        self.addresses = {
            "aws_endpoint": self.aws.url,
            "control_endpoint": base,
            "customers": [_customer_address(customer) for customer in registered],
        }
        write_private(self.addresses_file, json.dumps(self.addresses, indent=1))
        log.info("ready: AWS at %s, Kubernetes at %s", self.aws.url, base)

    async def stop(self) -> None:
        """Stop in reverse order; the state is on disk afterwards."""
        self.addresses_file.unlink(missing_ok=True)
        await self._stack.aclose()

    async def _serve_kubernetes(self) -> str:
        routes = [Route("/_sandbox/ready", self._ready), *control_routes(lambda: self.fleet)]
        app = clusters_app([runtime.cluster for runtime in self.fleet.clusters.values()], routes)
        listening = self._listen()
        server = QuietServer(
            uvicorn.Config(
                app,
                lifespan="off",
                log_level="warning",
                access_log=False,
                ws="none",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=1,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[listening]))

        async def stop() -> None:
            for runtime in self.fleet.clusters.values():
                runtime.cluster.store.close()
            server.should_exit = True
            await serving

        self._stack.push_async_callback(stop)
        while not server.started:
            if serving.done():
                serving.result()
            await asyncio.sleep(0.005)
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    def _listen(self) -> socket.socket:
        """A socket on the wanted port, on that of the last start, or on a free one (kept for the next start)."""
        file = self._folder / "k8s_port"
        kept = int(file.read_text()) if file.exists() else 0
        for port in dict.fromkeys([self._settings.k8s_port or kept, 0]):
            listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listening.bind(("127.0.0.1", port))
            except OSError as error:
                listening.close()
                if self._settings.k8s_port:
                    raise OSError(
                        error.errno,
                        f"CLOUDOPTIM_SANDBOX_K8S_PORT: cannot listen on 127.0.0.1:{port}: {error.strerror}; "
                        "choose another port or stop what uses it",
                    ) from error
                continue
            file.write_text(str(listening.getsockname()[1]))
            return listening
        raise OSError("no free port on 127.0.0.1 for the sandbox's Kubernetes APIs")

    async def _ready(self, request: Request) -> Response:
        """What is safe to show to anybody on this machine; keys and tokens are only in the file."""
        if not self.addresses:
            return JSONResponse({"ready": False}, status_code=503)
        customers = [
            {
                **{key: value for key, value in customer.items() if key not in ("external_id", "clusters")},
                "clusters": [
                    {key: value for key, value in cluster.items() if key not in ("agent_key", "k8s_token")}
                    for cluster in customer["clusters"]
                ],
            }
            for customer in self.addresses["customers"]
        ]
        return JSONResponse({"ready": True, **self.addresses, "customers": customers})

    def _registered(self, identities: tuple[CustomerIdentity, ...], base: str) -> list[Registered]:
        accounts = {account.account_id: account for account in self.aws.accounts()}
        return [
            Registered(
                identity,
                accounts[identity.account_id].role_arn,
                accounts[identity.account_id].queue_url,
                {c.cluster_name: f"{base}/clusters/{c.cluster_name}" for c in identity.clusters},
            )
            for identity in identities
        ]

    async def _register(self, customers: list[Registered]) -> None:
        settings = self._server_settings
        if not (settings.database_url_setting.get_secret_value() or settings.db_host):
            log.warning("DATABASE_URL is not set: the sandbox's customers are not registered with any server")
            return
        # SQLAlchemy and psycopg cost 30 MB for one second of work: in a process of its own.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            failure = await asyncio.get_running_loop().run_in_executor(
                process,
                _register_and_say,
                settings.database_url,
                settings.master_key.get_secret_value(),
                settings.api_key_pepper.get_secret_value(),
                customers,
            )
        if failure:
            raise SandboxError(f"the customers cannot be registered: {failure}")


def _register_and_say(database_url: str, master_key: str, pepper: str, customers: list[Registered]) -> str:
    """`register` in a process of its own: what went wrong in one line, or nothing."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        register(database_url, master_key, pepper, customers)
    except SQLAlchemyError as error:
        return f"{str(error.__cause__ or error).splitlines()[0]}; check DATABASE_URL and run `cloudoptim migrate`"
    except ValueError as error:
        return f"{error}; check CLOUDOPTIM_MASTER_KEY and API_KEY_SALT"
    return ""


def _customer_address(customer: Registered) -> dict[str, Any]:
    identity = customer.identity
    return {
        "customer_id": identity.customer_id,
        "company_name": identity.company_name,
        "account_id": identity.account_id,
        "role_arn": customer.role_arn,
        "external_id": identity.external_id,
        "queue_url": customer.queue_url,
        "clusters": [
            {
                "cluster_id": cluster.cluster_id,
                "cluster_name": cluster.cluster_name,
                "region": cluster.region,
                "k8s_endpoint": customer.endpoints[cluster.cluster_name],
                "k8s_token": cluster.k8s_token,
                "agent_key": cluster.agent_key,
            }
            for cluster in identity.clusters
        ],
    }


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _run(settings: Settings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    sandbox = Sandbox(settings.home, SandboxSettings(), settings)
    try:
        await sandbox.start()
        await stop.wait()
    finally:
        await sandbox.stop()


def run(settings: Settings) -> None:
    """Run the sandbox in the foreground until SIGTERM or SIGINT."""
    logging.basicConfig(
        level=settings.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    try:
        asyncio.run(_run(settings))
    except ValidationError as error:
        wrong = "; ".join(f"CLOUDOPTIM_SANDBOX_{str(d['loc'][0]).upper()}: {d['msg']}" for d in error.errors())
        raise SystemExit(f"cloudoptim sandbox: {wrong}") from None
    except SandboxError as error:
        raise SystemExit(f"cloudoptim sandbox: {error}") from None
    except OSError as error:
        raise SystemExit(f"cloudoptim sandbox: {error} (CLOUDOPTIM_SANDBOX_PORT, CLOUDOPTIM_HOME)") from None
