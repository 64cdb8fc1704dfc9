"""What an answer of EC2 to RunInstances means. Only a definite refusal ends an attempt; silence never does."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from control.gateways.aws import THROTTLE_CODES, AwsError


class Meaning(StrEnum):
    """How a call ended."""

    LAUNCHED = "launched"
    REFUSED = "refused"
    DENIED = "denied"
    UNKNOWN = "unknown"
    THROTTLED = "throttled"
    MISMATCH = "mismatch"
    ENDED = "ended"


# Nothing was launched because of the pool: another pool may do.
CAPACITY_CODES = frozenset(
    {
        "InsufficientInstanceCapacity",
        "InsufficientHostCapacity",
        "InsufficientReservedInstanceCapacity",
        "InsufficientFreeAddressesInSubnet",
        "InsufficientAddressCapacity",
        "InsufficientCapacity",
        "Unsupported",
        "UnsupportedOperation",
        "SpotMaxPriceTooLow",
        "MaxSpotInstanceCountExceeded",
        "InstanceLimitExceeded",
        "VcpuLimitExceeded",
        "UnfulfillableCapacity",
    }
)
# Our request is judged, not the pool: a quota, a right or a suspended account. Another zone will not help.
DENIED_CODES = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "UnauthorizedOperation",
        "AuthFailure",
        "Blocked",
        "OptInRequired",
        "PendingVerification",
        "AccountDisabled",
        "InvalidClientTokenId",
        "NoCredentials",
    }
)
# Credentials ended between planning and calling (C-15).
EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired"})
# Refusals that say something about the pool's capacity, for its standing.
POOL_CODES = frozenset(
    {
        "InsufficientInstanceCapacity",
        "InsufficientHostCapacity",
        "InsufficientCapacity",
        "SpotMaxPriceTooLow",
        "UnfulfillableCapacity",
        "PartialFill",
    }
)


@dataclass(frozen=True, slots=True)
class Reading:
    """A meaning with AWS's code and words."""

    meaning: Meaning
    code: str
    message: str


def read(error: AwsError) -> Reading:
    """What an error means for the attempt."""
    code = error.code
    if code == "IdempotentParameterMismatch":
        meaning = Meaning.MISMATCH
    elif code == "IdempotentInstanceTerminated":
        meaning = Meaning.ENDED
    elif code in THROTTLE_CODES or code in EXPIRED_CODES or code == "Unreachable":
        meaning = Meaning.THROTTLED
    elif code in DENIED_CODES:
        meaning = Meaning.DENIED
    elif code in CAPACITY_CODES:
        meaning = Meaning.REFUSED
    elif error.definite:
        # Any other 4xx is a request EC2 did not carry out.
        meaning = Meaning.REFUSED
    else:
        meaning = Meaning.UNKNOWN
    return Reading(meaning, code, error.message[:500])
