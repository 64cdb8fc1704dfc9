"""Where things are for one home: ports, generated secrets, and the variables every process gets."""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from control.embedded import free_port
from control.embedded.process import private_text, write_private
from control.supervisor.errors import UpError

REPOSITORY = Path(__file__).resolve().parents[2]

# Marks every process of one home, so that a later start finds what an earlier one left behind.
HOME_MARK = "CLOUDOPTIM_UP_HOME"

REAL_AWS_VARIABLES = ("AWS_ACCOUNT_ID", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN", "AWS_ENDPOINT_URL")


@dataclass(frozen=True)
class PortRule:
    """How one port is chosen: its variables (the first set one counts), its default, who may see it, and where it is.

    ``host_variable`` names the setting of the address listened on; without one that is loopback.
    """

    variables: tuple[str, ...]
    default: int
    public: bool = False
    host_variable: str = ""

    def variable(self, environ: Mapping[str, str]) -> str:
        """The variable that is set, else the first."""
        return next((variable for variable in self.variables if environ.get(variable)), self.variables[0])

    def host(self, environ: Mapping[str, str]) -> str:
        """The address listened on."""
        return environ.get(self.host_variable) or "127.0.0.1"

    def url(self, port: int, environ: Mapping[str, str]) -> str:
        """Where a process of this machine reaches the server: loopback when it listens on every address."""
        host = self.host(environ)
        if host in {"0.0.0.0", "localhost"}:
            host = "127.0.0.1"
        elif host == "::":
            host = "::1"
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# Internal defaults lie below the kernel's ephemeral range, so that no outgoing connection takes them.
PORTS = {
    "control": PortRule(
        ("CENTRAL_SERVER_PORT", "CLOUDOPTIM_CONTROL_PORT"), 8000, public=True, host_variable="CENTRAL_SERVER_HOST"
    ),
    "dagster": PortRule(("CLOUDOPTIM_DAGSTER_PORT",), 3000, public=True),
    "dashboards": PortRule(
        ("CLOUDOPTIM_DASHBOARDS_PORT",), 5006, public=True, host_variable="CLOUDOPTIM_DASHBOARDS_HOST"
    ),
    "postgres": PortRule(("CLOUDOPTIM_POSTGRES_PORT",), 15432),
    "redis": PortRule(("CLOUDOPTIM_REDIS_PORT",), 16379),
    "sandbox": PortRule(("CLOUDOPTIM_SANDBOX_PORT",), 14566),
    "worker": PortRule(("CLOUDOPTIM_WORKER_METRICS_PORT",), 9109),
    "dagster-code": PortRule(("CLOUDOPTIM_CODE_SERVER_PORT",), 14266),
}

SECRETS = {
    "JWT_SECRET_KEY": "jwt_secret_key",
    "API_KEY_SALT": "api_key_pepper",
    "CLOUDOPTIM_MASTER_KEY": "master_key",
    "CLOUDOPTIM_ADMIN_API_KEY": "admin_api_key",
}

# Small steady processes: two malloc arenas instead of eight per core, and no thread pool per library and core.
FRUGAL = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "DAGSTER_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


def with_config_file(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment, and below it what the file named by CLOUDOPTIM_CONFIG sets (its keys are variables' names).

    Raises:
        UpError: there is no such file, or it is no YAML mapping.
    """
    path = environ.get("CLOUDOPTIM_CONFIG")
    if not path:
        return dict(environ)
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
        return {**{str(name): str(value) for name, value in values.items() if value is not None}, **environ}
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UpError(f"CLOUDOPTIM_CONFIG names {path!r}, which is no readable YAML mapping: {error}") from error


def uses_sandbox(environ: Mapping[str, str]) -> bool:
    """CLOUDOPTIM_SANDBOX decides; unset, the sandbox runs unless some setting points at a real AWS account."""
    wish = environ.get("CLOUDOPTIM_SANDBOX", "").strip().lower()
    if wish:
        return wish not in {"0", "false", "no", "off"}
    return not any(environ.get(name) for name in REAL_AWS_VARIABLES)


def choose_ports(names: list[str], home: Path, environ: Mapping[str, str]) -> dict[str, int]:
    """The port of each name: its variable, else what this home used last, else the default.

    A variable of 0 means any free port, kept for later starts. An internal port nobody chose gives way to a free one
    when it is taken; a public one does not, because people know it.

    Raises:
        UpError: a variable is no port number.
    """
    kept_file = home / "ports.json"
    kept = _kept_ports(kept_file)
    chosen: dict[str, int] = {}
    for name in names:
        rule = PORTS[name]
        variable = rule.variable(environ)
        text = environ.get(variable, "")
        if text and not (text.isdigit() and int(text) < 65536):
            raise UpError(f"{variable} is {text!r}; set it to a port number from 1 to 65535, or 0 for any free one")
        if text and int(text):
            chosen[name] = int(text)
        elif not text and rule.public:
            chosen[name] = rule.default
        else:
            port = kept.get(name) or (free_port() if text else rule.default)
            chosen[name] = kept[name] = port if port_is_free(port) else free_port()
    write_private(kept_file, json.dumps(kept))
    return chosen


def _kept_ports(file: Path) -> dict[str, int]:
    """What this home used last; a file that a full disk or a hand has spoilt only means that ports are chosen anew."""
    try:
        kept = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {name: port for name, port in kept.items() if isinstance(port, int) and 0 < port < 65536}


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    return listen_error(port, host) is None


def listen_error(port: int, host: str) -> OSError | None:
    """Why a server could not listen there now; ``socket.gaierror`` when the host has no address.

    A name may have several addresses; those this machine does not have count only when it has none of them, as the
    servers (asyncio) see it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        return error
    errors = [_listen_error_at(family, address) for family, _, _, _, address in found]
    real = [error for error in errors if error and error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}]
    if real:
        return real[0]
    return None if None in errors else errors[0]


def _listen_error_at(family: int, address: Any) -> OSError | None:
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error
    return None


def generated_secrets(home: Path, environ: Mapping[str, str], *, all_of_them: bool) -> dict[str, str]:
    """The secrets to pass on: from the environment, else generated once below ``home/secrets`` (mode 0600).

    Outside the sandbox only the first admin key is generated; the others are an operator's to set.
    """
    folder = home / "secrets"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    values = {}
    for variable, name in SECRETS.items():
        if environ.get(variable):
            values[variable] = environ[variable]
        elif all_of_them or variable == "CLOUDOPTIM_ADMIN_API_KEY":
            values[variable] = private_text(folder / name, lambda: secrets.token_hex(32))
    return values


def sandbox_environment(port: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment with every AWS client sent to the sandbox and kept from finding a real account's credentials."""
    # Unset, not emptied: botocore takes an empty profile for one named "".
    kept = {name: value for name, value in environ.items() if not name.startswith("AWS_")}
    return {
        **kept,
        "CLOUDOPTIM_SANDBOX": "1",
        "CLOUDOPTIM_SANDBOX_PORT": str(port),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": environ.get("AWS_REGION", "us-east-1"),
        "AWS_ACCESS_KEY_ID": "AKIACLOUDOPTIMSANDBX",
        "AWS_SECRET_ACCESS_KEY": "sandbox",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
