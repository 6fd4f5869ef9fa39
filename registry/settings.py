"""Settings: `HEADRACE_*` variables, the same for the command line, streams, serving and Feast's processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from store.address import FORMS, Address

DEAD_LETTER_SUFFIX: Final = ".dead-letter"
"""What a contract refuses goes to the topic's name with this."""

DEAD_LETTER_BYTES_MAX: Final = 8_000_000
"""Dead-letter topics take larger records than Kafka's default of 1 MB: a refused record and its headers."""


class Settings(BaseSettings):
    """Where things are and how much of them; every field is a variable `HEADRACE_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="HEADRACE_", extra="ignore", hide_input_in_errors=True)

    repo: Path = Field(Path(), description="Folder of feature_store.yaml")
    definitions: str = Field("features.catalog", description="Importable package that declares the features")
    kafka: str = Field("127.0.0.1:9092", description="Kafka bootstrap servers")
    kafka_options: dict[str, str] = Field(
        {}, repr=False, description='More librdkafka options as JSON, such as {"security.protocol": "SASL_SSL", …}'
    )
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
    host: str = Field("127.0.0.1", description="Address that the server listens on")
    port: int = Field(8000, ge=0, le=65535, description="Port that the server listens on; 0 for any free one")
    server_processes: int = Field(1, ge=1, description="Server processes that share the port")
    request_timeout_s: float = Field(1.0, gt=0, description="Deadline of one HTTP request's read, seconds")
    mirror_rows: int = Field(
        50_000, ge=0, description="Item rows that each server process keeps while Redis has them unchanged; 0 for none"
    )
    items_max: int = Field(1000, ge=1, description="Most candidate items of one request")
    log_json: bool = Field(default=False, description="Log lines as JSON, for machines")

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, value: SecretStr) -> SecretStr:
        Address.parse(value.get_secret_value())
        return value

    def environment(self) -> dict[str, str]:
        """The settings as variables, for a child process."""
        plain: dict[str, Any] = self.model_dump(mode="json") | {"redis_url": self.redis_url.get_secret_value()}
        plain["kafka_options"] = json.dumps(self.kafka_options)
        return {f"HEADRACE_{name.upper()}": str(value) for name, value in plain.items()}

    def librdkafka(self, **options: Any) -> dict[str, Any]:
        """Options of a confluent_kafka client."""
        return {"bootstrap.servers": self.kafka, **self.kafka_options, **options}
