"""Computed tables: one ``.sql`` file each, run by DuckDB on a pinned release and streamed into staged files.

A model is one SELECT under a header of comments. What it is, its grain, units and keys are required:

    -- What each node cost in each hour, at the price of that hour.
    -- table: node_cost_hourly
    -- grain: one row per node and hour
    -- units: USD, minutes
    -- keys: customer_id, cluster_id, instance_id, ts
    SELECT … WHERE day = $day

    staged = stage_model(lake, snapshot, load_model("node_cost_hourly"), {"day": day}, {"day": day})
    lake.publish([staged], run_id=run_id, code_version=version)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads

from warehouse.lake.errors import LakeDataError
from warehouse.lake.query import Snapshot
from warehouse.lake.releases import Release
from warehouse.lake.staging import Staged
from warehouse.lake.store import Lake
from warehouse.lake.tables import TableSpec
from warehouse.lake.texts import reading_statement

_FIELD = re.compile(r"^([a-z][a-z ]*):\s*(.*)$")


@dataclass(frozen=True, slots=True)
class Model:
    """A computed table as its file declares it. ``parameters`` are the names its text binds."""

    name: str
    table: str
    description: str
    grain: str
    units: str
    keys: tuple[str, ...]
    sql: str
    parameters: frozenset[str]


def load_model(name: str | Path) -> Model:
    """The model of that name in ``warehouse/lake/models``, or in the file given.

    Raises:
        LakeDataError: the file is missing, its header incomplete, or its text not one reading statement.
    """
    if isinstance(name, Path):
        stem, text = name.stem, name.read_text()
    else:
        stem, file = name, resources.files("warehouse.lake") / "models" / f"{name}.sql"
        if not file.is_file():
            raise LakeDataError(f"there is no model {name!r} in warehouse/lake/models")
        text = file.read_text()
    return parse_model(stem, text)


def parse_model(name: str, text: str) -> Model:
    """The model in a text; see ``load_model``."""
    fields: dict[str, str] = {}
    description: list[str] = []
    current = ""
    for line in text.splitlines():
        if not line.strip():
            continue
        if not line.startswith("--"):
            break
        content = line.removeprefix("--").strip()
        if match := _FIELD.match(content):
            current, fields[match[1]] = match[1], match[2]
        elif current:
            fields[current] += f" {content}"
        else:
            description.append(content)
    missing = [field for field in ("grain", "units", "keys") if not fields.get(field)]
    if missing or not description:
        raise LakeDataError(
            f"model {name}: the header lacks {', '.join(missing or ['a sentence that says what it is'])}; see "
            "warehouse/lake/computed.py for the form"
        )
    sql, parameters = reading_statement(text)
    keys = tuple(key.strip() for key in fields["keys"].split(","))
    table = fields.get("table") or name
    return Model(name, table, " ".join(description), fields["grain"], fields["units"], keys, sql, frozenset(parameters))


def stage_model(
    lake: Lake,
    snapshot: Snapshot,
    model: Model,
    partition: Mapping[str, Any],
    parameters: Mapping[str, Any] | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
) -> Staged:
    """Run the model over all customers on the pinned release and stage its rows for ``partition``.

    ``inputs`` are frames the text reads beside the lake's tables. The rows stream from DuckDB into files; memory does
    not grow with them. Each row group is put in order on the way; a model that fills several for one partition orders
    its text itself where that is worth a sort of the whole. Publish what this returns, alone or with others.

    Raises:
        LakeDataError: a key occurs twice (nothing is left behind), or rows do not fit the table.
        LakeQueryError: the text fails.
    """
    spec = lake.spec(model.table)
    if model.keys != spec.keys:
        raise LakeDataError(f"model {model.name} says keys {model.keys}, but table {spec.name} has {spec.keys}")
    with snapshot.stream(model.sql, parameters, all_customers=True, inputs=inputs) as rows:
        staged = lake.stage(model.table, partition, rows)
    try:
        refuse_duplicates(lake, spec, staged)
    except BaseException:
        lake.discard(staged)
        raise
    return staged


def run_model(
    lake: Lake,
    snapshot: Snapshot,
    model: Model,
    partition: Mapping[str, Any],
    parameters: Mapping[str, Any] | None = None,
    *,
    run_id: str,
    code_version: str = "",
    inputs: Mapping[str, Any] | None = None,
) -> Release:
    """Stage the model and publish it as one release."""
    staged = stage_model(lake, snapshot, model, partition, parameters, inputs=inputs)
    return lake.publish([staged], run_id=run_id, code_version=code_version, note=f"model {model.name}")


def refuse_duplicates(lake: Lake, spec: TableSpec, staged: Staged) -> None:
    """Raise when a key occurs twice in the staged files: money would be counted twice.

    Raises:
        LakeDataError: names the table, the key and one example.
    """
    if not staged.files:
        return
    files = [lake.storage.path(staged.table, file.path) for file in staged.files]
    keys = ", ".join(f'"{key}"' for key in spec.keys)
    query = f"SELECT {keys}, count(*) FROM staged GROUP BY {keys} HAVING count(*) > 1 LIMIT 1"
    db = duckdb.connect(":memory:", config={"memory_limit": "1GB", "threads": 2})
    try:
        db.execute("SET TimeZone = 'UTC'")
        if lake.storage.remote:
            schema = spec.schema()
            columns = pa.schema([schema.field(name) for name in spec.partition_by])
            dataset = pads.dataset(
                files,
                filesystem=lake.storage.filesystem,
                format="parquet",
                partitioning=pads.partitioning(columns, flavor="hive"),
                partition_base_dir=lake.storage.path(staged.table),
            )
            db.register("staged", dataset)
            twice = db.execute(query).fetchone()
        else:
            listed = query.replace("FROM staged", "FROM read_parquet($files, hive_partitioning = true)")
            twice = db.execute(listed, {"files": files}).fetchone()
    finally:
        db.close()
    if twice:
        example = ", ".join(f"{key}={value}" for key, value in zip(spec.keys, twice, strict=False))
        raise LakeDataError(f"table {spec.name}: the key ({', '.join(spec.keys)}) occurs {twice[-1]} times: {example}")
