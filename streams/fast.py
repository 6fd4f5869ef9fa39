"""A decoder compiled from a contract (msgspec): it accepts a part of what the contract does, with equal values.

A contract's fields may be anywhere in a record: the places that it reads are a tree, each of whose nodes is a struct
of msgspec's, and each of whose leaves becomes a column. What of a record stands beside them is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from operator import attrgetter
from typing import Annotated, Any, Final, Literal, get_args, get_origin
from uuid import UUID

import annotated_types
import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from features.events import (
    LIST_LENGTH_MAX,
    NEWEST_MS,
    OLDEST_MS,
    TEXT_LENGTH_MAX,
    WHOLE_MAX,
    Event,
    milliseconds_of,
    without_none,
)
from features.source import Path, paths_of

_BYTES_MAX: Final = 4096
_NESTING_MAX: Final = 100
_TEXT: Final = {"min_length": 1, "max_length": TEXT_LENGTH_MAX}
_TIME: Final = r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)\Z"
_DAY: Final = r"\A\d{4}-\d\d-\d\d\Z"
_UUID: Final = r"\A[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z"
_NUMBER: Final = r"\A-?\d{1,40}(\.\d{1,40})?\Z"
_Text = Annotated[str, Meta(**_TEXT)]
_Whole = Annotated[int, Meta(ge=-WHOLE_MAX, le=WHOLE_MAX)]
_Time = Annotated[int, Meta(ge=OLDEST_MS, le=NEWEST_MS)]
_NOTHING: Final = object()


class _NoEqualError(Exception):
    """There is no such decoder of a contract: it says something that msgspec has no word for."""


@dataclass
class _Node:
    """An object in a record; `own` are its leaves, by name of attribute."""

    attribute: str = ""
    is_model: bool = False
    """Whether nothing but None stands for it where it is not there; or else its leaves' defaults do."""
    needed: bool = False
    children: dict[str, _Node | _Leaf] = field(default_factory=dict)
    empty: Any = None


@dataclass
class _Leaf:
    attribute: str
    type: Any
    default: Any
    """`_NOTHING` if there is none."""


@dataclass
class _Column:
    """Of a field: where it may be, the value where it is nowhere, and what becomes of what is there."""

    leaves: list[tuple[_Node, _Leaf]]
    default: Any
    made: Callable[[Any], Any] | None


class Fast:
    """A compiled decoder of records.

    msgspec passes over fields that it does not know; pydantic looks at their encoding, nesting and digits. Where these
    could matter, the contract judges.
    """

    def __init__(self, of_json: _Columns, of_objects: _Columns) -> None:
        self._json, self._objects = of_json, of_objects
        self._decode = msgspec.json.Decoder(of_json.struct).decode

    def columns(self, values: Sequence[Any], made: Callable[[str, list[Any]], Any] | None = None) -> dict[str, Any]:
        """The fields of the events in records (JSON, or objects): of all, or an error.

        `made` makes something else of each one's values, by its name: so not all lists are in memory at once.

        Raises:
            msgspec.MsgspecError, ValueError, RecursionError: if the contract is to judge one of them.
        """
        if values and not isinstance(values[0], bytes):
            struct = self._objects.struct
            return self._objects.of([msgspec.convert(value, struct) for value in values], made, _must_be_storable)
        joined = b"".join(values)
        nesting = joined.count(b"[") + joined.count(b"{")
        # Each record is an object, or is refused below: so if no record is nested, none is too deep.
        if nesting - len(values) >= _NESTING_MAX:
            nesting = max(value.count(b"[") + value.count(b"{") for value in values)
        else:
            nesting = 0
        if b"\\u0000" in joined or nesting > _NESTING_MAX or max(map(len, values), default=0) > _BYTES_MAX:
            msg = "for the contract to judge"
            raise ValueError(msg)
        if not joined.isascii():
            for value in values:
                value.decode()
        return self._json.of(list(map(self._decode, values)), made)


