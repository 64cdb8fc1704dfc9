"""Embedded Postgres: durable, private, loopback only, and clear about what is wrong."""

import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest

from control.embedded import EmbeddedPostgres, EmbeddedServerError, free_port


@pytest.fixture
def server(tmp_path):
    server = EmbeddedPostgres(tmp_path / "postgres", port=free_port()).start()
    yield server
    server.stop()


def test_committed_rows_survive_kill_and_a_second_start(server):
    with psycopg.connect(server.url()) as connection:
        connection.execute("CREATE TABLE kept (value int)")
        connection.execute("INSERT INTO kept VALUES (42)")
    server.process.kill()
    with EmbeddedPostgresAgain(server) as again, psycopg.connect(again.url()) as connection:
        assert connection.execute("SELECT value FROM kept").fetchone() == (42,)


class EmbeddedPostgresAgain:
    """The same folder and port, started once more."""

    def __init__(self, first: EmbeddedPostgres) -> None:
        self.server = EmbeddedPostgres(first.folder, port=first.port)

    def __enter__(self) -> EmbeddedPostgres:
        # Backends of a killed postmaster leave on their own; until then the port is theirs.
        for process in psutil.process_iter(["cmdline"]):
            if str(self.server.folder) in " ".join(process.info["cmdline"] or []):
                process.wait(10)
        return self.server.start()

    def __exit__(self, *_: object) -> None:
        self.server.stop()


def test_password_is_required_and_kept_private(server):
    assert stat.S_IMODE((server.folder / "password").stat().st_mode) == 0o600
    wrong = server.url().replace(server.password, "wrong")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong)
    assert server.password not in " ".join(psutil.Process(server.process.pid).cmdline())


def test_listens_on_loopback_only(server):
    addresses = {
        connection.laddr.ip for connection in psutil.Process(server.process.pid).net_connections() if connection.laddr
    }
    assert addresses == {"127.0.0.1"}


def test_commits_wait_for_the_disk_by_default(tmp_path):
    server = EmbeddedPostgres(tmp_path / "postgres", port=free_port()).start()
    try:
        with psycopg.connect(server.url()) as connection:
            row = connection.execute(
                "SELECT current_setting('fsync'), current_setting('synchronous_commit')"
            ).fetchone()
        assert row == ("on", "on")
    finally:
        server.stop()


def test_stop_leaves_no_process(tmp_path):
    server = EmbeddedPostgres(tmp_path / "postgres", port=free_port()).start()
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    server.stop()
    assert not [process for process in family if process.is_running()]


def test_server_leaves_with_its_killed_parent(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from control.embedded import EmbeddedPostgres;"
        f"s = EmbeddedPostgres(Path({str(tmp_path / 'postgres')!r}), port={free_port()}).start();"
        "print(s.process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        postgres = psutil.Process(int(parent.stdout.readline()))
        assert postgres.is_running()
        parent.kill()
        parent.wait()
        postgres.wait(10)
    assert not postgres.is_running()


def test_port_in_use_names_port_and_setting(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EmbeddedServerError, match=rf"port {port} .*in use.*CLOUDOPTIM_POSTGRES_PORT"):
            EmbeddedPostgres(tmp_path / "postgres", port=port).start()


def test_data_of_another_version_is_left_alone(tmp_path):
    data = tmp_path / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("16\n")
    with pytest.raises(EmbeddedServerError, match=r"data of Postgres 16.*runs 18"):
        EmbeddedPostgres(tmp_path / "postgres", port=free_port()).prepare()
    assert (data / "PG_VERSION").read_text() == "16\n"


def test_half_made_cluster_is_made_again(tmp_path):
    data = tmp_path / "postgres" / "data"
    (data / "base").mkdir(parents=True)
    (data / "postgresql.conf").write_text("half written")
    server = EmbeddedPostgres(tmp_path / "postgres", port=free_port()).start()
    server.stop()
    assert (data / "PG_VERSION").read_text().strip() == "18"


@pytest.mark.root
def test_root_is_dropped_even_below_a_closed_folder(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    server = EmbeddedPostgres(closed / "postgres", port=free_port()).start()
    try:
        assert psutil.Process(server.process.pid).uids().effective != 0
        with psycopg.connect(server.url()) as connection:
            connection.execute("CREATE TABLE works (value int)")
    finally:
        server.stop()


@pytest.mark.root
def test_without_the_capability_data_moves_within_reach_and_says_so(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    program = (
        "import psycopg; from pathlib import Path; from control.embedded import EmbeddedPostgres;"
        f"s = EmbeddedPostgres(Path({str(closed / 'postgres')!r}), port={free_port()}).start();"
        "psycopg.connect(s.url()).close(); print(s.note); s.stop()"
    )
    drop = [
        "setpriv",
        "--bounding-set=-dac_read_search,-dac_override",
        "--inh-caps=-all",
        sys.executable,
        "-c",
        program,
    ]
    done = subprocess.run(drop, capture_output=True, text=True, check=False)
    try:
        assert done.returncode == 0, done.stderr
        assert "its data is in /var/lib/cloudoptim/" in done.stdout
    finally:
        if (place := done.stdout.strip().rpartition(" ")[2]).startswith("/var/lib/cloudoptim/"):
            shutil.rmtree(Path(place))


@pytest.mark.root
def test_full_disk_names_the_folder_and_setting(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small], check=False).returncode:
        pytest.skip("this machine does not allow mounting a small file system")
    try:
        with pytest.raises(EmbeddedServerError, match=r"disk of .*small.* is full.*CLOUDOPTIM_HOME"):
            EmbeddedPostgres(small / "postgres", port=free_port()).prepare()
    finally:
        subprocess.run(["umount", small], check=True)
