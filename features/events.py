"""Contracts: what an event of a topic must look like."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from features.expectations import Expectation

OLDEST_MS: Final = 946_684_800_000
"""2000-01-01: earlier times are a producer's mistake (seconds for milliseconds, zero, …)."""
NEWEST_MS: Final = 4_102_444_800_000
"""2100-01-01. A time more than a day ahead of the record's is refused too, where the record is known."""
TEXT_LENGTH_MAX: Final = 256
WHOLE_MAX: Final = 1 << 53

_RFC_3339: Final = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ](?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:[0-5]\d)", re.ASCII
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def epoch_ms(value: object) -> object:
    """Epoch milliseconds of an RFC 3339 text; anything else is returned as it is, for pydantic to judge.

    >>> epoch_ms("2025-11-21T10:00:00.250Z")
    1763719200250
    """
    if not isinstance(value, str):
        return value
    if _RFC_3339.fullmatch(value) is None:
        msg = "not RFC 3339: write epoch milliseconds, or a text such as 2025-11-21T10:00:00.250Z with its offset"
        raise ValueError(msg)
    return (datetime.fromisoformat(value.upper()) - _EPOCH) // timedelta(milliseconds=1)


OccurredAt = Annotated[
    int, BeforeValidator(epoch_ms, json_schema_input_type=int | str), Field(ge=OLDEST_MS, le=NEWEST_MS)
]

Kind = Literal["str", "int", "float", "bool"]
_KINDS: Final[dict[type, Kind]] = {str: "str", int: "int", float: "float", bool: "bool"}


class Event(BaseModel):
    """One immutable fact from a Kafka topic. Subclass it with the topic and the fields that features use.

    Fields are `str`, `int`, `float` or `bool`, optional ones with `| None = None`. Validation is strict: no text for a
    number, finite numbers only (whole ones up to 2^53), no empty text (send null instead), at most 256 characters, no
    NUL. Unknown fields are ignored, so that producers can add them first.

    `expect` declares what its events shall be like as a whole, which refuses none of them: see `features.expectations`.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, allow_inf_nan=False, extra="ignore", str_min_length=1, str_max_length=TEXT_LENGTH_MAX
    )

    topic: ClassVar[str] = ""
    expectations: ClassVar[tuple[Expectation, ...]] = ()

    event_id: str
    occurred_at: OccurredAt

    def __init_subclass__(cls, *, topic: str = "", expect: Sequence[Expectation] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if re.fullmatch(r"[a-zA-Z0-9._-]{1,200}", topic) is None or topic in (".", ".."):
            msg = (
                f"{cls.__name__}: topic={topic!r} is no Kafka topic name; "
                f'declare `class {cls.__name__}(Event, topic="clicks")`'
            )
            raise TypeError(msg)
        cls.topic = topic

    @classmethod
    def __pydantic_init_subclass__(cls, *, expect: Sequence[Expectation] = (), **kwargs: Any) -> None:
        from features.checks import checked_expectations  # Which knows contracts.

        cls.kinds()
        cls.expectations = checked_expectations(cls, expect)

    @field_validator("*", mode="after")
    @classmethod
    def _storable(cls, value: object) -> object:
        if isinstance(value, int) and abs(value) > WHOLE_MAX:
            msg = "whole numbers beyond 2^53 can't be kept exactly"
            raise ValueError(msg)
        if isinstance(value, str) and "\0" in value:
            msg = "text holds a NUL character; remove it"
            raise ValueError(msg)
        return value

    @classmethod
    def kinds(cls) -> dict[str, Kind]:
        """Field name to kind, in order of declaration.

        Raises:
            TypeError: if a field has a type that features can't use.
        """
        return {name: _kind(f"{cls.__name__}.{name}", info.annotation) for name, info in cls.model_fields.items()}


def _kind(where: str, annotation: Any) -> Kind:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [member for member in typing.get_args(annotation) if member is not type(None)]
        annotation = inner[0] if len(inner) == 1 else annotation
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal and all(
        isinstance(value, str) for value in typing.get_args(annotation)
    ):
        return "str"
    if annotation not in _KINDS:
        msg = (
            f"{where}: type {annotation} can't be used by features; "
            "use str, int, float or bool, optional with `| None = None`"
        )
        raise TypeError(msg)
    return _KINDS[annotation]
