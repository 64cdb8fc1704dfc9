"""Nine months of real Spot prices through the product's assets: fast, small, and the same money computed twice."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from control.embedded import EmbeddedPostgres
from tests.acceptance.real_input import show

REPOSITORY = Path(__file__).resolve().parents[2]
INGEST_SECONDS = 300
INGEST_PEAK_MB = 2048
REGIONS = ("eu-west-1", "us-east-1", "us-east-2")
PRICE_ROWS = 6_915_392


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_nine_months_of_real_prices(shared_data: Path, postgres_server: EmbeddedPostgres, tmp_path: Path) -> None:
    from warehouse.postgres.migrate import upgrade

    database = "real_input"
    postgres_server.ensure_database(database)
    upgrade(postgres_server.url(database))
    file = tmp_path / "figures.json"
    # A process of its own: the assets' partitions begin in 2022 there, and its memory is its own.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.acceptance.real_input", "--data", str(shared_data), "--json", str(file)),
            *("--database-url", postgres_server.url(database), "--regions", ",".join(REGIONS)),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    figures = json.loads(file.read_text())
    print("\n" + show(figures))  # noqa: T201 - the figures are what this run is for
    assert figures["price_rows"] == PRICE_ROWS
    assert figures["price_partitions"] == len(REGIONS) * 272
    # A figure to read, not to fail on: other tests share the machine.
    print(f"ingested in {figures['ingest_seconds'] / INGEST_SECONDS:.2f} of its bar of {INGEST_SECONDS} s")  # noqa: T201
    assert figures["ingest_peak_mb"] <= INGEST_PEAK_MB
    # Cron at 00, 07, 14 and 21 UTC; the five turns no region has, found from the data alone.
    assert [(gap["expected_at"][:13], gap["regions"]) for gap in figures["missing"]] == [
        ("2022-12-23T21", len(REGIONS)),
        ("2023-01-29T14", len(REGIONS)),
        ("2023-02-18T14", len(REGIONS)),
        ("2023-04-03T21", len(REGIONS)),
        ("2023-06-25T21", len(REGIONS)),
    ]
    assert figures["cost"] == figures["cross_check"]
    assert Decimal(figures["cost"]["net"]) == Decimal(figures["cost"]["baseline"]) - Decimal(figures["cost"]["actual"])
    # From a missing snapshot's hour to the next one's: three times 21 to 00, twice 14 to 21 UTC.
    lost = 3 * 4 + 2 * 8
    assert figures["incomplete_hours"] == lost * len(REGIONS)
    assert figures["coverage"] == round(1 - lost / 24 / 272, 6)
    shares = {(row["region"], row["month"]): Decimal(row["actual"]) / Decimal(row["b1"]) for row in figures["months"]}
    for region in REGIONS:
        # The shock of spring 2023: what was saved in winter was much more than what was saved from May on.
        assert shares[region, "2023-05"] > Decimal("1.3") * shares[region, "2023-02"]
