"""What Kafka has, or soon and clearly why it does not say so."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from config.settings import Settings

# confluent_kafka's public constants have these names.
PASSING = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE, KafkaError._TIMED_OUT)
"""What passes by itself, once the broker is back."""
_REFUSED = (KafkaError._AUTHENTICATION, KafkaError._SSL)
_CONNECTING = ("security.", "sasl.", "ssl.", "enable.ssl.", "enable.sasl.", "https.")


def topics_there(settings: Settings, timeout_s: float, topics: Iterable[str] | None = None) -> dict[str, Any]:
    """Metadata of the topics, by default of all that are there.

    A client of librdkafka keeps trying whatever the broker says; here a wrong password or certificate is an error at
    once, and not after `timeout_s` that the broker did not answer.

    Raises:
        KafkaException: if the broker can't be reached, or does not let us in.
    """
    refused: list[KafkaError] = []

    def on_error(error: KafkaError) -> None:
        if error.code() in _REFUSED:
            refused.append(error)

    client = AdminClient(settings.librdkafka(error_cb=on_error))
    until, patience_s = time.monotonic() + timeout_s, 0.5
    while True:
        try:
            if topics is None:
                return client.list_topics(timeout=patience_s).topics
            return {topic: client.list_topics(topic, timeout=patience_s).topics[topic] for topic in topics}
        except KafkaException as error:
            client.poll(0)
            if refused:
                raise KafkaException(refused[0]) from error
            if time.monotonic() >= until:
                raise
            # A slow broker is asked with ever more patience.
            patience_s = max(0.1, min(2 * patience_s, until - time.monotonic()))


def is_embedded(client: AdminClient, timeout_s: float) -> bool:
    """Whether the broker is librdkafka's mock, as the demo's, which does less than Kafka.

    Raises:
        KafkaException: if the broker can't be reached.
    """
    return str(client.list_topics(timeout=timeout_s).cluster_id).startswith("mockCluster")


def unreachable(settings: Settings, error: Exception) -> str:
    """What to say when Kafka can't be reached, or does not let us in."""
    return (
        f"Kafka at {settings.kafka}: {type(error).__name__}: {error}; "
        "is it up, and are HEADRACE_KAFKA and HEADRACE_KAFKA_OPTIONS right?"
    )


def kafka_python(settings: Settings, timeout_s: float) -> dict[str, Any]:
    """HEADRACE_KAFKA_OPTIONS, which are librdkafka's, under kafka-python's names, once the broker has let us in.

    Raises:
        ValueError: if one of them says how to connect and has no equal there: to go on without could be unsafe.
        KafkaException: as `topics_there`: kafka-python itself tries until its time is over, whatever a broker says of
            a password.
    """
    names = {
        "security.protocol": "security_protocol",
        "sasl.mechanism": "sasl_mechanism",
        "sasl.mechanisms": "sasl_mechanism",
        "sasl.username": "sasl_plain_username",
        "sasl.password": "sasl_plain_password",
        "ssl.ca.location": "ssl_cafile",
        "ssl.certificate.location": "ssl_certfile",
        "ssl.key.location": "ssl_keyfile",
        "ssl.key.password": "ssl_password",
        "ssl.crl.location": "ssl_crlfile",
        "ssl.cipher.suites": "ssl_ciphers",
    }
    options = dict(settings.kafka_options)
    found: dict[str, Any] = {}
    # Without it librdkafka compares the broker's name with its certificate, as kafka-python does.
    if options.pop("ssl.endpoint.identification.algorithm", "https") == "none":
        found["ssl_check_hostname"] = False
    unknown = sorted(name for name in options if name.startswith(_CONNECTING) and name not in names)
    if unknown:
        msg = f"HEADRACE_KAFKA_OPTIONS: `replay` can't take {', '.join(unknown)}; it knows {', '.join(names)}"
        raise ValueError(msg)
    found |= {names[name]: value for name, value in options.items() if name in names}
    if "security_protocol" in found:
        found["security_protocol"] = found["security_protocol"].upper()
    topics_there(settings, timeout_s)
    if is_embedded(AdminClient(settings.librdkafka()), timeout_s):
        # Asked for its versions, it answers what kafka-python can't read.
        found["api_version"] = (2, 1)
    return found
