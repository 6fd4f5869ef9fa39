"""Checks beyond types, declared beside a contract: `expect=[share_null("category") < 0.05, rate > "10/s"]`.

An expectation is plain data, so that the plan can keep it. It is of many events at once, and refuses none of them:
`headrace quality` says which are not met.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.expressions import AnyCondition, Condition, Fields, IsNull, text_of
from features.times import duration_ms

Sign = Literal["<", "<=", ">", ">="]

_HOLDS: Final[dict[Sign, Callable[[float, float], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class Share(msgspec.Struct, frozen=True, tag_field="is", tag="share"):
    """The share of events for which a condition holds; compare it with a number from 0 to 1."""

    where: AnyCondition

    def __lt__(self, bound: float) -> Expectation:
        return _expectation(self, "<", bound)

    def __le__(self, bound: float) -> Expectation:
        return _expectation(self, "<=", bound)

    def __gt__(self, bound: float) -> Expectation:
        return _expectation(self, ">", bound)

    def __ge__(self, bound: float) -> Expectation:
        return _expectation(self, ">=", bound)

    def __str__(self) -> str:
        if isinstance(self.where, IsNull):
            return f'share_null("{self.where.field}")'
        return f"share({text_of(self.where)})"


class Rate(msgspec.Struct, frozen=True, tag_field="is", tag="rate"):
    """How many events there are; compare it with a text such as `10/s`, `600/m` or `1000/d`."""

    def __lt__(self, bound: str) -> Expectation:
        return _expectation(self, "<", bound)

    def __le__(self, bound: str) -> Expectation:
        return _expectation(self, "<=", bound)

    def __gt__(self, bound: str) -> Expectation:
        return _expectation(self, ">", bound)

    def __ge__(self, bound: str) -> Expectation:
        return _expectation(self, ">=", bound)

    def __str__(self) -> str:
        return "rate"


class Expectation(msgspec.Struct, frozen=True):
    """`share(…) < 0.05` or `rate > "10/s"`; `str` gives it as it was declared."""

    of: Share | Rate
    sign: Sign
    bound: float | str

    def __bool__(self) -> bool:
        msg = "an expectation has no truth value at import: declare two in place of `0.1 < share(…) < 0.2`"
        raise TypeError(msg)

    def __str__(self) -> str:
        bound = f"{self.bound:g}" if isinstance(self.bound, float) else f'"{self.bound}"'
        return f"{self.of} {self.sign} {bound}"

    def fields(self) -> set[str]:
        """Names of the event fields that it reads."""
        return self.of.where.fields() if isinstance(self.of, Share) else set()

    def counted(self, columns: Fields, n: int) -> NDArray[np.bool_]:
        """bool[n]: which of n events it counts."""
        return self.of.where.holds(columns) if isinstance(self.of, Share) else np.ones(n, bool)

    def value(self, n_events: int, n_counted: int, span_s: float) -> float | None:
        """The share, or the events a second, that it is about; None for a share of no events."""
        if isinstance(self.of, Rate):
            return n_events / span_s
        return n_counted / n_events if n_events else None

    def is_met(self, value: float | None) -> bool:
        """Whether a value is as expected; what is not known is."""
        bound = per_second(self.bound) if isinstance(self.bound, str) else self.bound
        return value is None or _HOLDS[self.sign](value, bound)


rate: Final = Rate()
"""How many events of the contract there are: `rate > "10/s"`."""


def share(where: Condition) -> Share:
    """The share of events for which a condition holds: `share(col("price") > 1000) < 0.01`."""
    return Share(where)  # type: ignore[arg-type]  # every Condition is one of AnyCondition; what is none is refused later


def share_null(field: str) -> Share:
    """The share of events that leave a field out or send null: `share_null("category") < 0.05`."""
    return Share(IsNull(field))


def per_second(text: str) -> float:
    """Events a second of a rate such as `10/s`, `0.5/m`, `600/h` or `1000/d`.

    Raises:
        ValueError: if the text is none.

    >>> per_second("600/m")
    10.0
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)/([smhd])", text)
    if match is None:
        msg = f"{text!r} is no rate: write a number a unit of time, such as '10/s', '600/m', '1000/h' or '5000/d'"
        raise ValueError(msg)
    return float(match[1]) * 1000 / duration_ms(f"1{match[2]}")


def _expectation(of: Share | Rate, sign: Sign, bound: Any) -> Expectation:
    # As a number it is read back from a plan; what else it may be is seen where it is declared.
    number = isinstance(bound, int) and not isinstance(bound, bool)
    return Expectation(of, sign, float(bound) if number else bound)
