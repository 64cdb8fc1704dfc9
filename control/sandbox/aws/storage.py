"""What the sandbox's AWS keeps over a restart: one SQLite file, written as things change.

`synchronous=OFF` on purpose: a killed process loses nothing, a power cut may, which is right for a sandbox and keeps
SendMessage at microseconds.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec


class Storage:
    """Documents by (kind, key), and messages by queue. `path=None` keeps everything in memory only."""

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # one event loop owns it, which in the threaded variant is not the thread that made it
        self._db = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
        self.durable = path is not None
        if path is not None:
            path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS document (kind TEXT, key TEXT, body BLOB, PRIMARY KEY (kind, key))"
        )
        self._db.execute("CREATE TABLE IF NOT EXISTS message (id TEXT PRIMARY KEY, queue TEXT, seq INTEGER, body BLOB)")

    def put(self, kind: str, key: str, document: Any) -> None:
        if self.durable:
            self._db.execute("REPLACE INTO document VALUES (?, ?, ?)", (kind, key, msgspec.json.encode(document)))

    def put_many(self, documents: Iterable[tuple[str, str, Any]]) -> None:
        """(kind, key, document) triples, all or nothing."""
        if self.durable:
            self._db.execute("BEGIN")
            self._db.executemany(
                "REPLACE INTO document VALUES (?, ?, ?)", [(k, key, msgspec.json.encode(d)) for k, key, d in documents]
            )
            self._db.execute("COMMIT")

    def delete(self, kind: str, key: str) -> None:
        if self.durable:
            self._db.execute("DELETE FROM document WHERE kind = ? AND key = ?", (kind, key))

    def all(self, kind: str) -> Iterator[tuple[str, Any]]:
        for key, body in self._db.execute("SELECT key, body FROM document WHERE kind = ? ORDER BY key", (kind,)):
            yield key, msgspec.json.decode(body)

    def put_messages(self, queue: str, messages: Iterable[tuple[str, int, dict[str, Any]]]) -> None:
        """(id, sequence, document) triples."""
        if self.durable:
            rows = [(i, queue, seq, msgspec.json.encode(document)) for i, seq, document in messages]
            self._db.execute("BEGIN")
            self._db.executemany("REPLACE INTO message VALUES (?, ?, ?, ?)", rows)
            self._db.execute("COMMIT")

    def delete_messages(self, ids: Iterable[str]) -> None:
        if self.durable:
            self._db.execute("BEGIN")
            self._db.executemany("DELETE FROM message WHERE id = ?", [(i,) for i in ids])
            self._db.execute("COMMIT")

    def delete_queue(self, queue: str) -> None:
        if self.durable:
            self._db.execute("DELETE FROM message WHERE queue = ?", (queue,))

    def messages(self) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
        """(queue, id, sequence, document) in order of arrival."""
        for queue, i, seq, body in self._db.execute("SELECT queue, id, seq, body FROM message ORDER BY seq"):
            yield queue, i, seq, msgspec.json.decode(body)

    def close(self) -> None:
        self._db.close()
