"""supervisord as a child of `cloudoptim up`: its configuration, and its XML-RPC over a Unix socket."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from control.embedded.process import POLL_SECONDS, dies_with_parent, write_private
from control.supervisor.errors import UpError

MAX_SOCKET_PATH = 100
# From the stop signal to SIGKILL. Apps and agents stop together, then the servers: all within 10 s. The longest app is
# the worker: 4 s for what is under way (control/worker.py), then its connections.
STOP_SECONDS = {"apps": 5, "agents": 5, "servers": 3}
# Ended sooner than this, a process counts as not started, and each further try comes a second later than the last.
SETTLED_SECONDS = 30
MAX_PAUSE_SECONDS = 30


@dataclass(frozen=True)
class Program:
    """One process of the product.

    Args:
        name: what messages, logs and addresses.json call it.
        argv: its command, which stays in the foreground.
        group: ``servers`` stop last, ``apps`` and ``agents`` before them.
        needs: names that have to be ready before it starts.
        ready: whether it does its work now; asked repeatedly, must not raise.
        once: it ends by itself, and is ready when it ended with success.
        environment: variables of this process alone.
        stop_signal: asks it to finish.
    """

    name: str
    argv: list[str]
    ready: Callable[[], bool] = lambda: True
    group: str = "apps"
    needs: tuple[str, ...] = ()
    once: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def full_name(self) -> str:
        """supervisord's name."""
        return f"{self.group}:{self.name}"


GROUP_PRIORITY = {"servers": 1, "apps": 10, "agents": 20}


def render_programs(programs: Iterable[Program], log_folder: Path) -> str:
    """supervisord's configuration for the programs and their groups."""
    programs = list(programs)
    parts = []
    for program in programs:
        # A process that lives less than startsecs is started again after 1, 2, 3... seconds, without end (Restarts).
        # Nothing waits for supervisord's RUNNING: `up` asks each program itself.
        parts.append(
            f"[program:{program.name}]\n"
            f"command={_quote_command(dies_with_parent(program.argv, program.stop_signal))}\n"
            f"environment={_quote_environment(program.environment)}\n"
            "autostart=false\n"
            f"autorestart={'false' if program.once else 'true'}\n"
            f"startsecs={0 if program.once else SETTLED_SECONDS}\n"
            "startretries=1000000\n"
            f"stopsignal={program.stop_signal.name.removeprefix('SIG')}\n"
            f"stopwaitsecs={STOP_SECONDS[program.group]}\n"
            f"stopasgroup={'false' if program.group == 'servers' else 'true'}\n"
            "killasgroup=true\n"
            "redirect_stderr=true\n"
            f"stdout_logfile={_escape(str(log_folder / f'{program.name}.log'))}\n"
            "stdout_logfile_maxbytes=20MB\n"
            "stdout_logfile_backups=2\n"
        )
    for group, priority in GROUP_PRIORITY.items():
        members = [program.name for program in programs if program.group == group]
        if members:
            parts.append(f"[group:{group}]\nprograms={','.join(members)}\npriority={priority}\n")
    return "\n".join(parts)


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _quote_command(argv: list[str]) -> str:
    import shlex

    return _escape(shlex.join(argv))


def _quote_environment(environment: dict[str, str]) -> str:
    for name, value in environment.items():
        if '"' in value or "\n" in value:
            raise UpError(f"{name} holds a quotation mark or a line break, which cannot be passed on; change it")
    return _escape(",".join(f'{name}="{value}"' for name, value in environment.items()))


