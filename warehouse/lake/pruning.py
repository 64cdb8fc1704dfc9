"""Which days a query can read of each table, so that DuckDB is given the files of those days and not of all.

DuckDB looks at every file of a list before its own filter drops them: 30 microseconds each, a second for 29,000. Only
what is certain counts: a table is narrowed when each mention of it stands alone in its FROM and that WHERE bounds
``day`` by constants or parameters. Whatever else the text does happens to rows that passed the WHERE, which stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

DAY = "day"
# Comparisons of ``day`` with a value as the end they bound: (lower, upper).
_BOUNDS = {
    "COMPARE_EQUAL": (True, True),
    "COMPARE_GREATERTHAN": (True, False),
    "COMPARE_GREATERTHANOREQUALTO": (True, False),
    "COMPARE_LESSTHAN": (False, True),
    "COMPARE_LESSTHANOREQUALTO": (False, True),
}


@dataclass(frozen=True, slots=True)
class Operand:
    """What ``day`` is compared with: a parameter's name or a constant."""

    parameter: str | None = None
    constant: str | None = None

    def value(self, parameters: Mapping[str, Any]) -> date | None:
        """Its day; None for what is none for certain. A moment is the day it lies in, which bounds no less."""
        given = self.constant if self.parameter is None else parameters.get(self.parameter)
        if isinstance(given, datetime):
            return (given.astimezone(UTC) if given.tzinfo else given).date()
        if isinstance(given, date):
            return given
        if isinstance(given, str) and len(given) == len("2024-01-31"):
            try:
                return date.fromisoformat(given)
            except ValueError:
                return None
        return None


@dataclass(frozen=True, slots=True)
class Mention:
    """One mention of a table and what bounds its days."""

    lower: tuple[Operand, ...]
    upper: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Days:
    """First and last day that can be read, both included."""

    first: date
    last: date


def mentions(tree: Any) -> dict[str, tuple[Mention, ...]]:
    """Every mention of each unqualified table in a parsed query, by the table's name in lower case."""
    bounded: dict[int, Mention] = {}
    tables = []
    for node in _nodes(tree):
        if node.get("type") == "SELECT_NODE" and _alone(node.get("from_table")):
            bounded[id(node["from_table"])] = _bounds(node["from_table"], node.get("where_clause"))
        elif node.get("type") == "BASE_TABLE" and not node["schema_name"] and not node["catalog_name"]:
            tables.append(node)
    found: dict[str, tuple[Mention, ...]] = {}
    for table in tables:
        name = table["table_name"].lower()
        found[name] = (*found.get(name, ()), bounded.get(id(table), Mention((), ())))
    return found


def days_read(found: Mapping[str, tuple[Mention, ...]], parameters: Mapping[str, Any]) -> dict[str, Days]:
    """The days that each table is read of; a table that is missing may be read whole."""
    out = {}
    for table, several in found.items():
        days = [_days(mention, parameters) for mention in several]
        known = [item for item in days if item is not None]
        if known and len(known) == len(days):
            out[table] = Days(min(item.first for item in known), max(item.last for item in known))
    return out


def _days(mention: Mention, parameters: Mapping[str, Any]) -> Days | None:
    lower = [day for operand in mention.lower if (day := operand.value(parameters))]
    upper = [day for operand in mention.upper if (day := operand.value(parameters))]
    if not lower and not upper:
        return None
    return Days(max(lower, default=date.min), min(upper, default=date.max))


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            yield node
            stack.extend(node.values())


def _alone(table: Any) -> bool:
    """Whether a FROM is one table as it is: no join, sample, renamed column or moment in time."""
    return (
        isinstance(table, dict)
        and table.get("type") == "BASE_TABLE"
        and not (table.get("sample") or table.get("column_name_alias") or table.get("at_clause"))
    )


def _bounds(table: dict[str, Any], where: Any) -> Mention:
    names = {(DAY,), ((table.get("alias") or table["table_name"]).lower(), DAY)}
    lower: list[Operand] = []
    upper: list[Operand] = []

    def is_day(node: Any) -> bool:
        return node.get("class") == "COLUMN_REF" and tuple(part.lower() for part in node["column_names"]) in names

    stack = [where]
    while stack:
        node = stack.pop()
        if not isinstance(node, dict):
            continue
        kind = node.get("type", "")
        if kind == "CONJUNCTION_AND":
            stack.extend(node["children"])
        elif kind == "COMPARE_BETWEEN" and is_day(node["input"]):
            lower += _operand(node["lower"])
            upper += _operand(node["upper"])
        elif kind in _BOUNDS:
            below, above = _BOUNDS[kind]
            left, right = node["left"], node["right"]
            if is_day(right):
                left, right, below, above = right, left, above, below
            if is_day(left):
                lower += _operand(right) if below else []
                upper += _operand(right) if above else []
    return Mention(tuple(lower), tuple(upper))


def _operand(node: Any) -> list[Operand]:
    if node.get("type") == "OPERATOR_CAST" and node.get("type_expr", {}).get("type_name") == "DATE":
        node = node["child"]
    if node.get("class") == "PARAMETER":
        return [Operand(parameter=node["identifier"])]
    literal = node.get("literal") if node.get("class") == "CONSTANT" else None
    if isinstance(literal, dict) and literal.get("kind") == "STRING":
        return [Operand(constant=literal["text"])]
    return []
