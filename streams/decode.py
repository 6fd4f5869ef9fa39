"""From raw records to columns: the contract check, duplicates, and each lane's share. Pure: no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

import annotated_types
import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from features.events import NEWEST_MS, OLDEST_MS, TEXT_LENGTH_MAX, WHOLE_MAX, Event, Kind
from features.plan import EventSpec, Plan, find_contract
from features.texts import hash64
from features.times import DAY_MS
from store.keys import shards_of
from streams.chunk import Chunk, DeadLetter, Happened, Ints, Part, Partition
from streams.dedupe import Dedupe

_REASON_LENGTH_MAX: Final = 500
_FAST_BYTES_MAX: Final = 4096
_FAST_NESTING_MAX: Final = 100
_Of = TypeVar("_Of")
_TYPES: Final[dict[Kind, tuple[type, ...]]] = {"str": (str,), "int": (int,), "float": (float, int), "bool": (bool,)}


@dataclass(frozen=True)
class Decoded:
    """What a chunk holds: a part a lane, what the contract refuses, and how many records were duplicates."""

    parts: list[Part]
    dead_letters: list[DeadLetter]
    events: int
    duplicates: int


@dataclass(frozen=True)
class Checked:
    """A chunk that was checked against its contract and for duplicates.

    Attributes:
        spec: the contract.
        chunk: what was checked.
        accepted: what the contract accepts, of this chunk and maybe others.
        mine: which of them are the chunk's.
        offsets: int64[mine].
        record_ms: int64[mine].
        counted: bool[mine]: those that are new, and no duplicates.
        horizon: see `streams.chunk.Part`.
        dead_letters: what the contract refuses.
        duplicates: how many are.
    """

    spec: EventSpec
    chunk: Chunk
    accepted: Accepted
    mine: slice
    offsets: Ints
    record_ms: Ints
    counted: NDArray[np.bool_]
    horizon: int
    dead_letters: list[DeadLetter]
    duplicates: int


class Decoder:
    """Decodes chunks; remembers each partition's event_ids within the dedupe horizon.

    Raises:
        CodeChangedError: if a contract's code is not what was applied.
    """

    def __init__(self, plan: Plan, lanes: int, dedupe_ms: int) -> None:
        self._plan = plan
        self._lanes = lanes
        self._dedupe_ms = dedupe_ms
        self._specs = {spec.topic: spec for spec in plan.events}
        self._contracts = {spec.topic: ContractDecoder(spec.name, find_contract(spec)) for spec in plan.events}
        self._dedupes: dict[Partition, Dedupe] = {}

    def decode(self, chunk: Chunk) -> Decoded:
        """The parts of a chunk, one for every lane, also where it holds no event."""
        (decoded,) = self.decode_all([chunk])
        return decoded

    def decode_all(self, chunks: Sequence[Chunk]) -> list[Decoded]:
        """As `decode`, of chunks of several partitions: those of one topic are checked together."""
        return self._by_topic(chunks, self._decoded)

    def check_all(self, chunks: Sequence[Chunk]) -> list[Checked]:
        """Chunks of several partitions, checked as to be decoded."""
        return self._by_topic(chunks, self._checked)

    @staticmethod
    def _by_topic(chunks: Sequence[Chunk], of_topic: Callable[[list[Chunk]], Iterable[_Of]]) -> list[_Of]:
        found: dict[int, _Of] = {}
        for topic in dict.fromkeys(chunk.partition.topic for chunk in chunks):
            places = [place for place, chunk in enumerate(chunks) if chunk.partition.topic == topic]
            found.update(zip(places, of_topic([chunks[place] for place in places]), strict=True))
        return [found[place] for place in range(len(chunks))]

    def _checked(self, chunks: list[Chunk]) -> Iterator[Checked]:
        spec = self._specs[chunks[0].partition.topic]
        record_ms = np.concatenate([chunk.record_ms for chunk in chunks])
        values = [value for chunk in chunks for value in chunk.values]
        accepted, refused = self._contracts[spec.topic].decode(values, record_ms)
        record_ms, offsets = record_ms[accepted.index], np.concatenate([c.offsets for c in chunks])[accepted.index]
        hashes = hash64(accepted.event_ids)
        ends = [0, *accumulate(len(chunk.values) for chunk in chunks)]
        for chunk, (begin, end) in zip(chunks, pairwise(ends), strict=True):
            mine = slice(*np.searchsorted(accepted.index, (begin, end)).tolist())
            dedupe = self._dedupes.setdefault(chunk.partition, Dedupe(self._dedupe_ms))
            repeated = dedupe.duplicates(offsets[mine], hashes[mine], record_ms[mine])
            fresh = offsets[mine] >= chunk.fresh
            dead_letters = [
                DeadLetter(chunk.partition, int(chunk.offsets[at]), chunk.keys[at], chunk.values[at], reason)
                for at, reason in ((place - begin, reason) for place, reason in refused if begin <= place < end)
                if chunk.offsets[at] >= chunk.fresh
            ]
            yield Checked(
                spec,
                chunk,
                accepted,
                mine,
                offsets[mine],
                record_ms[mine],
                fresh & ~repeated,
                dedupe.horizon(chunk.end),
                dead_letters,
                int((repeated & fresh).sum()),
            )

    def _decoded(self, chunks: list[Chunk]) -> Iterator[Decoded]:
        shards: dict[str, tuple[str, Ints]] = {}
        for checked in self._checked(chunks):
            mine, counted, accepted = checked.mine, checked.counted, checked.accepted
            shards = shards or self._shards(accepted)
            events = {}
            if counted.any():
                times_ms = np.minimum(accepted.times_ms[mine], checked.record_ms)
                fields = {name: column[mine] for name, column in accepted.fields.items()}
                for entity, (key, of_shard) in shards.items():
                    ids = fields[key]
                    concerned = counted & np.asarray(ids.is_valid()) if ids.null_count else counted
                    given = (ids, of_shard[mine], checked.offsets, times_ms, fields)
                    events[entity] = Happened(checked.spec.name, *given).take(concerned)
            parts = self._parts(checked.chunk, checked.horizon, events)
            yield Decoded(parts, checked.dead_letters, int(counted.sum()), checked.duplicates)

    def _shards(self, accepted: Accepted) -> dict[str, tuple[str, Ints]]:
        """By entity that events name: the field that does, and each event's shard."""
        return {
            entity.name: (entity.key, shards_of(accepted.fields[entity.key], self._plan.shards))
            for entity in self._plan.entities
            if entity.key in accepted.fields
        }

    def _parts(self, chunk: Chunk, horizon: int, events: Mapping[str, Happened]) -> list[Part]:
        latest_ms = int(chunk.record_ms.max(initial=-1))
        start = max(chunk.start, chunk.fresh)
        return [
            Part(
                chunk.partition,
                start,
                max(chunk.end, start),
                horizon,
                latest_ms,
                {entity: happened.take(happened.shards % self._lanes == lane) for entity, happened in events.items()},
                chunk.low,
                chunk.topic_id,
            )
            for lane in range(self._lanes)
        ]


