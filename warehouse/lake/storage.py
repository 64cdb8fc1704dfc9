"""Where the lake's files live: a folder, or a bucket on S3 or anything that speaks its protocol.

Credentials and endpoint of S3 come from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``); where they are absent, the
machine's or pod's own role is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from warehouse.lake.errors import LakeError, LakeForkError

# delta-rs and pyarrow start threads that a forked child does not have: delta-rs panics on its first use, DuckDB hangs.
_IMPORTED_IN = os.getpid()


def refuse_forked_child() -> None:
    """Raise in a forked child.

    Raises:
        LakeForkError: this process was forked after the lake was imported. Start workers by spawning them
            (``multiprocessing.get_context("spawn")``, a subprocess, Dagster's default executor), or import the lake
            only after the fork.
    """
    if os.getpid() != _IMPORTED_IN:
        raise LakeForkError(
            f"process {os.getpid()} was forked from {_IMPORTED_IN} after the lake was imported, and delta-rs panics "
            'after fork; spawn the process instead (multiprocessing.get_context("spawn") or a subprocess)'
        )


class Storage:
    """File operations below one root, the same for a folder and for S3."""

    def __init__(self, root: str | Path, storage_options: Mapping[str, str] | None = None) -> None:
        text = str(root)
        scheme = urlsplit(text).scheme if "://" in text else ""
        if scheme not in ("", "s3"):
            raise LakeError(f"CLOUDOPTIM_LAKE_ROOT is {text!r}: only a folder or s3://bucket/prefix is supported")
        if set(text) & set("*?[]{}'\""):
            # DuckDB takes the names of files for patterns.
            raise LakeError(f"CLOUDOPTIM_LAKE_ROOT is {text!r}: choose a name without * ? [ ] {{ }} and quotes")
        self.remote = scheme == "s3"
        self.root = text.rstrip("/") if self.remote else str(Path(text).expanduser().absolute())
        self._given = dict(storage_options or {})

    def _option(self, *names: str) -> str:
        for name in names:
            if value := self._given.get(name) or self._given.get(name.lower()) or os.environ.get(name):
                return value
        return ""

    @cached_property
    def delta_options(self) -> dict[str, str] | None:
        """Options for delta-rs; None for a folder."""
        if not self.remote:
            return None
        endpoint = self._option("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        found = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true" if endpoint.startswith("http://") else "",
            "AWS_ACCESS_KEY_ID": self._option("AWS_ACCESS_KEY_ID"),
            "AWS_SECRET_ACCESS_KEY": self._option("AWS_SECRET_ACCESS_KEY"),
            "AWS_SESSION_TOKEN": self._option("AWS_SESSION_TOKEN"),
            "AWS_REGION": self._option("AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1",
            # Put-if-absent by the store itself: no DynamoDB lock table beside the bucket.
            "AWS_CONDITIONAL_PUT": "etag",
        }
        return {**self._given, **{name: value for name, value in found.items() if value}}

    @cached_property
    def filesystem(self) -> pafs.FileSystem:
        """Arrow filesystem; paths are ``path()``'s."""
        if not self.remote:
            return pafs.LocalFileSystem()
        options = self.delta_options or {}
        endpoint = options.get("AWS_ENDPOINT_URL", "")
        return pafs.S3FileSystem(
            access_key=options.get("AWS_ACCESS_KEY_ID"),
            secret_key=options.get("AWS_SECRET_ACCESS_KEY"),
            session_token=options.get("AWS_SESSION_TOKEN"),
            region=options["AWS_REGION"],
            endpoint_override=endpoint.split("://", 1)[-1] or None,
            scheme=endpoint.split("://", 1)[0] if endpoint else "https",
            background_writes=False,
        )

    def uri(self, *parts: str) -> str:
        """Address of a table or file for delta-rs."""
        return "/".join((self.root, *parts))

    def path(self, *parts: str) -> str:
        """The same as the Arrow filesystem wants it (without ``s3://``)."""
        return self.uri(*parts).removeprefix("s3://")

    def prepare(self, folder: str) -> bool:
        """Make the folder a file will be written to (buckets have none). True when it was not there."""
        if self.remote or Path(folder).is_dir():
            return False
        Path(folder).mkdir(parents=True, exist_ok=True)
        return True

    def settle(self, file: str, *, folders: int = 1) -> int:
        """Make a closed file and its name survive a power cut; returns its size in bytes.

        ``folders``: how many folders above the file are to be synced, more than one where they are new themselves.
        """
        if self.remote:
            return int(self.filesystem.get_file_info(file).size)
        for path in [Path(file), *Path(file).parents[:folders]]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return Path(file).stat().st_size

    def discard(self, file: str) -> None:
        """Delete a file that was never published; one that is gone is fine."""
        try:
            self.filesystem.delete_file(file)
        except FileNotFoundError:
            return
