"""Postgres and Redis that live in wheels, for one machine without either installed."""

from control.embedded.postgres import EmbeddedPostgres
from control.embedded.process import EmbeddedServerError, free_port
from control.embedded.redis import EmbeddedRedis

__all__ = ["EmbeddedPostgres", "EmbeddedRedis", "EmbeddedServerError", "free_port"]
