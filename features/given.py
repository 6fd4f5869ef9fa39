"""Fields features: values that somebody else computed and wrote, as Feast's ordinary views have them.

A row is all that one view has of one entity: 8 bytes of tag, which names its fields; the event's time and the time of
its creation, int64 microseconds since the epoch, by which the store tells the older of two rows; a word (int64, or the
bits of a float64) for each number; a bit for each that is null; the length of each other value (uint32, `_NULL` for
null), and these, one after the other: texts as UTF-8, all else as msgpack. All little-endian. So numbers of many rows
are taken out together, by one loop, and texts with one copy.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.loops import compiled
from features.texts import from_buffers
from features.values import Floats, Lists, Objects, Texts, Type, Values

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Value = Any
"""None, or what Python has of a field's kind; of a kind of its own `[Feast's number of its type, what it holds]`."""

_TAG_BYTES: Final = 8
_HEADER: Final = struct.Struct(f"<{_TAG_BYTES}sqq")
_NULL: Final = 0xFFFF_FFFF
_EXACT_MAX: Final = 1 << 53
"""Whole numbers beyond are no float64."""
_KINDS: Final[dict[str, Type]] = {
    "Int32": "int",
    "Int64": "int",
    "Float32": "float",
    "Float64": "float",
    "Bool": "bool",
    "String": "str",
    "Array(String)": "list[str]",
}


NESTED: Final = frozenset({21, 35, 42, 43})
"""Feast's numbers of the types that are lists (or sets) of values with types of their own."""


class GivenRowError(ValueError):
    """A key of given features holds something that is no row of them: `place` among those that were read."""

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(reason)
        self.place = place


class Field(NamedTuple):
    """A given feature, and its type as Feast calls it, such as `Int32` or `Array(Float64)`."""

    name: str
    dtype: str

    @property
    def kind(self) -> Type:
        """How it is kept."""
        return kind_of(self.dtype)


def kind_of(dtype: str) -> Type:
    """What a type of Feast is to us: `any`, if we do not compute with it."""
    return _KINDS.get(dtype, "any")


@dataclass(frozen=True)
class Fields:
    """The fields of a view's rows, in order."""

    fields: tuple[Field, ...]

    @classmethod
    def of(cls, fields: Iterable[tuple[str, str]]) -> Fields:
        """By names and types."""
        return cls(tuple(Field(*each) for each in fields))

    def encode(self) -> bytes:
        """The fields as plain data, by which a row of this tag can be read by others."""
        return msgspec.msgpack.encode([tuple(each) for each in self.fields])

    @classmethod
    def decode(cls, data: bytes) -> Fields:
        """The inverse of `encode`."""
        return cls.of(msgspec.msgpack.decode(data, type=list[tuple[str, str]]))

    @cached_property
    def tag(self) -> bytes:
        """What rows of these fields begin with."""
        return hashlib.sha256(self.encode()).digest()[:_TAG_BYTES]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The place of each number among them, by name."""
        return self._places(lambda kind: kind in ("int", "float", "bool"))

    @cached_property
    def others(self) -> dict[str, int]:
        """The place of each value of any length among them, by name."""
        return self._places(lambda kind: kind not in ("int", "float", "bool"))

    @cached_property
    def kinds(self) -> dict[str, Type]:
        """By name."""
        return {each.name: each.kind for each in self.fields}

    def _places(self, is_one: Callable[[Type], bool]) -> dict[str, int]:
        return {each.name: at for at, each in enumerate(one for one in self.fields if is_one(one.kind))}

    @cached_property
    def nulls_at(self) -> int:
        """Where the bits of nulls are."""
        return _HEADER.size + 8 * len(self.numbers)

    @cached_property
    def lengths_at(self) -> int:
        """Where the lengths are."""
        return self.nulls_at + (len(self.numbers) + 7) // 8

    @cached_property
    def fixed_bytes(self) -> int:
        """Where what has lengths begins."""
        return self.lengths_at + 4 * len(self.others)

    def pack(self, values: Mapping[str, Value], event_us: int, created_us: int) -> bytes:
        """A row. What is not among the values is null, and a value of no field is left out.

        Raises:
            ValueError: if a value is not of its field's type; it names the field and the value.
        """
        words, nulls = bytearray(), bytearray((len(self.numbers) + 7) // 8)
        for name, at in self.numbers.items():
            value = values.get(name)
            if value is None or value != value:  # noqa: PLR0124  # NaN is null
                value, nulls[at // 8] = 0, nulls[at // 8] | 1 << at % 8
            try:
                words += struct.pack("<d" if self.kinds[name] == "float" else "<q", value)
            except struct.error as error:
                raise _wrong(name, value, self.kinds[name]) from error
        texts = [_blob(name, self.kinds[name], values.get(name)) for name in self.others]
        lengths = struct.pack(f"<{len(texts)}I", *(_NULL if text is None else len(text) for text in texts))
        given = (text for text in texts if text is not None)
        return b"".join((_HEADER.pack(self.tag, event_us, created_us), words, nulls, lengths, *given))


def _blob(name: str, kind: Type, value: Value) -> bytes | None:
    if value is None:
        return None
    if kind == "str" and not isinstance(value, str):
        raise _wrong(name, value, kind)
    return value.encode() if kind == "str" else msgspec.msgpack.encode(value)


def _wrong(name: str, value: Value, kind: Type) -> ValueError:
    return ValueError(f"{name}: {value!r} is no {kind}, which its view declares; write such values, or declare another")


Find = Callable[[bytes], Fields | None]
"""The fields that a tag names, if anybody knows."""


class GivenRows:
    """What some entities' rows hold of one view; values are taken out when they are asked for.

    Attributes:
        event_us: int64[rows], each row's time, microseconds since the epoch; 0 where there is none.
        found: bool[rows], whether there is one.
        outside: bool[rows], whether it is older than the view's `ttl`, as `limited` says: its values are null then.

    Raises:
        GivenRowError: if bytes are no row.
    """

    def __init__(self, given: Fields, blobs: Sequence[bytes | None], find: Find = lambda _: None) -> None:
        self._given = given
        if any(blob is not None and not blob.startswith(given.tag) for blob in blobs):
            blobs = [blob if blob is None else _as_if(given, at, blob, find) for at, blob in enumerate(blobs)]
        self.found = np.array([blob is not None for blob in blobs], np.bool_)
        empty = given.pack({}, 0, 0)
        rows = [empty if blob is None else blob for blob in blobs]
        self._data = np.frombuffer(b"".join(rows), np.uint8)
        ends = np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)))
        self._starts = np.concatenate([np.zeros(min(len(rows), 1), np.int64), ends[:-1]])
        self.event_us = self._words(_TAG_BYTES, 8, 1)[0]
        self.outside = np.zeros(len(rows), np.bool_)
        self._hidden = ~self.found
        lengths = self._words(given.lengths_at, 4, len(given.others))
        self._null = lengths == _NULL
        lengths[self._null] = 0
        self._lengths = lengths
        self._begins = self._starts + given.fixed_bytes + np.cumsum(lengths, axis=0) - lengths
        if (broken := np.flatnonzero(self._starts + given.fixed_bytes + lengths.sum(axis=0) != ends)).size:
            raise GivenRowError(int(broken[0]), "its length is not that of its values")

    def limited(self, now_us: int | Ints, ttl_us: int) -> GivenRows:
        """The rows as of a time, or a time for each: of what is older than `ttl_us`, unless that is 0, no value."""
        if not ttl_us:
            return self
        found = copy(self)
        found.outside = self.found & (now_us - self.event_us > ttl_us)
        found._hidden = ~self.found | found.outside
        return found

    def number(self, name: str) -> Floats:
        """float64[rows], NaN for null; of whole numbers beyond 2^53 the nearest."""
        words, null = self._number(name)
        numbers = words.view(np.float64) if self._given.kinds[name] == "float" else words.astype(np.float64)
        return np.where(null, np.nan, numbers)

    def value(self, name: str) -> Values:
        """The values of a field that this view has or, an older row being read, has no more."""
        kind = self._given.kinds[name]
        if kind == "int":
            words, null = self._number(name)
            if (np.abs(words) > _EXACT_MAX).any():
                return Objects(
                    [None if none else word for none, word in zip(null.tolist(), words.tolist(), strict=True)]
                )
        if kind in ("int", "float", "bool"):
            return self.number(name)
        null, blobs = self._blobs(name)
        if kind == "str":
            return Texts(np.where(null, -1, np.arange(len(null))), blobs)
        objects = _objects(blobs, null)
        if kind == "any":
            return Objects([None if each is None else plain(each) for each in objects])
        lists = pa.array(objects, pa.list_(pa.string()))
        counts = np.diff(np.asarray(lists.offsets))
        texts = lists.flatten()
        owners = np.repeat(np.arange(len(null)), counts)
        return Lists(owners, len(null), np.arange(len(texts)), texts, null=null if null.any() else None)

    def raw(self, name: str) -> list[Value]:
        """As they were given, a list: for who makes Feast's own values of them."""
        kind = self._given.kinds[name]
        if kind in ("int", "float", "bool"):
            words, null = self._number(name)
            numbers: Any = words.view(np.float64) if kind == "float" else words
            numbers = numbers.astype(np.bool_) if kind == "bool" else numbers
            return [None if none else number for none, number in zip(null.tolist(), numbers.tolist(), strict=True)]
        null, blobs = self._blobs(name)
        if kind == "str":
            found: list[Value] = blobs.to_pylist()
            return [None if none else text for none, text in zip(null.tolist(), found, strict=True)]
        return _objects(blobs, null)

    def _number(self, name: str) -> tuple[Ints, NDArray[np.bool_]]:
        given, at = self._given, self._given.numbers[name]
        bits = self._words(given.nulls_at + at // 8, 1, 1)[0]
        return self._words(_HEADER.size + 8 * at, 8, 1)[0], (bits >> at % 8 & 1).astype(np.bool_) | self._hidden

    def _blobs(self, name: str) -> tuple[NDArray[np.bool_], pa.StringArray]:
        """bool[rows], which are null, and the bytes of all others."""
        at = self._given.others[name]
        null = self._null[at] | self._hidden
        lengths = np.where(null, 0, self._lengths[at])
        offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
        return null, from_buffers(offsets, _gather(self._data, self._begins[at], offsets))

    def _words(self, offset: int, width: int, count: int) -> Ints:
        words: Ints = _words(self._data, self._starts, offset, width, count)
        return words


def _as_if(given: Fields, at: int, blob: bytes, find: Find) -> bytes:
    """A row of other fields as one of these: what it has of the same name and kind, and null for the rest."""
    tag = blob[:_TAG_BYTES]
    if tag == given.tag:
        return blob
    other = find(tag) if len(blob) >= _HEADER.size else None
    if other is None:
        raise GivenRowError(at, f"its first bytes, {tag!r}, name no fields that were ever written here")
    _, event_us, created_us = _HEADER.unpack_from(blob)
    row = GivenRows(other, [blob], find)
    kinds = ((name, kind, given.kinds.get(name)) for name, kind in other.kinds.items())
    kept = [name for name, before, now in kinds if before == now or (before, now) == ("int", "float")]
    return given.pack({name: row.raw(name)[0] for name in kept}, event_us, created_us)


def _objects(blobs: pa.StringArray, null: NDArray[np.bool_]) -> list[Value]:
    """All msgpack values by one call, as one array; None for null."""
    offsets = np.frombuffer(blobs.buffers()[1], np.int32)
    data = blobs.buffers()[2]
    packed = b"" if data is None else data.to_pybytes()[: offsets[-1]]
    there = int((~null).sum())
    found = iter(msgspec.msgpack.decode(struct.pack(">BI", 0xDD, there) + packed))
    return [None if none else next(found) for none in null.tolist()]


def plain(value: Value) -> Any:
    """A value of a kind of its own, without the numbers of types: what it holds may be of such kinds."""
    match value:
        case [int(), dict() as held]:
            return {name: plain(each) for name, each in held.items()}
        case [int() as number, [*held]] if number in NESTED:
            return [plain(each) for each in held]
        case [int(), held]:
            return held
        case _:
            return value


@compiled
def _words(data: Bytes, starts: Ints, offset: int, width: int, count: int) -> Ints:
    """int64[count, rows]: little-endian words of so many bytes, from an offset of each row on; 0 beyond the data."""
    found = np.zeros((count, len(starts)), np.int64)
    for word in range(count):
        for row in range(len(starts)):
            first = starts[row] + offset + word * width
            if first + width > len(data):
                continue
            value = np.uint64(0)
            for byte in range(width):
                value |= np.uint64(data[first + byte]) << np.uint64(8 * byte)
            found[word, row] = np.int64(value)
    return found


@compiled
def _gather(data: Bytes, begins: Ints, offsets: NDArray[np.int32]) -> Bytes:
    """uint8[…]: from each beginning as many bytes as lie between two offsets."""
    found = np.empty(offsets[-1], np.uint8)
    for row in range(len(begins)):
        for at in range(offsets[row + 1] - offsets[row]):
            found[offsets[row] + at] = data[begins[row] + at]
    return found
