"""Spot price history from AWS, fast: botocore signs, one keep-alive connection carries, a pattern reads the pages.

boto3's paginator spends its time turning XML into dicts. Here a page goes straight into Arrow columns; what the pattern
cannot read (other element order is fine, escaped characters or missing elements are not) goes through lxml, item by
item, so that speed never decides what is accepted.

Rows come as AWS wrote them: the price is text, because judging it (empty, NaN, "0,0123", fifty times the list price) is
the ingesting asset's decision and needs the on-demand price. An item that is no record at all (no type, no zone, no
readable time) is left out and counted in the report.
"""

from __future__ import annotations

import random
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import urlencode

import botocore.session
import polars as pl
import pyarrow as pa
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import HTTPClientError
from botocore.httpsession import URLLib3Session
from lxml import etree

SCHEMA = pa.schema(
    [
        pa.field("ts", pa.timestamp("us", tz="UTC")),
        pa.field("region", pa.string()),
        pa.field("zone_id", pa.string()),
        pa.field("availability_zone", pa.string()),
        pa.field("instance_type", pa.string()),
        pa.field("product", pa.string()),
        pa.field("price_usd_per_hour", pa.string()),
    ]
)
"""One row per record. `zone_id` is the same place in every account, `availability_zone` is the caller's name for it."""

_UNDATED = SCHEMA.set(0, pa.field("ts", pa.string()))

PAGE_SIZE = 1_000
"""AWS's limit."""
WINDOW = timedelta(days=7)
"""Asked for at a time. A window is held until it is complete (80,000 rows of the largest region), so that a
restarted one never yields a row twice."""
HISTORY_KEPT = timedelta(days=90)
"""How far back AWS answers; asking for more is clipped by AWS, the caller records the gap."""
MAX_PAGES_PER_WINDOW = 5_000
ATTEMPTS = 8
FIRST_BACK_OFF_SECONDS = 0.2
LONGEST_BACK_OFF_SECONDS = 20.0
CONNECT_TIMEOUT_SECONDS = 5.0
READ_TIMEOUT_SECONDS = 30.0

_RETRIED_CODES = {
    "RequestLimitExceeded", "Throttling", "ThrottlingException", "InternalError", "InternalFailure", "Unavailable",
    "ServiceUnavailable", "RequestTimeout", "EC2ThrottledException",
}  # fmt: skip
_EXPIRED_TOKEN_CODES = {"InvalidNextToken", "InvalidPaginationToken", "ExpiredNextToken", "InvalidParameterValue"}
_EXPIRED_CREDENTIALS_CODES = {"RequestExpired", "ExpiredToken", "ExpiredTokenException"}


class SpotPriceError(Exception):
    """AWS refused, or kept failing. `code` is AWS's own, or Unanswered, BadAnswer, TokenLoop, TooManyPages."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"DescribeSpotPriceHistory: {code}: {message}")
        self.code = code


@dataclass(slots=True)
class FetchReport:
    """What happened underneath: filled while the iterator is consumed."""

    pages: int = 0
    rows: int = 0
    bytes: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    """By reason."""
    restarted_windows: int = 0
    slow_pages: int = 0
    """Pages that needed lxml."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Items that were no record, by reason."""
    examples: dict[str, str] = field(default_factory=dict)


