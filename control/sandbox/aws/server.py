"""The sandbox's AWS: one HTTP endpoint for all services, to be named by AWS_ENDPOINT_URL.

As a fixture, in the loop of the test or in a thread of its own (port 0 unless given):

    async with SandboxAWS(SandboxConfig()) as aws:
        account = aws.add_account("111111111111", external_id="x-1")
        sts = boto3.client("sts", endpoint_url=aws.url, region_name="us-east-1", **aws.credentials().boto3())
        aws.inject(Fault(mode="drop_after", action="RunInstances", nth=2))
        aws.interrupt(instance_id)                      # message on account.queue_url, two minutes, then gone
        aws.send_event(account.queue_url, {"any": "body"})
        calls = aws.history(action="RunInstances")

    with SandboxAWSThread(SandboxConfig()) as aws:      # the same methods, from any thread
        ...

boto3 calls block, so a test that runs `SandboxAWS` in its own loop must make them in another thread
(`asyncio.to_thread`) or use `SandboxAWSThread`.

Over HTTP, for scripts and people: `/_sandbox/health`, `/_sandbox/history`, `/_sandbox/faults`, `/_sandbox/instances`,
`/_sandbox/interrupt`, `/_sandbox/events`, `/_sandbox/accounts`.
"""

import asyncio
import contextlib
import copy
import json
import logging
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, get_args
from urllib.parse import parse_qsl, unquote

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from control.sandbox.aws import events
from control.sandbox.aws.accounts import Account, Accounts, Credentials
from control.sandbox.aws.autoscaling import ACTIONS as LIFECYCLE_ACTIONS
from control.sandbox.aws.autoscaling import AutoScaling, LifecycleAction
from control.sandbox.aws.buckets import Buckets
from control.sandbox.aws.ec2 import Ec2
from control.sandbox.aws.fallback import Moto
from control.sandbox.aws.faults import Fault, Faults
from control.sandbox.aws.history import History, redacted
from control.sandbox.aws.instances import Behaviour, Instance, Instances
from control.sandbox.aws.pricing import PriceList, decode
from control.sandbox.aws.protocol import Answer, AwsError, Call, Caller, error_answer, nest
from control.sandbox.aws.spot_history import SpotHistory
from control.sandbox.aws.sqs import Queue, Sqs
from control.sandbox.aws.storage import Storage
from control.sandbox.market import GeneratedMarket, Market, load_catalogue

DEFAULT_PLATFORM_ACCOUNT = "999900000000"
_log = logging.getLogger(__name__)
Listener = Callable[[Instance, str], None]


@dataclass(frozen=True, slots=True)
class SandboxConfig:
    """How this AWS behaves. The defaults suit tests, no luck involved; the sandbox process switches the luck on."""

    host: str = "127.0.0.1"
    port: int = 0
    home: Path | None = None
    """Where state is kept over restarts (`aws.sqlite`, `s3.sqlite`, `aws_history.jsonl`); None keeps nothing."""
    platform_account_id: str = DEFAULT_PLATFORM_ACCOUNT
    """The account of the server itself, which assumes the customers' roles. Unknown access keys belong to it."""
    market: Market | None = None
    """Prices, hazards and capacity; a GeneratedMarket by default."""
    boot_seconds: tuple[float, float] = (0.0, 0.0)
    """Range of the time an instance is pending."""
    visibility_delay_seconds: tuple[float, float] = (0.0, 0.0)
    """Range of the time after which Describe shows a new instance; AWS: up to some 30 s."""
    describe_page_size: int = 100
    """EC2 gives 1,000 at most, and may give fewer. To write a page holds up all else that the double's process does."""
    price_page_size: int = 1_000
    rate_limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    """EC2 action to (burst, calls per second) per account and region; beyond it RequestLimitExceeded."""
    capacity_errors: bool = False
    """Whether launches meet the market's shortages."""
    state_change_events: bool = False
    """Whether the account's queue also receives state-change notifications."""
    history_limit: int = 200_000
    """Calls kept in memory (about 400 bytes each); the file has all of them."""


class _Abort(Exception):
    """Cut the connection without an answer."""


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol with the transport within the application's reach, so that connections can be cut."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["cloudoptim.transport"] = self.transport  # type: ignore[typeddict-unknown-key]


