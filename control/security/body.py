"""Limits on request bodies, enforced while they stream in: size, time, compression, nesting.

A plain ASGI middleware: nothing is read that the route would not read, and what is over the limit is never kept.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import zstandard
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KIB = 1024
MIB = 1024 * KIB
DEFAULT_BYTES = 1 * MIB
RECEIVE_SECONDS = 30.0
# A compressed body may unfold to ten times its route's limit, and never to more than 10 MiB.
MAX_UNFOLD = 10
MAX_DECODED_BYTES = 10 * MIB
MAX_JSON_DEPTH = 32
METHODS_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


@dataclass(frozen=True, slots=True)
class BodyRule:
    """What one path accepts. ``streamed`` bodies (uploads) are counted by their route and not touched here."""

    max_bytes: int = DEFAULT_BYTES
    encodings: frozenset[str] = frozenset()
    streamed: bool = False
    free_json: bool = True


RULES: tuple[tuple[re.Pattern[str], BodyRule], ...] = (
    (re.compile(r"/api/v1/client/metrics$"), BodyRule(1 * MIB, frozenset({"gzip", "zstd"}), free_json=False)),
    (re.compile(r"/api/v1/client/events$"), BodyRule(256 * KIB, frozenset({"gzip", "zstd"}))),
    # What EventBridge delivers is never refused for its content: it would be lost.
    (re.compile(r"/api/v1/events/aws$"), BodyRule(1 * MIB, free_json=False)),
    (re.compile(r"/api/v1/models$"), BodyRule(512 * MIB + MIB, streamed=True)),
)
DEFAULT_RULE = BodyRule()

# A string that does not end is taken to the end and never gone over again: time grows with the body's length alone.
_DEPTH_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.?)*+"?|[\[{]|[\]}]', re.DOTALL)


def rule_for(path: str) -> BodyRule:
    """The rule of a path."""
    return next((rule for pattern, rule in RULES if pattern.search(path)), DEFAULT_RULE)


class BodyLimits:
    """Middleware that reads a body within its rule, decodes it, and hands it on in one piece."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in METHODS_WITHOUT_BODY:
            await self.app(scope, receive, send)
            return
        rule = rule_for(scope["path"])
        headers = dict(scope["headers"])
        await self.app(scope, _LimitedBody(rule, headers, receive, scope), send)


class _LimitedBody:
    """A ``receive`` that reads the whole body on its first call. Errors surface where the route reads its body, so
    that they are answered like any other error of the route."""

    def __init__(self, rule: BodyRule, headers: dict[bytes, bytes], receive: Receive, scope: Scope) -> None:
        self._rule = rule
        self._headers = headers
        self._receive = receive
        self._scope = scope
        self._delivered = False
        self._streamed = 0

    async def __call__(self) -> Message:
        if self._rule.streamed:
            return await self._next_of_stream()
        if self._delivered:
            return await self._receive()
        self._delivered = True
        declared = self._headers.get(b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > self._rule.max_bytes:
            raise _too_large(self._rule.max_bytes)
        encoding = self._headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        if encoding != "identity" and encoding not in self._rule.encodings:
            accepted = ", ".join(sorted(self._rule.encodings)) or "none"
            raise HTTPException(415, f"Content-Encoding {encoding[:20]!r} is not read here; accepted: {accepted}.")
        try:
            async with asyncio.timeout(RECEIVE_SECONDS):
                raw = await self._read()
        except TimeoutError:
            raise HTTPException(
                408, f"The body did not arrive within {RECEIVE_SECONDS:.0f} s; send it again."
            ) from None
        if raw is None:
            return {"type": "http.disconnect"}
        body = decode(raw, encoding, self._rule.max_bytes)
        if self._rule.free_json:
            check_json(body)
        return {"type": "http.request", "body": body, "more_body": False}

    async def _read(self) -> bytes | None:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self._rule.max_bytes:
                raise _too_large(self._rule.max_bytes)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _next_of_stream(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._streamed += len(message.get("body", b""))
            if self._streamed > self._rule.max_bytes:
                raise _too_large(self._rule.max_bytes)
        return message


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"The body is larger than {limit:,} bytes; send it in smaller parts.")


def _unfolds_too_far(cap: int) -> HTTPException:
    return HTTPException(413, f"The body unfolds to more than {cap:,} bytes; send it in smaller parts.")


def decode(raw: bytes, encoding: str, max_bytes: int) -> bytes:
    """Unfold a compressed body within its cap.

    Raises:
        HTTPException: 413 over the cap, 400 when it is not what it says it is.
    """
    if encoding == "identity":
        return raw
    cap = min(max_bytes * MAX_UNFOLD, MAX_DECODED_BYTES)
    decoder: Callable[[bytes, int], bytes] = _gunzip if encoding == "gzip" else _unzstd
    body = decoder(raw, cap)
    if len(body) > cap:
        raise _unfolds_too_far(cap)
    return body


def _gunzip(raw: bytes, cap: int) -> bytes:
    unfold = zlib.decompressobj(wbits=31)
    try:
        body = unfold.decompress(raw, cap + 1)
    except zlib.error:
        raise HTTPException(400, "The body says it is gzip and is not.") from None
    if len(body) <= cap and (not unfold.eof or unfold.unused_data):
        raise HTTPException(400, "The gzip body is cut short or followed by something else.")
    return body


def _unzstd(raw: bytes, cap: int) -> bytes:
    broken = HTTPException(400, "The body says it is zstd and is not, or is cut short.")
    try:
        promised = zstandard.frame_content_size(raw)
        if promised > cap:
            raise _unfolds_too_far(cap)
        # The window bounds the decoder's own memory; a stream reader stops at the cap whatever the frame claims.
        with zstandard.ZstdDecompressor(max_window_size=8 * MIB).stream_reader(raw) as reader:
            body = reader.read(cap + 1)
    except zstandard.ZstdError:
        raise broken from None
    # A frame that does not say its size and is cut short ends in JSON that does not parse.
    if 0 <= promised != len(body):
        raise broken
    return body


def check_json(body: bytes) -> None:
    """Refuse JSON nested deeper than 32 levels before anything parses it.

    Raises:
        HTTPException: 400.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return
    depth = 0
    for token in _DEPTH_TOKENS.finditer(body):
        character = body[token.start()]
        if character in b"[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise HTTPException(400, f"The JSON is nested deeper than {MAX_JSON_DEPTH} levels.")
        elif character in b"]}":
            depth -= 1
