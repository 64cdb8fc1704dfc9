"""`cloudoptim sandbox replay` as a process."""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from botocore.credentials import Credentials

from control.gateways.spot_prices import fetch_spot_prices
from tests.sandbox.market.test_replay import FIRST, record


def command(home: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from control.cli import app; app()", "sandbox", "replay", *arguments],
        env={**os.environ, "CLOUDOPTIM_HOME": str(home), "CLOUDOPTIM_SANDBOX": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_serves_the_recording_until_it_is_told_to_stop(tmp_path: Path) -> None:
    prices = record(tmp_path / "prices")
    process = command(tmp_path, "--prices", str(prices), "--from", "2023-03-30", "--speed", "1e12", "--port", "0")
    assert process.stdout is not None
    try:
        name, _, url = process.stdout.readline().strip().partition("=")
        assert name == "AWS_ENDPOINT_URL"
        assert "us-east-1: 4 pools, 2023-03-30 to 2023-04-03" in process.stdout.readline()
        # 30,000 years a second: at the end of the recording the clock stands and the last prices hold
        assert "now is 2023-04-03 20:58 UTC" in process.stdout.readline()
        assert "the recording ended at 2023-04-03 20:58 UTC: its last prices hold" in process.stdout.readline()
        batches = fetch_spot_prices(
            "us-east-1", FIRST, FIRST + timedelta(days=9), endpoint_url=url, credentials=Credentials("AKIA", "secret")
        )
        # 20 snapshots of four pools, without the twelve of the pool that left after two days
        assert sum(batch.num_rows for batch in batches) == 20 * 4 - 12
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()


def test_an_empty_folder_ends_with_one_line_that_says_what_is_expected(tmp_path: Path) -> None:
    process = command(tmp_path, "--prices", str(tmp_path), "--from", "2023-04-10", "--port", "0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "has no recorded prices; expected" in errors
    assert "Traceback" not in errors
