"""Settings of every process, from the environment and, below it, one optional YAML file (``CLOUDOPTIM_CONFIG``).

Names follow the documentation's table; a wrong value ends the start with one line that names the variable.
"""

from __future__ import annotations

from datetime import date
from functools import lru_cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

WEAK_SECRETS = {"", "changeme", "change-me", "secret", "example", "password", "your-secret-key"}
MIN_SECRET_LENGTH = 32
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class SettingsError(ValueError):
    """A setting that a person has to mend; the message names the variable and never its value."""


def _env(*names: str) -> AliasChoices:
    return AliasChoices(*names, *(name.lower() for name in names))


class ConfigFile(YamlConfigSettingsSource):
    """The YAML file named by CLOUDOPTIM_CONFIG; a key without a value is not set."""

    def _read_file(self, file_path: Path | Traversable) -> dict[str, Any]:
        import yaml

        problem = f"CLOUDOPTIM_CONFIG names {str(file_path)!r}, which is no readable YAML mapping"
        try:
            values = yaml.safe_load(file_path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SettingsError(f"{problem} ({_place(error)}); correct it or unset it") from error
        if not isinstance(values, dict):
            raise SettingsError(f"{problem} (it is a {type(values).__name__}); write lines like REDIS_URL: redis://…")
        return {str(name): value for name, value in values.items() if value is not None}


def _place(error: Exception) -> str:
    """What is wrong and where, without the file's own text, which may hold secrets."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return getattr(error, "strerror", None) or type(error).__name__
    return f"line {mark.line + 1}: {getattr(error, 'problem', None) or 'no YAML'}"


class Settings(BaseSettings):
    """All settings. ``home`` is where embedded servers, the lake, logs and generated secrets live."""

    model_config = SettingsConfigDict(extra="ignore")

    home: Path = Field(
        Path("~/.local/share/cloudoptim"), validation_alias=_env("CLOUDOPTIM_HOME"), validate_default=True
    )
    sandbox: bool = Field(False, validation_alias=_env("CLOUDOPTIM_SANDBOX"))
    log_level: str = Field("INFO", validation_alias=_env("CLOUDOPTIM_LOG_LEVEL", "LOG_LEVEL"))

    # Control service. Loopback unless a person says otherwise.
    host: str = Field("127.0.0.1", validation_alias=_env("CENTRAL_SERVER_HOST"))
    control_port: int = Field(8000, validation_alias=_env("CENTRAL_SERVER_PORT", "CLOUDOPTIM_CONTROL_PORT"))
    workers: int = Field(1, validation_alias=_env("CENTRAL_SERVER_WORKERS"), ge=1, le=64)
    dagster_port: int = Field(3000, validation_alias=_env("CLOUDOPTIM_DAGSTER_PORT"))
    worker_metrics_port: int = Field(9109, validation_alias=_env("CLOUDOPTIM_WORKER_METRICS_PORT"), ge=0, le=65535)
    dashboards_port: int = Field(5006, validation_alias=_env("CLOUDOPTIM_DASHBOARDS_PORT"))
    control_url_setting: str = Field("", validation_alias=_env("CLOUDOPTIM_CONTROL_URL"))
    dagster_url_setting: str = Field("", validation_alias=_env("CLOUDOPTIM_DAGSTER_URL"))
    frontend_url: str = Field("", validation_alias=_env("FRONTEND_URL"))
    cors_origins: str = Field("", validation_alias=_env("CORS_ORIGINS"))

    # Postgres and Redis
    database_url_setting: SecretStr = Field(SecretStr(""), validation_alias=_env("DATABASE_URL"))
    db_host: str = Field("", validation_alias=_env("DB_HOST"))
    db_port: int = Field(5432, validation_alias=_env("DB_PORT"))
    db_name: str = Field("cloudoptim", validation_alias=_env("DB_NAME"))
    db_user: str = Field("cloudoptim", validation_alias=_env("DB_USER"))
    db_password: SecretStr = Field(SecretStr(""), validation_alias=_env("DB_PASSWORD"))
    db_pool_size: int = Field(8, validation_alias=_env("DB_POOL_SIZE"), ge=2, le=100)
    redis_url_setting: SecretStr = Field(SecretStr(""), validation_alias=_env("REDIS_URL"))
    redis_host: str = Field("", validation_alias=_env("REDIS_HOST"))
    redis_port: int = Field(6379, validation_alias=_env("REDIS_PORT"))

    # Lake
    lake_root_setting: str = Field("", validation_alias=_env("CLOUDOPTIM_LAKE_ROOT"))

    # AWS and ML server
    aws_region: str = Field("us-east-1", validation_alias=_env("AWS_REGION"))
    aws_account_id: str = Field("", validation_alias=_env("AWS_ACCOUNT_ID"))
    aws_endpoint_url: str = Field("", validation_alias=_env("AWS_ENDPOINT_URL"))
    price_regions: str = Field("us-east-1,us-east-2,eu-west-1", validation_alias=_env("CLOUDOPTIM_PRICE_REGIONS"))
    # First day the pipelines know partitions of. Earlier days need it moved back, as for a replay of old prices.
    data_start: date = Field(date(2026, 1, 1), validation_alias=_env("CLOUDOPTIM_DATA_START"))
    ml_server_url: str = Field("", validation_alias=_env("ML_SERVER_URL"))
    ml_server_api_key: SecretStr = Field(SecretStr(""), validation_alias=_env("ML_SERVER_API_KEY"))

    # Secrets
    jwt_secret_key: SecretStr = Field(SecretStr(""), validation_alias=_env("JWT_SECRET_KEY"))
    api_key_pepper: SecretStr = Field(SecretStr(""), validation_alias=_env("API_KEY_SALT"))
    master_key: SecretStr = Field(SecretStr(""), validation_alias=_env("CLOUDOPTIM_MASTER_KEY"))
    admin_api_key: SecretStr = Field(SecretStr(""), validation_alias=_env("CLOUDOPTIM_ADMIN_API_KEY"))

    # Limits and outbound guard of the API. "none" as a limit switches it off (load tests).
    rate_limit_per_key: str = Field("6000/minute", validation_alias=_env("CLOUDOPTIM_RATE_LIMIT_PER_KEY"))
    rate_limit_per_customer: str = Field("30000/minute", validation_alias=_env("CLOUDOPTIM_RATE_LIMIT_PER_CUSTOMER"))
    trusted_proxies: str = Field("", validation_alias=_env("CLOUDOPTIM_TRUSTED_PROXIES"))
    outbound_allow_setting: str = Field("", validation_alias=_env("CLOUDOPTIM_OUTBOUND_ALLOW_CIDRS"))

    # One deployment's mark on everything it launches; a restored database with another mark adopts before it acts.
    deployment_id: str = Field("cloudoptim", validation_alias=_env("CLOUDOPTIM_DEPLOYMENT_ID"), max_length=64)

    @field_validator("home")
    @classmethod
    def _expand(cls, home: Path) -> Path:
        try:
            return home.expanduser().absolute()
        except RuntimeError as error:
            raise ValueError(f"{error}; name the folder in full") from error

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, level: str) -> str:
        if level.strip().upper() not in LOG_LEVELS:
            raise ValueError(f"is {level!r}; choose one of {', '.join(LOG_LEVELS)}")
        return level.strip().upper()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment first, then the YAML file named by CLOUDOPTIM_CONFIG (keys are the variables' names)."""
        import os

        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        if path := os.environ.get("CLOUDOPTIM_CONFIG"):
            if not Path(path).is_file():
                raise SettingsError(f"CLOUDOPTIM_CONFIG names {path!r}, which is not a file; correct it or unset it")
            sources += (ConfigFile(settings_cls, yaml_file=path),)
        return sources

    @property
    def database_url(self) -> str:
        """libpq URL ``postgresql://…`` (no driver suffix)."""
        if url := self.database_url_setting.get_secret_value():
            return url
        if self.db_host:
            user, password = quote(self.db_user, safe=""), quote(self.db_password.get_secret_value(), safe="")
            return f"postgresql://{user}:{password}@{self.db_host}:{self.db_port}/{self.db_name}"
        raise SettingsError("DATABASE_URL is not set; run under `cloudoptim up`, or set DATABASE_URL or DB_HOST")

    @property
    def redis_url(self) -> str:
        """``redis://…`` URL."""
        if url := self.redis_url_setting.get_secret_value():
            return url
        if self.redis_host:
            return f"redis://{self.redis_host}:{self.redis_port}/0"
        raise SettingsError("REDIS_URL is not set; run under `cloudoptim up`, or set REDIS_URL or REDIS_HOST")

    @property
    def lake_root(self) -> str:
        """Folder or s3:// URI of the lake."""
        return self.lake_root_setting or str(self.home / "lake")

    @property
    def control_url(self) -> str:
        """Address agents and dashboards use for the REST API."""
        return self.control_url_setting or f"http://127.0.0.1:{self.control_port}"

    @property
    def dagster_url(self) -> str:
        """Address of the Dagster webserver."""
        return self.dagster_url_setting or f"http://127.0.0.1:{self.dagster_port}"

    @property
    def outbound_allow(self) -> str:
        """Private networks customers' endpoints may be in; the sandbox's are on loopback."""
        loopback = "127.0.0.0/8,::1/128" if self.sandbox else ""
        return ",".join(part for part in (self.outbound_allow_setting, loopback) if part)

    @property
    def regions(self) -> list[str]:
        """Regions whose prices are ingested."""
        return [region.strip() for region in self.price_regions.split(",") if region.strip()]

    def require_secrets(self) -> None:
        """Refuse to start with a missing, short or example secret.

        Raises:
            SettingsError: names the first variable that is weak.
        """
        for variable, secret in (
            ("JWT_SECRET_KEY", self.jwt_secret_key),
            ("API_KEY_SALT", self.api_key_pepper),
            ("CLOUDOPTIM_MASTER_KEY", self.master_key),
        ):
            value = secret.get_secret_value()
            if value.lower() in WEAK_SECRETS or len(value) < MIN_SECRET_LENGTH:
                raise SettingsError(
                    f"{variable} is missing, an example or shorter than {MIN_SECRET_LENGTH} characters; "
                    "set a random one, for example from `openssl rand -hex 32`"
                )


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process's settings, read once."""
    return Settings()  # type: ignore[call-arg]
