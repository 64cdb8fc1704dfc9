"""A customer's caps of launches, in number and in money, as they stand within one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from control.interruptions.choosing import Pool
from control.interruptions.policies import DEFAULT_LAUNCHES_PER_HOUR


@dataclass(slots=True)
class Caps:
    """``max_launches_per_hour`` and ``max_hourly_spend_usd`` against the launches of the last hour, those without an
    answer yet included."""

    most_launches: int
    most_usd_per_hour: float | None
    launches: int
    usd_per_hour: float

    @classmethod
    def of(cls, config: Mapping[str, Any], launches: int, usd_per_hour: float) -> Caps:
        """From a customer's configuration and what it launched within the last hour."""
        most, usd = config.get("max_launches_per_hour"), config.get("max_hourly_spend_usd")
        return cls(
            most if isinstance(most, int) else DEFAULT_LAUNCHES_PER_HOUR,
            float(usd) if isinstance(usd, int | float) else None,
            launches,
            usd_per_hour,
        )

    def take(self, pool: Pool) -> str | None:
        """Take one launch in a pool; or nothing, and say which cap refuses it."""
        price = pool.price_usd_per_hour
        if self.launches + 1 > self.most_launches:
            return (
                f"{self.launches} launches within the last hour; max_launches_per_hour is {self.most_launches}, "
                "raise it or wait"
            )
        if self.most_usd_per_hour is not None:
            if price is None:
                return (
                    f"no price of {pool.instance_type} in {pool.availability_zone} is known, so max_hourly_spend_usd "
                    "cannot be kept; check the price pipelines"
                )
            if self.usd_per_hour + price > self.most_usd_per_hour:
                return (
                    f"the launches of the last hour cost {self.usd_per_hour:.4f} USD/h and this one {price:.4f}; "
                    f"max_hourly_spend_usd is {self.most_usd_per_hour}, raise it or wait"
                )
        self.launches += 1
        self.usd_per_hour += price or 0.0
        return None