@dataclass(frozen=True)
class Accepted:
    """Records that a contract accepts: their positions in what was decoded, and their columns."""

    index: NDArray[np.intp]
    event_ids: pa.StringArray
    times_ms: NDArray[np.int64]
    fields: dict[str, Any]


class ContractDecoder:
    """Checks records against a contract and turns them into columns.

    The contract (pydantic) decides. A decoder compiled from it (msgspec) goes first and is a quarter of the cost; what
    it does not accept goes to the contract, and what it accepts the contract would, with equal values: a differential
    test holds it to that. A contract with validators of its own has no such decoder.
    """

    def __init__(self, name: str, contract: type[Event]) -> None:
        self.name = name
        self._contract = contract
        self._kinds = {
            field: kind for field, kind in contract.kinds().items() if field not in ("event_id", "occurred_at")
        }
        self.fast: _Fast | None = _compile(contract)

    def decode(
        self, values: list[bytes | None], record_ms: NDArray[np.int64]
    ) -> tuple[Accepted, list[tuple[int, str]]]:
        """Columns of the accepted records, and (position, reason) of the refused ones."""
        found, index, refused = self._all(values) or self._each(values)
        accepted = self._columns(found, index)
        early = accepted.times_ms > record_ms[accepted.index] + DAY_MS
        if early.any():
            refused.extend(
                (
                    index[at],
                    (
                        f"occurred_at: {accepted.times_ms[at]} is more than a day ahead of the record; "
                        "check the producer's clock"
                    ),
                )
                for at in np.flatnonzero(early).tolist()
            )
            kept = np.flatnonzero(~early).tolist()
            accepted = self._columns([found[at] for at in kept], [index[at] for at in kept])
        return accepted, refused

    def _all(self, values: list[bytes | None]) -> tuple[list[Any], list[int], list[tuple[int, str]]] | None:
        """All values as events, if the fast decoder takes every one."""
        if self.fast is None or None in values:
            return None
        try:
            return self.fast.all(values), list(range(len(values))), []  # type: ignore[arg-type]  # there is no None
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None

    def _each(self, values: list[bytes | None]) -> tuple[list[Any], list[int], list[tuple[int, str]]]:
        """The events of those that are accepted, where they stand, and where and why others are refused."""
        found: list[Any] = []
        index: list[int] = []
        refused: list[tuple[int, str]] = []
        for at, value in enumerate(values):
            try:
                found.append(self.check(value))
                index.append(at)
            except ValueError as error:
                refused.append((at, str(error)[:_REASON_LENGTH_MAX]))
        return found, index, refused

    def check(self, value: bytes | None) -> Any:
        """The event in a record.

        Raises:
            ValueError: if the contract refuses it; the message says which field, what it holds and what is expected.
        """
        if value is None:
            msg = "the record is empty; send a JSON object"
            raise ValueError(msg)
        if self.fast is not None:
            try:
                return self.fast(value)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                pass  # The contract has the last word, and the better message.
        try:
            return self._storable(self._contract.model_validate_json(value))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  # a validator of the user's own may raise anything: we go on
            raise ValueError(_reason(error)) from None

    def _storable(self, event: Event) -> Event:
        """The event, if its columns can hold it: validators of a contract's own may return anything."""
        for name, kind in self._contract.kinds().items():
            value: Any = getattr(event, name)
            if value is None and not self._contract.model_fields[name].is_required():
                continue
            if not (isinstance(value, _TYPES[kind]) and _fits(name, kind, getattr(event, name))):
                msg = f"{name}: a validator of the contract returned {value!r:.80}, which can't be kept as {kind}"
                raise ValueError(msg)
        return event

    def _columns(self, found: list[Any], index: list[int]) -> Accepted:
        fields: dict[str, Any] = {}
        for name, kind in self._kinds.items():
            column = [getattr(event, name) for event in found]
            fields[name] = pa.array(column, pa.string()) if kind == "str" else np.array(column, np.float64)
        return Accepted(
            np.array(index, np.intp),
            pa.array([event.event_id for event in found], pa.string()),
            np.array([event.occurred_at for event in found], np.int64),
            fields,
        )


