"""The double seen through the official client: CRUD, errors, selectors, paging, watch, patches, authentication."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import yaml
from kubernetes import client, dynamic, watch
from kubernetes.client import ApiException

from control.sandbox.kubernetes.resources import NODES, PODS
from control.sandbox.kubernetes.store import HISTORY_LENGTH
from tests.sandbox.kubernetes.harness import TOKEN, Double, eventually, node_object, pod_object


def body(error: pytest.ExceptionInfo[ApiException]) -> dict:
    return json.loads(error.value.body)


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1]])
def test_without_the_token_everything_but_version_and_health_is_401(double: Double, token: str) -> None:
    stranger = double.client(token=token)
    with pytest.raises(ApiException) as refused:
        client.CoreV1Api(stranger).list_node()
    assert refused.value.status == 401
    assert body(refused) == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "Unauthorized",
        "reason": "Unauthorized",
        "code": 401,
    }
    assert client.VersionApi(stranger).get_code().git_version.startswith("v1.")


def test_a_read_only_token_reads_and_is_forbidden_to_write(double: Double) -> None:
    reader = client.CoreV1Api(double.client(token="reader"))
    assert reader.list_namespace().items
    with pytest.raises(ApiException) as refused:
        reader.create_namespace({"metadata": {"name": "nope"}})
    assert refused.value.status == 403


def test_clusters_are_apart(double: Double, core: client.CoreV1Api) -> None:
    core.create_node(node_object("n1"))
    other = client.CoreV1Api(double.client(1, "another-token"))
    assert [n.metadata.name for n in core.list_node().items] == ["n1"]
    assert other.list_node().items == []
    with pytest.raises(ApiException) as refused:
        client.CoreV1Api(double.client(1, TOKEN)).list_node()
    assert refused.value.status == 401


def test_real_node_and_pod_dumps_load_and_read_back_through_the_client(
    double: Double, core: client.CoreV1Api, shared_data: Path
) -> None:
    folder = shared_data / "k8s_dumps" / "1_34"
    nodes = yaml.safe_load(gzip.decompress((folder / "nodes.yaml.gz").read_bytes()))["items"]
    pods = yaml.safe_load(gzip.decompress((folder / "pods.yaml.gz").read_bytes()))["items"]
    for resource, items in ((NODES, nodes), (PODS, pods)):
        for item in items:
            double.call(double.store.load, resource, item)
    assert len(pods) > 3
    read = {(p.metadata.namespace, p.metadata.name): p for p in core.list_pod_for_all_namespaces().items}
    assert set(read) == {(p["metadata"]["namespace"], p["metadata"]["name"]) for p in pods}
    for pod in pods:
        got = core.read_namespaced_pod(pod["metadata"]["name"], pod["metadata"]["namespace"], _preload_content=False)
        stored = json.loads(got.data)
        assert stored["spec"] == json.loads(json.dumps(pod["spec"], default=str))
        assert stored["metadata"]["uid"] == pod["metadata"]["uid"]
    (node,) = core.list_node().items
    assert node.status.allocatable["memory"] == nodes[0]["status"]["allocatable"]["memory"]
    on_node = core.list_pod_for_all_namespaces(field_selector=f"spec.nodeName={node.metadata.name}")
    assert len(on_node.items) == sum(1 for p in pods if p["spec"].get("nodeName")) > 3


def test_errors_have_the_real_wording_and_details(core: client.CoreV1Api, policy: client.PolicyV1Api) -> None:
    with pytest.raises(ApiException) as missing:
        core.read_namespaced_pod("ghost", "default")
    assert (missing.value.status, body(missing)["message"]) == (404, 'pods "ghost" not found')
    assert body(missing)["details"] == {"name": "ghost", "kind": "pods"}
    with pytest.raises(ApiException) as no_budget:
        policy.read_namespaced_pod_disruption_budget("ghost", "default")
    assert body(no_budget)["message"] == 'poddisruptionbudgets.policy "ghost" not found'
    core.create_node(node_object("n1"))
    with pytest.raises(ApiException) as twice:
        core.create_node(node_object("n1"))
    assert (twice.value.status, body(twice)["reason"]) == (409, "AlreadyExists")
    with pytest.raises(ApiException) as homeless:
        core.create_namespaced_pod("nowhere", pod_object("p"))
    assert body(homeless)["message"] == 'namespaces "nowhere" not found'
    with pytest.raises(ApiException) as bad_name:
        core.create_namespaced_pod("default", pod_object("Not_A_Name"))
    assert (bad_name.value.status, body(bad_name)["details"]["causes"][0]["field"]) == (422, "metadata.name")


def test_an_update_with_an_old_resource_version_conflicts(core: client.CoreV1Api) -> None:
    core.create_node(node_object("n1"))
    first, second = core.read_node("n1"), core.read_node("n1")
    first.spec.unschedulable = True
    core.replace_node("n1", first)
    second.metadata.labels["late"] = "yes"
    with pytest.raises(ApiException) as stale:
        core.replace_node("n1", second)
    assert stale.value.status == 409
    assert body(stale)["message"] == (
        'Operation cannot be fulfilled on nodes "n1": the object has been modified; please apply your changes to the '
        "latest version and try again"
    )
    old = first.metadata.resource_version
    with pytest.raises(ApiException) as stale_patch:
        core.patch_node("n1", {"metadata": {"resourceVersion": old, "labels": {"a": "b"}}})
    assert stale_patch.value.status == 409


def test_a_write_that_changes_nothing_keeps_the_resource_version(core: client.CoreV1Api) -> None:
    created = core.create_node(node_object("n1"))
    core.patch_node("n1", {"metadata": {"labels": {"kubernetes.io/hostname": "n1"}}})
    assert core.read_node("n1").metadata.resource_version == created.metadata.resource_version


def test_status_is_written_only_through_its_subresource(core: client.CoreV1Api) -> None:
    core.create_namespaced_pod("default", pod_object("p"))
    core.patch_namespaced_pod("p", "default", {"status": {"phase": "Running"}, "metadata": {"labels": {"a": "1"}}})
    pod = core.read_namespaced_pod("p", "default")
    assert (pod.status.phase, pod.metadata.labels["a"]) == ("Pending", "1")
    core.patch_namespaced_pod_status("p", "default", {"status": {"phase": "Running"}, "spec": {"priority": 7}})
    pod = core.read_namespaced_pod("p", "default")
    assert (pod.status.phase, pod.spec.priority) == ("Running", 0)


def test_label_and_field_selectors_select_as_documented(double: Double, core: client.CoreV1Api) -> None:
    for name, labels in {"a": {"tier": "web", "env": "prod"}, "b": {"tier": "db"}, "c": {}}.items():
        core.create_node(node_object(name, labels=labels))

    def names(**selectors: str) -> list[str]:
        return [n.metadata.name for n in core.list_node(**selectors).items]

    assert names(label_selector="tier=web") == ["a"]
    assert names(label_selector="tier==web,env=prod") == ["a"]
    assert names(label_selector="tier!=web") == ["b", "c"]
    assert names(label_selector="tier in (web, db)") == ["a", "b"]
    assert names(label_selector="tier notin (web)") == ["b", "c"]
    assert names(label_selector="tier") == ["a", "b"]
    assert names(label_selector="!tier") == ["c"]
    assert names(field_selector="metadata.name=b") == ["b"]
    core.patch_node("c", {"spec": {"unschedulable": True}})
    assert names(field_selector="spec.unschedulable=true") == ["c"]
    with pytest.raises(ApiException) as bad:
        core.list_node(label_selector="tier in web")
    assert bad.value.status == 400
    with pytest.raises(ApiException) as unknown:
        core.list_node(field_selector="spec.color=red")
    assert unknown.value.status == 400
    assert "field label not supported: spec.color" in body(unknown)["message"]


def test_pods_are_found_by_node_and_phase(double: Double, core: client.CoreV1Api) -> None:
    double.node("n1")
    core.create_namespaced_pod("default", pod_object("on-node", node="n1"))
    core.create_namespaced_pod("default", pod_object("waiting"))

    def found(selector: str) -> list[str]:
        return [p.metadata.name for p in core.list_pod_for_all_namespaces(field_selector=selector).items]

    assert found("spec.nodeName=n1") == ["on-node"]
    assert found("spec.nodeName=") == ["waiting"]
    assert found("spec.nodeName!=n1,status.phase=Pending") == ["waiting"]


def test_a_paged_list_is_one_consistent_snapshot(core: client.CoreV1Api) -> None:
    for index in range(7):
        core.create_node(node_object(f"n{index}"))
    page = core.list_node(limit=3)
    assert (len(page.items), page.metadata.remaining_item_count) == (3, 4)
    core.delete_node("n4")
    core.create_node(node_object("n5a"))
    names = [n.metadata.name for n in page.items]
    versions = {page.metadata.resource_version}
    while page.metadata._continue:
        page = core.list_node(limit=3, _continue=page.metadata._continue)
        names += [n.metadata.name for n in page.items]
        versions.add(page.metadata.resource_version)
    assert names == [f"n{index}" for index in range(7)]
    assert len(versions) == 1


def test_a_forgotten_continue_token_is_410_with_a_fresh_one(core: client.CoreV1Api) -> None:
    for index in range(4):
        core.create_node(node_object(f"n{index}"))
    token = core.list_node(limit=2).metadata._continue
    for index in range(20):  # more listings than snapshots are kept
        core.patch_node("n0", {"metadata": {"labels": {"i": str(index)}}})
        core.list_node(limit=1)
    with pytest.raises(ApiException) as gone:
        core.list_node(limit=2, _continue=token)
    assert (gone.value.status, body(gone)["reason"]) == (410, "Expired")
    rest = core.list_node(limit=2, _continue=body(gone)["metadata"]["continue"])
    assert [n.metadata.name for n in rest.items] == ["n2", "n3"]


def test_watch_delivers_changes_from_a_resource_version_on(double: Double, core: client.CoreV1Api) -> None:
    core.create_node(node_object("before"))
    start = core.list_node().metadata.resource_version
    core.create_node(node_object("n1"))
    core.patch_node("n1", {"spec": {"unschedulable": True}})
    core.delete_node("n1")
    seen = [
        (event["type"], event["object"].metadata.name)
        for event in watch.Watch().stream(core.list_node, resource_version=start, timeout_seconds=1)
    ]
    assert seen == [("ADDED", "n1"), ("MODIFIED", "n1"), ("DELETED", "n1")]


def test_watch_without_a_version_begins_with_what_exists(core: client.CoreV1Api) -> None:
    core.create_node(node_object("n1"))
    events = watch.Watch().stream(core.list_node, timeout_seconds=1)
    assert [(e["type"], e["object"].metadata.name) for e in events] == [("ADDED", "n1")]


def test_leaving_a_selection_is_seen_as_a_deletion(core: client.CoreV1Api) -> None:
    core.create_node(node_object("n1", labels={"pool": "spot"}))
    start = core.list_node().metadata.resource_version
    core.patch_node("n1", {"metadata": {"labels": {"pool": "on-demand"}}})
    core.patch_node("n1", {"metadata": {"labels": {"pool": "spot"}}})
    events = watch.Watch().stream(core.list_node, resource_version=start, label_selector="pool=spot", timeout_seconds=1)
    assert [e["type"] for e in events] == ["DELETED", "ADDED"]


def test_bookmarks_move_a_quiet_watch_forward(core: client.CoreV1Api) -> None:
    start = core.list_node().metadata.resource_version
    core.create_namespaced_pod("default", pod_object("elsewhere"))
    events = list(
        watch.Watch().stream(core.list_node, resource_version=start, allow_watch_bookmarks=True, timeout_seconds=1)
    )
    assert {e["type"] for e in events} == {"BOOKMARK"}
    assert int(events[-1]["raw_object"]["metadata"]["resourceVersion"]) > int(start)


def test_a_watch_from_before_the_kept_history_is_410_gone(double: Double, core: client.CoreV1Api) -> None:
    start = core.list_node().metadata.resource_version
    core.create_node(node_object("n1"))

    def churn() -> None:
        for index in range(HISTORY_LENGTH + 1):
            node = double.store.get(NODES, "", "n1")
            double.store.edit(NODES, node, lambda d, i=index: d["metadata"]["labels"].__setitem__("i", str(i)))

    double.call(churn)
    with pytest.raises(ApiException) as gone:
        list(watch.Watch().stream(core.list_node, resource_version=start, timeout_seconds=5))
    assert gone.value.status == 410
    assert "too old resource version" in gone.value.reason


def test_patch_formats(api: client.ApiClient, core: client.CoreV1Api) -> None:
    core.create_namespaced_pod("default", pod_object("p", tolerations=[{"key": "a", "operator": "Exists"}]))
    # strategic: containers merge by name, tolerations are replaced whole
    core.patch_namespaced_pod(
        "p",
        "default",
        {"spec": {"containers": [{"name": "main", "image": "web:2"}, {"name": "side", "image": "side:1"}]}},
        _content_type="application/strategic-merge-patch+json",
    )
    pod = core.read_namespaced_pod("p", "default")
    assert [(c.name, c.image) for c in pod.spec.containers] == [("main", "web:2"), ("side", "side:1")]
    assert pod.spec.containers[0].resources.requests["cpu"] == "100m"
    core.patch_namespaced_pod(
        "p",
        "default",
        {"spec": {"containers": [{"name": "side", "$patch": "delete"}]}},
        _content_type="application/strategic-merge-patch+json",
    )
    assert [c.name for c in core.read_namespaced_pod("p", "default").spec.containers] == ["main"]
    # merge: null removes, lists are replaced
    core.patch_namespaced_pod(
        "p",
        "default",
        {"metadata": {"labels": {"app": None, "new": "1"}}},
        _content_type="application/merge-patch+json",
    )
    assert core.read_namespaced_pod("p", "default").metadata.labels == {"new": "1"}
    # JSON patch, with a test that fails
    core.patch_namespaced_pod(
        "p",
        "default",
        [{"op": "add", "path": "/metadata/annotations", "value": {"a/b": "1"}}],
        _content_type="application/json-patch+json",
    )
    assert core.read_namespaced_pod("p", "default").metadata.annotations == {"a/b": "1"}
    with pytest.raises(ApiException) as refused:
        core.patch_namespaced_pod(
            "p",
            "default",
            [{"op": "test", "path": "/metadata/annotations/a~1b", "value": "2"}],
            _content_type="application/json-patch+json",
        )
    assert refused.value.status == 422


def test_a_dry_run_answers_and_changes_nothing(core: client.CoreV1Api) -> None:
    assert core.create_node(node_object("n1"), dry_run="All").metadata.uid
    assert core.list_node().items == []


def test_the_dynamic_client_discovers_the_resources(api: client.ApiClient, core: client.CoreV1Api) -> None:
    core.create_node(node_object("n1"))
    found = dynamic.DynamicClient(api)
    assert [n.metadata.name for n in found.resources.get(api_version="v1", kind="Node").get().items] == ["n1"]
    assert found.resources.get(api_version="apps/v1", kind="Deployment").namespaced


def test_metrics_report_usage_of_running_pods(double: Double, core: client.CoreV1Api, api: client.ApiClient) -> None:
    double.node("n1")
    core.create_namespaced_pod("default", pod_object("p", node="n1", cpu="1"))
    double.run_pods()
    custom = client.CustomObjectsApi(api)
    (node,) = custom.list_cluster_custom_object("metrics.k8s.io", "v1beta1", "nodes")["items"]
    assert node["metadata"]["name"] == "n1"
    assert node["usage"]["cpu"] == "560000000n"  # half of 1 core for the pod, 0.06 for the system
    (pod,) = custom.list_namespaced_custom_object("metrics.k8s.io", "v1beta1", "default", "pods")["items"]
    assert pod["containers"][0]["usage"]["cpu"] == "500000000n"


def test_deleting_a_namespace_takes_its_contents(double: Double, core: client.CoreV1Api) -> None:
    double.start_controllers()
    core.create_namespace({"metadata": {"name": "shop"}})
    core.create_namespaced_pod("shop", pod_object("p"))
    core.delete_namespace("shop")
    eventually(lambda: "shop" not in [n.metadata.name for n in core.list_namespace().items])
    assert core.list_namespaced_pod("shop").items == []


def test_state_survives_a_dump_and_restore_and_no_watch_misses_what_a_kill_undid(
    double: Double, core: client.CoreV1Api
) -> None:
    before = core.create_node(node_object("n1"))
    snapshot = double.call(double.store.dump)
    core.delete_node("n1")
    core.create_node(node_object("n2"))
    # what a watcher has seen of writes that the snapshot does not have
    lost = core.list_node().metadata.resource_version
    double.call(double.store.restore, snapshot)
    after = core.read_node("n1")
    assert after.metadata.uid == before.metadata.uid
    assert after.metadata.resource_version == before.metadata.resource_version
    restored = core.list_node().metadata.resource_version
    assert int(restored) > int(lost)
    core.create_node(node_object("n3"))
    assert int(core.read_node("n3").metadata.resource_version) > int(lost)
    # of an earlier life, and of a life whose state was thrown away
    for unknown in (before.metadata.resource_version, lost, str(int(restored) + 1_000_000_000)):
        with pytest.raises(ApiException) as gone:
            list(watch.Watch().stream(core.list_node, resource_version=unknown, timeout_seconds=5))
        assert gone.value.status == 410
    events = list(watch.Watch().stream(core.list_node, resource_version=restored, timeout_seconds=1))
    assert [(event["type"], event["object"].metadata.name) for event in events] == [("ADDED", "n3")]
