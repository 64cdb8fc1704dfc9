"""The HTTP face of one cluster: a kube-apiserver's REST paths, verbs, authentication and errors over a `Store`.

Served: discovery, CRUD, collections, status/scale/binding/eviction subresources, watch, the three patch formats,
metrics.k8s.io. Not served: server-side apply, YAML and protobuf bodies, exec/log/proxy, RBAC beyond read-only tokens.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from control.sandbox.kubernetes.controllers import bind
from control.sandbox.kubernetes.eviction import evict
from control.sandbox.kubernetes.patches import json_patch, merge_patch, strategic_merge_patch
from control.sandbox.kubernetes.quantities import cpu_nanocores, memory_kibibytes, pod_requests
from control.sandbox.kubernetes.resources import (
    BY_PATH,
    NODES,
    PODS,
    RESOURCES,
    Object,
    Resource,
)
from control.sandbox.kubernetes.selectors import field_matcher, label_matcher
from control.sandbox.kubernetes.status import ApiError, bad_request, not_found, success
from control.sandbox.kubernetes.store import Store, timestamp

VERSION = {
    "major": "1",
    "minor": "34",
    "gitVersion": "v1.34.0",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "2025-08-27T10:09:04Z",
    "goVersion": "go1.24.5",
    "compiler": "gc",
    "platform": "linux/amd64",
}
# A kube-apiserver sends bookmarks about once a minute and ends watches after 30 to 60 minutes (--min-request-timeout).
BOOKMARK_SECONDS = 60.0
WATCH_SECONDS = (1800.0, 3600.0)
MAX_BODY_BYTES = 3 * 1024 * 1024  # the request limit of kube-apiserver

_PATCH_TYPES = (
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
)
_PUBLIC = ("/version", "/healthz", "/livez", "/readyz")

Usage = Callable[[Object], tuple[float, float]]  # pod -> cpu cores, memory bytes used now


def half_of_requests(pod: Object) -> tuple[float, float]:
    """The usage reported when nobody says better: half of what the pod requests."""
    cpu, memory = pod_requests(pod["spec"])
    return cpu / 2, memory / 2


class JsonResponse(Response):
    """JSON through msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class KubernetesApi:
    """One cluster's API as an ASGI application (`.app`)."""

    def __init__(
        self,
        store: Store,
        *,
        tokens: Iterable[str],
        read_only_tokens: Iterable[str] = (),
        usage: Usage = half_of_requests,
        bookmark_seconds: float = BOOKMARK_SECONDS,
        extra_routes: Iterable[Route] = (),
    ) -> None:
        self._store = store
        self.tokens = set(tokens)
        self.read_only_tokens = set(read_only_tokens)
        self.usage = usage
        self._bookmark_seconds = bookmark_seconds
        routes = [
            Route("/version", self._public(VERSION)),
            *(Route(path, self._healthy) for path in _PUBLIC[1:]),
            *extra_routes,
            Route("/api", self._json(_core_versions)),
            Route("/apis", self._json(_group_list)),
            Route("/api/{version}", self._discover_core),
            Route("/apis/{group}", self._discover_group),
            Route("/apis/{group}/{version}", self._discover_resources),
            Route("/apis/metrics.k8s.io/v1beta1/nodes", self._guarded(self._node_metrics)),
            Route("/apis/metrics.k8s.io/v1beta1/nodes/{name}", self._guarded(self._node_metrics)),
            Route("/apis/metrics.k8s.io/v1beta1/pods", self._guarded(self._pod_metrics)),
            Route("/apis/metrics.k8s.io/v1beta1/namespaces/{namespace}/pods", self._guarded(self._pod_metrics)),
            Route("/apis/metrics.k8s.io/v1beta1/namespaces/{namespace}/pods/{name}", self._guarded(self._pod_metrics)),
        ]
        verbs = ["GET", "POST", "PUT", "PATCH", "DELETE"]
        for prefix in ("/api/{version}", "/apis/{group}/{version}"):
            for path in (
                "/namespaces/{namespace}/{plural}/{name}/{subresource}",
                "/namespaces/{namespace}/{plural}/{name}",
                "/namespaces/{namespace}/{plural}",
                "/{plural}/{name}/{subresource}",
                "/{plural}/{name}",
                "/{plural}",
            ):
                routes.append(Route(prefix + path, self._guarded(self._serve), methods=verbs))
        self._routes = Starlette(routes=routes)
        self._routes.router.redirect_slashes = False
        self._routes.router.default = _path_not_found

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application; as on the real server `/version/` is `/version`."""
        if scope["type"] == "http" and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/")}
        await self._routes(scope, receive, send)

    # -- plumbing

    def _authenticate(self, request: Request) -> None:
        header = request.headers.get("authorization", "")
        scheme, _, token = header.partition(" ")
        if scheme.lower() == "bearer" and token in self.tokens:
            return
        if scheme.lower() == "bearer" and token in self.read_only_tokens:
            if request.method != "GET":
                raise ApiError(403, "Forbidden", f"this token may only read: {request.method} {request.url.path}")
            return
        raise ApiError(401, "Unauthorized", "Unauthorized")

    def _guarded(self, endpoint):
        async def run(request: Request) -> Response:
            try:
                self._authenticate(request)
                return await endpoint(request)
            except ApiError as error:
                return JsonResponse(error.status(), status_code=error.code, headers=error.headers)
            except ClientDisconnect:
                return Response(status_code=499)

        return run

    def _public(self, body: Any):
        async def answer(request: Request) -> Response:
            return JsonResponse(body)

        return answer

    def _json(self, make: Callable[[], Any]):
        async def answer(request: Request) -> Response:
            return JsonResponse(make())

        return self._guarded(answer)

    async def _healthy(self, request: Request) -> Response:
        return PlainTextResponse("ok")

    # -- discovery

    async def _discover_core(self, request: Request) -> Response:
        return await self._guarded(_resource_list)(request)

    async def _discover_resources(self, request: Request) -> Response:
        return await self._guarded(_resource_list)(request)

    async def _discover_group(self, request: Request) -> Response:
        return await self._guarded(_group)(request)

    # -- REST

    async def _serve(self, request: Request) -> Response:
        parameters = request.path_params
        group, version = parameters.get("group", ""), parameters["version"]
        namespace, name = parameters.get("namespace"), parameters.get("name")
        plural, subresource = parameters["plural"], parameters.get("subresource", "")
        # /api/v1/namespaces/x and /api/v1/namespaces/x/status also look like a collection in namespace x.
        if namespace is not None and name is None and group == "" and plural == "status":
            name, subresource, plural, namespace = namespace, plural, "namespaces", None
        resource = BY_PATH.get((group, version, plural))
        if resource is None or (namespace is not None and not resource.namespaced):
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        if subresource and subresource not in resource.subresources:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        if name is None:
            return await self._collection(request, resource, namespace)
        if resource.namespaced and namespace is None:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        if subresource == "eviction":
            return await self._evict(request, namespace or "", name)
        if subresource == "binding":
            return await self._bind(request, namespace or "", name)
        if subresource == "scale":
            return await self._scale(request, resource, namespace or "", name)
        return await self._object(request, resource, namespace or "", name, subresource)

    async def _collection(self, request: Request, resource: Resource, namespace: str | None) -> Response:
        query = request.query_params
        if request.method == "GET":
            if query.get("watch") in ("true", "1"):
                return self._watch(request, resource, namespace)
            return self._list(request, resource, namespace)
        if request.method == "POST":
            if resource.namespaced and namespace is None:
                raise _method_not_allowed()
            obj = await _body(request)
            created = self._store.create(resource, namespace or "", obj, dry_run=_dry_run(request))
            return JsonResponse(created, status_code=201)
        if request.method == "DELETE":
            if resource.namespaced and namespace is None:
                raise _method_not_allowed()
            options = await _delete_options(request)
            matches = _filter(request, resource)
            chosen = [obj for obj in self._store.objects(resource, namespace) if matches(obj)]
            for obj in chosen:
                metadata = obj["metadata"]
                self._store.delete(resource, metadata.get("namespace", ""), metadata["name"], options)
            return JsonResponse(_listing(resource, chosen, self._store.revision))
        raise _method_not_allowed()

    def _list(self, request: Request, resource: Resource, namespace: str | None) -> Response:
        query = request.query_params
        limit = _number(query.get("limit"), "limit")
        wanted = query.get("resourceVersion")
        if wanted and wanted != "0" and not query.get("continue"):
            revision = _number(wanted, "resourceVersion")
            if revision > self._store.revision:
                raise ApiError(
                    504,
                    "Timeout",
                    f"Too large resource version: {revision}, current: {self._store.revision}",
                    {"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
                     "retryAfterSeconds": 1},
                    {"Retry-After": "1"},
                )  # fmt: skip
            if query.get("resourceVersionMatch") == "Exact" and revision != self._store.revision:
                raise ApiError(410, "Expired", f"The resourceVersion for the provided list is too old: {revision}")
        page = self._store.page(
            resource,
            namespace,
            _filter(request, resource),
            limit=limit,
            token=query.get("continue"),
            selective=bool(query.get("labelSelector") or query.get("fieldSelector")),
        )
        metadata: dict[str, Any] = {"resourceVersion": str(page.revision)}
        if page.continue_token:
            metadata["continue"] = page.continue_token
            if page.remaining is not None:
                metadata["remainingItemCount"] = page.remaining
        return JsonResponse(_listing(resource, page.items, page.revision, metadata))

    def _watch(self, request: Request, resource: Resource, namespace: str | None) -> Response:
        query = request.query_params
        seconds = _number(query.get("timeoutSeconds"), "timeoutSeconds") or random.uniform(*WATCH_SECONDS)
        bookmarks = query.get("allowWatchBookmarks") in ("true", "1")
        events = self._store.watch(
            resource,
            namespace,
            _filter(request, resource),
            since=query.get("resourceVersion") if query.get("sendInitialEvents") != "true" else None,
            timeout_seconds=seconds,
            bookmark_seconds=self._bookmark_seconds if bookmarks else None,
            initial_events_end=query.get("sendInitialEvents") == "true" and bookmarks,
        )

        async def lines() -> AsyncIterator[bytes]:
            async for event in events:
                yield msgspec.json.encode(event) + b"\n"

        return StreamingResponse(lines(), media_type="application/json")

    async def _object(
        self, request: Request, resource: Resource, namespace: str, name: str, subresource: str
    ) -> Response:
        store, dry_run = self._store, _dry_run(request)
        if request.method == "GET":
            return JsonResponse(store.get(resource, namespace, name))
        if request.method == "PUT":
            obj = await _body(request)
            sent = (obj.get("metadata") or {}).get("name")
            if sent != name:
                raise bad_request(f"the name of the object ({sent}) does not match the name on the URL ({name})")
            return JsonResponse(store.update(resource, namespace, obj, subresource=subresource, dry_run=dry_run))
        if request.method == "PATCH":
            patch = await _patch_body(request)
            current = store.get(resource, namespace, name)
            draft = _patched(current, patch, request)
            sent_revision = (draft.get("metadata") or {}).get("resourceVersion")
            if not sent_revision:
                draft["metadata"]["resourceVersion"] = current["metadata"]["resourceVersion"]
            return JsonResponse(store.update(resource, namespace, draft, subresource=subresource, dry_run=dry_run))
        if request.method == "DELETE" and not subresource:
            options = await _delete_options(request)
            return JsonResponse(store.delete(resource, namespace, name, options, dry_run=dry_run))
        raise _method_not_allowed()

    async def _evict(self, request: Request, namespace: str, name: str) -> Response:
        if request.method != "POST":
            raise _method_not_allowed()
        eviction = await _body(request)
        if eviction.get("kind", "Eviction") != "Eviction":
            raise bad_request(f"no kind {eviction['kind']!r} is registered for the eviction subresource")
        sent = (eviction.get("metadata") or {}).get("name")
        if sent and sent != name:
            raise bad_request("name in URL does not match name in Eviction object")
        return JsonResponse(evict(self._store, namespace, name, eviction, dry_run=_dry_run(request)), status_code=201)

    async def _bind(self, request: Request, namespace: str, name: str) -> Response:
        if request.method != "POST":
            raise _method_not_allowed()
        target = (await _body(request)).get("target") or {}
        pod = self._store.get(PODS, namespace, name)
        if pod["spec"].get("nodeName"):
            raise ApiError(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on pods/binding "{name}": pod {name} is already assigned to node '
                f'"{pod["spec"]["nodeName"]}"',
                {"name": name, "kind": "pods/binding"},
            )
        bind(self._store, pod, target.get("name", ""))
        return JsonResponse(success(code=201), status_code=201)

    async def _scale(self, request: Request, resource: Resource, namespace: str, name: str) -> Response:
        current = self._store.get(resource, namespace, name)
        if request.method in ("PUT", "PATCH"):
            if request.method == "PUT":
                scale = await _body(request)
            else:
                scale = _patched(_scale_of(current), await _patch_body(request), request)
            replicas = int((scale.get("spec") or {}).get("replicas") or 0)
            current = self._store.edit(resource, current, lambda draft: draft["spec"].__setitem__("replicas", replicas))
        elif request.method != "GET":
            raise _method_not_allowed()
        return JsonResponse(_scale_of(current))

    # -- metrics.k8s.io

    async def _node_metrics(self, request: Request) -> Response:
        matches = _metrics_filter(request)
        now = timestamp(self._store.clock())
        by_node: dict[str, tuple[float, float]] = {}
        for pod in self._store.objects(PODS):
            if pod["status"].get("phase") == "Running":
                name = pod["spec"].get("nodeName", "")
                cpu, memory = self.usage(pod)
                before = by_node.get(name, (0.0, 0.0))
                by_node[name] = (before[0] + cpu, before[1] + memory)
        items = []
        for node in sorted(self._store.objects(NODES), key=lambda n: n["metadata"]["name"]):
            if not matches(node["metadata"].get("labels") or {}) or not _node_is_ready(node):
                continue
            cpu, memory = by_node.get(node["metadata"]["name"], (0.0, 0.0))
            # The kubelet, the container runtime and the kernel use a little on every node.
            items.append(
                {
                    "metadata": _metrics_metadata(node, now),
                    "timestamp": now,
                    "window": "10.061s",
                    "usage": {"cpu": cpu_nanocores(cpu + 0.06), "memory": memory_kibibytes(memory + 600 * 2**20)},
                }
            )
        return _metrics_answer(request, "NodeMetrics", "nodes", items)

    async def _pod_metrics(self, request: Request) -> Response:
        matches = _metrics_filter(request)
        now = timestamp(self._store.clock())
        items = []
        pods = self._store.objects(PODS, request.path_params.get("namespace"))
        for pod in sorted(pods, key=lambda p: (p["metadata"]["namespace"], p["metadata"]["name"])):
            if pod["status"].get("phase") != "Running" or not matches(pod["metadata"].get("labels") or {}):
                continue
            cpu, memory = self.usage(pod)
            containers = pod["spec"]["containers"]
            share = {"cpu": cpu_nanocores(cpu / len(containers)), "memory": memory_kibibytes(memory / len(containers))}
            items.append(
                {
                    "metadata": _metrics_metadata(pod, now),
                    "timestamp": now,
                    "window": "15.019s",
                    "containers": [{"name": container["name"], "usage": share} for container in containers],
                }
            )
        return _metrics_answer(request, "PodMetrics", "pods", items)


# -- requests


async def _body(request: Request) -> dict[str, Any]:
    content_type = request.headers.get("content-type", "application/json").split(";")[0].strip()
    if content_type not in ("application/json", ""):
        raise ApiError(
            415,
            "UnsupportedMediaType",
            "the body of the request was in an unknown format - accepted media types include: application/json",
        )
    return await _decoded(request)


async def _decoded(request: Request) -> Any:
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise ApiError(413, "RequestEntityTooLarge", f"Request entity too large: limit is {MAX_BODY_BYTES}")
    if not raw:
        return {}
    try:
        decoded = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_request(
            f"the object provided is unrecognized: couldn't get version/kind; json parse error: {error}"
        ) from error
    if not isinstance(decoded, (dict, list)):
        raise bad_request("the object provided is unrecognized: it is neither an object nor a list")
    return decoded


async def _patch_body(request: Request) -> Any:
    content_type = request.headers.get("content-type", "").split(";")[0].strip()
    if content_type not in _PATCH_TYPES:
        raise ApiError(
            415,
            "UnsupportedMediaType",
            "the body of the request was in an unknown format - accepted media types include: "
            + ", ".join(_PATCH_TYPES),
        )
    patch = await _decoded(request)
    if isinstance(patch, list) is not (content_type == "application/json-patch+json"):
        raise bad_request(f"cannot unmarshal the patch as {content_type}")
    return patch


def _patched(current: Object, patch: Any, request: Request) -> Object:
    content_type = request.headers.get("content-type", "").split(";")[0].strip()
    if content_type == "application/json-patch+json":
        return json_patch(current, patch)
    if content_type == "application/merge-patch+json":
        draft = merge_patch(current, patch)
    else:
        draft = strategic_merge_patch(current, patch)
    return {**draft, "metadata": dict(draft["metadata"])}


async def _delete_options(request: Request) -> dict[str, Any]:
    options = await _body(request)
    query = request.query_params
    if query.get("gracePeriodSeconds"):
        options["gracePeriodSeconds"] = _number(query["gracePeriodSeconds"], "gracePeriodSeconds")
    if query.get("propagationPolicy"):
        options["propagationPolicy"] = query["propagationPolicy"]
    return options


def _dry_run(request: Request) -> bool:
    values = request.query_params.getlist("dryRun")
    if values and values != ["All"]:
        raise bad_request(f'dryRun: Unsupported value: {values}: supported values: "All"')
    return bool(values)


def _number(text: str | None, name: str) -> int:
    if not text:
        return 0
    try:
        return int(text)
    except ValueError as error:
        raise bad_request(f"{name}: Invalid value: {text!r}: must be a number") from error


def _filter(request: Request, resource: Resource) -> Callable[[Object], bool]:
    labels_text = request.query_params.get("labelSelector", "")
    fields_text = request.query_params.get("fieldSelector", "")
    labels = label_matcher(labels_text)
    fields = field_matcher(fields_text, resource.described, resource.field_names)
    if not labels_text and not fields_text:
        return lambda obj: True
    return lambda obj: labels(obj["metadata"].get("labels") or {}) and fields(resource.fields(obj))


def _method_not_allowed() -> ApiError:
    return ApiError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")


async def _path_not_found(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("404 page not found\n", status_code=404)(scope, receive, send)


# -- answers


def _listing(
    resource: Resource, items: list[Object], revision: int, metadata: dict[str, Any] | None = None
) -> dict[str, Any]:
    # Inside a list the items carry neither kind nor apiVersion, as on the real server.
    bare = [{name: value for name, value in item.items() if name not in ("kind", "apiVersion")} for item in items]
    return {
        "kind": f"{resource.kind}List",
        "apiVersion": resource.api_version,
        "metadata": metadata or {"resourceVersion": str(revision)},
        "items": bare,
    }


def _scale_of(workload: Object) -> Object:
    metadata, spec = workload["metadata"], workload["spec"]
    selector = (spec.get("selector") or {}).get("matchLabels") or {}
    kept = {name: metadata[name] for name in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")}
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": kept,
        "spec": {"replicas": spec.get("replicas", 0)},
        "status": {
            "replicas": (workload.get("status") or {}).get("replicas", 0),
            "selector": ",".join(f"{key}={value}" for key, value in sorted(selector.items())),
        },
    }


def _node_is_ready(node: Object) -> bool:
    return any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for condition in (node.get("status") or {}).get("conditions") or ()
    )


def _metrics_metadata(obj: Object, now: str) -> dict[str, Any]:
    metadata = obj["metadata"]
    kept = {name: metadata[name] for name in ("name", "namespace", "labels") if metadata.get(name)}
    return {**kept, "creationTimestamp": now}


def _metrics_filter(request: Request) -> Callable[[dict[str, str]], bool]:
    return label_matcher(request.query_params.get("labelSelector", ""))


def _metrics_answer(request: Request, kind: str, plural: str, items: list[dict[str, Any]]) -> Response:
    name = request.path_params.get("name")
    if name is None:
        return JsonResponse(
            {"kind": f"{kind}List", "apiVersion": "metrics.k8s.io/v1beta1", "metadata": {}, "items": items}
        )
    for item in items:
        if item["metadata"]["name"] == name:
            return JsonResponse({"kind": kind, "apiVersion": "metrics.k8s.io/v1beta1", **item})
    raise not_found(plural, name, "metrics.k8s.io")


def _core_versions() -> dict[str, Any]:
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}


def _groups() -> dict[str, str]:
    groups = {resource.group: resource.version for resource in RESOURCES if resource.group}
    return {**groups, "metrics.k8s.io": "v1beta1"}


def _group_entry(name: str, version: str) -> dict[str, Any]:
    entry = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [entry], "preferredVersion": entry}


def _group_list() -> dict[str, Any]:
    return {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [_group_entry(name, version) for name, version in _groups().items()],
    }


async def _group(request: Request) -> Response:
    name = request.path_params["group"]
    version = _groups().get(name)
    if version is None:
        return PlainTextResponse("404 page not found\n", status_code=404)
    return JsonResponse({"kind": "APIGroup", "apiVersion": "v1", **_group_entry(name, version)})


_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]


async def _resource_list(request: Request) -> Response:
    group, version = request.path_params.get("group", ""), request.path_params["version"]
    entries: list[dict[str, Any]] = []
    for resource in RESOURCES:
        if (resource.group, resource.version) != (group, version):
            continue
        entry: dict[str, Any] = {
            "name": resource.plural,
            "singularName": resource.singular,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": _VERBS,
        }
        if resource.short_names:
            entry["shortNames"] = list(resource.short_names)
        if resource.categories:
            entry["categories"] = list(resource.categories)
        entries.append(entry)
        for subresource in resource.subresources:
            kind = {"eviction": "Eviction", "binding": "Binding", "scale": "Scale"}.get(subresource, resource.kind)
            more = {"group": "policy", "version": "v1"} if subresource == "eviction" else {}
            more = {"group": "autoscaling", "version": "v1"} if subresource == "scale" else more
            verbs = ["create"] if subresource in ("eviction", "binding") else ["get", "patch", "update"]
            entries.append(
                {
                    "name": f"{resource.plural}/{subresource}",
                    "singularName": "",
                    "namespaced": resource.namespaced,
                    **more,
                    "kind": kind,
                    "verbs": verbs,
                }
            )
    if (group, version) == ("metrics.k8s.io", "v1beta1"):
        entries = [
            {"name": "nodes", "singularName": "", "namespaced": False, "kind": "NodeMetrics", "verbs": ["get", "list"]},
            {"name": "pods", "singularName": "", "namespaced": True, "kind": "PodMetrics", "verbs": ["get", "list"]},
        ]
    if not entries:
        return PlainTextResponse("404 page not found\n", status_code=404)
    name = f"{group}/{version}" if group else version
    return JsonResponse({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": entries})
