"""Settings: flags above variables above defaults, and errors that name what to mend."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from control.agent.config import ConfigError, read_config

CLUSTER = "01890000-0000-7000-8000-000000000001"
REQUIRED = {"CLOUDOPTIM_AGENT_CLUSTER_ID": CLUSTER, "CLOUDOPTIM_AGENT_KEY": "co_secret"}


def test_variables_are_read_and_flags_win(tmp_path: Path) -> None:
    environ = {**REQUIRED, "CLOUDOPTIM_HOME": str(tmp_path), "CLOUDOPTIM_AGENT_METRICS_SECONDS": "15"}
    config = read_config(["--server-url", "https://optim.example/", "--metrics-seconds", "5"], environ)
    assert config.cluster_id == UUID(CLUSTER)
    assert (config.server_url, config.metrics_seconds, config.poll_wait_seconds) == ("https://optim.example", 5.0, 25)
    assert config.state_dir == tmp_path / "agent" / CLUSTER
    assert config.cluster_name == CLUSTER


def test_the_key_may_come_from_a_file_and_is_never_printed(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("co_from_file\n")
    config = read_config([], {"CLOUDOPTIM_AGENT_CLUSTER_ID": CLUSTER, "CLOUDOPTIM_AGENT_KEY_FILE": str(file)})
    assert config.api_key == "co_from_file"
    assert "co_from_file" not in repr(config)


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"CLOUDOPTIM_AGENT_KEY": "x"}, "CLOUDOPTIM_AGENT_CLUSTER_ID"),
        ({**REQUIRED, "CLOUDOPTIM_AGENT_CLUSTER_ID": "prod"}, "CLOUDOPTIM_AGENT_CLUSTER_ID"),
        ({"CLOUDOPTIM_AGENT_CLUSTER_ID": CLUSTER}, "CLOUDOPTIM_AGENT_KEY"),
        ({"CLOUDOPTIM_AGENT_CLUSTER_ID": CLUSTER, "CLOUDOPTIM_AGENT_KEY_FILE": "/nowhere/key"}, "/nowhere/key"),
        ({**REQUIRED, "CLOUDOPTIM_CONTROL_URL": "optim.example"}, "CLOUDOPTIM_CONTROL_URL"),
        ({**REQUIRED, "CLOUDOPTIM_AGENT_METRICS_SECONDS": "soon"}, "CLOUDOPTIM_AGENT_METRICS_SECONDS"),
        ({**REQUIRED, "CLOUDOPTIM_AGENT_POLL_WAIT_SECONDS": "-1"}, "CLOUDOPTIM_AGENT_POLL_WAIT_SECONDS"),
        ({**REQUIRED, "CLOUDOPTIM_LOG_LEVEL": "loud"}, "CLOUDOPTIM_LOG_LEVEL"),
    ],
)
def test_what_is_wrong_is_named(environ: dict[str, str], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        read_config([], environ)
