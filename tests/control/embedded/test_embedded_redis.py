"""Embedded Redis: keeps what it acknowledged over a kill, asks for a password, loopback only."""

import os
import socket
import stat

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from control.embedded import EmbeddedRedis, EmbeddedServerError, free_port


@pytest.fixture
def server(tmp_path):
    server = EmbeddedRedis(tmp_path / "redis", port=free_port()).start()
    yield server
    server.stop()


def test_stream_entries_survive_kill(server):
    with redis.Redis.from_url(server.url) as client:
        for number in range(100):
            client.xadd("events", {"number": number})
    server.process.kill()
    again = EmbeddedRedis(server.folder, port=server.port).start()
    try:
        with redis.Redis.from_url(again.url) as client:
            assert client.xlen("events") == 100
    finally:
        again.stop()


def test_password_is_required_and_kept_private(server):
    for name in ("password", "redis.conf"):
        assert stat.S_IMODE((server.folder / name).stat().st_mode) == 0o600
    with redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0)) as client, pytest.raises(redis.AuthenticationError):
        client.ping()
    assert server.password not in " ".join(psutil.Process(server.process.pid).cmdline())


def test_listens_on_loopback_only(server):
    connections = psutil.Process(server.process.pid).net_connections()
    assert {connection.laddr.ip for connection in connections if connection.status == "LISTEN"} == {"127.0.0.1"}


def test_port_in_use_names_port_and_setting(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(EmbeddedServerError, match=rf"port {port} .*in use.*CLOUDOPTIM_REDIS_PORT"):
            EmbeddedRedis(tmp_path / "redis", port=port).start()


def test_another_redis_on_the_port_is_told_apart(server, tmp_path):
    with pytest.raises(EmbeddedServerError, match="another Redis listens"):
        EmbeddedRedis(tmp_path / "other", port=server.port).start()


def test_stop_leaves_no_process(tmp_path):
    server = EmbeddedRedis(tmp_path / "redis", port=free_port()).start()
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(server.process.pid, 0)
