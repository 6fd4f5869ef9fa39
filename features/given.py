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
    def are_floats(self) -> NDArray[np.bool_]:
        """bool[numbers]: which hold the bits of a float64."""
        return np.array([self.kinds[name] == "float" for name in self.numbers], np.bool_)

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
        if b"" in blobs:
            raise GivenRowError(blobs.index(b""), "it is empty")
        rows = [blob or b"" for blob in blobs]
        status, place = self._read(rows)
        if status == _FOREIGN:
            rows = [_as_if(given, at, row, find) for at, row in enumerate(rows)]
            status, place = self._read(rows)
        if status != _READ:
            raise GivenRowError(place, "its length is not that of its values")

    def _read(self, rows: list[bytes]) -> tuple[int, int]:
        given, n = self._given, len(rows)
        self._data = np.frombuffer(b"".join(rows), np.uint8)
        self.event_us, self.found, self.outside = np.zeros(n, np.int64), np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        self._words = np.zeros((len(given.numbers), n), np.int64)
        self._numbers = np.full((len(given.numbers), n), np.nan)
        self._lengths, self._begins = np.full((len(given.others), n), -1), np.zeros((len(given.others), n), np.int64)
        status: tuple[int, int] = _read(
            self._data,
            np.fromiter(map(len, rows), np.int64, n),
            np.frombuffer(given.tag, np.uint8),
            given.are_floats,
            self.found,
            self.event_us,
            self._words,
            self._numbers,
            self._numbers.view(np.int64),
            self._lengths,
            self._begins,
        )
        return status

    def limited(self, now_us: int | Ints, ttl_us: int) -> GivenRows:
        """The rows as of a time, or a time for each: of what is older than `ttl_us`, unless that is 0, no value."""
        if not ttl_us:
            return self
        found = copy(self)
        found.outside = self.found & (now_us - self.event_us > ttl_us)
        if found.outside.any():
            found._numbers = np.where(found.outside, np.nan, self._numbers)
            found._lengths = np.where(found.outside, -1, self._lengths)
        return found

    def number(self, name: str) -> Floats:
        """float64[rows], NaN for null; of whole numbers beyond 2^53 the nearest."""
        numbers: Floats = self._numbers[self._given.numbers[name]]
        return numbers

    def value(self, name: str) -> Values:
        """The values of a field that this view has or, an older row being read, has no more."""
        kind = self._given.kinds[name]
        if kind == "int" and (np.abs(self.number(name)) > _EXACT_MAX).any():
            return Objects(self.raw(name))
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
            numbers: Any = self.number(name)
            null = np.isnan(numbers)
            if kind != "float":  # Floats that are not null are what they were.
                numbers = self._words[self._given.numbers[name]].astype(np.bool_ if kind == "bool" else np.int64)
            return [None if none else number for none, number in zip(null.tolist(), numbers.tolist(), strict=True)]
        null, blobs = self._blobs(name)
        if kind == "str":
            found: list[Value] = blobs.to_pylist()
            return [None if none else text for none, text in zip(null.tolist(), found, strict=True)]
        return _objects(blobs, null)

    def _blobs(self, name: str) -> tuple[NDArray[np.bool_], pa.StringArray]:
        """bool[rows], which are null, and the bytes of all others."""
        at = self._given.others[name]
        lengths = self._lengths[at]
        null = lengths < 0
        offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(np.maximum(lengths, 0), dtype=np.int32)])
        return null, from_buffers(offsets, _gather(self._data, self._begins[at], offsets))


def _as_if(given: Fields, at: int, blob: bytes, find: Find) -> bytes:
    """A row of other fields as one of these: what it has of the same name and kind, and null for the rest."""
    tag = blob[:_TAG_BYTES]
    if tag == given.tag or not blob:
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


_READ, _FOREIGN, _BROKEN = 0, 1, 2


@compiled
def _word(data: Bytes, at: int, width: int) -> int:
    """A little-endian word of so many bytes."""
    value = np.uint64(0)
    for byte in range(width):
        value |= np.uint64(data[at + byte]) << np.uint64(8 * byte)
    return np.int64(value)  # type: ignore[return-value]  # to numba it is one


@compiled
def _read(  # noqa: PLR0913, PLR0917  # compiled code takes arrays, not objects
    data: Bytes,
    sizes: Ints,
    tag: Bytes,
    are_floats: NDArray[np.bool_],
    found: NDArray[np.bool_],
    event_us: Ints,
    words: Ints,
    numbers: Floats,
    number_words: Ints,
    lengths: Ints,
    begins: Ints,
) -> tuple[int, int]:
    """Takes numbers out of rows, and finds all else.

    Args:
        data: the rows, one after the other.
        sizes: int64[rows], the bytes of each; 0 of what is not there.
        tag: what rows begin with.
        are_floats: bool[numbers].
        found: bool[rows], written to, like all that follow.
        event_us: int64[rows].
        words: int64[numbers, rows].
        numbers: float64[numbers, rows], NaN for null.
        number_words: the same memory as int64.
        lengths: int64[others, rows], -1 for null.
        begins: int64[others, rows].

    Returns:
        `_READ`; `_FOREIGN` or `_BROKEN`, and which row is.
    """
    header = len(tag) + 16
    nulls_at = header + 8 * len(are_floats)
    lengths_at = nulls_at + (len(are_floats) + 7) // 8
    fixed = lengths_at + 4 * len(lengths)
    start = 0
    for row in range(len(sizes)):
        size = sizes[row]
        if size == 0:
            continue
        for at in range(len(tag)):
            if at >= size or data[start + at] != tag[at]:
                return _FOREIGN, row
        if size < fixed:
            return _BROKEN, row
        found[row] = True
        event_us[row] = _word(data, start + len(tag), 8)
        for number in range(len(are_floats)):
            word = _word(data, start + header + 8 * number, 8)
            words[number, row] = word
            if data[start + nulls_at + number // 8] >> (number % 8) & 1:
                continue
            if are_floats[number]:
                number_words[number, row] = word
            else:
                numbers[number, row] = word
        at = start + fixed
        for other in range(len(lengths)):
            length = _word(data, start + lengths_at + 4 * other, 4)
            if length != _NULL:
                lengths[other, row], begins[other, row] = length, at
                at += length
        start += size
        if at != start:
            return _BROKEN, row
    return _READ, 0


@compiled
def _gather(data: Bytes, begins: Ints, offsets: NDArray[np.int32]) -> Bytes:
    """uint8[…]: from each beginning as many bytes as lie between two offsets."""
    found = np.empty(offsets[-1], np.uint8)
    for row in range(len(begins)):
        for at in range(offsets[row + 1] - offsets[row]):
            found[offsets[row] + at] = data[begins[row] + at]
    return found
