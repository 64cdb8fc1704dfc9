"""One row in every table, made from the models alone: what a migration test needs and nobody wants to maintain."""

from __future__ import annotations

import itertools
import re
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Date,
    DateTime,
    Double,
    Float,
    Integer,
    LargeBinary,
    Numeric,
    Table,
    Text,
    Uuid,
    insert,
)
from sqlalchemy.dialects.postgresql import JSONB

from warehouse.postgres.models import Base

_numbers = itertools.count(1)
_ONE_OF = re.compile(r"^(\w+) IN \('([^']+)'")

# Rows that checks over several columns ask for.
SPECIAL: dict[str, dict[str, Any]] = {
    "interruptions": {"state": "open", "outcome": None},
    "launch_intents": {"plan_id": None, "step_no": None},
    "api_keys": {"role": "analyst"},
}


def _value(column: Column[Any]) -> Any:
    kind, number = column.type, next(_numbers)
    if isinstance(kind, Uuid):
        return uuid4()
    if isinstance(kind, ARRAY):
        return ["x"]
    if isinstance(kind, JSONB):
        return {"n": number}
    if isinstance(kind, DateTime):
        return datetime.now(UTC)
    if isinstance(kind, Date):
        return date(2026, 1, 1)
    if isinstance(kind, Boolean):
        return False
    if isinstance(kind, LargeBinary):
        return number.to_bytes(8, "big")
    if isinstance(kind, Double | Float):
        return float(number)
    if isinstance(kind, Numeric):
        return Decimal(number)
    if isinstance(kind, Integer | BigInteger):
        return number
    assert isinstance(kind, Text), (column, kind)
    return f"{column.name}-{number}"


def row_for(table: Table, known: dict[tuple[str, str], Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """A row that every constraint accepts; ``known`` holds values of rows made before, by (table, column)."""
    row: dict[str, Any] = {}
    choices = {}
    for constraint in table.constraints:
        if isinstance(constraint, CheckConstraint) and (match := _ONE_OF.match(str(constraint.sqltext))):
            choices[match[1]] = match[2]
    special = SPECIAL.get(table.name, {})
    references = {
        element.parent.name: (element.column.table.name, element.column.name)
        for constraint in table.foreign_key_constraints
        for element in constraint.elements
    }
    for column in table.columns:
        if column.identity is not None or column.computed is not None:
            continue
        if column.name in special:
            row[column.name] = special[column.name]
        elif column.name in fixed:
            row[column.name] = fixed[column.name]
        elif column.name in references and references[column.name] in known:
            row[column.name] = known[references[column.name]]
        elif column.name in choices:
            row[column.name] = choices[column.name]
        elif column.name == "lake_release_id":
            row[column.name] = 1
        else:
            row[column.name] = _value(column)
    return row


def fill(connection: Connection, tables: list[Table] | None = None) -> dict[str, dict[str, Any]]:
    """Insert one customer and one row of its in every table; returns the rows by table."""
    customer_id = uuid4()
    known: dict[tuple[str, str], Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for table in tables if tables is not None else Base.metadata.sorted_tables:
        fixed: dict[str, Any] = {"customer_id": customer_id}
        if table.name == "customers":
            fixed = {"id": customer_id}
        row = row_for(table, known, fixed)
        connection.execute(insert(table).values(**row))
        rows[table.name] = row
        for name, value in row.items():
            known[table.name, name] = value
    return rows


def customer_of(rows: dict[str, dict[str, Any]]) -> UUID:
    """The customer that ``fill`` made."""
    return rows["customers"]["id"]
