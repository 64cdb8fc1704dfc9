"""The guard before every address a customer gives us (Kubernetes endpoints, webhooks): no request into our own house.

The name is resolved once, every answer must be a public address, and the connection goes to exactly the address that
was checked, with the certificate checked for the name. No redirects, no proxies from the environment, small answers.
Operators may open single networks (CLOUDOPTIM_OUTBOUND_ALLOW_CIDRS), for private Kubernetes endpoints and sandboxes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from control.errors import Invalid

CONNECT_TIMEOUT_SECONDS = 5.0
TOTAL_TIMEOUT_SECONDS = 10.0
MAX_ANSWER_BYTES = 64 * 1024

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Python calls these global, yet they reach private addresses (NAT64, 6to4) or many hosts.
_REFUSED_NETWORKS: tuple[Network, ...] = (
    ipaddress.ip_network("64:ff9b::/96"),
    ipaddress.ip_network("64:ff9b:1::/48"),
    ipaddress.ip_network("2002::/16"),
    ipaddress.ip_network("2001::/32"),
    ipaddress.ip_network("fd00:ec2::/32"),
)
# Ports of services that speak line protocols and could be talked to by an HTTP request.
_REFUSED_PORTS = frozenset({20, 21, 22, 23, 25, 110, 143, 465, 587, 5432, 6379, 11211, 27017})


@dataclass(frozen=True, slots=True)
class Target:
    """An address that passed: connect to ``address``, present ``host``."""

    scheme: str
    host: str
    port: int
    address: str


def parse_networks(text: str) -> tuple[Network, ...]:
    """Networks of a comma-separated setting.

    Raises:
        ValueError: not a CIDR network.
    """
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


def _allowed(address: Address, allow: Iterable[Network]) -> bool:
    return any(address.version == network.version and address in network for network in allow)


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
        if any(address in network for network in _REFUSED_NETWORKS if network.version == 6):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def check_url(url: str, *, field: str, allow: Sequence[Network] = ()) -> Target:
    """Resolve and check an address before it is stored or used.

    Raises:
        Invalid: names ``field`` and the reason; the reason never repeats what the name resolved to.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise Invalid(f"{field}: not a valid URL; give https://host[:port][/path]") from None
    if not host or parts.scheme not in ("https", "http"):
        raise Invalid(f"{field}: only https addresses are allowed; give https://host[:port][/path]")
    if parts.username is not None or parts.password is not None:
        raise Invalid(f"{field}: an address must not hold a user name or password; remove the part before @")
    if any(ord(character) < 33 for character in url):
        raise Invalid(f"{field}: the address holds a space or control character; remove it")
    port = port or (443 if parts.scheme == "https" else 80)
    if port in _REFUSED_PORTS:
        raise Invalid(f"{field}: port {port} belongs to another protocol; use an HTTPS port")
    addresses = await _resolve(host, port, field)
    opened = all(_allowed(address, allow) for address in addresses)
    if parts.scheme != "https" and not opened:
        raise Invalid(f"{field}: only https addresses are allowed; give https://host[:port][/path]")
    if not opened and not all(_is_public(address) or _allowed(address, allow) for address in addresses):
        raise Invalid(
            f"{field}: the address is not a public one. For a private endpoint an operator has to open its network "
            "with CLOUDOPTIM_OUTBOUND_ALLOW_CIDRS"
        )
    return Target(parts.scheme, host, port, str(addresses[0]))


async def _resolve(host: str, port: int, field: str) -> list[Address]:
    try:
        return [ipaddress.ip_address(host)]
    except ValueError:
        pass
    try:
        # getaddrinfo also reads 2130706433, 0x7f000001 and 127.1 as addresses: they are checked like any other.
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        raise Invalid(f"{field}: the name does not resolve; check its spelling") from None
    addresses = [ipaddress.ip_address(str(item[4][0]).split("%")[0]) for item in found]
    if not addresses:
        raise Invalid(f"{field}: the name does not resolve; check its spelling")
    return addresses


async def post(url: str, *, field: str, content: bytes, headers: dict[str, str], allow: Sequence[Network] = ()) -> int:
    """POST to a customer's address through the guard; returns the status code, never the body.

    Raises:
        Invalid: the address is refused.
        httpx.HTTPError: the connection failed, took over 10 s or answered more than 64 KiB.
    """
    target = await check_url(url, field=field, allow=allow)
    parts = httpx.URL(url)
    default_port = 443 if target.scheme == "https" else 80
    host_header = target.host if target.port == default_port else f"{target.host}:{target.port}"
    timeout = httpx.Timeout(TOTAL_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS)
    async with (
        asyncio.timeout(TOTAL_TIMEOUT_SECONDS),
        httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=timeout) as client,
    ):
        request = client.build_request(
            "POST",
            parts.copy_with(host=target.address, port=target.port),
            content=content,
            headers={**headers, "Host": host_header, "Accept-Encoding": "identity"},
            extensions={"sni_hostname": target.host},
        )
        response = await client.send(request, stream=True)
        try:
            received = 0
            async for chunk in response.aiter_raw():
                received += len(chunk)
                if received > MAX_ANSWER_BYTES:
                    raise httpx.DecodingError("the answer is larger than 64 KiB")
        finally:
            await response.aclose()
        return response.status_code
