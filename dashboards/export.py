"""Downloads of what the pages show, as CSV and Parquet, at plain addresses a script can use too."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from dashboards.api import ApiError
from dashboards.auth import BaseHandler, Login
from dashboards.data import Data, DataError

log = logging.getLogger("cloudoptim.dashboards")

Export = Callable[[Data, UUID, Mapping[str, str]], pa.Table]

# What a spreadsheet would run as a formula when a cell starts with it, full-width forms included.
_FORMULA = "^[=+\\-@\t\r\n\x00＝＋－＠]"


def csv_bytes(table: pa.Table) -> bytes:
    """RFC 4180 CSV in which text stays text: a cell that a spreadsheet would run gets a leading quote, and control
    characters that end a cell early become spaces. Numbers stay numbers, times are ISO 8601 in UTC."""
    columns = []
    for name in table.column_names:
        column = table[name]
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            risky = pc.match_substring_regex(column, _FORMULA)
            quoted = pc.binary_join_element_wise(pa.scalar("'", column.type), column, pa.scalar("", column.type))
            column = pc.replace_substring_regex(pc.if_else(risky, quoted, column), "[\x00\r]", " ")
        elif pa.types.is_timestamp(column.type):
            column = pc.strftime(column, format="%Y-%m-%dT%H:%M:%SZ")
        columns.append(column)
    out = io.BytesIO()
    pa_csv.write_csv(pa.table(columns, names=table.column_names), out)
    return out.getvalue()


def parquet_bytes(table: pa.Table) -> bytes:
    """The same rows with their types."""
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


FORMATS: dict[str, tuple[str, Callable[[pa.Table], bytes]]] = {
    "csv": ("text/csv; charset=utf-8", csv_bytes),
    "parquet": ("application/vnd.apache.parquet", parquet_bytes),
}


class FileHandler(BaseHandler):
    """What the two kinds of files share."""

    def say(self, status: int, message: str) -> None:
        """Answer with one line instead of a file."""
        self.set_status(status)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(message)

    def tenant(self) -> tuple[Login, UUID] | None:
        """The login and its customer; None when an answer was given instead."""
        login = self.logins.from_request(self.request)
        if login is None:
            self.redirect("/login")
            return None
        if login.customer_id is None:
            self.say(404, "There is no customer to show; open a page first.")
            return None
        return login, login.customer_id


class ReportHandler(FileHandler):
    """GET /report/<month>.<format>: the control service's own report of a month, fetched in the person's name."""

    async def get(self, month: str, kind: str) -> None:
        """Hand the file on, or say in one line why there is none."""
        if (known := self.tenant()) is None:
            return
        login, customer_id = known
        try:
            answer = await self.api.fetch(
                login, "/reports/savings", customer_id=str(customer_id), month=month, format=kind
            )
        except ApiError as error:
            log.warning("report %s.%s: %s", month, kind, error)
            self.say(error.status or 503, str(error))
            return
        ending = "csv" if kind == "focus" else kind
        self.set_header("Content-Type", answer.headers.get("Content-Type", "application/octet-stream"))
        self.set_header("Content-Disposition", f'attachment; filename="cloudoptim-savings-{month}-{kind}.{ending}"')
        await self.finish(answer.content)


class DownloadHandler(FileHandler):
    """GET /download/<dataset>.<csv|parquet>: the page's rows, with the page's own parameters and the login's tenant."""

    def initialize(self, *, data: Data, exports: Mapping[str, Export], **shared: object) -> None:  # type: ignore[override]
        """Called by Tornado with the routing table's arguments."""
        super().initialize(**shared)  # type: ignore[arg-type]
        self.data, self.exports = data, exports

    async def get(self, dataset: str, kind: str) -> None:
        """Write the file, or say in one line why there is none."""
        if (known := self.tenant()) is None:
            return
        _, customer_id = known
        export = self.exports.get(dataset)
        if export is None:
            self.say(404, f"There is no download {dataset}; there are {', '.join(sorted(self.exports))}.")
            return
        params = {name: self.get_query_argument(name) for name in self.request.query_arguments}
        content_type, encode = FORMATS[kind]
        try:
            body = await asyncio.to_thread(lambda: encode(export(self.data, customer_id, params)))
        except DataError as error:
            log.warning("download %s: %s", dataset, error)
            self.say(503, f"{error.what}: {error.why}. What to do: {error.next_step}")
            return
        name = f"cloudoptim-{dataset}-{datetime.now(UTC):%Y%m%dT%H%MZ}.{kind}"
        self.set_header("Content-Type", content_type)
        self.set_header("Content-Disposition", f'attachment; filename="{name}"')
        await self.finish(body)
