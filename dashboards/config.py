"""Settings of the dashboards process, read from the environment under the product's own variable names.

A small class of its own: the dashboards know the warehouse and the REST API, and nothing of the control service's
code or configuration file.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path
from urllib.parse import quote, urlsplit

from pydantic import AliasChoices, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIN_SECRET_LENGTH = 32


class DashboardSettingsError(ValueError):
    """A setting that a person has to mend; the message names the variable and never its value."""


def _env(*names: str) -> AliasChoices:
    return AliasChoices(*names, *(name.lower() for name in names))


class DashboardSettings(BaseSettings):
    """All settings. ``sandbox`` lets a person on this machine in without a password."""

    model_config = SettingsConfigDict(extra="ignore")

    host: str = Field("127.0.0.1", validation_alias=_env("CLOUDOPTIM_DASHBOARDS_HOST"))
    port: int = Field(5006, validation_alias=_env("CLOUDOPTIM_DASHBOARDS_PORT"), ge=1, le=65535)
    # Host names (with port) people reach the pages under, besides the address itself; exact, no wildcard.
    websocket_origins: str = Field("", validation_alias=_env("CLOUDOPTIM_DASHBOARDS_ORIGINS"))
    cookie_secret_setting: SecretStr = Field(
        SecretStr(""), validation_alias=_env("CLOUDOPTIM_DASHBOARDS_COOKIE_SECRET", "PANEL_COOKIE_SECRET")
    )
    session_hours: float = Field(12.0, validation_alias=_env("CLOUDOPTIM_DASHBOARDS_SESSION_HOURS"), gt=0, le=168)

    home: Path = Field(Path("~/.local/share/cloudoptim"), validation_alias=_env("CLOUDOPTIM_HOME"))
    lake_root_setting: str = Field("", validation_alias=_env("CLOUDOPTIM_LAKE_ROOT"))
    database_url_setting: SecretStr = Field(SecretStr(""), validation_alias=_env("DATABASE_URL"))
    db_host: str = Field("", validation_alias=_env("DB_HOST"))
    db_port: int = Field(5432, validation_alias=_env("DB_PORT"))
    db_name: str = Field("cloudoptim", validation_alias=_env("DB_NAME"))
    db_user: str = Field("cloudoptim", validation_alias=_env("DB_USER"))
    db_password: SecretStr = Field(SecretStr(""), validation_alias=_env("DB_PASSWORD"))

    control_url_setting: str = Field("", validation_alias=_env("CLOUDOPTIM_CONTROL_URL"))
    control_port: int = Field(8000, validation_alias=_env("CENTRAL_SERVER_PORT", "CLOUDOPTIM_CONTROL_PORT"))
    dagster_url: str = Field("", validation_alias=_env("CLOUDOPTIM_DAGSTER_URL"))
    sandbox: bool = Field(False, validation_alias=_env("CLOUDOPTIM_SANDBOX"))
    admin_api_key: SecretStr = Field(SecretStr(""), validation_alias=_env("CLOUDOPTIM_ADMIN_API_KEY"))
    jwt_secret_key: SecretStr = Field(SecretStr(""), validation_alias=_env("JWT_SECRET_KEY"))

    @model_validator(mode="after")
    def _expand(self) -> DashboardSettings:
        self.home = self.home.expanduser().absolute()
        return self

    @property
    def database_url(self) -> str:
        """libpq URL ``postgresql://…``.

        Raises:
            DashboardSettingsError: neither DATABASE_URL nor DB_HOST is set.
        """
        if url := self.database_url_setting.get_secret_value():
            return url
        if self.db_host:
            user, password = quote(self.db_user, safe=""), quote(self.db_password.get_secret_value(), safe="")
            return f"postgresql://{user}:{password}@{self.db_host}:{self.db_port}/{self.db_name}"
        raise DashboardSettingsError(
            "DATABASE_URL is not set; run under `cloudoptim up`, or set DATABASE_URL or DB_HOST"
        )

    @property
    def lake_root(self) -> str:
        """Folder or s3:// URI of the lake; credentials of s3 come from the AWS_* variables."""
        return self.lake_root_setting or str(self.home / "lake")

    @property
    def control_url(self) -> str:
        """Address of the REST API, without a trailing slash."""
        return (self.control_url_setting or f"http://127.0.0.1:{self.control_port}").rstrip("/")

    @property
    def cookie_secret(self) -> str:
        """What cookies and page tokens are signed with, at least 32 random bytes.

        Derived from JWT_SECRET_KEY where no secret of its own is set; random in the sandbox where neither is.

        Raises:
            DashboardSettingsError: the secret is short, or none is set outside the sandbox.
        """
        own = self.cookie_secret_setting.get_secret_value()
        if own:
            if len(own) < MIN_SECRET_LENGTH:
                raise DashboardSettingsError(
                    f"CLOUDOPTIM_DASHBOARDS_COOKIE_SECRET is shorter than {MIN_SECRET_LENGTH} characters; "
                    "set a random one, for example from `openssl rand -hex 32`"
                )
            return own
        shared = self.jwt_secret_key.get_secret_value()
        if len(shared) >= MIN_SECRET_LENGTH:
            return hmac.new(shared.encode(), b"cloudoptim dashboards cookie", hashlib.sha256).hexdigest()
        if self.sandbox:
            return secrets.token_hex(32)
        raise DashboardSettingsError(
            "CLOUDOPTIM_DASHBOARDS_COOKIE_SECRET is not set; set a random one, for example from `openssl rand -hex 32`"
        )

    def allowed_origins(self, port: int) -> list[str]:
        """Origins (host:port) whose pages may open the WebSocket: the address served, loopback and the named ones."""
        origins = {f"127.0.0.1:{port}", f"localhost:{port}"}
        if self.host not in ("0.0.0.0", "::"):
            origins.add(f"{self.host}:{port}")
        for name in self.websocket_origins.split(","):
            if name := name.strip():
                origins.add(urlsplit(name).netloc if "//" in name else name)
        return sorted(origins)
