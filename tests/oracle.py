"""Brute force: every aggregation over a plain list of events, written from the window rule and nothing else.

It shares no code with `features`. Events are dictionaries with `t` (ms) and fields; a missing field is null.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LADDER_S = [5, 30, 60, 300, 3600, 21600, 86400]
UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

OracleEvent = Mapping[str, Any]


class About(float):
    """A number that may be answered within 1 %."""


def seconds(text: str) -> int:
    """The length of a duration; of a window that says its step, without it."""
    text = text.partition("/")[0]
    return int(text[:-1]) * UNIT_S[text[-1]]


def hop_ms(window: str) -> int:
    """The largest step at most a tenth of the window, or the one that it says."""
    if "/" in window:
        return seconds(window.partition("/")[2]) * 1000
    return max(step for step in LADDER_S if step <= seconds(window) / 10) * 1000


def tail_ms(window: str, query_ms: int) -> int:
    """The first millisecond inside the window."""
    if window == "all":
        return -(1 << 62)
    hop = hop_ms(window)
    return (query_ms - seconds(window) * 1000) // hop * hop


def within(events: Iterable[OracleEvent], window: str, query_ms: int) -> list[OracleEvent]:
    """The events that a window holds; the caller passes none at or after the query."""
    return [event for event in events if event["t"] >= tail_ms(window, query_ms)]


def expected(  # noqa: PLR0917  # every option of every aggregation
    agg: str,
    events: Iterable[OracleEvent],
    query_ms: int,
    window: str = "all",
    field: str | None = None,
    k: int = 0,
    half_life: str = "1h",
    q: float = 0.5,
    before: str = "",
    fields: Sequence[str] = (),
    of: str = "",
) -> Any:
    """The value that the window rule gives."""
    events = list(events)
    inside = within(events, window, query_ms)
    if field is not None and "+" in field:
        parts = [[event.get(name) for name in field.split("+")] for event in inside]
        inside = [{"t": 0, field: tuple(part)} for part in parts if None not in part]
    if field is not None:
        inside = [event for event in inside if event.get(field) is not None]
    values = [event[field] for event in inside] if field is not None else [1.0] * len(inside)
    oldest = sorted(inside, key=lambda event: (event["t"], event[str(field)] if field else 0))
    newest = sorted(inside, key=lambda event: (event["t"], event[str(field)] if field else 0), reverse=True)
    if agg == "sequence":
        ranked = sorted(inside, key=lambda event: (event["t"], [_or_least(event.get(name)) for name in fields]))
        return [event["t"] if of == "occurred_at" else event.get(of) for event in ranked[::-1]][:k]
    match agg:
        case "count":
            return len(inside)
        case "sum":
            return math.fsum(values)
        case "mean":
            return math.fsum(values) / len(values) if values else None
        case "min":
            return min(values, default=None)
        case "max":
            return max(values, default=None)
        case "std":
            if not values:
                return None
            mean = math.fsum(values) / len(values)
            return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        case "distinct":
            return len(set(values))
        case "last":
            return newest[0][str(field)] if newest else None
        case "last_k":
            return list(dict.fromkeys(event[str(field)] for event in newest))[:k]
        case "seconds_since":
            return max(0.0, (query_ms - newest[0]["t"]) / 1000) if newest else None
        case "entropy":
            shares = [n / len(values) for n in Counter(values).values()]
            return math.fsum(-share * math.log(share) for share in shares) if values else None
        case "quantile":
            return About(sorted(values)[math.floor(q * (len(values) - 1))]) if values else None
        case "delta":
            hop, ago_ms = hop_ms(window), query_ms - seconds(before) * 1000
            begin_ms, end_ms = tail_ms(window, ago_ms), ago_ms // hop * hop
            earlier = [event for event in events if begin_ms <= event["t"] < end_ms]
            if field is None:
                return len(inside) - len(earlier)
            gone = [event[field] for event in earlier if event.get(field) is not None]
            return math.fsum(values) - math.fsum(gone)
        case "first":
            return oldest[0][str(field)] if oldest else None
        case "first_k":
            return list(dict.fromkeys(event[str(field)] for event in oldest))[:k]
        case "since_first":
            return max(0.0, (query_ms - oldest[0]["t"]) / 1000) if oldest else None
        case "decayed":
            return math.fsum(
                value * 2 ** (-(query_ms - event["t"]) / 1000 / seconds(half_life))
                for value, event in zip(values, inside, strict=True)
            )
        case "top_k":
            return [value for value, _ in sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0]))[:k]]
    raise AssertionError(agg)


def _or_least(value: Any) -> tuple[bool, Any]:
    return value is not None, value


def close(got: Any, want: Any) -> bool:
    """Equal, floats to 1e-9 relative (and to the rounding of a sum that cancels)."""
    if isinstance(want, About):
        return isinstance(got, float) and math.isclose(got, want, rel_tol=0.0100001)
    if isinstance(want, float) and isinstance(got, int | float):
        return math.isclose(got, want, rel_tol=1e-9, abs_tol=1e-9 * max(1.0, abs(want)) if abs(want) > 1e-3 else 1e-12)
    return bool(got == want and type(got) is type(want))