def fetch_spot_prices(
    region: str,
    start: datetime,
    end: datetime,
    *,
    endpoint_url: str | None = None,
    credentials: Credentials | None = None,
    instance_types: Sequence[str] | None = None,
    product: str | None = "Linux/UNIX",
    page_size: int = PAGE_SIZE,
    window: timedelta = WINDOW,
    report: FetchReport | None = None,
) -> Iterator[pa.RecordBatch]:
    """Price records of one region in [start, end], and per pool the one in force at `start`, in batches of SCHEMA.

    Batches run forward in time (a window each); rows inside one are as AWS ordered them, newest first.

    Args:
        endpoint_url: replaces AWS's own address (the sandbox).
        credentials: the process's own chain (environment, profile, machine role) by default.
        instance_types: all types by default.
        product: a product description; None for all.
        report: filled with counts.

    Raises:
        SpotPriceError: after eight attempts at a page, at once for a refusal that will not change, or when pages go in
            circles. Nothing of the failed window was yielded; the caller may go on from the last batch.
        ValueError: times without a zone.
    """
    if start.tzinfo is None or end.tzinfo is None:
        raise ValueError("start and end must carry a time zone (UTC)")
    client = _Client(region, endpoint_url, credentials, report or FetchReport())
    try:
        first = start
        while True:
            last = min(first + window, end)
            batch = client.window(first, last, instance_types, product, page_size)
            # AWS adds the record in force before the window: only the first window may say it, the others repeat
            if first > start:
                batch = batch.filter(pa.compute.greater_equal(batch["ts"], pa.scalar(first, SCHEMA.field("ts").type)))
            yield from batch.to_batches()
            if last >= end:
                return
            first = last
    finally:
        client.close()


class _Restart(Exception):
    """The window must be asked for again from its first page."""


