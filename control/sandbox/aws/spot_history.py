"""DescribeSpotPriceHistory: paged XML, newest first, formatted some pages at a time.

A page of 1,000 records is a string join, not 1,000 templates: polars builds the items of four pages in one expression,
so that months of prices are served at hundreds of thousands of records a second. A query that nobody reads on holds the
numbers of its chunk (20 bytes a record) and those pages.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl

from control.sandbox.aws import network
from control.sandbox.aws.describing import filters, matches_any, opened, sealed
from control.sandbox.aws.protocol import EC2_NAMESPACE, Answer, AwsError, Call
from control.sandbox.market.interface import PRODUCT, Market, PriceChanges

LARGEST_PAGE = 1_000
_RESULTS_KEPT = 32
_PAGES_AT_ONCE = 4
_PAGES_KEPT = 4
"""A client that lost a response asks for the same page again, hardly ever for one further back."""


class _Result:
    """The pages of one query, made as they are asked for."""

    def __init__(self, chunks: Iterator[PriceChanges], zone_names: dict[str, str], page_size: int) -> None:
        self._coming = (page for chunk in chunks for page in _pages(chunk, zone_names, page_size))
        self._pages: dict[int, str] = {}
        self._made = 0
        self._exhausted = False
        self.lock = threading.Lock()

    def page(self, number: int) -> tuple[str, bool] | None:
        """Page text and whether another follows; None when the page was dropped already."""
        while number + 1 >= self._made and not self._exhausted:
            made = next(self._coming, None)
            if made is None:
                self._exhausted = True
                break
            self._pages[self._made] = made
            self._made += 1
        for old in [n for n in self._pages if n < number - _PAGES_KEPT]:
            del self._pages[old]
        if number >= self._made:
            return "", False
        text = self._pages.get(number)
        return None if text is None else (text, number + 1 < self._made)


class SpotHistory:
    """Answers DescribeSpotPriceHistory for every account; thread-safe."""

    def __init__(self, market: Market, page_size: int = LARGEST_PAGE) -> None:
        self.market = market
        self.page_size = page_size
        self._results: OrderedDict[str, _Result] = OrderedDict()
        self._lock = threading.Lock()

    def handle(self, call: Call) -> Answer:
        query, number = self._query(call)
        key = hashlib.sha256(repr(sorted(query.items())).encode()).hexdigest()
        result = self._result(key, call, query)
        with result.lock:
            page = result.page(number)
        if page is None:
            with self._lock:
                self._results.pop(key, None)
            result = self._result(key, call, query)
            with result.lock:
                page = result.page(number)
        text, more = page or ("", False)
        token = sealed([query, number + 1]) if more else ""
        call.result["page"] = number
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<DescribeSpotPriceHistoryResponse xmlns="{EC2_NAMESPACE}">'
            f"<requestId>{call.request_id}</requestId><spotPriceHistorySet>{text}</spotPriceHistorySet>"
            f"<nextToken>{token}</nextToken></DescribeSpotPriceHistoryResponse>"
        )
        return Answer(200, body.encode())

    def _query(self, call: Call) -> tuple[dict[str, Any], int]:
        """The query with all defaults fixed (so that all pages see one `now`), and the page number."""
        p = call.params
        if p.get("NextToken"):
            query, number = opened(p["NextToken"])
            return query, int(number)
        now = self.market.now()
        end = min(_time(p["EndTime"], "EndTime"), now) if p.get("EndTime") else now
        oldest = now - self.market.history_limit if self.market.history_limit is not None else _EPOCH
        start = max(_time(p["StartTime"], "StartTime"), oldest) if p.get("StartTime") else oldest
        if (
            start > end
            and p.get("StartTime")
            and p.get("EndTime")
            and _time(p["StartTime"], "StartTime") > _time(p["EndTime"], "EndTime")
        ):
            raise AwsError("InvalidParameterValue", "StartTime must be before EndTime")
        names = network.zone_ids(call.caller.account_id, call.region)
        types = list(p.get("InstanceType") or [])
        products = list(p.get("ProductDescription") or [])
        zones = [z for z in (names.get(p.get("AvailabilityZone", "")), p.get("AvailabilityZoneId")) if z]
        if p.get("AvailabilityZone") and p["AvailabilityZone"] not in names:
            raise AwsError("InvalidParameterValue", f"Invalid availability zone: [{p['AvailabilityZone']}]")
        pools = self.market.pools(call.region)
        for name, values in filters(p):
            if name == "availability-zone":
                matched = [i for n, i in names.items() if matches_any(n, values)]
                zones = [z for z in zones if z in matched] if zones else matched or ["none"]
            elif name == "availability-zone-id":
                matched = [i for i in names.values() if matches_any(i, values)]
                zones = [z for z in zones if z in matched] if zones else matched or ["none"]
            elif name == "instance-type":
                matched = sorted({q.instance_type for q in pools if matches_any(q.instance_type, values)})
                types = [t for t in types if t in matched] if types else matched or ["none"]
            elif name == "product-description":
                products += values
            else:
                raise AwsError("InvalidParameterValue", f"The filter '{name}' is invalid")
        size = min(int(p.get("MaxResults") or LARGEST_PAGE), self.page_size, LARGEST_PAGE)
        return {
            "account": call.caller.account_id,
            "region": call.region,
            "start": start.isoformat(),
            "end": max(start, end).isoformat(),
            "types": sorted(types),
            "zones": sorted(zones),
            # with and without VPC are the same price; the sandbox has VPC only
            "sold": not products or any(matches_any(d, products) for d in (PRODUCT, f"{PRODUCT} (Amazon VPC)")),
            "size": max(1, size),
        }, 0

    def _result(self, key: str, call: Call, query: dict[str, Any]) -> _Result:
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key]
            chunks: Iterator[PriceChanges] = iter(())
            if query["sold"]:
                chunks = self.market.changes(
                    query["region"],
                    datetime.fromisoformat(query["start"]),
                    datetime.fromisoformat(query["end"]),
                    instance_types=query["types"] or None,
                    zone_ids=query["zones"] or None,
                )
            result = _Result(chunks, network.zone_names(query["account"], query["region"]), query["size"])
            self._results[key] = result
            while len(self._results) > _RESULTS_KEPT:
                self._results.popitem(last=False)
            return result


_EPOCH = datetime(2006, 1, 1, tzinfo=UTC)


def _time(text: str, name: str) -> datetime:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise AwsError("InvalidParameterValue", f"Value ({text}) for parameter {name} is invalid.") from None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return at.astimezone(UTC) + timedelta(0)


def _pages(chunk: PriceChanges, zone_names: dict[str, str], size: int) -> Iterator[str]:
    """The records of a chunk as page texts, newest first."""
    if len(chunk) == 0:
        return
    heads = pl.Series(
        [
            f"<item><instanceType>{p.instance_type}</instanceType><productDescription>{PRODUCT}</productDescription><spotPrice>"
            for p in chunk.pools
        ]
    )
    tails = pl.Series(
        [
            f"</timestamp><availabilityZone>{zone_names.get(p.zone_id, p.zone_id)}</availabilityZone>"
            f"<availabilityZoneId>{p.zone_id}</availabilityZoneId></item>"
            for p in chunk.pools
        ]
    )
    step = size * _PAGES_AT_ONCE
    for stop in range(len(chunk), 0, -step):
        made = _formatted(chunk, slice(max(0, stop - step), stop), heads, tails, size)
        while made:
            yield made.pop()


def _formatted(chunk: PriceChanges, rows: slice, heads: pl.Series, tails: pl.Series, size: int) -> list[str]:
    """The pages of some rows, the first page last; a function, so that a waiting generator holds nothing but them."""
    pool = pl.Series(chunk.pool[rows][::-1])
    usd = chunk.usd_per_hour[rows][::-1]
    millionths = np.round(usd * 1e6)
    if np.abs(millionths / 1e6 - usd).max() < 1e-9:
        whole = pl.Series((millionths // 1_000_000).astype(np.int64)).cast(pl.String)
        fraction = pl.Series((millionths % 1_000_000).astype(np.int64)).cast(pl.String).str.zfill(6)
        price = whole + "." + fraction
    else:
        price = pl.Series([format(v, ".12f") for v in usd])
    frame = pl.DataFrame(
        {
            "head": heads.gather(pool),
            "price": price,
            "at": pl.Series(chunk.at[rows][::-1]).cast(pl.Datetime("us")).dt.strftime("%Y-%m-%dT%H:%M:%S.%3fZ"),
            "tail": tails.gather(pool),
        }
    )
    items = frame.select(
        pl.concat_str("head", "price", pl.lit("</spotPrice><timestamp>"), "at", "tail").alias("item"),
        (pl.int_range(pl.len()) // size).alias("page"),
    )
    pages = items.group_by("page", maintain_order=True).agg(pl.col("item").str.join(""))["item"].to_list()
    pages.reverse()
    return pages
