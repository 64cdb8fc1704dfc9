"""Why data is missing, in the words of ``data_gaps.reason``, and what mends it, for the API and the pages."""

from __future__ import annotations

from typing import Final

NO_SCRAPE: Final = "no_scrape"
AGENT_AWAY: Final = "agent_away"
API_ERROR: Final = "api_error"
DENIED: Final = "denied"
NOT_CONFIGURED: Final = "not_configured"
NOT_NEEDED: Final = "not_needed"
DID_NOT_EXIST: Final = "did_not_exist"
TOO_OLD: Final = "too_old"

# Nothing a run can do brings these back.
UNFILLABLE: Final = frozenset({NOT_CONFIGURED, NOT_NEEDED, DID_NOT_EXIST, TOO_OLD})

REMEDIES: Final = {
    NO_SCRAPE: "Fill the gap: AWS still knows the prices in between.",
    AGENT_AWAY: "See that the cluster's agent runs and reaches the server; late samples close the gap by themselves.",
    API_ERROR: "Fill the gap; if the source fails again, the run in Dagster says why.",
    DENIED: (
        "Allow ec2:DescribeSpotPriceHistory for the server's AWS identity and enable the region for its account "
        "(or take the region off CLOUDOPTIM_PRICE_REGIONS), then fill the gap."
    ),
    NOT_CONFIGURED: "Add the region to CLOUDOPTIM_PRICE_REGIONS and restart: a cluster there needs its prices.",
    NOT_NEEDED: "Nothing: the region is no longer listed and no cluster runs there; list it again to have it filled.",
    DID_NOT_EXIST: "Nothing: there was no data yet.",
    TOO_OLD: "Nothing: no source keeps data this old.",
}
