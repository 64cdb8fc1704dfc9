"""The three patch formats of the Kubernetes API: JSON merge patch, JSON patch and strategic merge patch."""

from __future__ import annotations

import copy
from typing import Any

from control.sandbox.kubernetes.status import ApiError, bad_request

# patchMergeKey of the API types this double serves (k8s.io/api struct tags). Lists not named here are atomic: a
# strategic merge patch replaces them whole, which is what the real server does with taints and tolerations.
_MERGE_KEYS = {
    "containers": ("name",),
    "initContainers": ("name",),
    "ephemeralContainers": ("name",),
    "env": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "ports": ("containerPort", "port"),
    "imagePullSecrets": ("name",),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey",),
    "resourceClaims": ("name",),
    "conditions": ("type",),
    "addresses": ("type",),
    "podIPs": ("ip",),
    "ownerReferences": ("uid",),
}
_MERGED_PRIMITIVES = frozenset({"finalizers", "podCIDRs"})


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def strategic_merge_patch(target: Any, patch: dict[str, Any]) -> Any:
    """Strategic merge patch with the directives kubectl and controllers send ($patch, $retainKeys,
    $setElementOrder, $deleteFromPrimitiveList)."""
    if patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    if patch.get("$patch") == "delete":
        return {}
    result = dict(target) if isinstance(target, dict) else {}
    retain = patch.get("$retainKeys")
    if retain is not None:
        result = {key: value for key, value in result.items() if key in retain}
    for key, value in patch.items():
        if key.startswith("$deleteFromPrimitiveList/"):
            name = key.split("/", 1)[1]
            result[name] = [item for item in result.get(name) or [] if item not in value]
        elif key.startswith("$"):
            continue
        elif value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = strategic_merge_patch(result.get(key), value)
        elif isinstance(value, list):
            result[key] = _merge_list(key, result.get(key), value)
        else:
            result[key] = value
    for key, order in patch.items():
        if key.startswith("$setElementOrder/"):
            name = key.split("/", 1)[1]
            result[name] = _ordered(name, result.get(name) or [], order)
    return result


def _merge_key(name: str, items: list[Any]) -> str | None:
    for candidate in _MERGE_KEYS.get(name, ()):
        if any(isinstance(item, dict) and candidate in item for item in items):
            return candidate
    return None


def _merge_list(name: str, current: Any, patch: list[Any]) -> list[Any]:
    present = list(current or [])
    if name in _MERGED_PRIMITIVES:
        return present + [item for item in patch if item not in present]
    key = _merge_key(name, patch)
    if key is None:
        return [item for item in patch if not (isinstance(item, dict) and set(item) == {"$patch"})]
    if any(isinstance(item, dict) and item == {"$patch": "replace"} for item in patch):
        return [item for item in patch if item != {"$patch": "replace"}]
    for item in patch:
        if key not in item:
            raise bad_request(f"map: {item} does not contain declared merge key: {key}")
        at = next((i for i, old in enumerate(present) if old.get(key) == item[key]), None)
        if item.get("$patch") == "delete":
            if at is not None:
                del present[at]
        elif at is None:
            present.append(strategic_merge_patch({}, item))
        else:
            present[at] = strategic_merge_patch(present[at], item)
    return present


def _ordered(name: str, items: list[Any], order: list[Any]) -> list[Any]:
    key = _merge_key(name, items)
    wanted = [entry.get(key) if isinstance(entry, dict) else entry for entry in order]

    def position(item: Any) -> int:
        identity = item.get(key) if key else item
        return wanted.index(identity) if identity in wanted else len(wanted)

    return sorted(items, key=position)


def json_patch(target: Any, operations: list[dict[str, Any]]) -> Any:
    """RFC 6902. Raises a 422 ApiError when a path is missing or a test fails, as the real server does."""
    document = copy.deepcopy(target)
    for operation in operations:
        try:
            document = _apply(document, operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ApiError(
                422, "Invalid", f"the server rejected our request due to an error in our request: {error}"
            ) from error
    return document


def _tokens(path: str) -> list[str]:
    if path and not path.startswith("/"):
        raise ValueError(f"path {path!r} does not start with /")
    return [token.replace("~1", "/").replace("~0", "~") for token in path.split("/")[1:]]


def _locate(document: Any, path: str) -> tuple[Any, str]:
    tokens = _tokens(path)
    if not tokens:
        raise ValueError("the whole document cannot be replaced")
    for token in tokens[:-1]:
        document = document[int(token)] if isinstance(document, list) else document[token]
    return document, tokens[-1]


def _read(document: Any, path: str) -> Any:
    parent, token = _locate(document, path)
    return parent[int(token)] if isinstance(parent, list) else parent[token]


def _apply(document: Any, operation: dict[str, Any]) -> Any:
    name, path = operation["op"], operation["path"]
    if name == "test":
        if _read(document, path) != operation.get("value"):
            raise ValueError(f"testing value {path} failed")
        return document
    if name in ("move", "copy"):
        value = copy.deepcopy(_read(document, operation["from"]))
        if name == "move":
            document = _apply(document, {"op": "remove", "path": operation["from"]})
        return _apply(document, {"op": "add", "path": path, "value": value})
    parent, token = _locate(document, path)
    if name == "remove":
        del parent[int(token) if isinstance(parent, list) else token]
    elif name == "replace":
        if isinstance(parent, list):
            parent[int(token)] = operation["value"]
        elif token in parent:
            parent[token] = operation["value"]
        else:
            raise KeyError(f"replace operation does not apply: doc is missing key: {path}")
    elif name == "add":
        if not isinstance(parent, list):
            parent[token] = operation["value"]
        elif token == "-":
            parent.append(operation["value"])
        else:
            if not 0 <= int(token) <= len(parent):
                raise IndexError(f"add operation does not apply: index {token} is outside the list")
            parent.insert(int(token), operation["value"])
    else:
        raise ValueError(f"unknown operation {name!r}")
    return document
