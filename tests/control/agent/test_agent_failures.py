"""Broken connections, strange answers, full disks and single items the server cannot take: the agent goes on."""

from __future__ import annotations

import http.server
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from control.agent.board import Board
from control.agent.cluster import Cluster, ClusterError
from control.agent.config import AgentConfig
from control.agent.server import Server, Unavailable
from control.agent.spool import Spool
from tests.control.agent.harness import World, eventually


class Raw:
    """A socket that reads a request and answers with given bytes, then hangs up."""

    def __init__(self) -> None:
        self.answer = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(self.answer)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def raw() -> Iterator[Raw]:
    server = Raw()
    yield server
    server.close()


def _config(url: str, tmp_path: Path) -> AgentConfig:
    return AgentConfig(
        server_url=url,
        cluster_id=uuid4(),
        api_key="k",
        cluster_name="c",
        state_dir=tmp_path,
        k8s_endpoint=url,
        k8s_token="t",
        poll_wait_seconds=1,
    )


def _ok(body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\n%sContent-Length: %d\r\n\r\n%s" % (headers, len(body), body)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BROKEN_ANSWERS = {
    "half a body": b'HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{"items": [',
    "half a chunk": CHUNKED + b'ff\r\n{"type"',
    "a chunk without a length": CHUNKED + b"zz\r\n",
    "a page": _ok(b"<html>please log in</html>\n"),
    "no utf-8": _ok(b'{"items": "\xff\xfe"}\n'),
    "a list": _ok(b"[1]\n"),
    "no object": _ok(b'{"type": "ADDED"}\n'),
    "an error without utf-8": b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\n\xff\xfe",
}


@pytest.mark.parametrize("answer", BROKEN_ANSWERS.values(), ids=BROKEN_ANSWERS)
def test_every_broken_answer_of_kubernetes_is_a_cluster_error(raw: Raw, tmp_path: Path, answer: bytes) -> None:
    raw.answer = answer
    cluster = Cluster(_config(raw.url, tmp_path))
    for ask in (cluster.nodes, lambda: cluster.usage("nodes"), lambda: list(cluster.watch_nodes())):
        with pytest.raises(ClusterError) as caught:
            ask()
        assert caught.value.status in (0, 500)  # both are tried again


