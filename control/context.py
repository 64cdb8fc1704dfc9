"""What one API process shares between requests, and the dependencies that hand it out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import redis.asyncio as redis
from fastapi import Depends
from starlette.requests import HTTPConnection

from control.bus.bells import Bells
from control.gateways.aws import AwsGateway
from control.security.keys import pepper_of
from control.security.limits import Limiter
from control.security.tokens import Tokens
from control.settings import Settings
from warehouse.postgres.codec import Codec
from warehouse.postgres.session import Database

if TYPE_CHECKING:
    from control.agents.ingest import Ingest
    from control.agents.watch import Watch
    from control.security.authentication import Authenticator


@dataclass(slots=True)
class AppContext:
    """Opened by the application's lifespan. ``intake_db`` is a small pool that only the event intake uses, so that
    no storm of other requests keeps an interruption out."""

    settings: Settings
    db: Database
    intake_db: Database
    redis: redis.Redis
    bells: Bells
    limiter: Limiter
    tokens: Tokens
    codec: Codec
    pepper: bytes
    aws: AwsGateway
    broker: Any = None
    authenticator: Authenticator = field(init=False)
    ingest: Ingest = field(init=False)
    watch: Watch = field(init=False)


def build(settings: Settings) -> AppContext:
    """Everything that needs no connection yet."""
    return AppContext(
        settings=settings,
        db=Database(settings.database_url, pool_size=settings.db_pool_size, max_overflow=2, pool_timeout=2.0),
        intake_db=Database(settings.database_url, pool_size=2, max_overflow=3, pool_timeout=2.0),
        redis=redis.Redis.from_url(settings.redis_url, socket_timeout=1.0, socket_connect_timeout=1.0),
        bells=Bells(settings.redis_url),
        limiter=Limiter(settings.redis_url),
        tokens=Tokens(settings.jwt_secret_key.get_secret_value()),
        codec=Codec(settings.master_key.get_secret_value()),
        pepper=pepper_of(settings),
        aws=AwsGateway(endpoint_url=settings.aws_endpoint_url, region=settings.aws_region),
    )


def get_context(connection: HTTPConnection) -> AppContext:
    """The process's context."""
    return connection.app.state.context


Context = Annotated[AppContext, Depends(get_context)]
