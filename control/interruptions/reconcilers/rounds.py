"""Rounds over every account and region: shared between workers, several at once, none waiting for a slow one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from control.interruptions.reconcilers import repository
from control.interruptions.reconcilers.repository import Place
from control.interruptions.runtime import Runtime

# Each runner asks one place at a time: an account that does not answer holds up one of them for a call's time-out.
RUNNERS = 6


async def each_due(
    runtime: Runtime, prefix: str, seconds: float, work: Callable[[Place], Awaitable[int]], *, leaving: bool = False
) -> int:
    """Do ``work`` for each place whose last round, anybody's, is ``seconds`` ago; returns the sum of what it says.

    Places are claimed one by one, those waiting longest first: a worker that dies leaves no more than it had in hand.
    """
    async with runtime.db.system() as conn:
        known = await repository.places(conn, leaving=leaving)
        places = {f"{prefix}:{place.customer_id}:{place.region}": place for place in known}
        await repository.prepare_rounds(conn, list(places), worker=runtime.worker)
    found = 0

    async def run() -> None:
        nonlocal found
        while True:
            async with runtime.db.system() as conn:
                name = await repository.claim_longest(conn, list(places), worker=runtime.worker, seconds=seconds)
            if name is None:
                return
            found += await work(places[name])

    await asyncio.gather(*(run() for _ in range(min(RUNNERS, len(places)))))
    return found