class Supervisord:
    """The process manager of one home.

    Args:
        home: its ``run/`` holds configuration and pid file, its ``log/`` the logs.
        environment: what every process inherits.
    """

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home, self.environment = home, environment
        self.log_folder = home / "log"
        self.log = self.log_folder / "supervisord.log"
        self._config = home / "run" / "supervisord.conf"
        socket_file = home / "run" / "supervisord.sock"
        if len(str(socket_file)) > MAX_SOCKET_PATH:
            # The kernel takes at most 107 characters for a socket's path.
            mark = hashlib.sha256(str(home).encode()).hexdigest()[:16]
            socket_file = Path(tempfile.gettempdir()) / f"cloudoptim-{os.getuid()}-{mark}.sock"
        self._socket = socket_file
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, programs: list[Program]) -> None:
        """Start supervisord with all programs known and none running.

        Raises:
            UpError: it did not come up.
        """
        self.log_folder.mkdir(parents=True, exist_ok=True)
        self._socket.unlink(missing_ok=True)
        write_private(
            self._config,
            "[unix_http_server]\n"
            f"file={_escape(str(self._socket))}\n"
            "chmod=0600\n\n"
            "[supervisord]\n"
            "nodaemon=true\n"
            "silent=true\n" + ("user=root\n" if os.geteuid() == 0 else "") + f"logfile={_escape(str(self.log))}\n"
            "logfile_maxbytes=5MB\n"
            "logfile_backups=1\n"
            f"pidfile={_escape(str(self.home / 'run' / 'supervisord.pid'))}\n\n"
            "[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n\n"
            "[include]\n"
            f"files = {_escape(str(self.home / 'run'))}/*.programs.conf\n",
        )
        for old in (self.home / "run").glob("*.programs.conf"):
            old.unlink()
        self._write("first", programs)
        boot_log = self.log_folder / "supervisord.out"
        with boot_log.open("wb") as output:
            # A session of its own: Ctrl-C reaches `up` only, which stops the rest in order. Should `up` be killed,
            # the kernel tells supervisord to stop everything.
            self._child = subprocess.Popen(
                dies_with_parent(
                    [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(self._config)], signal.SIGTERM
                ),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
            )
        deadline = time.monotonic() + 15
        while not self._answers():
            if self._child.poll() is not None or time.monotonic() > deadline:
                words = boot_log.read_text(errors="replace").strip().splitlines()
                raise UpError(f"supervisord did not start: {words[-1] if words else 'no output'} (log: {boot_log})")
            time.sleep(POLL_SECONDS)

    def add(self, name: str, programs: list[Program]) -> None:
        """Make more programs known while running."""
        self._write(name, programs)
        added = self._call("reloadConfig")[0][0]
        for group in added:
            self._call("addProcessGroup", group)

    def launch(self, program: Program) -> None:
        """Start one program without waiting for it."""
        self._call("startProcess", program.full_name, False)

    def start_waiting(self, program: Program) -> None:
        """Start a program now that supervisord would start later; nothing happens to one that is not waiting."""
        if self.states()[program.name]["statename"] != "BACKOFF":
            return
        try:
            self._call("stopProcess", program.full_name, False)
            self.launch(program)
        except xmlrpc.client.Fault:
            pass  # it ended again at once, which supervisord's log tells

    def states(self) -> dict[str, dict[str, Any]]:
        """What supervisord knows of each program (statename, pid, exitstatus, ...), by program name."""
        return {info["name"]: info for info in self._call("getAllProcessInfo")}

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def stop(self) -> None:
        """Stop apps and agents together, then the servers, then supervisord. Bounded; never raises."""
        if self._child is None:
            return
        if self.alive:
            try:
                for groups in (("apps", "agents"), ("servers",)):
                    self._stop_groups(groups)
            except (OSError, xmlrpc.client.Error, UpError):
                pass  # it is gone or stuck: the signals below and the sweep remain
            self._child.terminate()
        try:
            self._child.wait(3)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._socket.unlink(missing_ok=True)

    def _stop_groups(self, groups: tuple[str, ...]) -> None:
        deadline = time.monotonic() + max(STOP_SECONDS[group] for group in groups) + 0.5
        present = {info["group"] for info in self._call("getAllProcessInfo")}
        for group in present.intersection(groups):
            self._call("stopProcessGroup", group, False)
        active = {"STARTING", "RUNNING", "BACKOFF", "STOPPING"}
        while time.monotonic() < deadline:
            infos = self._call("getAllProcessInfo")
            if not any(info["group"] in groups and info["statename"] in active for info in infos):
                return
            time.sleep(0.05)

    def _write(self, name: str, programs: list[Program]) -> None:
        write_private(self.home / "run" / f"{name}.programs.conf", render_programs(programs, self.log_folder))

    def _answers(self) -> bool:
        try:
            return self._call("getState")["statename"] == "RUNNING"
        except (OSError, xmlrpc.client.Error):
            return False

    def _call(self, method: str, *arguments: Any) -> Any:
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        try:
            proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)
            return getattr(proxy.supervisor, method)(*arguments)
        finally:
            transport.close()


EXITED = re.compile(r"exited: (?P<name>\S+) \((?P<reason>[^;)]+)")
SETTLED = re.compile(r"success: (?P<name>\S+) entered RUNNING state")


@dataclass(frozen=True)
class End:
    """A process's end nobody asked for; it is started again after ``pause_seconds``, 0 for at once."""

    name: str
    reason: str
    pause_seconds: int


class Restarts:
    """Follows supervisord's log: who ended, and when is it tried again.

    supervisord waits a second longer for every end in a row, without a bound; past ``MAX_PAUSE_SECONDS``, ``due``
    tells whom to start before it would.
    """

    def __init__(self) -> None:
        self._settled: set[str] = set()
        self._ends_in_a_row: dict[str, int] = {}
        self._due_at: dict[str, float] = {}

    def read(self, line: str, *, now: float) -> End | None:
        """The end a line tells of, else None. ``now`` is in seconds of any one clock."""
        if match := SETTLED.search(line):
            self._settled.add(match["name"])
            self._ends_in_a_row.pop(match["name"], None)
            return None
        match = EXITED.search(line)
        if match is None:
            return None
        name = match["name"]
        if name in self._settled:
            self._settled.discard(name)
            return End(name, match["reason"], 0)
        in_a_row = self._ends_in_a_row[name] = self._ends_in_a_row.get(name, 0) + 1
        # Three seconds' room, so that supervisord does not start it at the same moment.
        if in_a_row < MAX_PAUSE_SECONDS + 3:
            return End(name, match["reason"], in_a_row)
        self._due_at[name] = now + MAX_PAUSE_SECONDS
        return End(name, match["reason"], MAX_PAUSE_SECONDS)

    def due(self, now: float) -> list[str]:
        """Names to start now; each is told once."""
        names = [name for name, at in self._due_at.items() if at <= now]
        for name in names:
            del self._due_at[name]
        return names
