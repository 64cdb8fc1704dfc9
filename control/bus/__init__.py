"""The event bus: doorbells, streams and the outbox."""

from control.bus.broker import make_broker, specification

__all__ = ["make_broker", "specification"]
