"""`cloudoptim sandbox replay`: the price endpoints over a recording, until interrupted."""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from control.sandbox.aws.server import SandboxAWS, SandboxConfig
from control.sandbox.market import ReplayMarket

TICK_SECONDS = 1.0
"""How often the clock's file is brought forward."""


def replay_market(
    prices: Path,
    start: datetime,
    speed: float,
    home: Path | None,
    *,
    again: bool = False,
    in_real_time: bool = False,
    clock: Callable[[], float] | None = None,
) -> ReplayMarket:
    """The recording with its clock. With a home, a replay of the same recording from the same start goes on where it
    was stopped, unless `again`."""
    state = None
    if home is not None:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = home / "replay.json"
        if again:
            state.unlink(missing_ok=True)
    extra = {} if clock is None else {"clock": clock}
    return ReplayMarket(prices, start, speed=speed, state=state, in_real_time=in_real_time, **extra)


async def keep_time(market: ReplayMarket, say: Callable[[str], None]) -> None:
    """Keep the clock on disk until cancelled, and say once when the recording is over."""
    said = False
    try:
        while True:
            if market.clock.ended and not said:
                said = True
                say(
                    f"the recording ended at {market.recorded_span[1]:%Y-%m-%d %H:%M} UTC: "
                    "its last prices hold from here on"
                )
            await asyncio.sleep(TICK_SECONDS)
    finally:
        market.clock.close()


async def serve_replay(
    prices: Path, start: datetime, *, speed: float, host: str, port: int, home: Path | None, again: bool = False
) -> None:
    """Serve until SIGINT or SIGTERM; prints where and what. Raises ValueError for a folder without prices."""
    market = replay_market(prices, start, speed, home, again=again)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    async with SandboxAWS(SandboxConfig(host=host, port=port, home=home, market=market)) as aws:
        spans = {region: market.span(region) for region in market.regions()}
        _print(f"AWS_ENDPOINT_URL={aws.url}")
        for region, (first, last) in sorted(spans.items()):
            _print(f"{region}: {len(market.pools(region))} pools, {first:%Y-%m-%d} to {last:%Y-%m-%d}")
        _print(f"now is {market.now():%Y-%m-%d %H:%M} UTC, {speed:g} s pass per second")
        keeping = asyncio.create_task(keep_time(market, _print))
        await stopping.wait()
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201
