"""What a query's text may do: read tables, and nothing else."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import duckdb
import msgspec

from warehouse.lake.errors import LakeQueryError
from warehouse.lake.pruning import Mention, mentions

# Nodes of a parsed query that only read. DuckDB 2 parses COPY and INSERT inside WITH and still calls it a SELECT.
READING_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
# Functions a text may read from. A list of what is allowed: DuckDB has a hundred others, and each of its releases adds
# some, that run text, read files, write logs or reach a table by a name given as text.
TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree"})
# Functions of one value that run text, look outside or leave something behind.
REFUSED_FUNCTIONS = frozenset(
    {
        "currval",
        "getenv",
        "json_execute_serialized_sql",
        "nextval",
        "query",
        "query_table",
        "read_blob",
        "read_text",
        "setseed",
        "setval",
        "write_log",
    }
)
# A table's name. Anything else in its place is a file, or the unfiltered rows below a view (see ``plans.beneath``).
_PLAIN_NAME = re.compile(r"\w+")
# Texts whose parsed form is kept; a dashboard page has some thirty.
KEPT_TEXTS = 512


@dataclass(frozen=True, slots=True)
class Reading:
    """A text that only reads, its parameters, a table in it that is named with a schema, and how it mentions tables."""

    statement: str
    parameters: frozenset[str]
    qualified: str | None
    mentions: Mapping[str, tuple[Mention, ...]]


def reading_statement(sql: str) -> tuple[str, set[str]]:
    """The text of the one reading statement in ``sql`` and the names of its parameters.

    Raises:
        LakeQueryError: there are several statements, or something in it does more than read tables.
    """
    reading = parsed(sql)
    return reading.statement, set(reading.parameters)


@lru_cache(maxsize=KEPT_TEXTS)
def parsed(sql: str) -> Reading:
    """The one reading statement in ``sql``.

    Raises:
        LakeQueryError: there are several statements, or something in it does more than read tables.
    """
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise LakeQueryError(f"the query cannot be read: {first_lines(error)}") from error
    if len(statements) != 1:
        raise LakeQueryError(f"give exactly one statement; this text has {len(statements)}")
    statement = statements[0]
    if statement.type != duckdb.StatementType.SELECT:
        raise LakeQueryError(
            f"only reading is allowed here (SELECT, WITH, FROM, VALUES, DESCRIBE, SUMMARIZE), not {statement.type.name}"
        )
    tree = _tree(statement.query)
    qualified = _refuse_writing(tree)
    return Reading(statement.query, frozenset(statement.named_parameters), qualified, mentions(tree))


# One instance only parses: it sees no file and no table.
_PARSER = threading.local()


def _tree(sql: str) -> dict[str, Any]:
    if not hasattr(_PARSER, "db"):
        _PARSER.db = duckdb.connect(":memory:", config={"enable_external_access": False, "threads": 1})
    tree = msgspec.json.decode(_PARSER.db.execute("SELECT json_serialize_sql($sql)", {"sql": sql}).fetchall()[0][0])
    if tree.get("error"):
        raise LakeQueryError(
            f"only plain reading statements are allowed here: {tree.get('error_message', 'not a SELECT')}"
        )
    return tree


def _refuse_writing(tree: dict[str, Any]) -> str | None:
    """Refuse what hides inside a SELECT: DuckDB 2 runs ``WITH x AS (COPY … TO 'file') SELECT …`` as one.

    Returns a table that is named with a schema or catalog, if there is one.
    """
    qualified: str | None = None
    stack: list[Any] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            kind = node.get("type")
            if isinstance(kind, str) and kind.endswith("_NODE") and kind not in READING_NODES:
                what = kind.removesuffix("_NODE").removesuffix("_QUERY")
                raise LakeQueryError(f"only reading is allowed here; the text contains {what}")
            _refuse_function(node)
            qualified = _named_with_schema(node) or qualified
            stack.extend(node.values())
    return qualified


def _refuse_function(node: Mapping[str, Any]) -> None:
    if node.get("type") == "TABLE_FUNCTION":
        name = node["function"].get("function_name")
        if not isinstance(name, str) or name.lower() not in TABLE_FUNCTIONS:
            raise LakeQueryError(
                f"reading from function {name} is not allowed in lake queries; allowed are "
                f"{', '.join(sorted(TABLE_FUNCTIONS))}"
            )
    name = node.get("function_name")
    if isinstance(name, str) and name.lower() in REFUSED_FUNCTIONS:
        raise LakeQueryError(f"function {name} is not allowed in lake queries")


def _named_with_schema(node: Mapping[str, Any]) -> str | None:
    """The table's or listing's name if it has a schema; None for what has none.

    Raises:
        LakeQueryError: a file stands in the table's place.
    """
    kind = node.get("type")
    if kind not in ("BASE_TABLE", "SHOW_REF"):
        return None
    table = node["table_name"].strip('"')  # SHOW TABLES asks for "tables", with the quotes
    if table and not _PLAIN_NAME.fullmatch(table):
        raise LakeQueryError(f"{table!r} is no table; lake queries read tables, not files")
    path = [node["catalog_name"], node["schema_name"], table]
    return ".".join(filter(None, path)) if any(path[:2]) else None


def first_lines(error: Exception) -> str:
    """What DuckDB says of an error, without the text around it."""
    return " ".join(line.strip() for line in str(error).split("\n\n")[0].splitlines() if line.strip())
