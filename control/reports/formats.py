"""A statement as CSV, Parquet, HTML and FOCUS. Pure functions: the same statement gives the same bytes."""

from __future__ import annotations

import csv
import html
import io
import json
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from control.reports.schemas import Statement

# Spreadsheets run what starts with one of these; a quote in front makes it text.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\0")


def rows(statement: Statement) -> list[dict[str, Any]]:
    """One row for each cluster."""
    return [
        {
            "period_start": statement.period_start.isoformat(),
            "period_end": statement.period_end.isoformat(),
            "customer_id": str(statement.customer_id),
            "company_name": statement.company_name,
            "cluster_id": str(cluster.cluster_id),
            "cluster_name": cluster.cluster_name,
            "region": cluster.region,
            "baseline": statement.baseline_name,
            "stage": statement.stage,
            "baseline_usd": cluster.baseline_usd,
            "actual_usd": cluster.actual_usd,
            "gross_usd": cluster.gross_usd,
            "overlap_usd": cluster.overlap_usd,
            "fallback_premium_usd": cluster.fallback_premium_usd,
            "displaced_commitment_usd": cluster.displaced_commitment_usd,
            "rework_usd": cluster.rework_usd,
            "net_usd": cluster.net_usd,
            "hours_covered": cluster.hours_covered,
            "revision": statement.revision,
            "lake_release_ids": ",".join(map(str, statement.lake_release_ids)),
        }
        for cluster in statement.clusters
    ]


COLUMNS = (
    "period_start",
    "period_end",
    "customer_id",
    "company_name",
    "cluster_id",
    "cluster_name",
    "region",
    "baseline",
    "stage",
    "baseline_usd",
    "actual_usd",
    "gross_usd",
    "overlap_usd",
    "fallback_premium_usd",
    "displaced_commitment_usd",
    "rework_usd",
    "net_usd",
    "hours_covered",
    "revision",
    "lake_release_ids",
)


def safe_cell(value: Any) -> str:
    """A CSV cell: numbers stay numbers, text that a spreadsheet would run is quoted."""
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, int | float):
        return str(value)
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def to_csv(columns: tuple[str, ...], content: list[dict[str, Any]]) -> bytes:
    """RFC 4180 with a header line."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(columns)
    writer.writerows([safe_cell(row[name]) for name in columns] for row in content)
    return out.getvalue().encode()


def to_parquet(statement: Statement) -> bytes:
    """The rows with money as decimals."""
    # Here and not above: the library costs 50 MB, and only this format needs it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: dict[str, Any] = {name: pa.decimal128(18, 8) for name in COLUMNS if name.endswith("_usd")}
    kinds |= {"hours_covered": pa.float64(), "revision": pa.int32()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(_scaled(rows(statement)), schema=schema), out)
    return out.getvalue()


def _scaled(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step = Decimal("0.00000001")
    return [
        {name: value.quantize(step) if isinstance(value, Decimal) else value for name, value in row.items()}
        for row in content
    ]


FOCUS_COLUMNS = (
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodStart",
    "BillingPeriodEnd",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodStart",
    "ChargePeriodEnd",
    "ContractedCost",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "PricingCategory",
    "ProviderName",
    "PublisherName",
    "RegionId",
    "RegionName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "SubAccountId",
    "SubAccountName",
    "Tags",
)


def to_focus(statement: Statement) -> bytes:
    """FOCUS 1.1 columns as CSV: one usage charge for each cluster, and our fee as a charge of its own."""
    start = datetime.combine(statement.period_start, time(), UTC)
    end = datetime.combine(statement.period_end, time(), UTC)
    month_start = start.replace(day=1)
    month_end = (month_start + timedelta(days=32)).replace(day=1)
    common = {
        "BillingAccountId": statement.aws_account_id or "",
        "BillingAccountName": statement.company_name,
        "BillingCurrency": "USD",
        "BillingPeriodStart": _moment(month_start),
        "BillingPeriodEnd": _moment(month_end),
        "ChargeClass": "",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodStart": _moment(start),
        "ChargePeriodEnd": _moment(end),
        "SubAccountId": statement.aws_account_id or "",
        "SubAccountName": statement.company_name,
    }
    charges = [
        common
        | {
            "BilledCost": cluster.actual_usd,
            "EffectiveCost": cluster.actual_usd,
            "ContractedCost": cluster.actual_usd,
            "ListCost": cluster.baseline_usd,
            "ChargeCategory": "Usage",
            "ChargeDescription": "EC2 instances of a Kubernetes cluster",
            "InvoiceIssuerName": "AWS",
            "PricingCategory": "Dynamic",
            "ProviderName": "AWS",
            "PublisherName": "AWS",
            "RegionId": cluster.region,
            "RegionName": cluster.region,
            "ResourceId": str(cluster.cluster_id),
            "ResourceName": cluster.cluster_name,
            "ResourceType": "Kubernetes cluster",
            "ServiceCategory": "Compute",
            "ServiceName": "Amazon Elastic Compute Cloud",
            "Tags": json.dumps({"baseline": statement.baseline_name, "net_usd": f"{cluster.net_usd:f}"}),
        }
        for cluster in statement.clusters
    ]
    if statement.fee_usd:
        charges.append(
            common
            | {
                "BilledCost": statement.fee_usd,
                "EffectiveCost": statement.fee_usd,
                "ContractedCost": statement.fee_usd,
                "ListCost": statement.fee_usd,
                "ChargeCategory": "Purchase",
                "ChargeDescription": "CloudOptim share of net savings",
                "InvoiceIssuerName": "CloudOptim",
                "PricingCategory": "Standard",
                "ProviderName": "CloudOptim",
                "PublisherName": "CloudOptim",
                "RegionId": "",
                "RegionName": "",
                "ResourceId": "",
                "ResourceName": "",
                "ResourceType": "",
                "ServiceCategory": "Management and Governance",
                "ServiceName": "CloudOptim",
                "Tags": "{}",
            }
        )
    return to_csv(FOCUS_COLUMNS, charges)


def _moment(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;width:100%;margin:1rem 0}th,td{border-bottom:1px solid #d0d7de;padding:.4rem .6rem;
text-align:left}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.bad{color:#cf222e}.good{color:#1a7f37}
p.note{color:#57606a}"""


