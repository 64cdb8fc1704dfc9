"""The object store of one cluster: optimistic concurrency, a bounded watch history, paging and graceful deletion.

Everything runs on one event loop thread; every method is synchronous and therefore atomic. Stored objects are never
edited in place: a write replaces the object, so lists, watches and page snapshots can share references.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from control.sandbox.kubernetes.resources import (
    DEPLOYMENTS,
    EVENTS,
    NAMESPACES,
    NODES,
    PODS,
    RESOURCES,
    SERVICES,
    Object,
    Resource,
)
from control.sandbox.kubernetes.status import (
    ApiError,
    already_exists,
    bad_request,
    conflict,
    expired,
    invalid,
    not_found,
    success,
)

# Changes kept for watches that resume, over all kinds. A real server keeps five minutes of them; this keeps a count so
# that memory stays flat, and answers 410 Gone below it.
HISTORY_LENGTH = 1000
# How far revisions jump at a restore: more than a cluster writes between two dumps.
RESTORE_STEP = 1_000_000
# Snapshots kept for `continue` tokens; a list that pages slower than 16 others gets 410 as after a compaction.
PAGE_SNAPSHOTS = 16
# Events kept per cluster (a real server drops them after an hour).
EVENTS_KEPT = 500

_NAME = re.compile(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
_SUFFIX_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # apimachinery's, without vowels and look-alikes
_IMMUTABLE_METADATA = (
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
    "name",
    "namespace",
    "selfLink",
)

_WITHOUT_GENERATION = frozenset({NAMESPACES, NODES, SERVICES})

Key = tuple[str, str]  # namespace ("" when cluster-scoped), name
Filter = Callable[[Object], bool]


def timestamp(moment: datetime) -> str:
    """metav1.Time: RFC 3339 in UTC with whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_timestamp(text: str) -> datetime:
    """The inverse of `timestamp`; also reads fractional seconds."""
    return datetime.fromisoformat(text)


def copied(obj: Object) -> Object:
    """A deep copy of a JSON-shaped object (a round trip through msgspec, 5 times faster than copy.deepcopy)."""
    return msgspec.json.decode(msgspec.json.encode(obj))


def random_suffix(length: int = 5) -> str:
    """The random part of a generated name."""
    return "".join(random.choices(_SUFFIX_ALPHABET, k=length))


def controller_of(obj: Object) -> dict[str, Any] | None:
    """The controlling owner reference, if any."""
    return next((ref for ref in obj["metadata"].get("ownerReferences") or () if ref.get("controller")), None)


@dataclass(frozen=True, slots=True)
class Change:
    """One write, as watches see it."""

    revision: int
    resource: Resource
    kind: str  # ADDED, MODIFIED, DELETED
    obj: Object
    previous: Object | None


@dataclass(frozen=True, slots=True)
class Page:
    """One answer to a list."""

    items: list[Object]
    revision: int
    continue_token: str | None
    remaining: int | None