@pytest.mark.parametrize(
    "answer",
    [
        _ok(b"<html></html>"),
        _ok(b"[]"),
        _ok(b'{"tasks": "\xff"}'),
        _ok(b"\x00", b"Content-Encoding: gzip\r\n"),
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{",
        b"rubbish\r\n\r\n",
    ],
)
def test_answers_that_are_not_the_servers_are_tried_again(raw: Raw, tmp_path: Path, answer: bytes) -> None:
    raw.answer = answer
    server = Server(_config(raw.url, tmp_path))
    for ask in (
        lambda: server.poll(["drain_node"], 1),
        lambda: server.report(uuid4(), b"{}"),
        lambda: server.send_metrics(b""),
        lambda: server.send_events(b"{}"),
    ):
        with pytest.raises(Unavailable):
            ask()
    server.close()


def test_only_failures_of_the_whole_server_stop_a_round(raw: Raw, tmp_path: Path) -> None:
    server = Server(_config(raw.url, tmp_path))
    told = {}
    for status in (302, 401, 403, 429, 500, 502, 503):
        raw.answer = b"HTTP/1.1 %d x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % status
        with pytest.raises(Unavailable) as caught:
            server.send_events(b"{}")
        told[status] = caught.value.nothing_gets_through
    raw.close()
    with pytest.raises(Unavailable) as caught:
        Server(_config("http://127.0.0.1:1", tmp_path)).send_events(b"{}")
    assert caught.value.nothing_gets_through
    assert [status for status, stops in told.items() if stops] == [401, 429, 503]
    server.close()


def test_a_renewed_lease_revives_a_run_that_had_lost_the_older_one(world: World, tmp_path: Path) -> None:
    instance = world.add_node("n1")
    config = AgentConfig(
        server_url=world.server.thread.url,
        cluster_id=world.cluster_id,
        api_key=world.server.key,
        cluster_name="c",
        state_dir=tmp_path,
        k8s_endpoint=f"{world.kubernetes.url}/clusters/prod",
        k8s_token=world.TOKEN,
    )
    server = Server(config)
    board = Board(Cluster(config), server, Spool(tmp_path / "reports", max_age_seconds=60), collect=dict)
    task_id = world.server.add("cordon_node", node_name="n1", instance_id=instance)
    offer = server.poll(["cordon_node"], 1)[0]
    board.take(offer)
    board._lost_lease(task_id, {"lease_epoch": 1, "status": "running", "detail": {}})
    board.take({**offer, "lease_epoch": 2})
    world.server.tasks[task_id].epoch = 2
    board.start()
    assert world.server.ended(task_id, 10).lease_epoch == 2
    board.stop(2)
    server.close()


def test_a_page_instead_of_the_server_ends_no_thread(world: World) -> None:
    instance = world.add_node("n1")
    world.server.captive = True
    world.start_agent(CLOUDOPTIM_AGENT_METRICS_SECONDS="0.5")
    eventually(lambda: world.log.read_text().count("no tasks from the server") >= 2)
    world.server.captive = False
    task = world.server.add("cordon_node", node_name="n1", instance_id=instance)
    assert world.server.ended(task, 15).status == "done"
    assert eventually(lambda: world.server.batches, 15)[0].seq == 0  # nothing was taken for delivered


def test_one_report_the_server_cannot_take_does_not_keep_the_others(world: World) -> None:
    instance = world.add_node("n1")
    poison = world.server.add("cordon_node", node_name="n1", instance_id=instance)
    world.server.poison = {poison}
    world.start_agent()
    eventually(lambda: f"{poison}" in world.log.read_text() and "a task report waits" in world.log.read_text())
    for _ in range(3):
        task = world.server.add("uncordon_node", node_name="n1", instance_id=instance)
        assert world.server.ended(task, 10).status == "done"
    world.server.poison = set()
    assert world.server.ended(poison, 15).status == "done"


def test_one_batch_the_server_cannot_take_does_not_keep_the_others(world: World) -> None:
    world.add_node("n1")
    world.server.poison_batches = 1
    world.start_agent(CLOUDOPTIM_AGENT_METRICS_SECONDS="0.3")
    eventually(lambda: {batch.seq for batch in world.server.batches} >= {1, 2, 3}, 15)
    world.server.poison_batches = 0
    eventually(lambda: 0 in {batch.seq for batch in world.server.batches}, 15)


def test_tasks_end_and_notices_arrive_although_the_disk_was_full(world: World) -> None:
    instance = world.add_node("n1")
    world.deploy("web", 2, node="n1")
    process = world.start_agent()
    eventually(lambda: world.server.batches)
    _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, most))  # every write to a file fails from here on
    task = world.server.add("drain_node", node_name="n1", instance_id=instance)
    assert world.server.ended(task, 20).status == "done"
    notice = {"cloudoptim.io/imds-rebalance": json.dumps({"noticeTime": "2026-01-02T03:04:05Z"})}
    world.core.patch_node("n1", {"metadata": {"annotations": notice}})
    time.sleep(1)
    assert not list((world.state_dir / "events").iterdir())  # nothing half-written is left on the full disk
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))
    (event,) = eventually(lambda: world.server.events, 20)[0].events
    assert event.instance_id == instance


class _Cutting(http.server.BaseHTTPRequestHandler):
    """Forwards to the Kubernetes double; while `cut` is set, only half of every answer's body comes back."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    cut = threading.Event()
    cuts = 0

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name: self.headers[name] for name in ("authorization", "content-type") if self.headers[name]}
        if "watch=true" in self.path:
            self.send_error(503)
            return
        answer = httpx.request(self.command, self.upstream + self.path, content=body, headers=headers)
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        if type(self).cut.is_set():
            type(self).cuts += 1
            self.wfile.write(answer.content[: len(answer.content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(answer.content)

    do_GET = do_POST = do_PATCH = do_DELETE = _forward

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def test_a_drain_outlives_answers_that_break_off(world: World) -> None:
    instance = world.add_node("n1")
    world.add_node("n2")
    world.deploy("web", 3, node="n1")
    _Cutting.upstream = world.kubernetes.url
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Cutting)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    _Cutting.cut.set()
    endpoint = f"http://127.0.0.1:{proxy.server_address[1]}/clusters/prod"
    world.start_agent(CLOUDOPTIM_AGENT_K8S_ENDPOINT=endpoint)
    task: UUID = world.server.add("drain_node", node_name="n1", instance_id=instance)
    eventually(lambda: world.log.read_text().count("trying again") >= 2)
    _Cutting.cut.clear()
    assert world.server.ended(task, 20).status == "done"
    proxy.shutdown()
    proxy.server_close()
