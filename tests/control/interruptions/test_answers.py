"""What EC2's answers mean: only a definite refusal ends an attempt."""

from __future__ import annotations

import pytest

from control.gateways.aws import AwsError
from control.interruptions.answers import Meaning, read


@pytest.mark.parametrize(
    ("code", "status", "meaning"),
    [
        # EC2 sends this one as a 500.
        ("InsufficientInstanceCapacity", 500, Meaning.REFUSED),
        ("Unsupported", 400, Meaning.REFUSED),
        ("SpotMaxPriceTooLow", 400, Meaning.REFUSED),
        ("InvalidParameterValue", 400, Meaning.REFUSED),
        ("UnauthorizedOperation", 403, Meaning.DENIED),
        ("AccessDenied", 403, Meaning.DENIED),
        ("RequestLimitExceeded", 503, Meaning.THROTTLED),
        ("RequestExpired", 400, Meaning.THROTTLED),
        ("ExpiredToken", 403, Meaning.THROTTLED),
        ("Unreachable", 0, Meaning.THROTTLED),
        ("IdempotentParameterMismatch", 400, Meaning.MISMATCH),
        ("IdempotentInstanceTerminated", 400, Meaning.ENDED),
        ("InternalError", 500, Meaning.UNKNOWN),
        ("Unavailable", 503, Meaning.UNKNOWN),
        ("BadAnswer", 200, Meaning.UNKNOWN),
        ("Unanswered", 0, Meaning.UNKNOWN),
    ],
)
def test_meaning_of_an_answer(code: str, status: int, meaning: Meaning) -> None:
    assert read(AwsError("RunInstances", code, "", status=status)).meaning is meaning