class _Columns:
    """The structs of a contract, and how columns are made of them."""

    def __init__(self, contract: type[Event], *, json: bool) -> None:
        self._root = _Node(needed=True)
        self._fields: dict[str, _Column | None] = {}
        self._json, self._n = json, 0
        source = contract.declared_source
        given = {"event_id": source.identity_is_given, "occurred_at": source.time_is_given}
        elsewhere = {name for name, is_given in given.items() if is_given}
        for name, info in contract.model_fields.items():
            if name in elsewhere:
                self._fields[name] = None
            else:
                self._add(name, name, info, [self._root], within_model=False)
        self.struct = self._made(self._root, contract.__name__)

    def of(
        self,
        structs: list[Any],
        made: Callable[[str, list[Any]], Any] | None,
        check: Callable[[list[Any]], None] = lambda _: None,
    ) -> dict[str, Any]:
        """The columns of all fields, in order; None of those that are found elsewhere."""
        of_node: dict[int, list[Any]] = {id(self._root): structs}
        for parent, node in _below(self._root):
            objects = list(map(attrgetter(node.attribute), of_node[id(parent)]))
            if not node.needed:
                empty = node.empty
                objects = [empty if each is None else each for each in objects]
            of_node[id(node)] = objects
        found: dict[str, Any] = {}
        for name, column in self._fields.items():
            if column is None:
                found[name] = None
                continue
            values = [list(map(attrgetter(leaf.attribute), of_node[id(node)])) for node, leaf in column.leaves]
            chosen = values[0]
            for more in values[1:]:
                chosen = [other if value is UNSET else value for value, other in zip(chosen, more, strict=True)]
            if len(values) > 1:
                if column.default is _NOTHING and any(value is UNSET for value in chosen):
                    msg = f"{name} is missing"
                    raise ValueError(msg)
                chosen = [column.default if value is UNSET else value for value in chosen]
            if (plainly := column.made) is not None:
                chosen = [None if value is None else plainly(value) for value in chosen]
            check(chosen)
            found[name] = chosen if made is None else made(name, chosen)
        return found

    def _add(self, name: str, field_name: str, info: FieldInfo, parents: list[_Node], *, within_model: bool) -> None:
        if info.default_factory is not None or info.validate_default is not None:
            raise _NoEqualError
        plain, optional = without_none(info.annotation)
        if any(get_origin(each) is Annotated for each in get_args(info.annotation)):
            raise _NoEqualError  # Constraints of one side of a union.
        paths = paths_of(field_name, info.validation_alias)
        if within_model and any(len(path) > 1 for path in paths):
            raise _NoEqualError
        default = _NOTHING if info.is_required() else info.get_default()
        if isinstance(plain, type) and issubclass(plain, BaseModel):
            self._add_model(name, plain, paths, parents, default, optional=optional)
            return
        kind, made = self._type(name, info, plain)
        kind = kind | None if optional else kind
        if default not in (_NOTHING, None, []) and (made is not None or isinstance(default, list)):
            raise _NoEqualError  # A default is a value of the type, not what is written for it.
        if isinstance(default, Enum):
            default = default.value
        leaves = []
        for parent in parents:
            for path in paths:
                node = parent
                for step in path[:-1]:
                    node = self._node(node, step, needed=default is _NOTHING and len(paths) * len(parents) == 1)
                several = len(paths) * len(parents) > 1
                leaf = _Leaf(self._attribute(), kind | UnsetType if several else kind, UNSET if several else default)
                if str(path[-1]) != path[-1] or path[-1] in node.children:
                    raise _NoEqualError
                node.children[path[-1]] = leaf
                leaves.append((node, leaf))
        self._fields[name] = _Column(leaves, default, made)

    def _add_model(  # a model's own fields are the contract's
        self,
        name: str,
        model: type[BaseModel],
        paths: tuple[Path, ...],
        parents: list[_Node],
        default: Any,
        *,
        optional: bool,
    ) -> None:
        if len(paths) > 1 or len(parents) > 1 or default not in (_NOTHING, None) or _has_own_code(model):
            raise _NoEqualError
        if model.model_config not in ({}, Event.model_config):
            raise _NoEqualError
        (node,) = parents
        for step in paths[0][:-1]:
            node = self._node(node, step, needed=default is _NOTHING and not optional)
        last = paths[0][-1]
        if not isinstance(last, str) or last in node.children:
            raise _NoEqualError
        own = _Node(self._attribute(), is_model=True, needed=default is _NOTHING and not optional)
        if default is _NOTHING and optional:
            raise _NoEqualError  # It must be there, and may be null.
        node.children[last] = own
        for field_name, info in model.model_fields.items():
            self._add(f"{name}.{field_name}", field_name, info, [own], within_model=True)

    def _node(self, parent: _Node, step: str | int, *, needed: bool) -> _Node:
        if not isinstance(step, str):
            raise _NoEqualError
        node = parent.children.setdefault(step, _Node(self._attribute()))
        if isinstance(node, _Leaf) or node.is_model:
            raise _NoEqualError
        node.needed |= needed
        return node

    def _attribute(self) -> str:
        self._n += 1
        return f"f{self._n}"

    def _made(self, node: _Node, name: str) -> Any:
        """The node's struct; and what stands for it where it is not there."""
        fields: list[Any] = []
        names, empty = {}, {}
        for key, child in node.children.items():
            names[child.attribute] = key
            if isinstance(child, _Leaf):
                default = (child.default,) if child.default is not _NOTHING else ()
                fields.append((child.attribute, child.type, *default))
                empty[child.attribute] = None if node.is_model or not default else child.default
            else:
                struct = self._made(child, f"{name}.{key}")
                fields.append((child.attribute, struct) if child.needed else (child.attribute, struct | None, None))
                empty[child.attribute] = child.empty if child.needed else None
        made = msgspec.defstruct(name, fields, gc=False, kw_only=True, rename=names)
        node.empty = made(**empty)
        return made

    def _type(self, name: str, info: FieldInfo, plain: Any) -> tuple[Any, Callable[[Any], Any] | None]:
        """The msgspec type for a field, and what becomes of its values."""
        if name == "occurred_at":
            if [*map(repr, info.metadata)] != [*map(repr, Event.model_fields[name].metadata)]:
                raise _NoEqualError
            return (_Time, None) if self._json else (_Time | datetime, _milliseconds)
        if plain in (str, int, float, bool):
            return _narrowed(info, plain), None
        if info.metadata:
            raise _NoEqualError
        if get_origin(plain) is Literal or (isinstance(plain, type) and issubclass(plain, Enum)):
            return _literal(plain), None
        if plain == list[str]:
            return Annotated[list[_Text], Meta(max_length=LIST_LENGTH_MAX)], None
        return (_IN_JSON if self._json else _IN_OBJECTS)[plain]