class Store:
    """All objects of one cluster."""

    def __init__(self, name: str, clock: Callable[[], datetime] | None = None) -> None:
        self.name = name
        self.clock = clock or (lambda: datetime.now(UTC))
        self.revision = 1
        self._objects: dict[Resource, dict[Key, Object]] = {resource: {} for resource in RESOURCES}
        self._history: deque[Change] = deque(maxlen=HISTORY_LENGTH)
        self._compacted = 1  # watches may resume from this revision or a later one
        self._pages: OrderedDict[tuple[Resource, str, int], list[Object]] = OrderedDict()
        self._waiters: set[asyncio.Future[None]] = set()
        self._listeners: list[Callable[[Change], None]] = []
        self._closed = False
        for namespace in ("default", "kube-system", "kube-public", "kube-node-lease"):
            self.create(NAMESPACES, "", {"metadata": {"name": namespace}})

    # -- reading

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """The object; raises a 404 ApiError when absent."""
        found = self._objects[resource].get((namespace, name))
        if found is None:
            raise not_found(resource.plural, name, resource.group)
        return found

    def find(self, resource: Resource, namespace: str, name: str) -> Object | None:
        """The object or None."""
        return self._objects[resource].get((namespace, name))

    def objects(self, resource: Resource, namespace: str | None = None) -> list[Object]:
        """All objects of a resource, in no particular order; the caller must not edit them."""
        stored = self._objects[resource]
        if namespace is None:
            return list(stored.values())
        return [obj for (where, _), obj in stored.items() if where == namespace]

    def page(
        self,
        resource: Resource,
        namespace: str | None,
        matches: Filter,
        *,
        limit: int = 0,
        token: str | None = None,
        selective: bool = False,
    ) -> Page:
        """One page of a list in key order, consistent over all pages of one listing.

        Raises a 410 ApiError carrying a fresh token when the snapshot behind `token` is gone.
        """
        scope = namespace or ""
        if token:
            start, revision = _decode_continue(token)
            snapshot = self._pages.get((resource, scope, revision))
            if snapshot is None:
                raise expired(
                    "The provided continue parameter is too old to display a consistent list result. You can start a "
                    "new list without the continue parameter, or use the continue token in this response to retrieve "
                    "the remainder of the results. Continuing with the provided token results in an inconsistent "
                    "list - objects that were created, modified, or deleted between the time the first chunk was "
                    "returned and now may show up in the list.",
                    _encode_continue(start, self._remember_page(resource, namespace)),
                )
        else:
            start, revision = ("", ""), self.revision
            snapshot = self._sorted(resource, namespace)
        after = [obj for obj in snapshot if _key(obj) > start] if token else snapshot
        selected = [obj for obj in after if matches(obj)]
        if not limit or len(selected) <= limit:
            return Page(selected, revision, None, None)
        if not token:
            revision = self._remember_page(resource, namespace)
        items = selected[:limit]
        # As etcd counts keys, not matches, the real server names the remainder only without selectors.
        remaining = None if selective else len(selected) - limit
        return Page(items, revision, _encode_continue(_key(items[-1]), revision), remaining)

    def _sorted(self, resource: Resource, namespace: str | None) -> list[Object]:
        return sorted(self.objects(resource, namespace), key=_key)

    def _remember_page(self, resource: Resource, namespace: str | None) -> int:
        self._pages[resource, namespace or "", self.revision] = self._sorted(resource, namespace)
        while len(self._pages) > PAGE_SNAPSHOTS:
            self._pages.popitem(last=False)
        return self.revision

    # -- writing

    def create(self, resource: Resource, namespace: str, obj: Object, *, dry_run: bool = False) -> Object:
        """Store a new object; raises 409 when the name is taken, 404 for an unknown namespace, 422 without a name."""
        obj = copied(obj)
        metadata = obj.setdefault("metadata", {})
        _check_type(resource, obj)
        if resource.namespaced:
            if metadata.setdefault("namespace", namespace) != namespace:
                raise bad_request(
                    f"the namespace of the provided object does not match the namespace sent on the request "
                    f"({metadata['namespace']} != {namespace})"
                )
            home = self.get(NAMESPACES, "", namespace)
            if home["metadata"].get("deletionTimestamp"):
                raise ApiError(
                    403,
                    "Forbidden",
                    f'{resource.plural} "{metadata.get("name", "")}" is forbidden: unable to create new content in '
                    f"namespace {namespace} because it is being terminated",
                )
        else:
            metadata.pop("namespace", None)
            namespace = ""
        if metadata.get("resourceVersion"):
            raise ApiError(400, "BadRequest", "resourceVersion should not be set on objects to be created")
        name = metadata.get("name") or ""
        if not name and metadata.get("generateName"):
            name = metadata["name"] = metadata["generateName"] + random_suffix()
        if not name:
            raise invalid(
                resource.kind,
                "",
                resource.group,
                "metadata.name",
                "FieldValueRequired",
                "Required value: name or generateName is required",
            )
        if not _NAME.match(name) or len(name) > 253:
            raise invalid(
                resource.kind,
                name,
                resource.group,
                "metadata.name",
                "FieldValueInvalid",
                f'Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric '
                "characters, '-' or '.', and must start and end with an alphanumeric character",
            )
        if (namespace, name) in self._objects[resource]:
            raise already_exists(resource.plural, name, resource.group)
        metadata["uid"] = str(uuid.uuid4())
        metadata["creationTimestamp"] = timestamp(self.clock())
        metadata.pop("deletionTimestamp", None)
        metadata.pop("deletionGracePeriodSeconds", None)
        if "spec" in obj and resource not in _WITHOUT_GENERATION:
            metadata["generation"] = 1
        if "status" in resource.subresources and resource is not NODES:  # a kubelet registers its node with a status
            obj.pop("status", None)
        if resource.defaults is not None:
            resource.defaults(obj)
        obj = _ordered(resource, obj)
        if dry_run:
            return obj
        if resource is EVENTS:
            self._drop_old_events()
        return self._commit(resource, "ADDED", obj, None)

    def load(self, resource: Resource, obj: Object) -> Object:
        """Store an object exactly as given (uid, times and status included): snapshots and captured dumps."""
        obj = _ordered(resource, copied(obj))
        if resource.namespaced and not self.find(NAMESPACES, "", obj["metadata"]["namespace"]):
            self.create(NAMESPACES, "", {"metadata": {"name": obj["metadata"]["namespace"]}})
        obj["metadata"].setdefault("uid", str(uuid.uuid4()))
        previous = self._objects[resource].get(_key(obj))
        return self._commit(resource, "MODIFIED" if previous else "ADDED", obj, previous)

    def update(
        self, resource: Resource, namespace: str, obj: Object, *, subresource: str = "", dry_run: bool = False
    ) -> Object:
        """Replace an object (or only its status); raises 404 and 409 on an old resourceVersion or another uid."""
        metadata = obj.get("metadata") or {}
        name = metadata.get("name") or ""
        current = self.get(resource, namespace if resource.namespaced else "", name)
        _check_type(resource, obj)
        sent_revision = metadata.get("resourceVersion")
        if not sent_revision and not resource.unconditional_update and not subresource:
            raise invalid(
                resource.kind,
                name,
                resource.group,
                "metadata.resourceVersion",
                "FieldValueInvalid",
                "Invalid value: 0: must be specified for an update",
            )
        if sent_revision and sent_revision != current["metadata"]["resourceVersion"]:
            raise conflict(resource.plural, name, resource.group)
        if metadata.get("uid") and metadata["uid"] != current["metadata"]["uid"]:
            raise conflict(
                resource.plural,
                name,
                resource.group,
                f"Precondition failed: UID in precondition: {metadata['uid']}, "
                f"UID in object meta: {current['metadata']['uid']}",
            )
        return self.replace(resource, current, copied(obj), subresource=subresource, dry_run=dry_run)

    def edit(
        self, resource: Resource, current: Object, change: Callable[[Object], None], *, subresource: str = ""
    ) -> Object:
        """Controllers' way to write: apply `change` to a copy of `current` and store it."""
        draft = copied(current)
        change(draft)
        return self.replace(resource, current, draft, subresource=subresource)

    def replace(
        self, resource: Resource, current: Object, draft: Object, *, subresource: str = "", dry_run: bool = False
    ) -> Object:
        """Store `draft` in place of `current`, keeping what the server owns; a change of nothing writes nothing."""
        metadata = draft.setdefault("metadata", {})
        for name in _IMMUTABLE_METADATA:
            if name in current["metadata"]:
                metadata[name] = current["metadata"][name]
            else:
                metadata.pop(name, None)
        if subresource == "status":
            draft = {**current, "metadata": metadata, "status": draft.get("status") or {}}
        elif "status" in resource.subresources:
            draft["status"] = current.get("status") or {}
        _check_transition(resource, current, draft)
        if draft.get("spec") != current.get("spec") and "generation" in metadata:
            metadata["generation"] = current["metadata"]["generation"] + 1
        metadata["resourceVersion"] = current["metadata"]["resourceVersion"]
        draft = _ordered(resource, draft)
        if draft == current:
            return current
        if dry_run:
            return draft
        held = metadata.get("finalizers") or metadata.get("deletionGracePeriodSeconds") or resource is NAMESPACES
        if metadata.get("deletionTimestamp") and not held:
            return self._commit(resource, "DELETED", draft, current)
        return self._commit(resource, "MODIFIED", draft, current)

    def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        options: dict[str, Any] | None = None,
        *,
        dry_run: bool = False,
    ) -> Object:
        """Delete an object the way its kind is deleted; returns the answer's body.

        A pod bound to a node keeps existing with a deletionTimestamp until its kubelet (or anybody) deletes it with
        grace period 0; finalizers hold any object. Raises 404, and 409 for failed preconditions.
        """
        options = options or {}
        namespace = namespace if resource.namespaced else ""
        current = self.get(resource, namespace, name)
        metadata = current["metadata"]
        preconditions = options.get("preconditions") or {}
        for field, label in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
            if preconditions.get(field) and preconditions[field] != metadata[field]:
                raise conflict(
                    resource.plural,
                    name,
                    resource.group,
                    f"Precondition failed: {label} in precondition: {preconditions[field]}, "
                    f"{label} in object meta: {metadata[field]}",
                )
        answer = (
            current
            if resource.returns_deleted_object
            else success(
                {
                    "name": name,
                    **({"group": resource.group} if resource.group else {}),
                    "kind": resource.plural,
                    "uid": metadata["uid"],
                }
            )
        )
        if dry_run:
            return answer
        if resource is PODS:
            return self._delete_pod(current, options.get("gracePeriodSeconds"))
        if resource is NAMESPACES:
            return self._delete_namespace(current)
        policy = options.get("propagationPolicy")
        extra = {"Foreground": ["foregroundDeletion"], "Orphan": ["orphan"]}.get(policy or "", [])
        finalizers = [*(metadata.get("finalizers") or []), *extra]
        if finalizers:
            draft = {
                **current,
                "metadata": {
                    **metadata,
                    "finalizers": list(dict.fromkeys(finalizers)),
                    "deletionTimestamp": metadata.get("deletionTimestamp") or timestamp(self.clock()),
                    "deletionGracePeriodSeconds": 0,
                },
            }
            if draft != current:
                stored = self._commit(resource, "MODIFIED", draft, current)
                return stored if resource.returns_deleted_object else answer
            return answer
        self._commit(resource, "DELETED", current, current)
        return answer

    def _delete_pod(self, pod: Object, requested: int | None) -> Object:
        metadata, spec = pod["metadata"], pod.get("spec") or {}
        if requested is not None and requested < 0:
            requested = 1
        grace = requested if requested is not None else int(spec.get("terminationGracePeriodSeconds", 30))
        # Nothing to wait for: never bound to a node, or already finished (registry/core/pod/strategy.go).
        if not spec.get("nodeName") or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
            grace = 0
        now = self.clock()
        pending = metadata.get("deletionGracePeriodSeconds")
        if pending is not None:  # already terminating: the grace period may only become shorter
            if requested is None or grace >= pending:
                return pod
            if grace > 0:
                first = parse_timestamp(metadata["deletionTimestamp"]) - timedelta(seconds=pending)
                return self._mark_pod(pod, first + timedelta(seconds=grace), grace)
        if grace > 0:
            return self._mark_pod(pod, now + timedelta(seconds=grace), grace)
        if metadata.get("finalizers"):
            return self._mark_pod(pod, now, 0)
        final = {**pod, "metadata": {**metadata, "deletionGracePeriodSeconds": 0}}
        final["metadata"].setdefault("deletionTimestamp", timestamp(now))
        return self._commit(PODS, "DELETED", final, pod)

    def _mark_pod(self, pod: Object, until: datetime, grace: int) -> Object:
        metadata = {
            **pod["metadata"],
            "deletionTimestamp": timestamp(until),
            "deletionGracePeriodSeconds": grace,
        }
        if pod["metadata"].get("generation"):
            metadata["generation"] = pod["metadata"]["generation"] + 1
        return self._commit(PODS, "MODIFIED", {**pod, "metadata": metadata}, pod)

    def _delete_namespace(self, namespace: Object) -> Object:
        name = namespace["metadata"]["name"]
        if name in ("default", "kube-system", "kube-public"):
            raise ApiError(403, "Forbidden", f'namespaces "{name}" is forbidden: this namespace may not be deleted')
        metadata = {**namespace["metadata"], "deletionTimestamp": timestamp(self.clock())}
        marked = self._commit(
            NAMESPACES,
            "MODIFIED",
            {**namespace, "metadata": metadata, "status": {"phase": "Terminating"}},
            namespace,
        )
        for resource in RESOURCES:
            if resource.namespaced:
                for obj in self.objects(resource, name):
                    self.delete(resource, name, obj["metadata"]["name"])
        self.finish_namespace(marked)
        return marked

    def finish_namespace(self, namespace: Object) -> None:
        """Remove a terminating namespace once nothing is left in it."""
        name = namespace["metadata"]["name"]
        if not any(self.objects(resource, name) for resource in RESOURCES if resource.namespaced):
            self._commit(NAMESPACES, "DELETED", namespace, namespace)

    def _drop_old_events(self) -> None:
        events = self._objects[EVENTS]
        while len(events) >= EVENTS_KEPT:
            oldest = events[next(iter(events))]
            self._commit(EVENTS, "DELETED", oldest, oldest)

    def _commit(self, resource: Resource, kind: str, obj: Object, previous: Object | None) -> Object:
        self.revision += 1
        obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.revision)}}
        if kind == "DELETED":
            self._objects[resource].pop(_key(obj), None)
        else:
            self._objects[resource][_key(obj)] = obj
        if len(self._history) == self._history.maxlen:
            self._compacted = self._history[0].revision
        change = Change(self.revision, resource, kind, obj, previous)
        self._history.append(change)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()
        for listener in self._listeners:
            listener(change)
        return obj

    # -- watching

    def listen(self, listener: Callable[[Change], None]) -> None:
        """Call `listener` after every write, on the loop's thread."""
        self._listeners.append(listener)

    def close(self) -> None:
        """End every watch; called when the server stops."""
        self._closed = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def watch(
        self,
        resource: Resource,
        namespace: str | None,
        matches: Filter,
        *,
        since: str | None,
        timeout_seconds: float,
        bookmark_seconds: float | None,
        initial_events_end: bool = False,
    ) -> AsyncIterator[dict[str, Any]]:
        """Watch events until the time is up or the store closes.

        Without a revision (or with "0") the present objects come first as ADDED. A revision older than the history, or
        from the future, yields one ERROR event with code 410. Bookmarks come every `bookmark_seconds` and at the end.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_seconds
        if not since or since == "0":
            cursor = self.revision
            for obj in self._sorted(resource, namespace):
                if matches(obj):
                    yield {"type": "ADDED", "object": obj}
            if initial_events_end:
                yield _bookmark(resource, cursor, {"k8s.io/initial-events-end": "true"})
        else:
            cursor = _revision(since)
            # A revision never given out is one of another life of this cluster: to wait for it is to miss events.
            if cursor < self._compacted or cursor > self.revision:
                yield _gone(cursor, self._compacted)
                return
        next_bookmark = loop.time() + bookmark_seconds if bookmark_seconds else None
        while not self._closed:
            if cursor < self._compacted:
                yield _gone(cursor, self._compacted)
                return
            for change in self._since(cursor):
                cursor = change.revision
                event = _seen(change, resource, namespace, matches)
                if event is not None:
                    yield event
            now = loop.time()
            if now >= ends_at:
                break
            if next_bookmark is not None and now >= next_bookmark:
                yield _bookmark(resource, cursor)
                next_bookmark = now + (bookmark_seconds or 0)
            until = min(ends_at, next_bookmark) if next_bookmark is not None else ends_at
            if self.revision > cursor:
                continue
            waiter = loop.create_future()
            self._waiters.add(waiter)
            try:
                async with asyncio.timeout(max(0.0, until - now)):
                    await waiter
            except TimeoutError:
                pass
            finally:
                self._waiters.discard(waiter)
        if bookmark_seconds and not self._closed:
            yield _bookmark(resource, cursor)

    def _since(self, cursor: int) -> list[Change]:
        newer: list[Change] = []
        for change in reversed(self._history):
            if change.revision <= cursor:
                break
            newer.append(change)
        newer.reverse()
        return newer

    # -- persistence

    def dump(self) -> bytes:
        """Everything but events, as JSON, for `restore`."""
        objects = {
            f"{resource.api_version}/{resource.plural}": list(stored.values())
            for resource, stored in self._objects.items()
            if resource is not EVENTS
        }
        return msgspec.json.encode({"name": self.name, "revision": self.revision, "objects": objects})

    def restore(self, snapshot: bytes) -> None:
        """Replace the contents by a dump; uids continue, revisions jump, watches of any earlier life get 410.

        The writer of the dump may have been killed after further writes, which watchers have seen: no revision it gave
        out may come back with another meaning. Dump again before anybody watches.
        """
        state = msgspec.json.decode(snapshot)
        for resource in RESOURCES:
            items = state["objects"].get(f"{resource.api_version}/{resource.plural}", [])
            self._objects[resource] = {_key(obj): obj for obj in items}
        self.revision = max(self.revision, state["revision"]) + RESTORE_STEP
        self._history.clear()
        self._pages.clear()
        self._compacted = self.revision


def _key(obj: Object) -> Key:
    metadata = obj["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _ordered(resource: Resource, obj: Object) -> Object:
    head = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": obj["metadata"]}
    return {**head, **{name: value for name, value in obj.items() if name not in head}}


def _check_type(resource: Resource, obj: Object) -> None:
    for field, expected in (("apiVersion", resource.api_version), ("kind", resource.kind)):
        if obj.get(field) and obj[field] != expected:
            raise bad_request(
                f"the object provided is unrecognized (must be of type {resource.kind}): "
                f"{field} {obj[field]!r} is not {expected!r}"
            )


def _check_transition(resource: Resource, current: Object, draft: Object) -> None:
    """The update validations a drain or a resize can run into."""
    name = current["metadata"]["name"]
    if resource is PODS:
        before, after = current.get("spec") or {}, draft.get("spec") or {}
        if before.get("nodeName") and after.get("nodeName") != before.get("nodeName"):
            raise invalid("Pod", name, "", "spec", "FieldValueForbidden", "Forbidden: pod updates may not change "
                          "fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
                          "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
                          "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
                          )  # fmt: skip
    if resource is NODES:
        before, after = current["spec"].get("providerID"), (draft.get("spec") or {}).get("providerID")
        if before and after != before:
            raise invalid("Node", name, "", "spec.providerID", "FieldValueForbidden",
                          "Forbidden: node updates may not change providerID except from \"\" to valid")  # fmt: skip
    if resource is DEPLOYMENTS and (draft.get("spec") or {}).get("selector") != current["spec"].get("selector"):
        raise invalid("Deployment", name, "apps", "spec.selector", "FieldValueInvalid",
                      "Invalid value: field is immutable")  # fmt: skip


def _encode_continue(start: Key, revision: int) -> str:
    text = json.dumps({"v": "meta.k8s.io/v1", "rv": revision, "start": f"{start[0]}/{start[1]}"})
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decode_continue(token: str) -> tuple[Key, int]:
    try:
        decoded = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        namespace, name = decoded["start"].split("/", 1)
        return (namespace, name), int(decoded["rv"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_request(f"continue key is not valid: {error}") from error


def _revision(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise invalid(
            "", "", "", "resourceVersion", "FieldValueInvalid", f'Invalid value: "{text}": must be an unsigned integer'
        ) from error


def _bookmark(resource: Resource, revision: int, annotations: dict[str, str] | None = None) -> dict[str, Any]:
    metadata: dict[str, Any] = {"resourceVersion": str(revision), "creationTimestamp": None}
    if annotations:
        metadata["annotations"] = annotations
    return {
        "type": "BOOKMARK",
        "object": {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata},
    }


def _gone(cursor: int, oldest: int) -> dict[str, Any]:
    return {"type": "ERROR", "object": expired(f"too old resource version: {cursor} ({oldest})").status()}


def _seen(change: Change, resource: Resource, namespace: str | None, matches: Filter) -> dict[str, Any] | None:
    """How a watch with a selector sees a change: leaving the selection is a DELETED, entering it an ADDED."""
    if change.resource is not resource:
        return None
    if namespace is not None and change.obj["metadata"].get("namespace", "") != namespace:
        return None
    was = change.previous is not None and change.kind != "ADDED" and matches(change.previous)
    fits = change.kind != "DELETED" and matches(change.obj)
    if fits:
        return {"type": "MODIFIED" if was else "ADDED", "object": change.obj}
    if was:
        return {"type": "DELETED", "object": change.obj}
    return None


def owned_by(objects: Iterable[Object]) -> dict[str, list[Object]]:
    """Objects grouped by the uid of their controlling owner."""
    groups: dict[str, list[Object]] = {}
    for obj in objects:
        owner = controller_of(obj)
        if owner is not None:
            groups.setdefault(owner["uid"], []).append(obj)
    return groups
