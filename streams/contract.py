"""A contract's word on what is in records: columns of what it accepts, reasons for what it refuses. Pure: no I/O."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from features.events import (
    LIST_LENGTH_MAX,
    NEWEST_MS,
    OLDEST_MS,
    TEXT_LENGTH_MAX,
    WHOLE_MAX,
    Event,
    Kind,
    column_of,
    milliseconds_of,
    value_of,
)
from features.times import DAY_MS
from streams.fast import Fast, compile_fast

_REASON_LENGTH_MAX: Final = 500
_TYPES: Final[dict[Kind, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "list[str]": (list,),
}
_FAILS: Final = (msgspec.MsgspecError, ValueError, RecursionError)


@dataclass(frozen=True)
class Accepted:
    """Records that a contract accepts: their positions in what was decoded, and their columns."""

    index: NDArray[np.intp]
    event_ids: pa.StringArray
    times_ms: NDArray[np.int64]
    fields: dict[str, Any]


_Columns = tuple[dict[str, Any], NDArray[np.intp], list[tuple[int, str]]]


class Given(NamedTuple):
    """What a contract does not find among its fields: see `features.source`.

    Attributes:
        ids: the event_id of each record, if it is found elsewhere.
        times_ms: when it happened, likewise; in milliseconds.
        refused: why a record has none, by its place.
    """

    ids: Sequence[str] | None = None
    times_ms: Sequence[int] | None = None
    refused: dict[int, str] = {}  # noqa: RUF012  # never written to


NOTHING_GIVEN: Final = Given()


class ContractDecoder:
    """Checks records against a contract and turns them into columns.

    The contract (pydantic) decides. A decoder compiled from it (msgspec) goes first and is a quarter of the cost; what
    it does not accept goes to the contract, and what it accepts the contract would, with equal values: a differential
    test holds it to that. A contract with validators of its own has no such decoder. Records are JSON, or objects as
    Avro and Protobuf have them, which the contract judges in their JSON.
    """

    def __init__(self, name: str, contract: type[Event]) -> None:
        self.name = name
        self._contract = contract
        self._leaves, source = contract.leaves(), contract.declared_source
        given = {"event_id": source.identity_is_given, "occurred_at": source.time_is_given}
        self._elsewhere = {name for name, is_given in given.items() if is_given}
        self.fast: Fast | None = compile_fast(contract)

    def decode(
        self, values: Sequence[Any], record_ms: NDArray[np.int64], given: Given = NOTHING_GIVEN
    ) -> tuple[Accepted, list[tuple[int, str]]]:
        """Columns of the accepted records, and (position, reason) of the refused ones."""
        columns, places, refused = self._all(values) or self._each(values)
        if given.ids is not None:
            columns["event_id"] = pa.array([given.ids[at] for at in places.tolist()], pa.string())
        if given.times_ms is not None:
            columns["occurred_at"] = np.array(given.times_ms, np.int64)[places]
        event_ids, times_ms = columns.pop("event_id"), columns.pop("occurred_at")
        early = times_ms > record_ms[places] + DAY_MS
        wrong = {int(places[at]): self._ahead(int(times_ms[at])) for at in np.flatnonzero(early)}
        if given.refused:
            wrong |= {at: given.refused[at] for at in given.refused.keys() & set(places.tolist())}
        accepted = Accepted(places, event_ids, times_ms, columns)
        if wrong:
            refused = [*refused, *wrong.items()]
            kept = ~np.isin(places, list(wrong))
            mask = pa.array(kept)
            fields = {
                name: column.filter(mask) if isinstance(column, pa.Array) else column[kept]
                for name, column in accepted.fields.items()
            }
            accepted = Accepted(places[kept], accepted.event_ids.filter(mask), times_ms[kept], fields)
        return accepted, refused

    @staticmethod
    def _ahead(time_ms: int) -> str:
        return f"occurred_at: {time_ms} is more than a day ahead of the record; check the producer's clock"

    def _all(self, values: Sequence[Any]) -> _Columns | None:
        """The columns of all values, if the fast decoder takes every one."""
        if self.fast is None or None in values:
            return None
        try:
            return self.fast.columns(values, self._column), np.arange(len(values)), []
        except _FAILS:
            return None

    def _each(self, values: Sequence[Any]) -> _Columns:
        """The columns of those that are accepted, where they stand, and where and why others are refused."""
        found: list[tuple[Any, ...]] = []
        index: list[int] = []
        refused: list[tuple[int, str]] = []
        for at, value in enumerate(values):
            try:
                found.append(self.check(value))
                index.append(at)
            except ValueError as error:
                refused.append((at, str(error)[:_REASON_LENGTH_MAX]))
        lists = zip(*found, strict=True) if found else ((),) * len(self._leaves)
        columns = {name: self._column(name, list(each)) for name, each in zip(self._leaves, lists, strict=True)}
        return columns, np.array(index, np.intp), refused

    def _column(self, name: str, values: list[Any]) -> Any:
        """A field's values as they are kept; None if they are found elsewhere."""
        if name in self._elsewhere:
            return None
        if name == "occurred_at":
            return np.array(values, np.int64)
        return column_of(self._leaves[name].kind, values)

    def check(self, value: Any) -> tuple[Any, ...]:
        """The fields of the event in a record, in order: see `features.events.Event.leaves`.

        Raises:
            ValueError: if the contract refuses it; the message says which field, what it holds and what is expected.
        """
        if value is None:
            msg = "the record is empty; send a JSON object"
            raise ValueError(msg)
        if self.fast is not None:
            try:
                return tuple(column and column[0] for column in self.fast.columns([value]).values())
            except _FAILS:
                pass  # The contract has the last word, and the better message.
        try:
            as_json = value if isinstance(value, bytes) else json.dumps(value, default=_as_json)
            return self._storable(self._contract.model_validate_json(as_json))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  # a validator of the user's own may raise anything: we go on
            raise ValueError(_reason(error)) from None

    def _storable(self, event: Event) -> tuple[Any, ...]:
        """The event's fields, if columns can hold them: validators of a contract's own may return anything."""
        values = []
        for name, leaf in self._leaves.items():
            value = value_of(event, leaf.attributes)
            if not (value is None and not leaf.required):
                kind = leaf.kind
                if not (isinstance(value, _TYPES[kind]) and _fits(name, kind, value)):
                    msg = f"{name}: a validator of the contract returned {value!r:.80}, which can't be kept as {kind}"
                    raise ValueError(msg)
            values.append(value)
        return tuple(values)


