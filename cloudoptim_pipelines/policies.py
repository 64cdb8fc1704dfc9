"""What all assets share: who owns them, how a failed step is tried again, how many partitions a run takes."""

from __future__ import annotations

import dagster as dg

OWNERS = ["team:platform"]
# One process start for a whole range: 90 partitions in one run take 40 s, in 90 runs six minutes.
SINGLE_RUN = dg.BackfillPolicy.single_run()
RETRY = dg.RetryPolicy(max_retries=2, delay=2, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)
# The run of a gap fill carries the id of its gap_fills row.
FILL_TAG = "cloudoptim/fill_id"
# Asking again changes nothing until somebody allows it. The other refusals are AWS's trouble, or ours, and pass.
DENIALS = frozenset(
    {
        "AccessDenied", "AccessDeniedException", "AuthFailure", "Blocked", "ExpiredToken", "InvalidClientTokenId",
        "NoCredentials", "OptInRequired", "PendingVerification", "SignatureDoesNotMatch", "UnauthorizedOperation",
        "UnsupportedOperation",
    }
)  # fmt: skip
