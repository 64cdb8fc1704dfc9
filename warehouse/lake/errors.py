"""Errors of the lake that a person can meet. Each message names the thing, the reason and what to do next."""

from __future__ import annotations


class LakeError(Exception):
    """Base of everything the lake raises on purpose."""


class LakeDataError(LakeError, ValueError):
    """Data or a partition does not fit its table; nothing was published."""


class LakeBusyError(LakeError):
    """Somebody else holds what this call needs; trying again later may succeed."""


class LakeConflictError(LakeError):
    """A commit met another writer's commit although it held the lock; nothing of this call is visible."""


class LakeReleaseError(LakeError, LookupError):
    """The release asked for does not exist, is expired, or belongs to another lake."""


class LakeQueryError(LakeError, ValueError):
    """A query is refused or failed."""


class TenantScopeError(LakeQueryError):
    """A query reads tenant data without naming the customer."""


class LakeForkError(LakeError, RuntimeError):
    """The lake was touched in a forked child. delta-rs panics after fork: spawn worker processes instead."""