class _Client:
    def __init__(
        self, region: str, endpoint_url: str | None, credentials: Credentials | None, report: FetchReport
    ) -> None:
        self.region, self.report = region, report
        self.url = (endpoint_url or f"https://ec2.{region}.amazonaws.com").rstrip("/") + "/"
        self._credentials = credentials
        self._chain: Any = None
        self._http = URLLib3Session(
            timeout=(CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS),
            max_pool_connections=1,
            # botocore's clients pass this themselves; without it Nagle and delayed acknowledgements cost 40 ms a page
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        self._zone_ids: dict[str, str] | None = None

    def close(self) -> None:
        self._http.close()

    def window(
        self, start: datetime, end: datetime, types: Sequence[str] | None, product: str | None, page_size: int
    ) -> pa.Table:
        """All pages of one window."""
        asked: dict[str, str] = {
            "Action": "DescribeSpotPriceHistory",
            "Version": "2016-11-15",
            "StartTime": _stamp(start),
            "EndTime": _stamp(end),
            "MaxResults": str(page_size),
        }
        asked |= {f"InstanceType.{i}": name for i, name in enumerate(types or (), 1)}
        if product is not None:
            asked["ProductDescription.1"] = product
        for _ in range(ATTEMPTS):
            try:
                return self._pages(asked)
            except _Restart as reason:
                self.report.restarted_windows += 1
                self.report.retries[str(reason)] += 1
        raise SpotPriceError("InvalidNextToken", f"the page token of {_stamp(start)} expired {ATTEMPTS} times")

    def _pages(self, asked: dict[str, str]) -> pa.Table:
        pages: list[pa.Table] = []
        token, seen = "", set()
        for _ in range(MAX_PAGES_PER_WINDOW):
            body = self._call(asked | ({"NextToken": token} if token else {}), paging=bool(token))
            table, token = self._read(body)
            pages.append(table)
            if not token:
                return self._dated(pa.concat_tables(pages).combine_chunks())
            if token in seen:
                raise SpotPriceError("TokenLoop", f"{self.region} repeated a page token after {len(pages)} pages")
            seen.add(token)
        raise SpotPriceError(
            "TooManyPages", f"{self.region} answered more than {MAX_PAGES_PER_WINDOW} pages for a window"
        )

    def _read(self, body: bytes) -> tuple[pa.Table, str]:
        fast = _by_pattern(body)
        if fast is None:
            self.report.slow_pages += 1
            columns, token = _by_tree(body, self.report)
        else:
            columns, token = fast
        rows = len(columns["instanceType"])
        zone_ids: Any = columns.get("availabilityZoneId")
        if zone_ids is None or None in zone_ids:
            known = self._zones()
            names = columns["availabilityZone"]
            given = zone_ids or [None] * rows
            zone_ids = [g or known.get(n) for g, n in zip(given, names, strict=True)]
        table = pa.table(
            {
                "ts": pa.array(columns["timestamp"], pa.string()),
                "region": pa.repeat(pa.scalar(self.region), rows),
                "zone_id": pa.array(zone_ids, pa.string()),
                "availability_zone": pa.array(columns["availabilityZone"], pa.string()),
                "instance_type": pa.array(columns["instanceType"], pa.string()),
                "product": pa.array(columns["productDescription"], pa.string()),
                "price_usd_per_hour": pa.array(columns["spotPrice"], pa.string()),
            },
            schema=_UNDATED,
        )
        self.report.pages += 1
        self.report.bytes += len(body)
        return table, token

    def _dated(self, table: pa.Table) -> pa.Table:
        """A window with its times read, all at once: page by page it would cost more than all the rest."""
        times = _times(table["ts"])
        if times.null_count:
            self.report.rejected["unreadable timestamp"] += times.null_count
            at = times.to_pylist().index(None)
            self.report.examples.setdefault("unreadable timestamp", repr(table["ts"][at].as_py()))
        table = table.set_column(0, SCHEMA.field("ts"), times)
        table = table.filter(table["ts"].is_valid()) if times.null_count else table
        self.report.rows += table.num_rows
        return table

    def _zones(self) -> dict[str, str]:
        """Zone name to zone id in the caller's account, for answers without AvailabilityZoneId."""
        if self._zone_ids is None:
            body = self._call({"Action": "DescribeAvailabilityZones", "Version": "2016-11-15"}, paging=False)
            root = etree.fromstring(body, _parser())
            self._zone_ids = {
                item.findtext("{*}zoneName") or "": item.findtext("{*}zoneId") or ""
                for item in root.iterfind("{*}availabilityZoneInfo/{*}item")
            }
        return self._zone_ids

    def _call(self, parameters: dict[str, str], *, paging: bool) -> bytes:
        """One signed request, repeated with back-off and jitter while AWS is slow, away or throttles."""
        content = urlencode(parameters).encode()
        waited = FIRST_BACK_OFF_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                response = self._http.send(self._signed(content))
                body: bytes = response.content
            except HTTPClientError as error:
                code, message = "Unanswered", f"{self.url}: {error}"
            else:
                if response.status_code == 200:
                    if _complete(body):
                        return body
                    code, message = "BadAnswer", f"{len(body)} bytes that are no complete XML answer"
                else:
                    code, message = _refusal(body, response.status_code)
            if code in _EXPIRED_CREDENTIALS_CODES and self._credentials is None:
                self._chain = None
            elif paging and code in _EXPIRED_TOKEN_CODES:
                raise _Restart(code)
            elif code not in (*_RETRIED_CODES, "Unanswered", "BadAnswer"):
                raise SpotPriceError(code, message)
            if attempt == ATTEMPTS:
                raise SpotPriceError(code, message)
            self.report.retries[code] += 1
            # full jitter: many regions throttled together must not come back together
            time.sleep(random.uniform(0, waited))
            waited = min(waited * 2, LONGEST_BACK_OFF_SECONDS)
        raise AssertionError("unreachable")

    def _signed(self, content: bytes) -> AWSPreparedRequest:
        headers = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}
        request = AWSRequest("POST", self.url, headers=headers, data=content)
        SigV4Auth(self._frozen(), "ec2", self.region).add_auth(request)
        return request.prepare()

    def _frozen(self) -> Any:
        if self._credentials is not None:
            return self._credentials.get_frozen_credentials()
        if self._chain is None:
            self._chain = botocore.session.get_session().get_credentials()
        if self._chain is None:
            raise SpotPriceError(
                "NoCredentials",
                "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a profile or role",
            )
        return self._chain.get_frozen_credentials()


# reading a page -----------------------------------------------------------------------------------------------------

