"""The guard before customers' addresses: every trick of RELIABILITY.md S-04 is refused, and nothing is connected to."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from control.errors import Invalid
from control.security.outbound import check_url, parse_networks, post

REFUSED = [
    "http://169.254.169.254/latest/meta-data/",
    "https://169.254.169.254/latest/meta-data/",
    "https://[fd00:ec2::254]/",
    "https://100.100.100.200/",
    "http://127.0.0.1:5432",
    "https://localhost:6379/%0d%0a",
    "https://localhost/",
    "https://0.0.0.0",
    "https://2130706433",
    "https://0x7f000001",
    "https://127.1",
    "https://[::1]/",
    "https://[::ffff:127.0.0.1]",
    "https://[64:ff9b::a9fe:a9fe]",
    "https://[2002:a9fe:a9fe::]",
    "https://224.0.0.1",
    "https://10.0.0.1",
    "https://user@10.0.0.1",
    "https://user:secret@example.com",
    "https://hooks.slack.com@169.254.169.254/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "ftp://example.com/",
    "https://8.8.8.8:22/",
    "https://8.8.8.8:6379/",
    "http://8.8.8.8/",
    "https://8.8.8.8/a b",
    "https://",
    "https://[",
    "https://no-such-name.invalid/",
    "//8.8.8.8/",
]


@pytest.mark.parametrize("url", REFUSED)
async def test_refused(url):
    with pytest.raises(Invalid, match=r"^field: ") as refused:
        await check_url(url, field="field")
    assert "127.0.0.1" not in refused.value.detail, "what a name resolves to is not told"


async def test_a_public_address_passes_and_is_the_one_to_connect_to():
    target = await check_url("https://8.8.8.8/hook", field="field")
    assert (target.host, target.port, target.address) == ("8.8.8.8", 443, "8.8.8.8")


async def test_an_operator_may_open_a_network():
    allow = parse_networks("10.1.0.0/16, 127.0.0.0/8")
    assert (await check_url("https://10.1.2.3:6443", field="f", allow=allow)).address == "10.1.2.3"
    assert (await check_url("http://127.0.0.1:6443", field="f", allow=allow)).scheme == "http"
    with pytest.raises(Invalid):
        await check_url("https://10.2.2.3:6443", field="f", allow=allow)


@pytest.fixture
async def listener():
    """A server on loopback that counts connections and answers what the test says."""
    seen: list[bytes] = []
    answer = {"bytes": b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n"}

    async def serve(reader, writer):
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer["bytes"])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    yield port, seen, answer
    server.close()
    await server.wait_closed()


async def test_nothing_connects_to_a_refused_address(listener):
    port, seen, _ = listener
    for host in ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"):
        for scheme in ("http", "https"):
            with pytest.raises(Invalid):
                await post(f"{scheme}://{host}:{port}/", field="f", content=b"{}", headers={})
    assert seen == []


async def test_a_redirect_is_not_followed_and_a_long_answer_is_cut(listener):
    port, seen, answer = listener
    allow = parse_networks("127.0.0.0/8")
    answer["bytes"] = b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n"
    assert await post(f"http://127.0.0.1:{port}/hook", field="f", content=b"{}", headers={}, allow=allow) == 302
    assert b"POST /hook" in seen[0]
    answer["bytes"] = b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000
    with pytest.raises(httpx.HTTPError):
        await post(f"http://127.0.0.1:{port}/", field="f", content=b"{}", headers={}, allow=allow)


async def test_the_api_refuses_such_endpoints(api, tenant):
    for url in ("https://169.254.169.254/", "https://127.0.0.1:6443", "http://8.8.8.8/"):
        body = {"cluster_name": "x", "region": "us-east-1", "k8s_api_endpoint": url}
        answer = await api.call("POST", "/clusters", tenant.admin_key, json=body)
        assert answer.status_code == 422
        assert "k8s_api_endpoint" in answer.json()["detail"]
