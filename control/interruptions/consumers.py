"""What a worker does with events it consumes from the bus."""

from __future__ import annotations

from uuid import uuid5

from control.bus.bells import Bells
from control.bus.broker import Handlers
from control.bus.events import ClientMetricsUpdated, PredictionReady
from control.interruptions.repository import insert_rows
from warehouse.postgres.session import Database


def handlers(db: Database, bells: Bells) -> Handlers:
    """Handlers over a worker's connections."""

    async def metrics_updated(event: ClientMetricsUpdated) -> None:
        await bells.ring("clusters", event.cluster_id)

    async def prediction_ready(event: PredictionReady) -> None:
        rows = [
            # The id comes from the event: a second delivery stores nothing.
            prediction.model_dump(mode="json")
            | {"id": uuid5(event.event_id, str(number)), "customer_id": event.customer_id}
            for number, prediction in enumerate(event.predictions)
        ]
        async with db.system() as conn:
            await insert_rows(conn, "predictions", rows, order="id", conflict="(id) DO NOTHING")

    return Handlers(metrics_updated, prediction_ready)
