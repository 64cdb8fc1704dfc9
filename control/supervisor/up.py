"""Start everything in order, watch it, stop it: the shell around plan.py, daemon.py and sweep.py."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from control.embedded import EmbeddedServerError
from control.embedded.process import POLL_SECONDS, write_private
from control.settings import Settings, SettingsError
from control.supervisor import checks
from control.supervisor.daemon import Program, Restarts, Supervisord
from control.supervisor.dagster_home import write_dagster_home
from control.supervisor.environment import with_config_file
from control.supervisor.errors import UpError
from control.supervisor.plan import Plan, agent_programs, all_programs, make_plan, read_sandbox
from control.supervisor.sweep import end_all, processes_of

READY_TIMEOUT_SECONDS = 180
# A program that ends this often before it was ready once will not mend itself.
MAX_EARLY_ENDS = 3
WATCH_SECONDS = 1.0
ORPHAN_GRACE_SECONDS = 6.0
SWEEP_GRACE_SECONDS = 0.5
TAIL_BYTES = 64 << 10
# SQLAlchemy adds the statement, which may have many lines, and a link to an error.
STATEMENT = re.compile(r"^\[(SQL|parameters):.*?\]$", re.MULTILINE | re.DOTALL)
NOISE = re.compile(r"\(Background on this error|\[SQL:|\[parameters:|The above exception|During handling of the above")
TRACEBACK = re.compile(r"(\W+ )?Traceback\b")
# The class has a lower-case letter, unlike the level a log line begins with.
RAISED = re.compile(r"(\w+\.)*[A-Z]\w*[a-z]\w*(: .*)?$")


# Address, as in addresses.json: the process that serves it (of those started here), and title and setting for people.
SERVED_BY = {
    "control": "control",
    "dagster": "dagster-web",
    "dashboards": "dashboards",
    "postgres": "postgres",
    "redis": "redis",
    "aws": "sandbox",
    "worker": "worker",
    "dagster-code": "dagster-code",
}
ADDRESS_ROWS = {
    "control": ("control: API, /docs", "CLOUDOPTIM_CONTROL_PORT"),
    "dagster": ("Dagster", "CLOUDOPTIM_DAGSTER_PORT"),
    "dashboards": ("dashboards", "CLOUDOPTIM_DASHBOARDS_PORT"),
    "postgres": ("Postgres", "CLOUDOPTIM_POSTGRES_PORT or DATABASE_URL"),
    "redis": ("Redis", "CLOUDOPTIM_REDIS_PORT or REDIS_URL"),
    "aws": ("AWS (sandbox)", "CLOUDOPTIM_SANDBOX_PORT"),
    "lake": ("lake", "CLOUDOPTIM_LAKE_ROOT"),
    "worker": ("worker's metrics", "CLOUDOPTIM_WORKER_METRICS_PORT"),
    "dagster-code": ("Dagster's code server", "CLOUDOPTIM_CODE_SERVER_PORT"),
}


class Stopped(Exception):
    """A person or the system asked to stop."""


class Up:
    """One run of `cloudoptim up`.

    Args:
        settings: of this home.
        only: names to start, with all they need; empty for everything.
        follow: show every log line on the screen with its process's name.
    """

    def __init__(self, settings: Settings, *, only: tuple[str, ...] = (), follow: bool = False) -> None:
        self.settings, self.only, self.follow = settings, only, follow
        # Written to a file or a pipe, the table keeps its width instead of losing half of each address.
        self.console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
        self.home = settings.home
        self.addresses_file = self.home / "run" / "addresses.json"
        self.daemon: Supervisord | None = None
        self.programs: list[Program] = []
        self.ready: set[str] = set()
        self._early_ends: dict[str, int] = {}
        self._restarts = Restarts()
        # Where in its log the latest run of each program begins.
        self._log_starts: dict[str, int] = {}
        self._pids: dict[str, int] = {}
        self._daemon_log: LogTail | None = None
        self._follower = Follower(self.console)
        self._sandbox: dict[str, Any] | None = None
        self._plan: Plan | None = None

    def run(self) -> int:
        """Run until told to stop; returns the exit code. Errors a person can mend are printed in one line."""
        began = time.monotonic()
        try:
            checks.check_home(self.home)
            with only_one(self.home), stop_signals():
                try:
                    self._start(began)
                    self._watch()
                finally:
                    self._stop()
        except Stopped:
            return 0
        except (UpError, SettingsError, EmbeddedServerError) as error:
            return self._fail(str(error))
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            return self._fail(f"{error.strerror}{where}; see CLOUDOPTIM_HOME")
        return 0

    def _fail(self, cause: str) -> int:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]cloudoptim up:[/] {escape(cause)}")
        return 1

    def _start(self, began: float) -> None:
        self.addresses_file.unlink(missing_ok=True)
        self._clear_left_overs()
        environ = with_config_file(os.environ)
        plan = make_plan(self.settings, environ)
        if not plan.postgres:
            checks.check_database(plan.database_url, plan.database_setting)
        if not plan.redis:
            checks.check_redis(plan.redis_url, plan.redis_setting)
        for name, port in plan.ports.items():
            checks.check_port(name, port, environ)
        (self.home / "sandbox" / "addresses.json").unlink(missing_ok=True)
        write_dagster_home(self.home)
        self.programs = select(all_programs(plan), self.only)
        if plan.postgres and plan.postgres.note:
            self._say(escape(plan.postgres.note))
        self.daemon = Supervisord(self.home, plan.environment)
        self._daemon_log = LogTail(self.daemon.log)
        self.daemon.start(self.programs)
        self._bring_up(plan)
        self._plan = plan
        self._write_addresses(plan)
        self._print_table(plan, time.monotonic() - began)

    def _clear_left_overs(self) -> None:
        """End what a killed earlier run left; it is stopping by itself, so it gets some time first."""
        deadline = time.monotonic() + ORPHAN_GRACE_SECONDS
        while processes_of(self.home):
            if time.monotonic() > deadline:
                names = end_all(self.home, grace_seconds=3)
                self._say(f"ended {len(names)} processes an earlier run left behind: {', '.join(sorted(set(names)))}")
                return
            time.sleep(0.1)

    def _bring_up(self, plan: Plan) -> None:
        """Start each program as soon as what it needs is ready, until all are."""
        assert self.daemon is not None
        launched: dict[str, float] = {}
        self._follower.show(self._logs())
        while True:
            waiting = [program for program in self.programs if program.name not in self.ready]
            if not waiting:
                return
            states = self.daemon.states()
            self._report_ends()
            for program in waiting:
                if program.name not in launched:
                    if self.ready.issuperset(program.needs):
                        self._mark_log(program.name)
                        self.daemon.launch(program)
                        launched[program.name] = time.monotonic()
                elif self._is_ready(program, states[program.name]):
                    self.ready.add(program.name)
                    took = time.monotonic() - launched[program.name]
                    self._say(f"[green]✓[/] {program.name} [dim]{took:.1f} s[/]")
                    if program.name == "sandbox":
                        self._learn_agents(plan)
                elif time.monotonic() - launched[program.name] > READY_TIMEOUT_SECONDS:
                    words = self._last_words(program.name)
                    raise UpError(f"{program.name} was not ready within {READY_TIMEOUT_SECONDS} s: {words}")
            self._follower.show(self._logs())
            time.sleep(POLL_SECONDS * 5)

    def _learn_agents(self, plan: Plan) -> None:
        self._sandbox = read_sandbox(self.home)
        assert self.daemon is not None
        if self._sandbox is None:
            return
        agents = agent_programs(plan, self._sandbox)
        if self.only:
            agents = [agent for agent in agents if agent.name in self.only or "agents" in self.only]
        if agents:
            self.daemon.add("agents", agents)
            self.programs += agents

    def _is_ready(self, program: Program, state: dict[str, Any]) -> bool:
        if program.once:
            if state["statename"] == "EXITED" and state["exitstatus"] != 0:
                raise UpError(f"{program.name} failed: {self._last_words(program.name)}")
            return state["statename"] == "EXITED"
        return state["statename"] in {"STARTING", "RUNNING"} and program.ready()

    def _report_ends(self) -> bool:
        """Say which processes ended and why; give up on one that cannot start. True when anything happened."""
        assert self._daemon_log is not None
        once = {program.name for program in self.programs if program.once}
        lines = self._daemon_log.new_lines()
        for line in lines:
            end = self._restarts.read(line, now=time.monotonic())
            if end is None or end.name in once:
                continue
            name, reason = end.name, end.reason
            if name not in self.ready:
                self._early_ends[name] = self._early_ends.get(name, 0) + 1
                if self._early_ends[name] >= MAX_EARLY_ENDS:
                    raise UpError(f"{name} does not start ({reason}): {self._last_words(name)}")
            words = escape(self._last_words(name))
            self._mark_log(name)
            when = f"in {end.pause_seconds} s" if end.pause_seconds else "at once"
            self._say(f"[yellow]![/] {name} ended ({reason}) and is started again {when}; its last words: {words}")
        return bool(lines)

    def _watch(self) -> None:
        """Until a signal: show ends and restarts, keep addresses.json true, follow logs."""
        assert self.daemon is not None
        assert self._plan is not None
        while True:
            if not self.daemon.alive:
                raise UpError(f"supervisord ended; everything is stopped. Its log: {self.daemon.log}")
            # supervisord writes a line for whatever changes: as long as there is none, nobody has to be asked.
            if self._report_ends():
                self._write_addresses(self._plan)
            due = self._restarts.due(time.monotonic())
            for program in self.programs:
                if program.name in due:
                    self.daemon.start_waiting(program)
            self._follower.show(self._logs())
            time.sleep(POLL_SECONDS * 10 if self.follow else WATCH_SECONDS)

    def _stop(self) -> None:
        for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signal_number, signal.SIG_IGN)
        self.addresses_file.unlink(missing_ok=True)
        if self.daemon is not None:
            self._say("stopping")
            self.daemon.stop()
            end_all(self.home, grace_seconds=SWEEP_GRACE_SECONDS)
            self._follower.show(self._logs())
            self._say("stopped")

    def _write_addresses(self, plan: Plan) -> None:
        """addresses.json, written anew whenever a process has another id."""
        assert self.daemon is not None
        pids = {name: info["pid"] for name, info in self.daemon.states().items() if info["pid"]}
        if pids == self._pids:
            return
        self._pids = pids
        document = {
            "version": 1,
            "up": {"pid": os.getpid()},
            "addresses": self._addresses(plan),
            "processes": {
                name: {"pid": pid, "log": str(self.daemon.log_folder / f"{name}.log")} for name, pid in pids.items()
            },
            "admin_api_key": plan.environment["CLOUDOPTIM_ADMIN_API_KEY"],
            "sandbox": self._sandbox,
        }
        write_private(self.addresses_file, json.dumps(document, indent=2))

    def _print_table(self, plan: Plan, seconds: float) -> None:
        table = Table(title=f"CloudOptim is ready ({seconds:.0f} s)", title_justify="left", title_style="bold green")
        for heading in ("what", "address", "set by"):
            table.add_column(heading, no_wrap=True)
        for name, url in self._addresses(plan).items():
            # Passwords stay in addresses.json, which only its owner can read.
            shown = f"{url.split('://')[0]}://{checks.where(url)}" if name in {"postgres", "redis"} else url
            title, setting = ADDRESS_ROWS[name]
            table.add_row(title, shown, setting)
        self.console.print(table)
        self._say(escape(f"logs: {self.home / 'log'}   for scripts: {self.addresses_file}   stop: Ctrl-C"))

    def _addresses(self, plan: Plan) -> dict[str, str]:
        """The addresses of what runs here or was given."""
        running = {program.name for program in self.programs}
        absent = {address for address, program in SERVED_BY.items() if program not in running}
        external = {"postgres"} if plan.postgres is None else set()
        external |= {"redis"} if plan.redis is None else set()
        return {name: url for name, url in plan.addresses.items() if url and (name in external or name not in absent)}

    def _last_words(self, name: str) -> str:
        """The line that tells most of what a program wrote in its latest run, with the log's place."""
        log = self._log_of(name)
        return f"{telling_line(text_since(log, self._log_starts.get(name, 0)))} (log: {log})"

    def _mark_log(self, name: str) -> None:
        log = self._log_of(name)
        self._log_starts[name] = log.stat().st_size if log.exists() else 0

    def _log_of(self, name: str) -> Path:
        assert self.daemon is not None
        return self.daemon.log_folder / f"{name}.log"

    def _logs(self) -> list[Path]:
        if not self.follow or self.daemon is None:
            return []
        return [self.daemon.log_folder / f"{program.name}.log" for program in self.programs]

    def _say(self, text: str) -> None:
        """Print a line of rich's markup."""
        self.console.print(text)