def _as_json(value: Any) -> Any:
    """What JSON has no type for, as it is written there; a decimal is a number."""
    if isinstance(value, datetime):
        return milliseconds_of(value) if value.tzinfo is None else value.isoformat()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, UUID):
        return str(value)
    return repr(value)


def _fits(name: str, kind: Kind, value: Any) -> bool:
    """Whether a value of the right type is within what every contract promises."""
    if kind == "list[str]":
        return len(value) <= LIST_LENGTH_MAX and all(
            isinstance(each, str) and _fits(name, "str", each) for each in value
        )
    if kind == "str":
        return 1 <= len(value) <= TEXT_LENGTH_MAX and "\0" not in value and bool(value.encode())
    if name == "occurred_at":
        return bool(OLDEST_MS <= value <= NEWEST_MS)
    return math.isfinite(value) and (kind != "int" or abs(value) <= WHOLE_MAX)


def _reason(error: BaseException) -> str:
    """One line: what is wrong with which field, or what the contract raised."""
    try:
        return _refusal(error) if isinstance(error, ValidationError) else _failure(error) + f": {error}"
    except Exception:  # noqa: BLE001  # what a validator raised, or made of the value, may not even be shown
        return _failure(error)


def _failure(error: BaseException) -> str:
    return f"the contract failed: {type(error).__name__}"


def _refusal(error: ValidationError) -> str:
    """One line: what is wrong with which field."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    got = repr(first.get("input"))
    shown = (
        "" if first["type"] in ("missing", "json_invalid") else f"; got {got if len(got) <= 80 else got[:77] + '...'}"
    )
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where + ': ' if where else ''}{first['msg']}{shown}{more}"
