"""WS /client/stream for agents and WS /admin/stream for dashboards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from uuid import UUID

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import ValidationError

from control.agents import service as agents
from control.agents.schemas import AckMessage, ErrorMessage, Hello, StreamResult, TasksMessage
from control.bus.bells import POLL_SECONDS
from control.context import AppContext, get_context
from control.errors import AppError
from control.security.access import AGENTS, READERS
from control.streams import service
from control.streams.schemas import Subscribe
from control.streams.sockets import Refused, Socket, opened

router = APIRouter()

# A whole new state of all clusters, even when nothing happened.
COST_SECONDS = 15.0


@router.websocket("/client/stream")
async def client_stream(websocket: WebSocket) -> None:
    """Tasks pushed the moment they exist; reports and their acknowledgements on the same socket."""
    context = get_context(websocket)
    try:
        async with opened(websocket, context, AGENTS, Hello, "agent") as (socket, hello):
            understands = agents.understood(",".join(hello.understands))
            await _until_first_ends(_push_tasks(context, socket, hello, understands), _take_reports(context, socket))
    except Refused:
        return


async def _until_first_ends(*parts: Awaitable[None]) -> None:
    """Run all; when one ends or fails the others are cancelled and its error is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _push_tasks(context: AppContext, socket: Socket, hello: Hello, understands: list[str]) -> None:
    _, cluster_id = agents.bound_cluster(socket.principal)
    holding: list[UUID] | None = [held.task_id for held in hello.holding]
    async with context.watch.tasks_of(cluster_id) as bell:
        while True:
            await socket.recheck()
            tasks = await agents.lease(
                context,
                socket.principal,
                understands=understands,
                limit=hello.limit,
                version=hello.agent_version,
                resume_without=holding,
            )
            holding = None
            if tasks:
                await socket.send(TasksMessage(tasks=tasks))
            if len(tasks) < hello.limit:
                await bell.wait(POLL_SECONDS)


async def _take_reports(context: AppContext, socket: Socket) -> None:
    while True:
        try:
            message = await socket.receive()
            if message.get("type") == "ping":
                await socket.send(b'{"type":"pong"}')
                continue
            result = StreamResult.model_validate(message)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            await socket.send(ErrorMessage(code="invalid", detail=f"{place}: {first['msg']}"))
            continue
        except ValueError as error:
            await socket.send(ErrorMessage(code="invalid", detail=str(error)))
            continue
        try:
            outcome = await agents.report(context, socket.principal, result.task_id, result.report)
        except AppError as error:
            await socket.send(
                ErrorMessage(
                    code=error.code,
                    detail=error.detail,
                    extra={"task_id": str(result.task_id), "report_id": str(result.report.report_id)},
                )
            )
            continue
        await socket.send(
            AckMessage(
                task_id=result.task_id,
                report_id=result.report.report_id,
                applied=outcome.applied,
                stale=outcome.stale,
                state=outcome.state,
                lease_until=outcome.lease_until,
                deadline=outcome.deadline_at,
            )
        )


@router.websocket("/admin/stream")
async def admin_stream(websocket: WebSocket) -> None:
    """Cost of every cluster now, every 15 s, and events within two seconds of their commit."""
    context = get_context(websocket)
    try:
        async with opened(websocket, context, READERS, Subscribe, "dashboard") as (socket, subscribe):
            customer_id = service.scope_of(socket.principal, subscribe.customer_id)
            await _until_first_ends(_push_updates(context, socket, customer_id), _until_gone(socket))
    except Refused:
        return


async def _push_updates(context: AppContext, socket: Socket, customer_id: UUID | None) -> None:
    newest, cost_at = service.now_id(), 0.0
    while True:
        await socket.recheck()
        if time.monotonic() - cost_at >= COST_SECONDS:
            await socket.send(await service.costs(context, socket.principal, customer_id))
            cost_at = time.monotonic()
        message, newest = await service.events(context, socket.principal, customer_id, newest)
        if message is not None:
            await socket.send(message)
        await asyncio.sleep(POLL_SECONDS)


async def _until_gone(socket: Socket) -> None:
    while True:
        try:
            await socket.receive()
        except WebSocketDisconnect:
            raise
        except ValueError:
            continue