def text_since(log: Path, start: int) -> str:
    """The text of a log from an offset on, at most its last ``TAIL_BYTES``; all of it when it was rotated since."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start if start <= size else 0, size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def telling_line(log: str) -> str:
    """Of the last 40 lines: the error that ends the last traceback, else the last that speaks of one, else the last."""
    log = STATEMENT.sub("", log)
    lines = [line.rstrip() for line in log.splitlines() if re.search(r"[A-Za-z]{2}", line) and not NOISE.match(line)]
    heads = [number for number, line in enumerate(lines) if TRACEBACK.match(line)]
    for number in range(heads[-1] + 1 if heads else len(lines), len(lines)):
        # The frames between are indented.
        if RAISED.match(lines[number]):
            if number >= len(lines) - 40:
                return lines[number]
            break
    errors = [line for line in lines[-40:] if re.search(r"error|fatal|refuse|cannot|failed", line, re.IGNORECASE)]
    return (errors or lines or ["no output"])[-1].strip()


def select(programs: list[Program], only: tuple[str, ...]) -> list[Program]:
    """The named programs and all they need, in the given order; all programs when nothing is named.

    Raises:
        UpError: no program has that name.
    """
    if not only:
        return programs
    by_name = {program.name: program for program in programs}
    wanted: set[str] = set()
    todo = [name for name in only if name != "agents" and not name.startswith("agent-")]
    todo += ["sandbox", "control"] if len(todo) < len(only) else []
    while todo:
        name = todo.pop()
        if name not in by_name:
            raise UpError(f"--only {name}: no such process; there are {', '.join(by_name)} and agents")
        if name not in wanted:
            wanted.add(name)
            todo += by_name[name].needs
    return [program for program in programs if program.name in wanted]


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Hold the home for this process.

    Raises:
        UpError: another `cloudoptim up` holds it.
    """
    run = home / "run"
    run.mkdir(parents=True, exist_ok=True)
    run.chmod(0o700)
    with (run / "up.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UpError(
                f"another `cloudoptim up` (process {lock.read().strip()}) runs on {home}; "
                "stop it or set CLOUDOPTIM_HOME to another folder"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def stop_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal raise Stopped in the main thread."""

    def stop(*_: object) -> None:
        raise Stopped

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LogTail:
    """New lines of a growing file, from its end at the time of creation; survives rotation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def new_lines(self) -> list[str]:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return []
        if size < self._offset:
            self._offset, self._rest = 0, b""
        if size == self._offset:
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = self._rest + file.read()
            self._offset = file.tell()
        *lines, self._rest = data.split(b"\n")
        return [line.decode(errors="replace") for line in lines]


class Follower:
    """Prints the new lines of many logs, each with its process's name."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tails: dict[Path, LogTail] = {}

    def show(self, logs: list[Path]) -> None:
        for log in logs:
            tail = self._tails.setdefault(log, LogTail(log))
            for line in tail.new_lines():
                self._console.print(Text.assemble((f"{log.stem:<15} ", "cyan"), Text.from_ansi(line)))
