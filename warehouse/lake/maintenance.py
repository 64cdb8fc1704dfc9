"""Keep the lake small and every readable release whole: compact, expire, vacuum.

compact(lake, reader, "spot_prices", run_id=run_id)     # rewrite partitions that are many small files
lake.keep(statement_release_id)                         # a statement reads it: never vacuumed
vacuum(lake)                                            # remove files that no readable release needs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from warehouse.lake.delta import live_files
from warehouse.lake.errors import LakeConflictError, LakeDataError, LakeError
from warehouse.lake.query import LakeReader
from warehouse.lake.releases import Release
from warehouse.lake.staging import Scope
from warehouse.lake.store import Lake, PartitionWrite

# Readers may hold a pinned release, and writers a staged file, for much less than a week.
RETENTION_HOURS = 168
# Below this a file staged by a running computation could be taken for litter, so nobody may be staging.
MINIMUM_RETENTION_HOURS = 24
# DuckDB reads one file of this size as fast as it does ten of a tenth, and opens nine footers less.
SMALL_FILE_BYTES = 32 * 1024 * 1024


def compact(
    lake: Lake,
    reader: LakeReader,
    table: str,
    partition: Mapping[str, Any] | None = None,
    *,
    run_id: str,
    code_version: str = "",
    small_file_bytes: int = SMALL_FILE_BYTES,
) -> list[Release]:
    """Rewrite every partition (or those in ``partition``) that has several small files into one sorted file.

    Rows do not change. A partition that somebody replaces meanwhile is left as they wrote it. Returns one release for
    each partition rewritten.
    """
    spec = lake.spec(table)
    scopes = [Scope.of(spec, partition)] if partition else None
    release = lake.release()
    small: dict[tuple[str, ...], int] = {}
    for _, size, _, values in live_files(lake.delta_table(table, release.versions[table]), spec, scopes):
        if size < small_file_bytes:
            key = tuple(values[name] for name in spec.partition_by)
            small[key] = small.get(key, 0) + 1
    releases = []
    order = ", ".join(f'"{name}"' for name in spec.sort_by)
    for key in sorted(key for key, files in small.items() if files > 1):
        values = dict(zip(spec.partition_by, key, strict=True))
        where = " AND ".join(f'"{name}" = ${name}' for name in spec.partition_by)
        pinned = reader.pin()
        count = pinned.query(f"SELECT count(*) AS rows FROM {table} WHERE {where}", values, all_customers=True)
        with pinned.stream(f"SELECT * FROM {table} WHERE {where} ORDER BY {order}", values, all_customers=True) as rows:
            staged = lake.stage(table, values, rows)
        if staged.rows != count["rows"][0].as_py():
            lake.discard(staged)
            raise LakeError(
                f"table {table}: compacting {values} read {staged.rows} of {count['rows'][0]} rows; not done"
            )
        try:
            note = f"compact {table} {'/'.join(key)}"
            releases.append(
                lake.publish(
                    [PartitionWrite(table, values, staged)],
                    run_id=run_id,
                    code_version=code_version,
                    note=note,
                    based_on=pinned.release,
                    operation="compact",
                )
            )
        except LakeConflictError:
            continue  # somebody replaced it: theirs is newer, and compacted next time
    return releases


@dataclass(frozen=True, slots=True)
class VacuumReport:
    """What a vacuum removed, or with ``dry_run`` would remove: files by table, and the releases that expired."""

    files: Mapping[str, Sequence[str]]
    expired: Sequence[int]
    retention_hours: float
    dry_run: bool


def vacuum(lake: Lake, *, retention_hours: int = RETENTION_HOURS, dry_run: bool = False) -> VacuumReport:
    """Remove files that no readable release needs: those of expired releases and those dead writers left behind.

    Releases that were superseded longer ago than the retention expire, but for kept ones. No commit is made: delta-rs
    only names the files. Retentions under ``MINIMUM_RETENTION_HOURS`` hold off all staging meanwhile.

    Raises:
        LakeBusyError: such a short retention, and a process is staging files.
    """
    if retention_hours < 0:
        raise LakeDataError(f"retention_hours is {retention_hours}; give 0 or more")
    if retention_hours < MINIMUM_RETENTION_HOURS and not dry_run:
        with lake.nothing_staged():
            return _vacuum(lake, retention_hours, dry_run)
    return _vacuum(lake, retention_hours, dry_run)


def _vacuum(lake: Lake, retention_hours: int, dry_run: bool) -> VacuumReport:
    cutoff = datetime.now(UTC) - timedelta(hours=retention_hours)
    # Expired first: from here on nobody can pin or keep what is about to go.
    expired = [] if dry_run else lake.expire(superseded_before=cutoff)
    removed: dict[str, list[str]] = {}
    for table, versions in lake.readable_versions().items():
        handle = lake.delta_table(table)
        files = handle.vacuum(
            retention_hours=retention_hours,
            dry_run=True,
            enforce_retention_duration=False,
            full=True,  # also what a dead writer staged and nobody committed
            keep_versions=sorted(versions),
        )
        removed[table] = [_relative(file, table) for file in files]
        if not dry_run:
            for path in removed[table]:
                lake.storage.discard(lake.storage.path(table, path))
    return VacuumReport(removed, expired, retention_hours, dry_run)


def _relative(file: str, table: str) -> str:
    """The path below the table: delta-rs names removed files in full and litter relatively."""
    marker = f"/{table}/"
    return file.rpartition(marker)[2] if marker in file else file
