"""What the agent and the node watch need to know, from flags or the environment (each flag names its variable in
--help)."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

AGENT_VERSION = "0.1.0"


class ConfigError(ValueError):
    """A setting a person has to mend; the message names the flag and its variable, never the value of a secret."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the cluster's API is. `k8s_endpoint` empty means: inside it, with the pod's service account."""

    k8s_endpoint: str = ""
    k8s_token: str = field(default="", repr=False)
    k8s_token_file: Path | None = None
    k8s_ca_file: Path | None = None


@dataclass(frozen=True, kw_only=True)
class NodeConfig(ClusterConfig):
    """Settings of the watch on one node."""

    node_name: str
    metadata_url: str
    log_level: str = "INFO"


@dataclass(frozen=True, kw_only=True)
class AgentConfig(ClusterConfig):
    """Settings of one agent."""

    server_url: str
    cluster_id: UUID
    api_key: str
    cluster_name: str
    state_dir: Path
    metrics_seconds: float = 30.0
    poll_wait_seconds: int = 25
    health_port: int = 0
    log_level: str = "INFO"

    def __repr__(self) -> str:
        return f"AgentConfig(server_url={self.server_url!r}, cluster_id={self.cluster_id})"


# flag, variable, default, help
_CLUSTER_OPTIONS = (
    ("--k8s-endpoint", "CLOUDOPTIM_AGENT_K8S_ENDPOINT", "", "Kubernetes API; empty inside a cluster."),
    ("--k8s-token", "CLOUDOPTIM_AGENT_K8S_TOKEN", "", "Bearer token for --k8s-endpoint."),
    ("--k8s-token-file", "CLOUDOPTIM_AGENT_K8S_TOKEN_FILE", "", "File with that token, read again when it changes."),
    ("--k8s-ca-file", "CLOUDOPTIM_AGENT_K8S_CA_FILE", "", "CA certificate of --k8s-endpoint."),
    ("--log-level", "CLOUDOPTIM_LOG_LEVEL", "INFO", "DEBUG, INFO, WARNING or ERROR."),
)  # fmt: skip
_NODE_OPTIONS = (
    ("--node-name", "NODE_NAME", "", "Name of this node; in a pod from the downward API's spec.nodeName."),
    ("--metadata-url", "AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254", "Instance metadata service."),
)  # fmt: skip
_AGENT_OPTIONS = (
    ("--server-url", "CLOUDOPTIM_CONTROL_URL", "http://127.0.0.1:8000", "Address of the central server."),
    ("--cluster-id", "CLOUDOPTIM_AGENT_CLUSTER_ID", "", "Id of the cluster this agent serves."),
    ("--cluster-name", "CLOUDOPTIM_AGENT_CLUSTER_NAME", "", "Name used as subject of cluster-wide metrics."),
    ("--api-key", "CLOUDOPTIM_AGENT_KEY", "", "Agent key of the cluster; better given by variable or file."),
    ("--api-key-file", "CLOUDOPTIM_AGENT_KEY_FILE", "", "File with the agent key."),
    ("--state-dir", "CLOUDOPTIM_AGENT_STATE_DIR", "", "Where unsent data is kept; default below CLOUDOPTIM_HOME."),
    ("--metrics-seconds", "CLOUDOPTIM_AGENT_METRICS_SECONDS", "30", "Seconds between two metric batches."),
    ("--poll-wait-seconds", "CLOUDOPTIM_AGENT_POLL_WAIT_SECONDS", "25", "Seconds one long poll waits at the server."),
    ("--health-port", "CLOUDOPTIM_AGENT_HEALTH_PORT", "0", "Serve /healthz here on loopback; 0 is off."),
)  # fmt: skip