def to_html(statement: Statement) -> bytes:
    """A page to print or send. Every name is escaped; it loads nothing."""

    def usd(value: Decimal | None) -> str:
        return "not measured" if value is None else f"{value:,.2f}"

    def tone(value: Decimal) -> str:
        return "bad" if value < 0 else "good"

    body = "".join(
        f"<tr><td>{html.escape(cluster.cluster_name)}</td><td>{html.escape(cluster.region)}</td>"
        f'<td class="n">{usd(cluster.baseline_usd)}</td><td class="n">{usd(cluster.actual_usd)}</td>'
        f'<td class="n">{usd(cluster.overlap_usd)}</td><td class="n">{usd(cluster.fallback_premium_usd)}</td>'
        f'<td class="n">{usd(cluster.displaced_commitment_usd)}</td><td class="n">{usd(cluster.rework_usd)}</td>'
        f'<td class="n {tone(cluster.net_usd)}">{usd(cluster.net_usd)}</td></tr>'
        for cluster in statement.clusters
    )
    share = f" ({statement.savings_ratio:.1%} of the baseline)" if statement.savings_ratio is not None else ""
    last_day = statement.period_end - timedelta(days=1)
    partial = " The month is not over: this is the sum of its finished days." if statement.partial else ""
    releases = ", ".join(map(str, statement.lake_release_ids[:3])) + (
        "…" if len(statement.lake_release_ids) > 3 else ""
    )
    unknown = "".join(
        f" {name.removesuffix('_usd').replace('_', ' ').capitalize()} is not measured: {html.escape(reason)}."
        for name, reason in sorted(statement.not_measured.items())
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Savings of {html.escape(statement.company_name)}</title>
<style>{STYLE}</style></head><body>
<h1>Savings of {html.escape(statement.company_name)}</h1>
<p>{statement.period_start} to {last_day} (UTC days), all money in USD.{partial}</p>
<table><tr><th>Baseline {html.escape(statement.baseline_name)}</th><td class="n">{usd(statement.baseline_usd)}</td></tr>
<tr><th>Actual cost</th><td class="n">{usd(statement.actual_usd)}</td></tr>
<tr><th>Net savings</th>
<td class="n {tone(statement.net_savings_usd)}">{usd(statement.net_savings_usd)}{share}</td></tr>
<tr><th>Our fee</th><td class="n">{usd(statement.fee_usd)}</td></tr></table>
<table><tr><th>Cluster</th><th>Region</th><th class="n">Baseline</th><th class="n">Actual</th><th class="n">Overlap</th>
<th class="n">Fallback premium</th><th class="n">Displaced commitment</th>
<th class="n">Rework</th><th class="n">Net</th></tr>{body}</table>
<p class="note">{html.escape(statement.stage.capitalize())}; data covers {statement.coverage:.1%} of the hours.
Baseline: the same machines on demand. Revision {statement.revision}, lake release {releases}.{unknown}</p>
</body></html>
"""
    return page.encode()
