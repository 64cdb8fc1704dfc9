"""Label and field selectors, with the grammar and the errors of apimachinery."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from control.sandbox.kubernetes.status import bad_request

Labels = dict[str, str]
Matcher = Callable[[Labels], bool]

_KEY = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?"
_VALUE = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?)?"
_SET = re.compile(rf"^({_KEY})\s+(in|notin)\s+\(([^()]*)\)$")
_EQUALITY = re.compile(rf"^({_KEY})\s*(==|=|!=|>|<)\s*({_VALUE})$")
_EXISTS = re.compile(rf"^(!?)\s*({_KEY})$")


def _split(text: str) -> list[str]:
    """The requirements of a selector: split at commas outside parentheses."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part.strip() for part in (*parts, text[start:])]


def label_matcher(text: str) -> Matcher:
    """A predicate over labels for a selector such as `app=web,tier in (a,b),!canary`.

    Raises a 400 ApiError for text that is not a selector. As in Kubernetes, `!=` and `notin` match objects
    without the label.
    """
    checks: list[Matcher] = []
    for part in _split(text) if text.strip() else ():
        if found := _SET.match(part):
            key, operator, values = found[1], found[2], frozenset(v.strip() for v in found[3].split(","))
            checks.append(_in(key, values) if operator == "in" else _not_in(key, values))
        elif found := _EQUALITY.match(part):
            key, operator, value = found.groups()
            if operator in ("=", "=="):
                checks.append(_in(key, frozenset([value])))
            elif operator == "!=":
                checks.append(_not_in(key, frozenset([value])))
            else:
                checks.append(_compare(key, operator, value))
        elif found := _EXISTS.match(part):
            checks.append(_exists(found[2], wanted=not found[1]))
        else:
            raise bad_request(f"unable to parse requirement: found '{part}', expected: a label selector requirement")
    return lambda labels: all(check(labels) for check in checks)


def _in(key: str, values: frozenset[str]) -> Matcher:
    return lambda labels: labels.get(key) in values


def _not_in(key: str, values: frozenset[str]) -> Matcher:
    return lambda labels: labels.get(key) not in values


def _exists(key: str, wanted: bool) -> Matcher:
    return lambda labels: (key in labels) is wanted


def _compare(key: str, operator: str, value: str) -> Matcher:
    def check(labels: Labels) -> bool:
        try:
            left, right = int(labels[key]), int(value)
        except (KeyError, ValueError):
            return False
        return left > right if operator == ">" else left < right

    return check


def matches_label_selector(selector: dict[str, Any] | None, labels: Labels) -> bool:
    """metav1.LabelSelector (matchLabels, matchExpressions); none at all matches nothing, an empty one everything."""
    if selector is None:
        return False
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items()) and all(
        matches_expression(expression, labels) for expression in selector.get("matchExpressions") or ()
    )


def matches_expression(expression: dict[str, Any], labels: Labels) -> bool:
    """One matchExpressions entry of a label selector or a node selector term (In, NotIn, Exists, Gt, …)."""
    key, operator, values = expression["key"], expression["operator"], expression.get("values") or []
    if operator == "In":
        return labels.get(key) in values
    if operator == "NotIn":
        return labels.get(key) not in values
    if operator == "Exists":
        return key in labels
    if operator == "DoesNotExist":
        return key not in labels
    if operator in ("Gt", "Lt") and values:
        return _compare(key, ">" if operator == "Gt" else "<", str(values[0]))(labels)
    return False


def field_matcher(text: str, resource: str, known: frozenset[str]) -> Callable[[dict[str, str]], bool]:
    """A predicate over an object's selectable fields for `spec.nodeName=x,status.phase!=Running`.

    Raises a 400 ApiError for a field this resource cannot be selected by, with the real server's wording.
    """
    checks: list[tuple[str, bool, str]] = []
    for part in text.split(",") if text.strip() else ():
        for operator in ("!=", "==", "="):
            if operator in part:
                field, value = (side.strip() for side in part.split(operator, 1))
                break
        else:
            raise bad_request(f"invalid selector: '{text}'; can't understand '{part}'")
        if field not in known:
            raise bad_request(
                f'Unable to find "{resource}" that match label selector "", field selector "{text}": '
                f"field label not supported: {field}"
            )
        checks.append((field, operator != "!=", value))
    return lambda fields: all((fields.get(field, "") == value) is wanted for field, wanted, value in checks)
