"""Who is asking, and what of the database they see."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from control.errors import NotFound
from warehouse.postgres.session import Database


class Role(StrEnum):
    """What a key or a person may do. ``agent`` is bound to one cluster; ``event_pusher`` may hand in its customer's
    events and nothing else, because it is kept in an EventBridge connection."""

    PLATFORM_ADMIN = "platform_admin"
    CUSTOMER_ADMIN = "customer_admin"
    ANALYST = "analyst"
    ML_SERVER = "ml_server"
    AGENT = "agent"
    EVENT_PUSHER = "event_pusher"


# Roles that may belong to no customer and then see all of them.
PLATFORM_ROLES = frozenset({Role.PLATFORM_ADMIN, Role.ML_SERVER})


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller. ``actor`` is how the audit log names it."""

    id: UUID
    actor: str
    role: Role
    customer_id: UUID | None
    cluster_id: UUID | None = None

    @property
    def sees_everything(self) -> bool:
        """Whether no tenant scope applies."""
        return self.customer_id is None and self.role in PLATFORM_ROLES

    def scope(self, db: Database):
        """One transaction that sees what this caller may see and nothing else."""
        if self.sees_everything:
            return db.system()
        if self.customer_id is None:
            raise NotFound("customer")
        return db.tenant(self.customer_id)

    def customer(self, asked: UUID | None, *, what: str = "customer") -> UUID:
        """The customer a request is about: the caller's own unless a platform role names another.

        Raises:
            NotFound: another customer's id, or none where the caller belongs to none.
        """
        if self.sees_everything:
            if asked is None:
                raise NotFound(what)
            return asked
        if self.customer_id is None or (asked is not None and asked != self.customer_id):
            raise NotFound(what)
        return self.customer_id
