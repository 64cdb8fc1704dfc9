"""The cluster as the agent uses it: the official client's transport with raw JSON.

Only `DynamicClient.request` over `ApiClient` is used: it carries the client's configuration, authentication, TLS and
error handling at 51 MB of memory, where importing `CoreV1Api` (every model of every API) costs 126 MB.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from http.client import HTTPException
from typing import Any

from kubernetes import client, config, dynamic
from kubernetes.watch.watch import iter_resp_lines
from urllib3.exceptions import HTTPError

from control.agent.config import ClusterConfig

Object = dict[str, Any]

# All the ways in which nobody answers, or half an answer comes. ValueError: it cannot be decoded.
BROKEN = (HTTPError, HTTPException, OSError, ValueError)

PAGE_LIMIT = 250  # objects per list page: bounds memory in clusters with thousands of pods
REQUEST_SECONDS = (5, 15)  # connect, read
WATCH_SECONDS = 240
TOKEN_REREAD_SECONDS = 60.0  # service account tokens are rotated by the kubelet


class ClusterError(Exception):
    """The Kubernetes API answered with an error (`status`) or not at all (status 0)."""

    def __init__(self, status: int, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status, self.message, self.retry_after_seconds = status, message, retry_after_seconds


class Eviction(StrEnum):
    """What became of an eviction request."""

    ACCEPTED = "accepted"
    GONE = "gone"
    BLOCKED = "blocked"


@dataclass(frozen=True, slots=True)
class EvictionAnswer:
    """The outcome; `retry_after_seconds` where the server suggested a time, `reason` for people."""

    outcome: Eviction
    reason: str = ""
    retry_after_seconds: float | None = None


class Cluster:
    """One cluster's API. Thread-safe: the client's connection pool is shared by all threads."""

    def __init__(self, settings: ClusterConfig, *, connections: int = 16) -> None:
        configuration: Any = client.Configuration()
        if settings.k8s_endpoint:
            configuration.host = settings.k8s_endpoint
            if settings.k8s_ca_file:
                configuration.ssl_ca_cert = str(settings.k8s_ca_file)
            self._token_file = settings.k8s_token_file
            self._token = settings.k8s_token
            self._token_read_at = float("-inf")
            configuration.api_key = {"authorization": f"Bearer {self._current_token()}"}
            configuration.refresh_api_key_hook = self._refresh
        else:
            config.load_incluster_config(client_configuration=configuration)
        configuration.connection_pool_maxsize = connections
        self._client = dynamic.DynamicClient(client.ApiClient(configuration), discoverer=_no_discovery)

    def _current_token(self) -> str:
        now = time.monotonic()
        if self._token_file is not None and now - self._token_read_at > TOKEN_REREAD_SECONDS:
            self._token = self._token_file.read_text().strip()
            self._token_read_at = now
        return self._token

    def _refresh(self, configuration: Any) -> None:
        configuration.api_key["authorization"] = f"Bearer {self._current_token()}"

    def _request(
        self, method: str, path: str, body: Any = None, *, timeout: Any = REQUEST_SECONDS, **options: Any
    ) -> Any:
        query = [(name, value) for name, value in options.pop("query", {}).items() if value is not None]
        try:
            return self._client.request(
                method, path, body, query_params=query, serialize=False, _request_timeout=timeout, **options
            )
        except dynamic.exceptions.DynamicApiError as error:
            raise _cluster_error(error) from None
        except client.ApiException as error:
            raise ClusterError(error.status or 0, str(error.reason)) from None
        except BROKEN as error:
            raise ClusterError(0, f"the Kubernetes API does not answer: {error}") from None

    def _json(self, method: str, path: str, body: Any = None, **options: Any) -> Object:
        response = self._request(method, path, body, **options)
        try:
            answer = json.loads(response.data)  # the body is read here, so the connection can break here as well
        except BROKEN as error:
            raise ClusterError(0, f"the answer of the Kubernetes API broke: {error}") from None
        finally:
            response.release_conn()
        if not isinstance(answer, dict):
            raise ClusterError(0, f"the Kubernetes API answered a {type(answer).__name__} instead of an object")
        return answer

    # -- reading

    def node(self, name: str) -> Object | None:
        """A node, or None when there is none of that name."""
        try:
            return self._json("get", f"/api/v1/nodes/{name}")
        except ClusterError as error:
            if error.status == 404:
                return None
            raise

    def get(self, path: str) -> Object:
        """Any object by its path; raises ClusterError with status 404 when there is none."""
        return self._json("get", path)

    def pages(self, path: str, **query: Any) -> Iterator[list[Object]]:
        """The pages of a list; starts over by itself when the continue token has expired."""
        token: str | None = None
        while True:
            try:
                page = self._json("get", path, query={**query, "limit": PAGE_LIMIT, "continue": token})
            except ClusterError as error:
                if error.status == 410 and token:
                    token = None
                    continue
                raise
            yield _items(page)
            token = (page.get("metadata") or {}).get("continue")
            if not token:
                return

    def nodes(self) -> list[Object]:
        """All nodes."""
        return [node for page in self.pages("/api/v1/nodes") for node in page]

    def pods_on(self, node_name: str) -> list[Object]:
        """All pods bound to a node."""
        pages = self.pages("/api/v1/pods", fieldSelector=f"spec.nodeName={node_name}")
        return [pod for page in pages for pod in page]

    def usage(self, plural: str) -> list[Object]:
        """metrics.k8s.io nodes or pods; empty where no metrics-server runs."""
        try:
            return _items(self._json("get", f"/apis/metrics.k8s.io/v1beta1/{plural}"))
        except ClusterError as error:
            if error.status in (403, 404, 503):
                return []
            raise

    def watch_nodes(self) -> Iterator[Object]:
        """Nodes as they are and as they change, for at most WATCH_SECONDS; ends quietly, raises ClusterError."""
        response = self._request(
            "get",
            "/api/v1/nodes",
            query={"watch": "true", "timeoutSeconds": WATCH_SECONDS, "allowWatchBookmarks": "true"},
            timeout=(5, WATCH_SECONDS + 30),
        )
        try:
            for line in iter_resp_lines(response):
                if not line:
                    continue
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise ClusterError(event["object"].get("code", 0), event["object"].get("message", "watch ended"))
                if event["type"] in ("ADDED", "MODIFIED"):
                    yield event["object"]
        except BROKEN as error:
            raise ClusterError(0, f"the watch broke: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ClusterError(0, f"the watch sent something else than events: {error!r}") from None
        finally:
            response.close()

    # -- writing

    def patch(self, path: str, body: Object, *, strategic: bool = False) -> Object:
        """Merge or strategic merge patch."""
        kind = "strategic-merge-patch" if strategic else "merge-patch"
        return self._json("patch", path, body, content_type=f"application/{kind}+json")

    def patch_node(self, node: Object, body: Object) -> Object:
        """Patch exactly this node object: the uid makes a re-used name a 409 instead of a wrong node."""
        body = {**body, "metadata": {**body.get("metadata", {}), "uid": node["metadata"]["uid"]}}
        return self.patch(f"/api/v1/nodes/{node['metadata']['name']}", body)

    def delete_node(self, node: Object) -> None:
        """Delete exactly this node object."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": node["metadata"]["uid"]},
        }
        self._json("delete", f"/api/v1/nodes/{node['metadata']['name']}", options)

    def evict(self, pod: Object, grace_seconds: int | None) -> EvictionAnswer:
        """Ask for an eviction; a budget's refusal is an answer, anything else unexpected raises ClusterError."""
        metadata = pod["metadata"]
        options: Object = {"preconditions": {"uid": metadata["uid"]}}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
            "deleteOptions": options,
        }
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/eviction"
        try:
            self._json("post", path, eviction)
        except ClusterError as error:
            if error.status == 404 or (error.status == 409 and "UID" in error.message):
                return EvictionAnswer(Eviction.GONE)
            if error.status == 429:
                return EvictionAnswer(Eviction.BLOCKED, error.message, error.retry_after_seconds)
            if error.status in (409, 500, 503, 504):
                return EvictionAnswer(Eviction.BLOCKED, error.message, 5.0)
            raise
        return EvictionAnswer(Eviction.ACCEPTED)

    def delete_pod(self, pod: Object, grace_seconds: int) -> None:
        """Delete exactly this pod, past any budget; one that is gone already is fine."""
        metadata = pod["metadata"]
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": grace_seconds,
            "preconditions": {"uid": metadata["uid"]},
        }
        try:
            self._json("delete", f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}", options)
        except ClusterError as error:
            if error.status not in (404, 409):
                raise


def _no_discovery(dynamic_client: Any, cache_file: Any) -> None:
    """The agent names its paths itself; discovery would cost a dozen requests at every start."""


def _items(page: Object) -> list[Object]:
    if "items" not in page:
        raise ClusterError(0, f"the Kubernetes API answered a {page.get('kind')} instead of a list")
    return page["items"] or []


def _cluster_error(error: dynamic.exceptions.DynamicApiError) -> ClusterError:
    """The Status in an error's body as a ClusterError, with its causes and the time to wait it suggests."""
    try:
        status = json.loads(error.body or b"")
        details = status.get("details") or {}
        causes = [cause.get("message", "") for cause in details.get("causes") or ()]
        message = " ".join([status.get("message", ""), *causes]).strip()
        return ClusterError(error.status or 0, message, details.get("retryAfterSeconds"))
    except (TypeError, ValueError, AttributeError):
        return ClusterError(error.status or 0, str(error.reason))


def instance_id_of(node: Object) -> str:
    """The EC2 instance behind a node: the last part of `aws:///<zone>/<instance-id>`; empty when it has none."""
    provider_id = (node.get("spec") or {}).get("providerID") or ""
    return provider_id.rsplit("/", 1)[-1] if provider_id.startswith("aws://") else ""
