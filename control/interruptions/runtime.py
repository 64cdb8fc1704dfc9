"""What every loop of a worker shares."""

from __future__ import annotations

from dataclasses import dataclass

from control.bus.bells import Bells
from control.gateways.aws import AwsGateway
from warehouse.postgres.session import Database


@dataclass(frozen=True, slots=True)
class Runtime:
    """One worker process's hands.

    ``db`` is the loops' pool, ``intake_db`` a reserved one: a storm of launches must not keep a warning waiting for a
    connection. ``worker`` names the process in leases. ``deployment_id`` is the mark on every instance we launch.
    """

    db: Database
    intake_db: Database
    aws: AwsGateway
    bells: Bells
    worker: str
    deployment_id: str
