"""Conditions on event fields: `where=col("surface") == "search"`.

A condition is plain data, so that the plan can keep it, and is evaluated for a whole batch of events at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Scalar = str | float | int | bool
Fields = Mapping[str, Any]
"""Columns of a batch by field name: `pa.StringArray`, or float64 with NaN for null."""

_COMPARE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "==": (pc.equal, np.equal),
    "!=": (pc.not_equal, np.not_equal),
    "<": (pc.less, np.less),
    "<=": (pc.less_equal, np.less_equal),
    ">": (pc.greater, np.greater),
    ">=": (pc.greater_equal, np.greater_equal),
}


class Condition(msgspec.Struct, frozen=True, tag_field="op"):
    """A condition on the fields of one event; combine with `&`, `|` and `~`. A comparison with null is false."""

    def __and__(self, other: Condition) -> Condition:
        return Both(self, _condition(other))  # type: ignore[arg-type]  # every Condition is one of AnyCondition

    def __or__(self, other: Condition) -> Condition:
        return Either(self, _condition(other))  # type: ignore[arg-type]  # as above

    def __invert__(self) -> Condition:
        return Not(self)  # type: ignore[arg-type]  # as above

    def __bool__(self) -> bool:
        msg = "a condition has no truth value at import: combine conditions with & | ~ in parentheses, not and/or/not"
        raise TypeError(msg)

    def fields(self) -> set[str]:
        """Names of the event fields that the condition reads."""
        raise NotImplementedError

    def holds(self, columns: Fields) -> NDArray[np.bool_]:
        """bool[n]: for which events of the batch the condition holds."""
        raise NotImplementedError


def _condition(other: object) -> Condition:
    if not isinstance(other, Condition):
        msg = f'{other!r} is no condition: write (col("price") > 10) & (col("surface") == "search")'
        raise TypeError(msg)
    return other


class Compare(Condition, frozen=True, tag="compare"):
    """`col(field) <sign> value`."""

    field: str
    sign: Literal["==", "!=", "<", "<=", ">", ">="]
    value: Scalar

    def fields(self) -> set[str]:
        """See `Condition.fields`."""
        return {self.field}

    def holds(self, columns: Fields) -> NDArray[np.bool_]:
        """See `Condition.holds`."""
        column = columns[self.field]
        for_text, for_number = _COMPARE[self.sign]
        if isinstance(column, pa.Array):
            return np.asarray(pc.fill_null(for_text(column, pa.scalar(self.value, column.type)), fill_value=False))
        # NaN stands for null, and is unequal to everything in numpy: `!=` needs the second half.
        result: NDArray[np.bool_] = for_number(column, float(self.value)) & ~np.isnan(column)
        return result


class OneOf(Condition, frozen=True, tag="one_of"):
    """`col(field).one_of(values)`."""

    field: str
    values: tuple[Scalar, ...]

    def fields(self) -> set[str]:
        """See `Condition.fields`."""
        return {self.field}

    def holds(self, columns: Fields) -> NDArray[np.bool_]:
        """See `Condition.holds`."""
        column = columns[self.field]
        if isinstance(column, pa.Array):
            return np.asarray(pc.is_in(column, pa.array(self.values, column.type)))
        return np.isin(column, np.array(self.values, np.float64))


class IsNull(Condition, frozen=True, tag="is_null"):
    """`col(field).is_null()`."""

    field: str

    def fields(self) -> set[str]:
        """See `Condition.fields`."""
        return {self.field}

    def holds(self, columns: Fields) -> NDArray[np.bool_]:
        """See `Condition.holds`."""
        column = columns[self.field]
        return np.asarray(pc.is_null(column)) if isinstance(column, pa.Array) else np.isnan(column)


class Both(Condition, frozen=True, tag="both"):
    """`left & right`."""

    left: AnyCondition
    right: AnyCondition

    def fields(self) -> set[str]:
        """See `Condition.fields`."""
        return self.left.fields() | self.right.fields()

    def holds(self, columns: Fields) -> NDArray[np.bool_]:
        """See `Condition.holds`."""
        return self.left.holds(columns) & self.right.holds(columns)


class Either(Condition, frozen=True, tag="either"):
    """`left | right`."""

    left: AnyCondition
    right: AnyCondition

    def fields(self) -> set[str]:
        """See `Condition.fields`."""
        return self.left.fields() | self.right.fields()

    def holds(self, columns: Fields) -> NDArray[np.bool_]:
        """See `Condition.holds`."""
        return self.left.holds(columns) | self.right.holds(columns)


class Not(Condition, frozen=True, tag="not"):
    """`~inner`."""

    inner: AnyCondition

    def fields(self) -> set[str]:
        """See `Condition.fields`."""
        return self.inner.fields()

    def holds(self, columns: Fields) -> NDArray[np.bool_]:
        """See `Condition.holds`."""
        return ~self.inner.holds(columns)


AnyCondition = Compare | OneOf | IsNull | Both | Either | Not


class col:  # noqa: N801  # read as a function, as in pyspark and polars
    """A field of an event in a condition: `col("price") > 10`, `col("surface").one_of("search", "feed")`."""

    __hash__ = None  # type: ignore[assignment]  # `==` builds a condition, so a column can't be a dict key

    def __init__(self, field: str) -> None:
        self._field = field

    def __eq__(self, value: object) -> Condition:  # type: ignore[override]  # builds a condition, on purpose
        return self._compare("==", value)

    def __ne__(self, value: object) -> Condition:  # type: ignore[override]  # builds a condition, on purpose
        return self._compare("!=", value)

    def __lt__(self, value: float | str) -> Condition:
        return self._compare("<", value)

    def __le__(self, value: float | str) -> Condition:
        return self._compare("<=", value)

    def __gt__(self, value: float | str) -> Condition:
        return self._compare(">", value)

    def __ge__(self, value: float | str) -> Condition:
        return self._compare(">=", value)

    def one_of(self, *values: Scalar) -> Condition:
        """Whether the field equals one of the values."""
        return OneOf(self._field, tuple(values))

    def is_null(self) -> Condition:
        """Whether the event leaves the field out or sends null."""
        return IsNull(self._field)

    def __repr__(self) -> str:
        return f"col({self._field!r})"

    def _compare(self, sign: Literal["==", "!=", "<", "<=", ">", ">="], value: object) -> Condition:
        if not isinstance(value, str | float | int | bool):
            msg = (
                f"col({self._field!r}) {sign} {value!r}: compare with text, a number or a bool; for null use .is_null()"
            )
            raise TypeError(msg)
        return Compare(self._field, sign, value)


def values_of(condition: Condition) -> Iterable[tuple[str, Scalar]]:
    """Every (field, literal) pair that a condition compares, for checking against the contract."""
    match condition:
        case Compare():
            yield condition.field, condition.value
        case OneOf():
            yield from ((condition.field, value) for value in condition.values)
        case Both() | Either():
            yield from values_of(condition.left)
            yield from values_of(condition.right)
        case Not():
            yield from values_of(condition.inner)


def text_of(condition: AnyCondition) -> str:
    """The condition as it is declared.

    >>> print(text_of((col("price") > 10) & ~col("surface").is_null()))
    (col("price") > 10) & (~(col("surface").is_null()))
    """
    match condition:
        case Compare():
            return f"{_col(condition.field)} {condition.sign} {_literal(condition.value)}"
        case OneOf():
            return f"{_col(condition.field)}.one_of({', '.join(map(_literal, condition.values))})"
        case IsNull():
            return f"{_col(condition.field)}.is_null()"
        case Both() | Either():
            sign = "&" if isinstance(condition, Both) else "|"
            return f"({text_of(condition.left)}) {sign} ({text_of(condition.right)})"
        case Not():
            return f"~({text_of(condition.inner)})"


def _col(field: str) -> str:
    return f'col("{field}")'


def _literal(value: Scalar) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