def _fits(name: str, kind: Kind, value: Any) -> bool:
    """Whether a value of the right type is within what every contract promises."""
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


def _compile(contract: type[Event]) -> _Fast | None:
    """A msgspec decoder that accepts a subset of what the contract does; None if the contract has code of its own."""
    own = contract.__pydantic_decorators__
    if own.model_validators or own.root_validators or own.validators or set(own.field_validators) != {"_storable"}:
        return None
    derived = contract.__mro__[: contract.__mro__.index(Event)]
    if (
        any("_storable" in vars(each) for each in derived)
        or contract.model_config != Event.model_config
        or contract.__pydantic_post_init__ is not None
    ):
        return None
    fields: list[Any] = []
    for name, info in contract.model_fields.items():
        annotation = _fast_type(name, info)
        particular = (info.alias, info.validation_alias, info.default_factory, info.validate_default)
        if annotation is None or any(each is not None for each in particular):
            return None
        fields.append((name, annotation) if info.is_required() else (name, annotation, info.get_default()))
    struct = msgspec.defstruct(contract.__name__, fields, gc=False, kw_only=True)
    return _Fast(msgspec.json.Decoder(struct).decode)


class _Fast:
    """A compiled decoder of records.

    msgspec passes over fields that it does not know; pydantic looks at their encoding, nesting and digits. Where these
    could matter, the contract judges.
    """

    def __init__(self, decode: Callable[[bytes], Any]) -> None:
        self._decode = decode

    def __call__(self, value: bytes) -> Any:
        """The event in one record."""
        return self.all([value])[0]

    def all(self, values: list[bytes]) -> list[Any]:
        """The events in records: of all, or an error."""
        joined = b"".join(values)
        nesting = joined.count(b"[") + joined.count(b"{")
        # Each record is an object, or is refused below: so if no record is nested, none is too deep.
        if nesting - len(values) >= _FAST_NESTING_MAX:
            nesting = max(value.count(b"[") + value.count(b"{") for value in values)
        else:
            nesting = 0
        if b"\\u0000" in joined or nesting > _FAST_NESTING_MAX or max(map(len, values), default=0) > _FAST_BYTES_MAX:
            msg = "for the contract to judge"
            raise ValueError(msg)
        if not joined.isascii():
            for value in values:
                value.decode()
        return list(map(self._decode, values))


def _fast_type(name: str, info: FieldInfo) -> Any:
    """The msgspec type for a pydantic field, or None where it has no equal."""
    if name == "occurred_at":
        if repr(info) != repr(Event.model_fields[name]):
            return None
        return Annotated[int, msgspec.Meta(ge=OLDEST_MS, le=NEWEST_MS)]
    optional = get_origin(info.annotation) in (Union, UnionType)
    plain = (
        next((kind for kind in get_args(info.annotation) if kind is not NoneType), None)
        if optional
        else info.annotation
    )
    if plain not in (str, int, float, bool):
        return None
    limits: dict[str, Any] = {"min_length": 1, "max_length": TEXT_LENGTH_MAX} if plain is str else {}
    if plain is int:
        limits = {"ge": -WHOLE_MAX, "le": WHOLE_MAX}
    for constraint in info.metadata:
        known = {
            annotated_types.Ge: "ge",
            annotated_types.Gt: "gt",
            annotated_types.Le: "le",
            annotated_types.Lt: "lt",
        }.get(type(constraint))
        if known is None:
            return None
        bound = getattr(constraint, known)
        if plain is int and known in ("gt", "lt"):
            known, bound = ("ge", bound + 1) if known == "gt" else ("le", bound - 1)
        tighter = max if known in ("ge", "gt") else min
        limits[known] = tighter(bound, limits.get(known, bound))
    if {"gt", "ge"} <= limits.keys() or {"lt", "le"} <= limits.keys():
        return None
    narrowed = Annotated[plain, msgspec.Meta(**limits)] if limits else plain
    return narrowed | None if optional else narrowed
