"""What a declaration may say: every mistake is a DeclarationError that names the place, the value and the remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Final

from features.aggregations import Distinct, Last, LastK, SecondsSince, TopK
from features.aggregations.base import Aggregation
from features.aggregations.decayed import Decayed
from features.events import Event, Kind
from features.expectations import Expectation, Rate, per_second
from features.expressions import Condition, values_of
from features.times import Window, duration_ms

_NAME: Final = re.compile(r"[a-z](?:_?[a-z0-9])*")
_NAME_LENGTH_MAX: Final = 64
_MANY_MAX: Final = 1000
TEXTS_A_ROW_MAX: Final = 65_000
"""Of the 65,535 that the packed row can count."""
_NUMBERS: Final[tuple[Kind, ...]] = ("int", "float", "bool")
_TEXTS: Final[tuple[Kind, ...]] = ("str", "int")
"""A whole number is its decimal text where one is wanted: ids are."""
_ONE: Final[tuple[Kind, ...]] = ("str", *_NUMBERS)


class DeclarationError(ValueError):
    """A declaration that can't be right: says where, what, and what would be."""


def mistake(place: str, wrong: str, right: str) -> DeclarationError:
    """The error for something wrong at a place, and what would be right."""
    return DeclarationError(f"{place}: {wrong}; {right}")


def check_name(what: str, name: object) -> None:
    """A name that keys, features and files can carry."""
    if not isinstance(name, str) or len(name) > _NAME_LENGTH_MAX or _NAME.fullmatch(name) is None:
        right = "use small letters, digits and single underscores between them, a letter first, at most 64 characters"
        raise mistake(what, f"{name!r} is no name", right)


def check_duration(
    place: str,
    parse: Callable[[str], Any],
    text: object,
    right: str = "write a duration such as '30m', '24h' or '7d'",
) -> None:
    """A text that `parse` takes."""
    if not isinstance(text, str):
        raise mistake(place, f"{text!r} is no text", right)
    try:
        parse(text)
    except ValueError as error:
        message = f"{place}: {error}"
        raise DeclarationError(message) from None


def check_event(place: str, event: object) -> None:
    """A contract."""
    if not (isinstance(event, type) and issubclass(event, Event)):
        raise mistake(place, f"{event!r} is no contract", "name a subclass of headrace.Event")


def checked_options(place: str, kind: type[Aggregation], event: type[Event], options: dict[str, Any]) -> dict[str, Any]:
    """An aggregation's options, as its plain data has them."""
    given = {name: value for name, value in options.items() if value is not None}
    _check_fields(place, kind, event, given)
    _check_windows(place, kind, given["over"])
    if "half_life" in given:
        check_duration(f"{place}: half_life", duration_ms, given["half_life"])
    for name in ("k", "buckets"):
        value = given.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MANY_MAX:
            raise mistake(place, f"{name}={value!r} is out of range", f"use a whole number from 1 to {_MANY_MAX}")
    for name in ("where", "of_where"):
        if name in given:
            _check_condition(place, name, given["of"] if name == "of_where" else event, given[name])
    if "of" in given:
        given |= {"of": given["of"].__name__, **_checked_prior(place, given["prior"], given["strength"])}
    if "default" in given:
        given["default"] = checked_default(
            place, given["default"], is_text=given.get("kind") == "str", is_map="by" in given
        )
    return given


def _check_fields(place: str, kind: type[Aggregation], event: type[Event], given: dict[str, Any]) -> None:
    """`field` and `by`; of `last`, also the field's kind becomes an option."""
    if "of" in given:
        check_event(f"{place}: of", given["of"])
    if kind is Last:
        given["kind"] = field_kind(place, event, "field", given.get("field"), *_ONE)
    elif kind in (LastK, TopK):
        field_kind(place, event, "field", given.get("field"), *_TEXTS)
    elif "field" in given:
        field_kind(place, event, "field", given["field"], *(_ONE if kind is Distinct else _NUMBERS))
    if "by" in given:
        for each in (event, given.get("of", event)):
            field_kind(place, each, "by", given["by"], *_TEXTS, "list[str]")


