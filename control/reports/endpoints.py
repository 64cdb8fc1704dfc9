"""/reports."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Response

from control.context import Context
from control.errors import Invalid
from control.reports import formats, service
from control.reports.schemas import Statement
from control.security.access import READERS, require
from control.security.principal import Principal

router = APIRouter(prefix="/reports", tags=["reports"])

Reader = Annotated[Principal, Depends(require(*READERS))]

MEDIA_TYPES = {
    "csv": "text/csv; charset=utf-8",
    "focus": "text/csv; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
    "html": "text/html; charset=utf-8",
}


@router.get(
    "/savings",
    response_model=Statement,
    responses={200: {"content": {name.split(";")[0]: {} for name in MEDIA_TYPES.values()}}},
)
async def savings(
    principal: Reader,
    context: Context,
    customer_id: UUID | None = None,
    month: Annotated[str | None, Query(pattern=r"^\d{4}-(0[1-9]|1[0-2])$", examples=["2026-10"])] = None,
    day: date | None = None,
    format: Literal["json", "csv", "parquet", "html", "focus"] = "json",
) -> Response | Statement:
    """The savings statement of a month or a day. The same period gives the same figures to the cent."""
    if (month is None) == (day is None):
        raise Invalid("month: give either month=YYYY-MM or day=YYYY-MM-DD.")
    if month is not None and month.startswith("0000"):
        raise Invalid("month: there is no year 0000.")
    first = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC).date() if month else None
    statement = await service.savings(context, principal, customer_id=customer_id, month=first, day=day, kind=format)
    if format == "json":
        return statement
    content = {
        "csv": lambda: formats.to_csv(formats.COLUMNS, formats.rows(statement)),
        "parquet": lambda: formats.to_parquet(statement),
        "html": lambda: formats.to_html(statement),
        "focus": lambda: formats.to_focus(statement),
    }[format]()
    suffix = "csv" if format == "focus" else format
    name = f"savings-{'focus-' if format == 'focus' else ''}{month or day}.{suffix}"
    return Response(
        content,
        media_type=MEDIA_TYPES[format],
        headers={
            "Content-Disposition": f'attachment; filename="{name}"',
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
        },
    )
