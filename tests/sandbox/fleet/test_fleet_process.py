"""The sandbox as its users see it: boto3 against AWS, the official client against the clusters, Postgres."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from kubernetes import client
from sqlalchemy import text

from control.cli import app as cli
from control.interruptions.parsing import ParsedEvent, QueueOwner, parse
from control.sandbox.fleet.plan import CUSTOMERS
from tests.sandbox.fleet.harness import SECRETS, RunningSandbox, eventually, instance_of, ready
from warehouse.postgres.codec import Codec
from warehouse.postgres.session import SyncDatabase

CLUSTERS = [plan.name for customer in CUSTOMERS for plan in customer.clusters]


def test_every_node_is_an_instance_of_its_customer_and_every_pod_runs(sandbox: RunningSandbox) -> None:
    nodes = {name: sandbox.core(name).list_node().items for name in CLUSTERS}
    assert sum(map(len, nodes.values())) == 60
    for name in CLUSTERS:
        instances = sandbox.running_instances(name)
        assert {instance_of(node) for node in nodes[name]} == set(instances)
        for node in nodes[name]:
            instance, labels = instances[instance_of(node)], node.metadata.labels
            assert ready(node)
            assert node.metadata.name == instance["PrivateDnsName"]
            zone = instance["Placement"]["AvailabilityZone"]
            assert node.spec.provider_id == f"aws:///{zone}/{instance['InstanceId']}"
            assert labels["topology.kubernetes.io/zone"] == zone
            assert labels["node.kubernetes.io/instance-type"] == instance["InstanceType"]
            spot = instance.get("InstanceLifecycle") == "spot"
            assert labels["eks.amazonaws.com/capacityType"] == ("SPOT" if spot else "ON_DEMAND")
        kinds = {(i["InstanceType"], i.get("InstanceLifecycle")) for i in instances.values()}
        assert len(kinds) >= 3
        assert len({i["Placement"]["AvailabilityZone"] for i in instances.values()}) >= 2
        core = sandbox.core(name)
        eventually(lambda core=core: all(p.status.phase == "Running" for p in core.list_pod_for_all_namespaces().items))


def test_customers_clusters_and_agent_keys_are_registered(sandbox: RunningSandbox, postgres_url: str) -> None:
    from control.security import keys

    database = SyncDatabase(postgres_url)
    with database.system() as connection:
        for customer in sandbox.addresses["customers"]:
            row = connection.execute(
                text("SELECT * FROM customers WHERE id = :id"), {"id": customer["customer_id"]}
            ).one()
            assert (row.aws_account_id, row.aws_role_arn, row.sqs_queue_url, str(row.external_id), row.status) == (
                customer["account_id"],
                customer["role_arn"],
                customer["queue_url"],
                customer["external_id"],
                "active",
            )
            for cluster in customer["clusters"]:
                found = connection.execute(
                    text("SELECT * FROM clusters WHERE id = :id"), {"id": cluster["cluster_id"]}
                ).one()
                assert (found.cluster_name, found.k8s_api_endpoint) == (
                    cluster["cluster_name"],
                    cluster["k8s_endpoint"],
                )
                token = Codec(SECRETS["CLOUDOPTIM_MASTER_KEY"]).decrypt(
                    bytes(found.k8s_token),
                    data_key=bytes(row.data_key),
                    customer_id=row.id,
                    table="clusters",
                    column="k8s_token",
                    row=found.id,
                )
                assert token == cluster["k8s_token"]
                pepper = SECRETS["API_KEY_SALT"].encode()
                prefix, secret = keys.split(pepper, cluster["agent_key"]) or ("", "")
                key = connection.execute(
                    text("SELECT * FROM api_keys WHERE prefix = :prefix"), {"prefix": prefix}
                ).one()
                assert (key.role, str(key.cluster_id)) == ("agent", cluster["cluster_id"])
                assert keys.matches(pepper, prefix, secret, bytes(key.secret_hmac))
    database.close()


def test_secrets_are_in_a_private_file_and_not_on_the_network(sandbox: RunningSandbox) -> None:
    folder = sandbox.home / "sandbox"
    for name in ("addresses.json", "identity.json", "fleet.json"):
        assert (folder / name).stat().st_mode & 0o077 == 0
    answer = sandbox.control("GET", "/_sandbox/ready")
    assert answer.json()["ready"] is True
    assert sandbox.cluster("shop-prod")["k8s_endpoint"] in answer.text
    for customer in sandbox.addresses["customers"]:
        for cluster in customer["clusters"]:
            assert cluster["agent_key"] not in answer.text
            assert cluster["k8s_token"] not in answer.text


def launch(sandbox: RunningSandbox, cluster: str, tags: dict[str, str], **more: object) -> str:
    ec2 = sandbox.aws("ec2", cluster)
    answer = ec2.run_instances(
        ImageId="ami-0c0ffee00000x8664",
        InstanceType="m5.large",
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": [{"Key": k, "Value": v} for k, v in tags.items()]}],
        **more,
    )
    ec2.close()
    return answer["Instances"][0]["InstanceId"]


def node_of(sandbox: RunningSandbox, cluster: str, instance_id: str) -> client.V1Node | None:
    return next((n for n in sandbox.core(cluster).list_node().items if instance_of(n) == instance_id), None)


def test_whoever_launches_an_instance_with_the_clusters_tag_gets_a_node(sandbox: RunningSandbox) -> None:
    stranger = launch(sandbox, "shop-staging", {"Name": "not a node"})
    foreign = launch(sandbox, "analytics-prod", {"kubernetes.io/cluster/shop-staging": "owned"})
    started = time.monotonic()
    # a replacement carries a copy of the tags of what it replaces
    model = next(iter(sandbox.running_instances("shop-staging").values()))
    ours = launch(sandbox, "shop-staging", {tag["Key"]: tag["Value"] for tag in model["Tags"]})
    assert node_of(sandbox, "shop-staging", ours) is None  # not at once
    node = eventually(lambda: (n := node_of(sandbox, "shop-staging", ours)) and ready(n) and n)
    assert time.monotonic() - started >= 25 / 20
    assert node.metadata.labels["eks.amazonaws.com/capacityType"] == "ON_DEMAND"
    core = sandbox.core("shop-staging")
    on_node = f"spec.nodeName={node.metadata.name}"
    daemons = eventually(lambda: core.list_pod_for_all_namespaces(field_selector=on_node).items)
    assert {p.metadata.labels["app"] for p in daemons} >= {"aws-node", "kube-proxy"}
    names = [instance_of(n) for n in core.list_node().items]
    assert stranger not in names  # no tag
    assert foreign not in names  # another customer's account
    ec2 = sandbox.aws("ec2", "shop-staging")
    ec2.terminate_instances(InstanceIds=[ours, stranger])
    ec2.close()
    eventually(lambda: node_of(sandbox, "shop-staging", ours) is None, 40)


def test_an_interruption_is_announced_on_the_queue_and_on_the_node_and_then_happens(sandbox: RunningSandbox) -> None:
    core = sandbox.core("shop-prod")
    sandbox.messages("shop-prod")
    victim = next(
        n
        for n in core.list_node(label_selector="eks.amazonaws.com/capacityType=SPOT").items
        if "cloudoptim.io/imds-spot-instance-action" not in (n.metadata.annotations or {})
    )
    pods_before = len(core.list_pod_for_all_namespaces().items)
    asked = datetime.now(UTC)
    answer = sandbox.control(
        "POST", "/_sandbox/fleet/interrupt", {"node": victim.metadata.name, "notice_seconds": 4}
    ).json()
    assert answer["interrupted"][0]["instance_id"] == instance_of(victim)

    messages = sandbox.messages("shop-prod")
    warning = next(m for m in messages if m["detail-type"] == "EC2 Spot Instance Interruption Warning")
    assert warning["detail"] == {"instance-id": instance_of(victim), "instance-action": "terminate"}
    assert warning["account"] == sandbox.customer_of("shop-prod")["account_id"]
    assert warning["source"] == "aws.ec2"
    assert abs(datetime.fromisoformat(warning["time"]) - asked) < timedelta(seconds=3)

    noticed = core.read_node(victim.metadata.name).metadata.annotations["cloudoptim.io/imds-spot-instance-action"]
    acts_at = datetime.fromisoformat(json.loads(noticed)["time"])
    assert timedelta(seconds=2) < acts_at - asked < timedelta(seconds=6)
    assert instance_of(victim) in sandbox.running_instances("shop-prod")

    eventually(lambda: instance_of(victim) not in sandbox.running_instances("shop-prod"))
    assert datetime.now(UTC) >= acts_at
    eventually(lambda: node_of(sandbox, "shop-prod", instance_of(victim)) is None, 30)
    states = []

    def told() -> bool:
        states.extend(
            m["detail"]["state"]
            for m in sandbox.messages("shop-prod")
            if m["detail-type"] == "EC2 Instance State-change Notification"
            and m["detail"]["instance-id"] == instance_of(victim)
        )
        return states[:1] == ["shutting-down"]  # "terminated" follows after EC2's 20 s

    eventually(told, 40)

    def recovered() -> bool:
        pods = core.list_pod_for_all_namespaces().items
        return (
            all(p.status.phase == "Running" and p.spec.node_name != victim.metadata.name for p in pods)
            and len(pods) == pods_before - 2  # its two daemon pods are not needed elsewhere
        )

    eventually(recovered, 40)


def test_the_servers_parser_reads_what_the_sandbox_sends(sandbox: RunningSandbox) -> None:
    sandbox.messages("analytics-prod")
    sandbox.control("POST", "/_sandbox/fleet/interrupt", {"cluster": "analytics-prod", "notice_seconds": 3})
    customer = sandbox.customer_of("analytics-prod")
    (body,) = [m for m in sandbox.messages("analytics-prod") if "Interruption" in m["detail-type"]]
    owner = QueueOwner(account_id=customer["account_id"], regions=frozenset({"eu-west-1"}))
    event = parse(json.dumps(body), owner=owner, received_at=datetime.now(UTC))
    assert isinstance(event, ParsedEvent)
    assert event.instance_ids == (body["detail"]["instance-id"],)
    assert event.flags == frozenset()


def test_a_hibernated_instance_keeps_its_node_which_is_not_ready(sandbox: RunningSandbox) -> None:
    core = sandbox.core("shop-prod")
    sandbox.messages("shop-prod")
    wish = {"cluster": "shop-prod", "behaviour": "hibernate"}
    (row,) = sandbox.control("POST", "/_sandbox/fleet/interrupt", wish).json()["interrupted"]
    assert (row["behaviour"], row["ends_in_seconds"]) == ("hibernate", 0)

    def down() -> client.V1Node | None:
        node = core.read_node(row["node"])
        return None if ready(node) else node

    node = eventually(down, 30)
    assert {t.key for t in node.spec.taints} >= {
        "node.kubernetes.io/unreachable", "node.cloudprovider.kubernetes.io/shutdown",
    }  # fmt: skip
    actions = [m["detail"].get("instance-action") for m in sandbox.messages("shop-prod")]
    assert "hibernate" in actions

    # EC2 has capacity again.
    eventually(lambda: "stopped" in {i["state"] for i in sandbox.control("GET", "/_sandbox/fleet").json()}, 40)
    answer = sandbox.control("POST", "/_sandbox/fleet/resume", {"node": row["node"]})
    assert (answer.status_code, answer.json().get("instance_id")) == (200, row["instance_id"])
    back = eventually(lambda: (node := core.read_node(row["node"])) and ready(node) and node, 40)
    assert not back.spec.taints
    assert back.metadata.uid == node.metadata.uid
    assert "cloudoptim.io/imds-spot-instance-action" not in back.metadata.annotations
    again = sandbox.control("POST", "/_sandbox/fleet/resume", {"node": row["node"]})
    assert (again.status_code, "is running" in again.json()["error"]) == (400, True)


def test_asking_for_what_is_not_there_says_what_is(sandbox: RunningSandbox) -> None:
    for wish, words in (
        ({"cluster": "nope"}, "there are shop-prod, shop-staging, analytics-prod"),
        ({"node": "ip-1-2-3-4"}, "not a Spot node that can be interrupted"),
        ({"nodes": 3}, "unknown field nodes"),
    ):
        answer = sandbox.control("POST", "/_sandbox/fleet/interrupt", wish)
        assert (answer.status_code, words in answer.json()["error"]) == (400, True)
    on_demand = next(
        n for n in sandbox.core("shop-prod").list_node(label_selector="eks.amazonaws.com/capacityType=ON_DEMAND").items
    )
    refused = sandbox.control("POST", "/_sandbox/fleet/interrupt", {"node": on_demand.metadata.name})
    assert refused.status_code == 400


def test_the_command_line_lists_nodes_and_interrupts(
    sandbox: RunningSandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from control.settings import get_settings

    monkeypatch.setenv("CLOUDOPTIM_HOME", str(sandbox.home))
    monkeypatch.setenv("COLUMNS", "250")
    get_settings.cache_clear()
    try:
        listed = CliRunner().invoke(cli, ["sandbox", "nodes"])
        assert listed.exit_code == 0
        assert "shop-staging" in listed.output
        done = CliRunner().invoke(cli, ["sandbox", "interrupt", "--cluster", "shop-staging", "--count", "1"])
        assert (done.exit_code, "m5.large" in done.output) == (0, True)
        failed = CliRunner().invoke(cli, ["sandbox", "interrupt", "--cluster", "nope"])
        assert failed.exit_code == 1
    finally:
        get_settings.cache_clear()


def test_node_and_pod_metrics_are_served_for_every_node(sandbox: RunningSandbox) -> None:
    core = sandbox.core("analytics-prod")
    custom = client.CustomObjectsApi(core.api_client)
    items = custom.list_cluster_custom_object("metrics.k8s.io", "v1beta1", "nodes")["items"]
    nodes = {n.metadata.name: n for n in core.list_node().items}
    assert {item["metadata"]["name"] for item in items} == {name for name, node in nodes.items() if ready(node)}
    for item in items:
        cores = int(item["usage"]["cpu"].removesuffix("n")) / 1e9
        assert 0.05 < cores < int(nodes[item["metadata"]["name"]].status.capacity["cpu"])


def test_memory_and_idle_processor_stay_small(sandbox: RunningSandbox) -> None:
    assert sandbox.process is not None
    status = Path(f"/proc/{sandbox.process.pid}/status").read_text().splitlines()
    rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
    assert rss < 200, f"{rss:.0f} MB"

    def seconds() -> float:
        fields = Path(f"/proc/{sandbox.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before, started = seconds(), time.monotonic()
    time.sleep(8)
    share = (seconds() - before) / (time.monotonic() - started)
    assert share < 0.03, f"{share:.1%} of a core"
