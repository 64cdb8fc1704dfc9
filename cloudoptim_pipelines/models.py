"""Run the ``.sql`` models of ``warehouse/lake/models`` with tables the lake does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from warehouse.lake.computed import load_model, refuse_duplicates
from warehouse.lake.query import Snapshot
from warehouse.lake.staging import Staged

BATCH_ROWS = 131_072


def stage(
    snapshot: Snapshot,
    name: str,
    partition: Mapping[str, Any],
    parameters: Mapping[str, Any],
    inputs: Mapping[str, pa.Table] | None = None,
) -> Staged:
    """Run a model over all customers on the pinned release and stage its rows; they stream, memory stays flat.

    Args:
        snapshot: the release it reads.
        name: file name of the model without ``.sql``.
        partition: what the rows replace.
        parameters: may hold more names than the model uses, so that the models of one run share them.
        inputs: tables the lake does not hold (what the model's header calls "given by the caller").

    Raises:
        LakeDataError: a key occurs twice, or rows do not fit the table; nothing is left behind.
    """
    model = load_model(name)
    lake = snapshot.reader.lake
    with snapshot.reader.cursor(snapshot.release, "all", None) as cursor:
        for table, data in (inputs or {}).items():
            cursor.register(table, data)
        used = {key: parameters[key] for key in model.parameters}
        staged = lake.stage(
            model.table, partition, cursor.sql(model.sql, params=used or None).to_arrow_reader(BATCH_ROWS)
        )
    try:
        refuse_duplicates(lake, lake.spec(model.table), staged)
    except BaseException:
        lake.discard(staged)
        raise
    return staged