def _check_windows(place: str, kind: type[Aggregation], over: tuple[Any, ...]) -> None:
    for window in over:
        check_duration(f"{place}: over", Window.parse, window)
    if len(set(over)) < len(over):
        raise mistake(place, f"over={list(over)} names a window twice", "name each once")
    if not over and kind not in (Last, LastK, SecondsSince, Decayed):
        raise mistake(place, "over=[] names no window", "name one, such as over='24h', or over='all'")


def _checked_prior(place: str, prior: object, strength: object) -> dict[str, float]:
    for name, value in (("prior", prior), ("strength", strength)):
        if not _is_number(value):
            raise mistake(
                place, f"{name}={value!r} is no finite number", "use a prior from 0 to 1 and a strength above 0"
            )
    checked = {"prior": float(prior), "strength": float(strength)}  # type: ignore[arg-type]  # numbers: see above
    if not (checked["strength"] > 0 and 0 <= checked["prior"] <= 1):
        raise mistake(
            place, f"prior={prior!r}, strength={strength!r}", "use a prior from 0 to 1 and a strength above 0"
        )
    return checked


def checked_default(place: str, default: object, *, is_text: bool = False, is_map: bool = False) -> float | str:
    """The default, which must be of the feature's type."""
    if is_map:
        raise mistake(
            place, f"default={default!r} of a feature with by=", "leave it out: a bucket without events reads as none"
        )
    if is_text and isinstance(default, str):
        return default
    if not is_text and _is_number(default):
        return float(default)  # type: ignore[arg-type]  # a number: see above
    raise mistake(
        place, f"default={default!r} is not of the feature's type", f"use {'text' if is_text else 'a finite number'}"
    )


def checked_expectations(event: type[Event], expectations: object) -> tuple[Expectation, ...]:
    """What a contract expects of its events."""
    place = event.__name__
    if not isinstance(expectations, list | tuple):
        raise mistake(place, f"expect={expectations} is no list", 'write expect=[share_null("category") < 0.05]')
    for each in expectations:
        if not isinstance(each, Expectation):
            right = 'write share_null("category") < 0.05, share(col("price") > 1000) < 0.01 or rate > "10/s"'
            raise mistake(place, f"expect has {each}, which expects nothing", right)
        if isinstance(each.of, Rate):
            check_duration(f"{place}: {each}", per_second, each.bound, "write a rate such as '10/s'")
            continue
        _check_condition(place, "share", event, each.of.where)
        if always := {"event_id", "occurred_at"} & each.fields():
            raise mistake(place, f"expect reads {always.pop()!r}", "leave it out: every event has its own")
        if not (_is_number(each.bound) and 0 <= float(each.bound) <= 1):
            raise mistake(place, f"{each.of} {each.sign} {each.bound!r}", "compare a share with a number from 0 to 1")
    found = tuple(expectations)
    if twice := [str(each) for each in found if found.count(each) > 1]:
        raise mistake(place, f"expects {twice[0]} twice", "say it once")
    return found


def _check_condition(place: str, option: str, event: type[Event], condition: object) -> None:
    if not isinstance(condition, Condition):
        raise mistake(place, f"{option}={condition!r} is no condition", f'write {option}=col("surface") == "search"')
    for name in condition.fields():
        field_kind(place, event, option, name, *_ONE)
    for name, value in values_of(condition):
        kind = event.kinds()[name]
        if (kind == "str") != isinstance(value, str) or (kind != "str" and not _is_number(value, or_bool=True)):
            raise mistake(
                place,
                f"{option} compares {name!r} with {value!r}",
                f"the field is {kind}: compare it with such a value",
            )


def field_kind(place: str, event: type[Event], option: str, name: object, *kinds: Kind) -> Kind:
    """The kind of a contract's field, which must be one of `kinds` if there are any."""
    known = event.kinds()
    if not isinstance(name, str) or name not in known:
        raise mistake(place, f"{option}={name!r} is no field of {event.__name__}", f"it has: {', '.join(known)}")
    if kinds and known[name] not in kinds:
        raise mistake(place, f"{option}={name!r} is {known[name]}", f"it needs a field of type {' or '.join(kinds)}")
    return known[name]


def _is_number(value: object, *, or_bool: bool = False) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and (or_bool or not isinstance(value, bool))
