"""`cloudoptim sandbox replay`: the price endpoints over a recording, until interrupted."""

import asyncio
import json
import signal
import time
from datetime import datetime
from pathlib import Path

from control.sandbox.aws.server import SandboxAWS, SandboxConfig
from control.sandbox.market import ReplayMarket


def replay_market(prices: Path, start: datetime, speed: float, home: Path | None) -> ReplayMarket:
    """The recording with its clock; with a home, a replay of the same recording goes on where it was stopped."""
    anchor = time.time()
    if home is not None:
        file = home / "replay.json"
        asked = {"prices": str(prices.resolve()), "start": start.isoformat(), "speed": speed}
        saved = json.loads(file.read_text()) if file.exists() else {}
        if {k: saved.get(k) for k in asked} == asked:
            anchor = float(saved["anchor_epoch_seconds"])
        else:
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.write_text(json.dumps({**asked, "anchor_epoch_seconds": anchor}))
    return ReplayMarket(prices, start, speed=speed, anchor_epoch_seconds=anchor)


async def serve_replay(prices: Path, start: datetime, *, speed: float, host: str, port: int, home: Path | None) -> None:
    """Serve until SIGINT or SIGTERM; prints where and what. Raises ValueError for a folder without prices."""
    market = replay_market(prices, start, speed, home)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    async with SandboxAWS(SandboxConfig(host=host, port=port, home=home, market=market)) as aws:
        spans = {region: market.span(region) for region in market.regions()}
        print(f"AWS_ENDPOINT_URL={aws.url}", flush=True)  # noqa: T201
        for region, (first, last) in sorted(spans.items()):
            print(f"{region}: {len(market.pools(region))} pools, {first:%Y-%m-%d} to {last:%Y-%m-%d}", flush=True)  # noqa: T201
        print(f"now is {market.now():%Y-%m-%d %H:%M} UTC, {speed:g} s pass per second", flush=True)  # noqa: T201
        await stopping.wait()
