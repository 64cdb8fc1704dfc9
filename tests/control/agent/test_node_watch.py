"""Instance metadata of a node, its watch, the Kubernetes double and the agent: a notice is told within seconds."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from control.agent.node_watch import main
from control.agent.notices import INSTANCE_ACTION_ANNOTATION, REBALANCE_ANNOTATION
from control.sandbox.kubernetes.server import ServerThread
from tests.commands import Forked
from tests.control.agent.harness import World, eventually
from warehouse.contracts import EventKind


class InstanceMetadata:
    """The metadata service of one instance, version 2: no document without a token that is still good."""

    def __init__(self) -> None:
        self.documents: dict[str, str] = {}
        self.tokens: set[str] = set()
        self.away = False
        self._numbers = itertools.count()
        routes = [
            Route("/latest/api/token", self._token, methods=["PUT"]),
            Route("/latest/meta-data/{path:path}", self._document),
        ]
        self.thread = ServerThread(Starlette(routes=routes))

    async def _token(self, request: Request) -> PlainTextResponse:
        assert 0 < int(request.headers["x-aws-ec2-metadata-token-ttl-seconds"]) <= 21_600
        token = f"token-{next(self._numbers)}"
        self.tokens.add(token)
        return PlainTextResponse(token)

    async def _document(self, request: Request) -> PlainTextResponse:
        if self.away:
            return PlainTextResponse("", status_code=503)
        if request.headers.get("x-aws-ec2-metadata-token") not in self.tokens:
            return PlainTextResponse("", status_code=401)
        document = self.documents.get(request.path_params["path"])
        return PlainTextResponse(document or "", status_code=200 if document else 404)


@pytest.fixture
def metadata() -> Iterator[InstanceMetadata]:
    service = InstanceMetadata()
    service.thread.start()
    yield service
    service.thread.stop()


@pytest.fixture
def watch(world: World, metadata: InstanceMetadata, tmp_path: Path) -> Iterator[Path]:
    """The watch of node n1; its log."""
    log = tmp_path / "watch.log"
    settings = {
        "NODE_NAME": "n1",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.thread.url,
        "CLOUDOPTIM_AGENT_K8S_ENDPOINT": f"{world.kubernetes.url}/clusters/prod",
        "CLOUDOPTIM_AGENT_K8S_TOKEN": world.TOKEN,
    }
    process = Forked(partial(main, []), {**os.environ, **settings}, log, log)
    yield log
    process.terminate()
    assert process.wait(5) == 0


def test_a_notice_of_instance_metadata_is_reported_and_taken_away_when_it_is_over(
    world: World, metadata: InstanceMetadata, watch: Path
) -> None:
    def annotations() -> dict[str, str]:
        return world.core.read_node("n1").metadata.annotations or {}

    instance = world.add_node("n1")
    world.core.patch_node("n1", {"metadata": {"annotations": {REBALANCE_ANNOTATION: "of an earlier life"}}})
    world.start_agent()
    eventually(lambda: metadata.tokens and REBALANCE_ANNOTATION not in annotations())

    metadata.tokens.clear()
    acts_at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=118)
    notice = json.dumps({"action": "terminate", "time": f"{acts_at:%Y-%m-%dT%H:%M:%SZ}"})
    metadata.documents["spot/instance-action"] = notice
    # within ten seconds of EC2 saying so, through the token that ended in between.
    (told,) = eventually(lambda: [event for body in world.server.events for event in body.events], 10)
    assert (told.event_type, told.instance_id) == (EventKind.SPOT_INTERRUPTION, instance)
    assert told.occurred_at == acts_at - timedelta(seconds=120)
    assert annotations()[INSTANCE_ACTION_ANNOTATION] == notice

    metadata.away = True
    eventually(lambda: "cannot be watched" in watch.read_text())
    assert annotations()[INSTANCE_ACTION_ANNOTATION] == notice, "no answer is not the end of a notice"
    metadata.documents.clear()
    metadata.away = False
    eventually(lambda: INSTANCE_ACTION_ANNOTATION not in annotations())


def test_a_watch_that_does_not_know_its_node_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NODE_NAME", raising=False)
    with pytest.raises(SystemExit, match=r"NODE_NAME.*spec\.nodeName"):
        main([])