def read_config(arguments: list[str], environ: dict[str, str] | None = None) -> AgentConfig:
    """Flags above variables above defaults.

    Raises:
        ConfigError: something required is missing or malformed.
    """
    environ = dict(os.environ) if environ is None else environ
    given = _given("cloudoptim agent", (*_AGENT_OPTIONS, *_CLUSTER_OPTIONS), arguments, environ)
    try:
        cluster_id = UUID(given.cluster_id)
    except ValueError:
        raise ConfigError(
            f"--cluster-id (CLOUDOPTIM_AGENT_CLUSTER_ID) is {given.cluster_id!r}, not a UUID; the server shows the "
            "cluster's id when it is registered"
        ) from None
    api_key = given.api_key or _secret_file(given.api_key_file, "--api-key-file (CLOUDOPTIM_AGENT_KEY_FILE)")
    if not api_key:
        raise ConfigError("--api-key (CLOUDOPTIM_AGENT_KEY) is missing; create one with POST /api/v1/api-keys")
    if not given.server_url.startswith(("http://", "https://")):
        raise ConfigError("--server-url (CLOUDOPTIM_CONTROL_URL) must begin with http:// or https://")
    home = Path(environ.get("CLOUDOPTIM_HOME") or "~/.local/share/cloudoptim").expanduser()
    return AgentConfig(
        server_url=given.server_url.rstrip("/"),
        cluster_id=cluster_id,
        api_key=api_key,
        cluster_name=given.cluster_name or str(cluster_id),
        state_dir=Path(given.state_dir) if given.state_dir else home / "agent" / str(cluster_id),
        **_cluster(given),
        metrics_seconds=_positive(given.metrics_seconds, "--metrics-seconds (CLOUDOPTIM_AGENT_METRICS_SECONDS)"),
        poll_wait_seconds=round(
            _positive(given.poll_wait_seconds, "--poll-wait-seconds (CLOUDOPTIM_AGENT_POLL_WAIT_SECONDS)")
        ),
        health_port=int(given.health_port),
        log_level=_log_level(given.log_level),
    )


def read_node_config(arguments: list[str], environ: dict[str, str] | None = None) -> NodeConfig:
    """The same for the watch on a node.

    Raises:
        ConfigError: something required is missing or malformed.
    """
    environ = dict(os.environ) if environ is None else environ
    given = _given("cloudoptim node-watch", (*_NODE_OPTIONS, *_CLUSTER_OPTIONS), arguments, environ)
    if not given.node_name:
        raise ConfigError("--node-name (NODE_NAME) is missing; in a pod it is the downward API's spec.nodeName")
    if not given.metadata_url.startswith(("http://", "https://")):
        raise ConfigError("--metadata-url (AWS_EC2_METADATA_SERVICE_ENDPOINT) must begin with http:// or https://")
    return NodeConfig(
        node_name=given.node_name,
        metadata_url=given.metadata_url.rstrip("/"),
        log_level=_log_level(given.log_level),
        **_cluster(given),
    )


def _given(
    program: str, options: tuple[tuple[str, str, str, str], ...], arguments: list[str], environ: dict[str, str]
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    for flag, variable, default, text in options:
        parser.add_argument(flag, default=environ.get(variable) or default, help=f"{text} [{variable}]")
    return parser.parse_args(arguments)


def _cluster(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "k8s_endpoint": given.k8s_endpoint.rstrip("/"),
        "k8s_token": given.k8s_token,
        "k8s_token_file": Path(given.k8s_token_file) if given.k8s_token_file else None,
        "k8s_ca_file": Path(given.k8s_ca_file) if given.k8s_ca_file else None,
    }


def _log_level(text: str) -> str:
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError("--log-level (CLOUDOPTIM_LOG_LEVEL) is none of DEBUG, INFO, WARNING, ERROR")
    return text.upper()


def _secret_file(path: str, name: str) -> str:
    if not path:
        return ""
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise ConfigError(f"{name}: cannot read {path}: {error.strerror}") from None


def _positive(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ConfigError(f"{name} is {text!r}; it must be a number of seconds above 0")
    return value
