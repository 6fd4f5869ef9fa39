"""Settings: `HEADRACE_*` variables, the same for the command line, streams, serving and Feast's processes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml  # type: ignore[import-untyped]  # its stubs are not among our dependencies
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SecretsSettingsSource, SettingsConfigDict

from config.address import FORMS, Address

DEAD_LETTER_SUFFIX: Final = ".dead-letter"
"""What a contract refuses goes to the topic's name with this."""

DEAD_LETTER_BYTES_MAX: Final = 8_000_000
"""Dead-letter topics take larger records than Kafka's default of 1 MB: a refused record and its headers."""


class Settings(BaseSettings):
    """Where things are and how much of them; every field is a variable `HEADRACE_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="HEADRACE_", extra="ignore", hide_input_in_errors=True)

    secrets_dir: Path | None = Field(
        None,
        description="Folder of files named as these variables are, one value each; a variable wins over its file",
    )
    repo: Path = Field(Path(), description="Folder of feature_store.yaml")
    definitions: str = Field("features.catalog", description="Importable package that declares the features")
    kafka: str = Field("127.0.0.1:9092", description="Kafka bootstrap servers")
    kafka_options: dict[str, str] = Field(
        {}, repr=False, description='More librdkafka options as JSON, such as {"security.protocol": "SASL_SSL", …}'
    )
    schema_registry: str = Field(
        "", description="URL of the schema registry whose ids records begin with; without credentials"
    )
    schema_registry_options: dict[str, str] = Field(
        {},
        repr=False,
        description="More options of confluent-kafka's client of it as JSON, such as "
        '{"basic.auth.user.info": "user:password", "ssl.ca.location": …}',
    )
    schema_registry_timeout_s: float = Field(5.0, gt=0, description="Deadline of one call of it, seconds")
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"), description=f"Redis, password included: {FORMS}"
    )
    redis_timeout_s: float = Field(5.0, gt=0, description="Deadline of one Redis call, seconds")
    shards: int = Field(16, ge=1, le=4096, description="Shards of each entity; fixed by the first apply")
    lanes: int = Field(
        1, ge=1, le=1024, description="Groups of shards that merge and commit apart; at least one a worker"
    )
    topics: Literal["create", "auto"] = Field(
        "create", description="Whether apply creates topics, or the broker makes them when first used (the demo's does)"
    )
    partitions: int = Field(4, ge=1, description="Partitions of a topic that apply creates")
    replication: int = Field(1, ge=1, description="Replication factor of a topic that apply creates")
    chunk_events: int = Field(10_000, ge=1, description="Most records that a worker of the stream takes at once")
    row_cache_mb: int = Field(
        256, ge=0, description="Rows that the stream keeps instead of reading them again, megabytes; 0 for none"
    )
    dedupe_s: int = Field(300, ge=0, description="An event_id seen again within so many seconds is a duplicate")
    stream_metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of the stream's Prometheus metrics; 0 for none"
    )
    archive: str = Field(
        "data/archive",
        description="Where events are archived, a table a topic: a folder (from that of feature_store.yaml), or an "
        "object store's URL such as s3://bucket/events",
    )
    archive_options: dict[str, str] = Field(
        {}, repr=False, description="Options of the object store as JSON, as delta-rs has them: credentials, region, …"
    )
    archive_commit_s: float = Field(
        10.0, gt=0, description="The longest that an event waits until it is committed to the archive, seconds"
    )
    archive_metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of the archiver's Prometheus metrics; 0 for none"
    )
    host: str = Field("127.0.0.1", description="Address that the server listens on")
    port: int = Field(8000, ge=0, le=65535, description="Port that the server listens on; 0 for any free one")
    server_processes: int = Field(1, ge=1, description="Server processes that share the port")
    request_timeout_s: float = Field(1.0, gt=0, description="Deadline of one HTTP request's read, seconds")
    mirror_rows: int = Field(
        50_000, ge=0, description="Item rows that each server process keeps while Redis has them unchanged; 0 for none"
    )
    items_max: int = Field(1000, ge=1, description="Most candidate items of one request")
    rows_max: int = Field(1000, ge=1, description="Most entity rows of one request to /get-online-features")
    body_bytes_max: int = Field(2_000_000, ge=1, description="Largest body of a request, bytes")
    header_bytes_max: int = Field(32_768, ge=1024, description="Largest head of a request, bytes")
    deadline_s: float = Field(
        5.0,
        gt=0,
        description="Deadline of a request's head, of its body and answer, and of the client's taking it, seconds each",
    )
    idle_s: int = Field(75, ge=1, description="How long a connection may be idle, seconds")
    hang_s: float = Field(
        30,
        ge=2,
        description="A server process that does nothing for so long is killed and replaced, seconds",
    )
    standby: bool = Field(
        default=True,
        description="Keep processes ready for when one dies or a newer plan is applied; without them that "
        "takes seconds more, and less memory",
    )
    connections_max: int = Field(1000, ge=1, description="Most connections of each server process")
    requests_max: int = Field(
        8,
        ge=1,
        description="Requests in work at once in each server process, beyond which it refuses (503) once there are "
        "more than it can carry; at least the requests a second times the seconds of a round trip to Redis",
    )
    sample: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        {},
        description="How much of what is served is kept, for `headrace compare` and `quality`, by service: "
        '{"ranking_v1": 0.001}',
    )
    sample_folder: Path = Field(
        Path("data/served"), description="Where it is kept (from the folder of feature_store.yaml)"
    )
    sample_days: int = Field(7, ge=1, description="For how many days")
    api_keys_file: Path | None = Field(
        None, description="File of API keys that callers must have, made by `headrace keys`; without it all may read"
    )
    open_to_all: bool = Field(
        default=False, description="Serve without API keys even on an address that other machines can reach"
    )
    metrics: Literal["open", "admin", "off"] = Field(
        "open", description="Who may read /metrics: all, keys with the scope admin, or nobody"
    )
    tls_certificate: Path | None = Field(None, description="Certificate chain (PEM) to serve HTTPS with")
    tls_key: Path | None = Field(None, description="Its private key (PEM), if it is in a file of its own")
    log_json: bool = Field(default=False, description="Log lines as JSON, for machines")

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, value: SecretStr) -> SecretStr:
        Address.parse(value.get_secret_value())
        return value

    @field_validator("schema_registry")
    @classmethod
    def _names_nobody(cls, value: str) -> str:
        if "@" in value.partition("://")[2].partition("/")[0]:
            msg = "credentials go into HEADRACE_SCHEMA_REGISTRY_OPTIONS: an URL is logged"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.tls_key is not None and self.tls_certificate is None:
            msg = "HEADRACE_TLS_KEY needs HEADRACE_TLS_CERTIFICATE"
            raise ValueError(msg)
        if self.metrics == "admin" and self.api_keys_file is None:
            msg = "HEADRACE_METRICS=admin needs HEADRACE_API_KEYS_FILE"
            raise ValueError(msg)
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # pydantic's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # as above
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, variables, files of `HEADRACE_SECRETS_DIR`: the first that has a value."""
        folder = os.environ.get("HEADRACE_SECRETS_DIR")
        if folder and not Path(folder).is_dir():
            msg = f"HEADRACE_SECRETS_DIR={folder!r} is no folder"
            raise ValueError(msg)
        files = [SecretsSettingsSource(settings_cls, secrets_dir=folder)] if folder else []
        return init_settings, env_settings, *files

    def environment(self) -> dict[str, str]:
        """The settings as variables, for a child process."""
        plain: dict[str, Any] = self.model_dump(mode="json") | {"redis_url": self.redis_url.get_secret_value()}
        as_json = ("kafka_options", "schema_registry_options", "archive_options", "sample")
        plain |= {name: json.dumps(getattr(self, name)) for name in as_json}
        return {f"HEADRACE_{name.upper()}": str(value) for name, value in plain.items() if value is not None}

    def archive_url(self) -> str:
        """The archive's folder, or its URL."""
        return self.archive if "://" in self.archive else str(self.repo.resolve() / self.archive)

    def sample_path(self) -> Path:
        """The folder of what is kept of what was served."""
        return self.repo.resolve() / self.sample_folder

    def librdkafka(self, **options: Any) -> dict[str, Any]:
        """Options of a confluent_kafka client."""
        return {"bootstrap.servers": self.kafka, **self.kafka_options, **options}


def project_of(repo: Path) -> str:
    """The project's name, from feature_store.yaml.

    Raises:
        FileNotFoundError: if the folder has none.
        ValueError: if it names no project.
    """
    path = repo / "feature_store.yaml"
    if not path.exists():
        msg = f"no feature_store.yaml in {repo.resolve()}: run in the project's folder, or set HEADRACE_REPO to it"
        raise FileNotFoundError(msg)
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path} is no YAML: {' '.join(str(error).split())}"
        raise ValueError(msg) from error
    project = settings.get("project") if isinstance(settings, dict) else None
    if not isinstance(project, str) or re.fullmatch(r"[a-z][a-z0-9_]{0,63}", project) is None:
        msg = f"{path}: project is {project!r}; give it a name of small letters, digits and underscores"
        raise ValueError(msg)
    return project
