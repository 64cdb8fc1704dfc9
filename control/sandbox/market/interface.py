"""What the AWS endpoint and the fleet ask of a market, whichever one it is."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

import numpy as np
import numpy.typing as npt

from control.sandbox.market.catalogue import Pool

PRODUCT = "Linux/UNIX"
"""The one product description the sandbox sells; others answer with an empty set, as where a product is not sold."""


@dataclass(frozen=True, slots=True)
class PriceChanges:
    """Price records in columns, oldest first: `at` in microseconds since the epoch, `pool` an index into `pools`."""

    pools: tuple[Pool, ...]
    pool: npt.NDArray[np.int32]
    at: npt.NDArray[np.int64]
    usd_per_hour: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.at)


def microseconds(at: datetime) -> int:
    """Since the epoch; raises ValueError for a time without a zone."""
    if at.tzinfo is None:
        raise ValueError("market times must carry a time zone (UTC)")
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


class Market(Protocol):
    """Prices, hazards and capacity of Spot pools at any time."""

    history_limit: timedelta | None
    """How far back prices are served; AWS keeps 90 days. None: everything there is."""

    def now(self) -> datetime:
        """The market's own clock (UTC); replay maps it, the generator uses the real one."""
        ...

    def regions(self) -> tuple[str, ...]: ...

    def pools(self, region: str) -> tuple[Pool, ...]: ...

    def price_usd_per_hour(self, pool: Pool, at: datetime) -> float:
        """The Spot price in force; raises KeyError for an unknown pool."""
        ...

    def on_demand_usd_per_hour(self, region: str, instance_type: str, at: datetime) -> float | None:
        """The list price in force; None where the type is not sold."""
        ...

    def on_demand_since(self, region: str, instance_type: str, at: datetime) -> datetime:
        """When that list price took effect."""
        ...

    def size(self, instance_type: str) -> tuple[int, float] | None:
        """(vCPUs, memory in GiB), None where unknown."""
        ...

    def changes(
        self,
        region: str,
        start: datetime,
        end: datetime,
        *,
        instance_types: Collection[str] | None = None,
        zone_ids: Collection[str] | None = None,
    ) -> Iterator[PriceChanges]:
        """Records in (start, end] and, per pool, the one in force at `start`; chunks come newest chunk first."""
        ...

    def hazard_per_hour(self, pool: Pool, at: datetime) -> float:
        """Chance per instance-hour that a Spot instance of this pool is interrupted."""
        ...

    def capacity(self, pool: Pool, at: datetime, *, spot: bool) -> int:
        """How many instances a single launch can get right now; 0 means InsufficientInstanceCapacity."""
        ...
