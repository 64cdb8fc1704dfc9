"""The event bus: doorbells, streams and the outbox."""
