"""The registry of per-customer configuration: every key with its type, default and meaning.

What is stored has been validated here, so readers may take it as it is. Secrets inside values (notification
addresses) are encrypted before they are stored and never shown again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import time
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from control.errors import Invalid
from control.interruptions.policies import DEFAULT_LAUNCHES_PER_HOUR, DEFAULT_POLICIES, Policy
from warehouse.contracts import EventKind


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OnDemandFloor(_Value):
    """Nodes that always stay on demand: a number, a share of the cluster, or the larger of both."""

    nodes: Annotated[int, Field(ge=0, le=10_000)] = 0
    ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0


class DisruptionBudget(_Value):
    """How many nodes may be disrupted at once for saving money: the larger of both, at least one when not zero."""

    ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.1
    nodes: Annotated[int, Field(ge=0, le=10_000)] = 1


def _known_zone(name: str) -> str:
    if name not in available_timezones():
        raise ValueError("is no time zone of the IANA database, such as Europe/Berlin")
    ZoneInfo(name)
    return name


class Window(_Value):
    """A daily stretch of local time; one that ends before it starts goes over midnight."""

    days: Annotated[list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]], Field(min_length=1, max_length=7)]
    start: time
    end: time

    @model_validator(mode="after")
    def _not_empty(self) -> Window:
        if self.start == self.end:
            raise ValueError("start and end are the same moment")
        return self


class DisruptionWindows(_Value):
    """When plans may disrupt nodes; interruptions are handled at any time. No windows: always."""

    time_zone: Annotated[str, AfterValidator(_known_zone)] = "UTC"
    windows: Annotated[list[Window], Field(max_length=50)] = Field(default_factory=list)


class Channel(_Value):
    """Where notifications go: an Apprise or webhook address, which is a secret. ``kinds`` empty means all kinds."""

    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9 ._-]+$")]
    url: Annotated[str, Field(min_length=8, max_length=2048, pattern=r"^[a-z][a-z0-9+.-]*://\S+$")]
    kinds: Annotated[list[Annotated[str, Field(max_length=60)]], Field(max_length=50)] = Field(default_factory=list)


def _unique_names(channels: list[Channel]) -> list[Channel]:
    if len({channel.name for channel in channels}) != len(channels):
        raise ValueError("two channels have the same name")
    return channels


InstanceType = Annotated[str, Field(pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$", max_length=40)]
Zone = Annotated[str, Field(pattern=r"^[a-z0-9-]{5,40}$")]


@dataclass(frozen=True, slots=True)
class Key:
    """One key. ``secret`` values are encrypted where they are stored."""

    name: str
    adapter: TypeAdapter[Any]
    default: Any
    description: str
    secret: bool = False

    def validate(self, value: Any) -> Any:
        """The value in its stored form (plain JSON).

        Raises:
            Invalid: names the key, the place in the value and the reason.
        """
        try:
            return self.adapter.dump_python(self.adapter.validate_python(value), mode="json")
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise Invalid(f"{self.name}{'.' if place else ''}{place}: {first['msg']}. {self.description}") from None


def _key(name: str, kind: Any, default: Any, description: str, *, secret: bool = False) -> Key:
    return Key(name, TypeAdapter(kind), default, description, secret)


REGISTRY: dict[str, Key] = {
    key.name: key
    for key in (
        _key(
            "event_policies",
            dict[EventKind, Policy],
            {kind.value: policy.value for kind, policy in DEFAULT_POLICIES.items()},
            "What to do about each kind of event: ignore, score, pre_spin or drain. Kinds left out keep the default.",
        ),
        _key(
            "on_demand_floor",
            OnDemandFloor,
            {"nodes": 0, "ratio": 0.0},
            "How much of each cluster always stays on demand.",
        ),
        _key(
            "allowed_instance_types",
            Annotated[list[InstanceType], Field(max_length=500)],
            [],
            "Types that may be launched; empty allows all with enough room.",
        ),
        _key(
            "allowed_zones",
            Annotated[list[Zone], Field(max_length=50)],
            [],
            "Availability zones that may be launched into; empty allows all with a subnet.",
        ),
        _key(
            "price_cap_ratio",
            Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)],
            1.0,
            "Highest Spot price that is paid, as a share of the on-demand price.",
        ),
        _key(
            "disruption_budget",
            DisruptionBudget,
            {"ratio": 0.1, "nodes": 1},
            "How many nodes of a cluster plans may disrupt at once.",
        ),
        _key(
            "disruption_windows",
            DisruptionWindows,
            {"time_zone": "UTC", "windows": []},
            "When plans may disrupt nodes, in local time; no windows means always.",
        ),
        _key(
            "approval_required",
            Annotated[bool, Field(strict=True)],
            False,
            "Whether a person approves each plan before it runs.",
        ),
        _key(
            "max_hourly_spend_usd",
            Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)] | None,
            None,
            "Cap of what replacements launched within an hour may cost per hour, in USD; null is no cap.",
        ),
        _key(
            "max_launches_per_hour",
            Annotated[int, Field(ge=0, le=10_000, strict=True)],
            DEFAULT_LAUNCHES_PER_HOUR,
            "Cap of launches within an hour, over all clusters.",
        ),
        _key(
            "notification_channels",
            Annotated[list[Channel], Field(max_length=20), AfterValidator(_unique_names)],
            [],
            "Where notifications go. Addresses are secrets: they are stored encrypted and shown by their last four "
            "characters only.",
            secret=True,
        ),
        _key(
            "savings_fee",
            Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)],
            0.0,
            "Our share of the net savings, 0 to 1. Set by the platform only.",
        ),
        _key(
            "quiet_hours_before_spot",
            Annotated[float, Field(ge=0, le=24 * 30, allow_inf_nan=False)],
            6.0,
            "Hours without an interruption in a pool before a node returns to Spot there.",
        ),
    )
}

# Keys that only the platform may set: they decide what the customer pays us.
PLATFORM_KEYS = frozenset({"savings_fee"})


def find(name: str) -> Key:
    """A key of the registry.

    Raises:
        Invalid: lists the keys there are.
    """
    key = REGISTRY.get(name)
    if key is None:
        raise Invalid(f"key: {name[:60]!r} is no configuration key; there are {', '.join(sorted(REGISTRY))}.")
    return key