def _must_be_storable(column: list[Any]) -> None:
    """What JSON can't say, objects can."""
    there = [value for value in column if value is not None]
    if not there or isinstance(there[0], int):
        return
    if isinstance(there[0], float):
        storable = bool(np.isfinite(there).all())
    else:
        joined = "".join(there if isinstance(there[0], str) else (text for each in there for text in each))
        storable = b"\0" not in joined.encode()
    if not storable:
        msg = "for the contract to judge"
        raise ValueError(msg)


def _below(node: _Node) -> Iterator[tuple[_Node, _Node]]:
    """Every node below one, with the one that it is in, which comes before."""
    for child in node.children.values():
        if isinstance(child, _Node):
            yield node, child
            yield from _below(child)


def _has_own_code(model: type[BaseModel]) -> bool:
    own = model.__pydantic_decorators__
    return bool(
        own.model_validators
        or own.root_validators
        or own.validators
        or own.field_validators
        or model.__pydantic_post_init__ is not None
    )


def compile_fast(contract: type[Event]) -> Fast | None:
    """A decoder that accepts a subset of what the contract does; None if the contract has code of its own."""
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
    try:
        return Fast(_Columns(contract, json=True), _Columns(contract, json=False))
    except _NoEqualError:
        return None


def _narrowed(info: FieldInfo, plain: Any) -> Any:
    """A plain type with a field's constraints."""
    limits: dict[str, Any] = dict(_TEXT) if plain is str else {}
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
            raise _NoEqualError
        bound = getattr(constraint, known)
        if plain is int and known in ("gt", "lt"):
            known, bound = ("ge", bound + 1) if known == "gt" else ("le", bound - 1)
        tighter = max if known in ("ge", "gt") else min
        limits[known] = tighter(bound, limits.get(known, bound))
    if {"gt", "ge"} <= limits.keys() or {"lt", "le"} <= limits.keys():
        raise _NoEqualError
    return Annotated[plain, Meta(**limits)] if limits else plain


def _literal(plain: Any) -> Any:
    is_enum = isinstance(plain, type)
    values = [each.value for each in plain] if is_enum else get_args(plain)
    if is_enum and "_missing_" in vars(plain):
        raise _NoEqualError
    if not all(1 <= len(value) <= TEXT_LENGTH_MAX for value in values if isinstance(value, str)):
        raise _NoEqualError
    return Literal[tuple(values)]


def _milliseconds(value: Any) -> int:
    return value if isinstance(value, int) else milliseconds_of(value)


def _milliseconds_of_text(text: str) -> int:
    return milliseconds_of(datetime.fromisoformat(text))


def _day(value: date) -> int:
    return milliseconds_of(date(value.year, value.month, value.day))


def _day_of_text(text: str) -> int:
    return milliseconds_of(date.fromisoformat(text))


_IN_JSON: Final[dict[Any, tuple[Any, Callable[[Any], Any]]]] = {
    Decimal: (float | Annotated[str, Meta(pattern=_NUMBER)], float),
    UUID: (Annotated[str, Meta(pattern=_UUID)], str.lower),
    datetime: (Annotated[str, Meta(pattern=_TIME)], _milliseconds_of_text),
    date: (Annotated[str, Meta(pattern=_DAY)], _day_of_text),
}
"""What these types are in records, and what becomes of it."""
_IN_OBJECTS: Final[dict[Any, tuple[Any, Callable[[Any], Any]]]] = {
    Decimal: (float, float),
    UUID: (UUID, str),
    datetime: (datetime, _milliseconds),
    date: (date, _day),
}
