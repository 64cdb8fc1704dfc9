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
    # The call was not made.
    WITHDRAWN = "withdrawn"


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


def of_no_call(error: AwsError) -> Reading:
    """What it means when the account's credentials could not be had and nothing was sent: the account is to be mended,
    or asked again soon. No pool has refused, and nothing can have been launched."""
    refused = error.definite and error.code not in THROTTLE_CODES | EXPIRED_CODES
    denied = refused or error.code in DENIED_CODES
    return Reading(Meaning.DENIED if denied else Meaning.THROTTLED, error.code, error.message[:500])


def of_a_retry(reading: Reading) -> Reading:
    """What the same error means when an earlier call with this token may have launched.

    Only EC2's word about capacity says that the token has no instance. A right that is gone by now, credentials that
    cannot be had, or a request that is refused for another reason say nothing about the call before.
    """
    silent = reading.meaning is Meaning.DENIED or (
        reading.meaning is Meaning.REFUSED and reading.code not in CAPACITY_CODES
    )
    return Reading(Meaning.UNKNOWN, reading.code, reading.message) if silent else reading
