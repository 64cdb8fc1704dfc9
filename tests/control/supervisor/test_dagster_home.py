"""The instance's configuration that `up` writes, held against what the pipelines are."""

import yaml
from dagster import AssetSpec

from control.supervisor.dagster_home import write_dagster_home
from control.supervisor.environment import REPOSITORY


def test_no_daemon_is_switched_off_that_an_asset_needs(tmp_path):
    from cloudoptim_pipelines.definitions import defs

    write_dagster_home(tmp_path)
    instance = yaml.safe_load((tmp_path / "dagster" / "dagster.yaml").read_text())
    specs: list[AssetSpec] = list(defs.resolve_all_asset_specs())
    assert specs
    if not instance["auto_materialize"]["enabled"]:
        assert [spec.key for spec in specs if spec.automation_condition] == []
    if not instance["freshness"]["enabled"]:
        assert [spec.key for spec in specs if spec.freshness_policy] == []


def test_workspace_takes_its_address_from_the_environment():
    (location,) = yaml.safe_load((REPOSITORY / "workspace.yaml").read_text())["load_from"]
    assert location["grpc_server"]["host"] == {"env": "CLOUDOPTIM_CODE_SERVER_HOST"}
    assert location["grpc_server"]["port"] == {"env": "CLOUDOPTIM_CODE_SERVER_PORT"}