class _Server(uvicorn.Server):
    """uvicorn without its hands on the process's signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class SandboxAWS:
    """The endpoint, inside the running event loop. All methods are for that loop's thread."""

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self.config = config or SandboxConfig()
        self.market: Market = self.config.market or GeneratedMarket()
        self.url = ""
        self._listeners: list[Listener] = []
        self._timer: asyncio.TimerHandle | None = None
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    # life -----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Restore the state and listen; raises OSError naming the address when the port is taken."""
        home = self.config.home
        self._storage = Storage(home / "aws.sqlite" if home else None)
        self._history = History(home / "aws_history.jsonl" if home else None, self.config.history_limit)
        self._faults = Faults()
        self._accounts = Accounts(self._storage, self.config.platform_account_id)
        self._instances = Instances(self._storage)
        self._sqs = Sqs(self._storage, lambda: self.url)
        self._ec2 = Ec2(
            self._instances,
            self.market,
            boot_seconds=self.config.boot_seconds,
            visibility_delay_seconds=self.config.visibility_delay_seconds,
            describe_page_size=self.config.describe_page_size,
            buckets=self.config.rate_limits,
            capacity_errors=self.config.capacity_errors,
            changed=self._changed,
        )
        self._prices = SpotHistory(self.market, self.config.price_page_size)
        self._price_list = PriceList(self.market, load_catalogue())
        self._moto = Moto(Buckets(home / "s3.sqlite") if home else None)
        self._autoscaling = AutoScaling()
        # asyncio switches Nagle off only on sockets that name their protocol; without it every answer takes 40 ms
        family = socket.AF_INET6 if ":" in self.config.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self.config.host, self.config.port))
        except OSError as error:
            listening.close()
            raise OSError(
                error.errno,
                f"the sandbox's AWS cannot listen on {self.config.host}:{self.config.port}: {error.strerror}",
            ) from error
        self.url = f"http://{self.config.host}:{listening.getsockname()[1]}"
        uvicorn_config = uvicorn.Config(
            self._application,
            http=_Protocol,
            interface="asgi3",
            proxy_headers=False,
            ws="none",
            lifespan="off",
            log_level="critical",
            access_log=False,
            timeout_keep_alive=65,
            timeout_graceful_shutdown=1,
            backlog=2048,
        )
        self._server = _Server(uvicorn_config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(0.005)
        # what happened to instances while the sandbox was down is told now
        self._changed(list(self._instances.by_id.values()))

    async def stop(self) -> None:
        """Stop listening within a second, long polls included, and close the files."""
        self._sqs.close()
        if self._timer is not None:
            self._timer.cancel()
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
        self._moto.close()
        self._storage.close()
        self._history.close()

    async def __aenter__(self) -> "SandboxAWS":
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def ensure_bucket(self, name: str, region: str) -> None:
        """A bucket of the platform's own account; nothing happens where there is one."""
        document = "" if region == "us-east-1" else f"<LocationConstraint>{region}</LocationConstraint>"
        signed = f"AWS4-HMAC-SHA256 Credential=SANDBOX/20260101/{region}/s3/aws4_request"
        answer = await asyncio.get_running_loop().run_in_executor(
            None,
            lambda: self._moto.call(
                method="PUT",
                path=f"/{name}",
                query=b"",
                headers=[(b"authorization", signed.encode()), (b"host", b"127.0.0.1")],
                body=f"<CreateBucketConfiguration>{document}</CreateBucketConfiguration>".encode() if document else b"",
                account_id=self.config.platform_account_id,
                service="s3",
                region=region,
            ),
        )
        if answer.status >= 400 and b"BucketAlreadyOwnedByYou" not in answer.body:
            raise ValueError(f"the bucket {name} cannot be made: {answer.body.decode()[:300]}")

    # accounts -------------------------------------------------------------------------------------------------------

    def add_account(
        self,
        account_id: str,
        *,
        external_id: str,
        role_arn: str | None = None,
        queue_name: str = "cloudoptim-events",
        region: str = "us-east-1",
        queue_attributes: dict[str, str] | None = None,
    ) -> Account:
        """An account with a role we may assume with `external_id` and a queue of events in `region`.

        Adding one that exists updates role and external id and keeps the queue with its messages.
        """
        queue = self._sqs.create(account_id, region, queue_name, queue_attributes)
        return self._accounts.add(
            Account(
                account_id=account_id,
                role_arn=role_arn or f"arn:aws:iam::{account_id}:role/CloudOptim",
                external_id=external_id,
                queue_url=self._sqs.url(queue),
                region=region,
            )
        )

    def accounts(self) -> list[Account]:
        """All customers' accounts; queue URLs carry the address of this start."""
        for account in self._accounts.by_id.values():
            with contextlib.suppress(AwsError):  # a customer may have deleted the queue
                account.queue_url = self._sqs.url(self._sqs.find(account.queue_url))
        return list(self._accounts.by_id.values())

    def credentials(self, account_id: str | None = None) -> Credentials:
        """Long-lived keys: of the platform (default), or of a customer's own administrator."""
        return self._accounts.credentials(account_id or self.config.platform_account_id)

    def expire_credentials(self, account_id: str) -> None:
        """Every session handed out so far for this account is expired from now on."""
        account = self._accounts.by_id[account_id]
        account.generation += 1
        self._accounts.save(account)

    def revoke_role(self, account_id: str, *, revoked: bool = True) -> None:
        """The customer removes our role (or puts it back)."""
        account = self._accounts.by_id[account_id]
        account.revoked = revoked
        self._accounts.save(account)

    # queues ---------------------------------------------------------------------------------------------------------

    def create_queue(
        self, account_id: str, name: str, *, region: str = "us-east-1", attributes: dict[str, str] | None = None
    ) -> str:
        """Another queue; answers its URL."""
        return self._sqs.url(self._sqs.create(account_id, region, name, attributes))

    def send_event(self, queue: str, body: str | dict[str, Any], *, delay_seconds: int = 0) -> str:
        """Deliver a body (dicts as JSON) as EventBridge would; `queue`: a URL or account id. Answers the message id."""
        text = body if isinstance(body, str) else json.dumps(body)
        (message,) = self._sqs.send(self._queue(queue), [text], delay_seconds=delay_seconds)
        return message.id

    def _tell(self, account_id: str, body: str) -> str | None:
        """Deliver to an account's queue as a rule of EventBridge does: where the queue is gone, the event is lost."""
        try:
            return self.send_event(account_id, body)
        except AwsError as error:
            _log.warning("an event for account %s is lost: %s", account_id, error)
            return None

    def send_events(self, queue: str, bodies: Iterable[str | dict[str, Any]]) -> list[str]:
        """Many at once, for storms."""
        texts = [b if isinstance(b, str) else json.dumps(b) for b in bodies]
        return [m.id for m in self._sqs.send(self._queue(queue), texts)]

    def queue_depth(self, queue: str) -> tuple[int, int]:
        """(visible, in flight or delayed)."""
        return self._sqs.depth(self._queue(queue))

    def _queue(self, queue: str) -> Queue:
        if queue in self._accounts.by_id:
            queue = self._accounts.by_id[queue].queue_url
        return self._sqs.find(queue)

    # instances ------------------------------------------------------------------------------------------------------

    def instances(
        self, *, account_id: str | None = None, region: str | None = None, states: Iterable[str] | None = None
    ) -> list[Instance]:
        """Copies of the instances, invisible ones included, oldest first."""
        now = self._instances.clock()
        wanted = set(states) if states is not None else None
        chosen = [
            copy.copy(i)
            for i in self._instances.by_id.values()
            if (account_id is None or i.account_id == account_id)
            and (region is None or i.region == region)
            and (wanted is None or i.state(now) in wanted)
        ]
        return sorted(chosen, key=lambda i: (i.launched_at, i.instance_id))

    def on_change(self, listener: Listener) -> None:
        """Call `listener(instance, state)` when an instance reaches a state: pending, running, shutting-down, …"""
        self._listeners.append(listener)

    def interrupt(
        self,
        instance_id: str,
        *,
        notice_seconds: float = 120.0,
        send_event: bool = True,
        behaviour: Behaviour = "terminate",
    ) -> str | None:
        """AWS takes a Spot instance back: warning now, shutdown after the notice. Answers the message id, None when
        nothing was sent or nobody has the queue any more.

        `behaviour` "stop" stops it instead, "hibernate" does so at once, as hibernation begins with its notice. A
        second warning of the same instance is sent, but neither postpones nor changes what the first announced.
        `send_event=False` is the lost notice: only the Spot request's status and the instance's state tell. Raises
        KeyError for an unknown instance and ValueError for one that is not a running Spot instance, or for a behaviour
        there is not.
        """
        if behaviour not in get_args(Behaviour):
            raise ValueError(f"behaviour {behaviour!r} is none of {', '.join(get_args(Behaviour))}")
        instance = self._running(instance_id)
        if instance.lifecycle != "spot":
            raise ValueError(f"{instance_id} is an on-demand instance; only Spot instances are interrupted")
        self._instances.interrupt(instance, notice_seconds, behaviour)
        self._history.add(
            service="sandbox", action="Interruption", account=instance.account_id, region=instance.region,
            params={"notice_seconds": notice_seconds, "behaviour": behaviour}, outcome="ok",
            result={"instance_ids": [instance_id]},
        )  # fmt: skip
        message_id = None
        if send_event:
            body = events.interruption_warning(
                instance_id, account_id=instance.account_id, region=instance.region, zone_name=instance.zone_name,
                at=datetime.now(UTC), action=instance.interruption_behaviour,
            )  # fmt: skip
            message_id = self._tell(instance.account_id, body)
        self._changed([instance])
        return message_id

    def recommend_rebalance(self, instance_id: str) -> str | None:
        """Send a rebalance recommendation; answers the message id, None when the queue is gone."""
        instance = self._running(instance_id)
        instance.rebalance_at = self._instances.clock()
        self._instances.save([instance])
        body = events.rebalance_recommendation(
            instance_id, account_id=instance.account_id, region=instance.region, zone_name=instance.zone_name,
            at=datetime.now(UTC),
        )  # fmt: skip
        return self._tell(instance.account_id, body)

    def schedule_retirement(self, instance_id: str, *, in_seconds: float = 14 * 86_400.0) -> str | None:
        """Announce a retirement through AWS Health; answers the message id, None when the queue is gone."""
        instance = self._running(instance_id)
        starts_at = datetime.now(UTC) + timedelta(seconds=in_seconds)
        instance.scheduled_event = {
            "instanceEventId": f"instance-event-{instance_id[2:]}",
            "code": "instance-retirement",
            "description": "The instance is running on degraded hardware",
            "notBefore": starts_at.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        }
        self._instances.save([instance])
        body = events.scheduled_retirement(
            instance_id,
            account_id=instance.account_id,
            region=instance.region,
            at=datetime.now(UTC),
            starts_at=starts_at,
        )
        return self._tell(instance.account_id, body)

    def begin_lifecycle_action(
        self,
        instance_id: str,
        transition: str = "terminating",
        *,
        group_name: str = "workers",
        hook_name: str = "drain",
        timeout_seconds: float = 3600.0,
        direct: bool = False,
    ) -> LifecycleAction:
        """A group launches or ends an instance and waits for its hook; the queue is told by EventBridge, or by the
        group itself (`direct`). The action answered is the double's own: it shows heartbeats and the result."""
        instance = self._instances.by_id[instance_id]
        action = self._autoscaling.begin(
            LifecycleAction(
                instance.account_id, instance.region, group_name, hook_name, instance_id, transition, timeout_seconds
            )
        )
        self._tell(instance.account_id, events.lifecycle_action(action, at=datetime.now(UTC), direct=direct))
        return action

    def terminate(self, instance_id: str, *, reason: str = "Client.UserInitiatedShutdown") -> None:
        """Somebody ends the instance, outside of any API call of ours."""
        instance = self._instances.by_id[instance_id]
        self._instances.terminate(instance, reason)
        self._changed([instance])

    def resume(self, instance_id: str) -> None:
        """EC2 has capacity again for an instance it stopped or hibernated. Raises KeyError for an unknown instance and
        ValueError for one that is not stopped."""
        instance = self._instances.by_id[instance_id]
        state = instance.state(self._instances.clock())
        if state != "stopped":
            raise ValueError(f"{instance_id} is {state}; only what is stopped is started again")
        self._instances.resume(instance, random.uniform(*self.config.boot_seconds))
        self._changed([instance])

    def _running(self, instance_id: str) -> Instance:
        instance = self._instances.by_id[instance_id]
        state = instance.state(self._instances.clock())
        if state not in ("pending", "running"):
            raise ValueError(f"{instance_id} is {state}")
        return instance

    def _changed(self, instances: list[Instance]) -> None:
        """Announce states that were reached, and set the one timer for the next one."""
        now = self._instances.clock()
        told = []
        for instance in instances:
            state = instance.state(now)
            if state == instance.announced:
                continue
            instance.announced = state
            told.append(instance)
            self._history.add(
                service="sandbox", action="StateChange", account=instance.account_id, region=instance.region,
                params={"state": state, "reason": instance.reason_code}, outcome="ok",
                result={"instance_ids": [instance.instance_id]},
            )  # fmt: skip
            if self.config.state_change_events and instance.account_id in self._accounts.by_id:
                self._tell(
                    instance.account_id,
                    events.state_change(
                        instance.instance_id, state, account_id=instance.account_id, region=instance.region,
                        at=datetime.now(UTC),
                    ),
                )  # fmt: skip
            for listener in self._listeners:
                listener(copy.copy(instance), state)
        if told:
            self._instances.save(told)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        moments = [m for i in self._instances.by_id.values() if (m := i.next_moment(now)) is not None]
        if moments:
            delay = max(0.0, min(moments) - now) + 0.002
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._instances.forget_old()
        self._changed(list(self._instances.by_id.values()))

    # faults and history ---------------------------------------------------------------------------------------------

    def inject(self, fault: Fault | dict[str, Any]) -> int:
        """Make a fault happen; answers its id. The nth counts from now."""
        return self._faults.inject(fault if isinstance(fault, Fault) else Fault.from_document(fault))

    def clear_faults(self, fault_id: int | None = None) -> None:
        self._faults.clear(fault_id)

    def history(self, *, action: str | None = None, since_seq: int = 0) -> list[dict[str, Any]]:
        """Calls so far, oldest first: seq, at, service, action, region, account, session, params, outcome, result, …"""
        return list(self._history.entries(action=action, since_seq=since_seq))

    # HTTP -----------------------------------------------------------------------------------------------------------

    async def _application(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        chunks = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        body = b"".join(chunks)
        after: Fault | None = None
        try:
            if scope["path"].startswith("/_sandbox/"):
                answer = self._control(scope["method"], scope["path"], scope["query_string"], body)
            else:
                answer, after = await self._serve(scope, body, receive)
        except _Abort:
            scope["cloudoptim.transport"].abort()
            return
        except Exception:
            _log.exception("the sandbox's AWS failed on %s %s", scope["method"], scope["path"])
            answer = Answer(500, b"the sandbox failed; its log has the reason", "text/plain")
        if after is not None and after.mode == "truncate":
            half = answer.body[: len(answer.body) // 2]
            await _send(send, Answer(answer.status, half, answer.content_type, answer.headers), length=len(answer.body))
            scope["cloudoptim.transport"].close()
            return
        await _send(send, answer)
        if after is not None and after.mode == "signal" and after.moment == "answered":
            after.send_signal()

    async def _serve(self, scope: Any, body: bytes, receive: Any) -> tuple[Answer, Fault | None]:
        headers = dict(scope["headers"])
        service, region, key_id, token = _credential(headers, scope["query_string"])
        started = time.perf_counter()
        is_json = b"x-amz-target" in headers and service in ("sqs", "pricing")
        action = _action(service, headers, scope, body)
        call = Call(service, region, action, {}, Caller("", "", key_id), is_json)
        outcome = "ok"
        fault: Fault | None = None
        answer: Answer | None = None
        try:
            call.caller = self._accounts.caller(service, key_id, token)
            call.params = _params(service, is_json, body, scope["query_string"])
            fault = self._faults.strike(call)
            if fault is not None:
                outcome = f"fault:{fault.mode}"
                answer = await self._before(fault, call, receive)
            if answer is None:
                answer = await self._dispatch(call, scope, headers, body, receive, fault)
            if fault is not None:
                answer = await self._afterwards(fault, answer, receive)
        except AwsError as error:
            outcome = f"error:{error.code}" if fault is None else f"{outcome}:{error.code}"
            answer = error_answer(service, is_json, call.request_id, error)
        except _Abort:
            outcome = outcome if fault is not None else "client left"
            raise
        finally:
            self._history.add(
                service=service,
                action=action,
                region=region,
                account=call.caller.account_id,
                session=call.caller.session_name,
                access_key_id=call.caller.access_key_id,
                params=redacted(call.params),
                outcome=outcome,
                status=answer.status if answer is not None else None,
                result=call.result,
                request_id=call.request_id,
                duration_ms=round((time.perf_counter() - started) * 1000, 3),
            )
        return answer, fault

    async def _dispatch(
        self, call: Call, scope: Any, headers: dict[bytes, bytes], body: bytes, receive: Any, fault: Fault | None
    ) -> Answer:
        loop = asyncio.get_running_loop()
        if call.service == "sqs":
            if call.action == "ReceiveMessage":
                duplicate = fault is not None and fault.mode == "duplicate"
                return await _unless_client_leaves(self._sqs.handle(call, duplicate=duplicate), receive)
            return await self._sqs.handle(call)
        if call.service == "ec2":
            if call.action == "DescribeSpotPriceHistory":
                self._ec2.throttle(call)
                return await loop.run_in_executor(None, self._prices.handle, call)
            if self._ec2.knows(call.action):
                return self._ec2.handle(call)
        if call.service == "sts" and call.action == "AssumeRole":
            return self._accounts.assume_role(call)
        if call.service == "sts" and call.action == "GetCallerIdentity":
            return self._accounts.get_caller_identity(call)
        if call.service == "autoscaling" and call.action in LIFECYCLE_ACTIONS:
            return self._autoscaling.handle(call)
        if call.service == "pricing":
            return await loop.run_in_executor(None, self._price_list.handle, call)
        return await loop.run_in_executor(
            None,
            lambda: self._moto.call(
                method=scope["method"],
                path=unquote(scope["raw_path"].decode("latin-1")) if "raw_path" in scope else scope["path"],
                query=scope["query_string"],
                headers=list(scope["headers"]),
                body=body,
                account_id=call.caller.account_id,
                service=call.service,
                region=call.region,
            ),
        )

    async def _before(self, fault: Fault, call: Call, receive: Any) -> Answer | None:
        match fault.mode:
            case "drop_before":
                raise _Abort
            case "hang":
                await _silence(fault.seconds, receive)
                raise _Abort
            case "delay":
                await asyncio.sleep(fault.seconds or 0.0)
            case "error":
                raise AwsError(fault.code, fault.message, fault.status)
            case "ice":
                raise AwsError(
                    "InsufficientInstanceCapacity",
                    "There is no Spot capacity available that matches your request.",
                    500,
                )
            case "throttle":
                if call.service == "ec2":
                    raise AwsError("RequestLimitExceeded", "Request limit exceeded.", 503)
                raise AwsError("ThrottlingException", "Rate exceeded", 400)
            case "http_error":
                page = f"<html><body><h1>{fault.status} Service Unavailable</h1></body></html>"
                return Answer(fault.status, page.encode(), "text/html")
            case "signal" if fault.moment == "before":
                fault.send_signal()
                if fault.signal_number == signal.SIGKILL:
                    # Whoever was killed before the call never made it.
                    raise _Abort
        return None

    async def _afterwards(self, fault: Fault, answer: Answer, receive: Any) -> Answer:
        match fault.mode:
            case "drop_after":
                raise _Abort
            case "hang_after":
                await _silence(fault.seconds, receive)
                raise _Abort
            case "garbage":
                return Answer(200, b"<not <xml {nor json", answer.content_type)
            case "rewrite":
                text = re.sub(fault.pattern, fault.replacement, answer.body.decode())
                return Answer(answer.status, text.encode(), answer.content_type, answer.headers)
            case "signal" if fault.moment == "applied":
                fault.send_signal()
        return answer

    def _control(self, method: str, path: str, query: bytes, body: bytes) -> Answer:
        """The control API; loopback only, like everything here."""
        arguments = dict(parse_qsl(query.decode()))
        try:
            document = decode(body) if method in ("POST", "PUT") else {}
            value = self._controlled(method, path.removeprefix("/_sandbox/"), arguments, document)
        except (KeyError, TypeError, ValueError, AwsError) as error:
            return Answer(400, msgspec.json.encode({"error": str(error)}), "application/json")
        if value is None:
            known = "health, accounts, events, faults, history, instances, interrupt"
            return Answer(
                404,
                msgspec.json.encode({"error": f"unknown path; known under /_sandbox/: {known}"}),
                "application/json",
            )
        return Answer(200, msgspec.json.encode(value), "application/json")

    def _controlled(self, method: str, path: str, arguments: dict[str, str], document: dict[str, Any]) -> Any:
        match method, path:
            case "GET", "health":
                return {"status": "ok", "now": self.market.now().isoformat()}
            case "GET", "accounts":
                return [_shown(account) for account in self.accounts()]
            case "POST", "accounts":
                return _shown(self.add_account(**document))
            case "POST", "events":
                return {"message_id": self.send_event(document["queue"], document["body"])}
            case "GET", "faults":
                return [{k: v for k, v in asdict(f).items() if not k.startswith("_")} for f in self._faults.active()]
            case "POST", "faults":
                return {"id": self.inject(document)}
            case "DELETE", "faults":
                self.clear_faults(int(arguments["id"]) if "id" in arguments else None)
                return {"active": len(self._faults.active())}
            case "GET", "history":
                entries = self.history(action=arguments.get("action"), since_seq=int(arguments.get("since_seq", 0)))
                return entries[-int(arguments.get("limit", 1000)) :]
            case "GET", "instances":
                now = self._instances.clock()
                return [
                    {**asdict(i), "state": i.state(now)} for i in self.instances(account_id=arguments.get("account_id"))
                ]
            case "POST", "interrupt":
                return {"message_id": self.interrupt(**document)}
        return None


def _shown(account: Account) -> dict[str, Any]:
    """An account for anybody on this machine: the external id is a secret, which addresses.json tells its owner."""
    return {name: value for name, value in asdict(account).items() if name != "external_id"}


class SandboxAWSThread:
    """`SandboxAWS` in a thread with its own event loop; every method of it can be called from any thread."""

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self._aws = SandboxAWS(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox-aws", daemon=True)

    @property
    def url(self) -> str:
        return self._aws.url

    @property
    def market(self) -> Market:
        return self._aws.market

    def start(self) -> None:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._aws.start(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._aws.stop(), self._loop).result()
        self._end_loop()

    def _end_loop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._loop.shutdown_default_executor(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "SandboxAWSThread":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._aws, name)

        def forwarded(*args: Any, **kwargs: Any) -> Any:
            async def run() -> Any:
                return method(*args, **kwargs)

            return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

        return forwarded


async def _send(send: Any, answer: Answer, *, length: int | None = None) -> None:
    names = {name for name, _ in answer.headers}
    headers = [(b"content-type", answer.content_type.encode()), *answer.headers]
    if b"content-length" not in names:
        headers.append((b"content-length", str(len(answer.body) if length is None else length).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": length is not None})


async def _unless_client_leaves(work: Any, receive: Any) -> Answer:
    """Await `work`, but give up with _Abort when the client disconnects: nobody is there to take the messages."""
    task = asyncio.ensure_future(work)
    # most receives answer at once; only a long poll is worth watching the connection
    done, _ = await asyncio.wait({task}, timeout=0.002)
    if done:
        return task.result()  # type: ignore[no-any-return]
    left = asyncio.ensure_future(receive())
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Abort
        return task.result()  # type: ignore[no-any-return]
    finally:
        for pending in (task, left):
            if not pending.done():
                pending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await pending


async def _silence(seconds: float | None, receive: Any) -> None:
    """Say nothing until the client leaves or `seconds` passed."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await receive()


def _credential(headers: dict[bytes, bytes], query: bytes) -> tuple[str, str, str, str | None]:
    """(service, region, access key id, session token) from the Authorization header or a presigned query."""
    token = headers.get(b"x-amz-security-token")
    match = re.search(rb"Credential=([^/,\s]+)/\d+/([^/]+)/([^/]+)/aws4_request", headers.get(b"authorization", b""))
    if match:
        key_id, region, service = (g.decode() for g in match.groups())
        return service, region, key_id, token.decode() if token is not None else None
    arguments = dict(parse_qsl(query.decode("latin-1")))
    parts = arguments.get("X-Amz-Credential", "").split("/")
    if len(parts) == 5:
        return parts[3], parts[2], parts[0], arguments.get("X-Amz-Security-Token")
    return "s3", "us-east-1", "anonymous", None


def _action(service: str, headers: dict[bytes, bytes], scope: Any, body: bytes) -> str:
    target = headers.get(b"x-amz-target")
    if target is not None:
        return target.decode().rpartition(".")[2]
    if service in ("ec2", "sts", "sqs", "iam", "autoscaling"):
        for source in (body, scope["query_string"]):
            match = re.search(rb"(?:^|&)Action=([A-Za-z]+)", source)
            if match:
                return match.group(1).decode()
    return f"{scope['method']} {scope['path']}"


def _params(service: str, is_json: bool, body: bytes, query: bytes) -> dict[str, Any]:
    if is_json:
        return decode(body)
    if service not in ("ec2", "sts", "sqs", "autoscaling"):
        return {}
    flat = dict(parse_qsl((body or query).decode(), keep_blank_values=True))
    for name in ("Action", "Version"):
        flat.pop(name, None)
    return nest(flat)