_REQUIRED = ("instanceType", "productDescription", "spotPrice", "timestamp", "availabilityZone")
_FIRST_ITEM = re.compile(r"<item>(.*?)</item>", re.DOTALL)
_ELEMENT = re.compile(r"\s*<([A-Za-z]+)>[^<]*</\1>\s*")
_TOKEN = re.compile(r"<nextToken>([^<]*)</nextToken>")


@lru_cache(maxsize=32)
def _pattern(order: tuple[str, ...]) -> re.Pattern[str]:
    inside = r"\s*".join(f"<{name}>([^<]*)</{name}>" for name in order)
    return re.compile(rf"<item>\s*{inside}\s*</item>")


def _by_pattern(body: bytes) -> tuple[dict[str, Any], str] | None:
    """Columns and next token, or None when the page is not entirely of one plain shape."""
    if b"&" in body or b"<![CDATA[" in body:
        return None
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        return None
    token = _TOKEN.search(text)
    first = _FIRST_ITEM.search(text)
    if first is None:
        if "<item" in text:
            return None
        return {name: [] for name in _REQUIRED}, token.group(1).strip() if token else ""
    order = tuple(_ELEMENT.findall(first.group(1)))
    if not set(_REQUIRED) <= set(order) or len(set(order)) != len(order):
        return None
    rows = _pattern(order).findall(text)
    if len(rows) != text.count("<item"):
        return None
    return dict(zip(order, zip(*rows, strict=True), strict=True)), token.group(1).strip() if token else ""


def _parser() -> etree.XMLParser:
    # no DTD, no entities, no network: an answer is data
    return etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)


def _by_tree(body: bytes, report: FetchReport) -> tuple[dict[str, Any], str]:
    """The careful way: any order, any whitespace, escapes; an incomplete item is counted and left out."""
    root = etree.fromstring(body, _parser())
    columns: dict[str, list[Any]] = {name: [] for name in (*_REQUIRED, "availabilityZoneId")}
    for item in root.iterfind("{*}spotPriceHistorySet/{*}item"):
        values = {etree.QName(child).localname: child.text or "" for child in item.iterchildren(etree.Element)}
        missing = [name for name in _REQUIRED if name not in values or (name != "spotPrice" and not values[name])]
        if missing:
            reason = f"no {missing[0]}"
            report.rejected[reason] += 1
            report.examples.setdefault(reason, etree.tostring(item)[:300].decode())
            continue
        for name, column in columns.items():
            column.append(values.get(name))
    return columns, (root.findtext("{*}nextToken") or "").strip()


def _times(texts: pa.ChunkedArray) -> pa.Array:
    """ISO 8601 with Z or an offset, with or without fractions; null where it is none of these."""
    series = pl.Series(pl.from_arrow(texts), dtype=pl.String)
    parsed = series.str.strptime(pl.Datetime("us"), "%Y-%m-%dT%H:%M:%S%.fZ", strict=False)
    if parsed.null_count():
        other = series.str.strptime(pl.Datetime("us", "UTC"), "%Y-%m-%dT%H:%M:%S%.f%#z", strict=False)
        parsed = parsed.fill_null(other.dt.replace_time_zone(None))
    return parsed.dt.replace_time_zone("UTC").to_arrow().cast(SCHEMA.field("ts").type)


def _complete(body: bytes) -> bool:
    """Whether the answer ends as an XML answer must: a connection cut half-way can look like a short 200."""
    return body.rstrip().endswith(b"Response>") and body.lstrip().startswith(b"<")


def _refusal(body: bytes, status: int) -> tuple[str, str]:
    """AWS's code and message, or a 5xx of whatever stands in between."""
    code = re.search(rb"<Code>([^<]*)</Code>", body)
    message = re.search(rb"<Message>([^<]*)</Message>", body)
    if code is None:
        return ("InternalFailure" if status >= 500 else f"HTTP {status}"), f"HTTP {status} without an AWS error"
    return code.group(1).decode(), message.group(1).decode() if message else ""


def _stamp(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"
