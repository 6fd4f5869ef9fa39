"""Aggregations as a user declares them: `clicks = agg.count(Click, over=["10m", "1h", "24h"])`.

Each function returns a handle; its options are checked against the contract when the view is made. Shared options:
`over` names windows (`1m` to `90d`, or `all`), and each becomes a feature `attribute_window`; `where` keeps the events
for which a condition holds; `by` splits by a text field into at most `buckets` buckets a row, those seen latest;
`default` is served where the value is null; `doc` describes the feature in the catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

from features import aggregations as kinds
from features.aggregations.base import DEFAULT_BUCKETS, Aggregation
from features.aggregations.sequence import TIME
from features.checks import checked_edges, checked_shares
from features.events import Event
from features.expressions import Condition, col
from features.language import Declared, Group

Over = str | Sequence[str]


def count(
    event: type[Event],
    *,
    over: Over,
    where: Condition | None = None,
    by: str | None = None,
    buckets: int = DEFAULT_BUCKETS,
    doc: str = "",
) -> Declared:
    """How many events. Nothing seen: 0."""
    return _declare(kinds.Count, event, over, where=where, by=by, buckets=buckets, doc=doc)


def sum(  # noqa: A001  # on purpose: it is used as agg.sum
    event: type[Event],
    field: str,
    *,
    over: Over,
    where: Condition | None = None,
    by: str | None = None,
    buckets: int = DEFAULT_BUCKETS,
    doc: str = "",
) -> Declared:  # the field's standard term; used as agg.sum
    """The sum of a field, of events that have it: a bucket with none is not in the map. Nothing seen: 0."""
    return _declare(kinds.Sum, event, over, field=field, where=where, by=by, buckets=buckets, doc=doc)


def mean(
    event: type[Event],
    field: str,
    *,
    over: Over,
    where: Condition | None = None,
    by: str | None = None,
    buckets: int = DEFAULT_BUCKETS,
    default: float | None = None,
    doc: str = "",
) -> Declared:
    """The arithmetic mean of a field. Nothing seen: null."""
    return _declare(kinds.Mean, event, over, field=field, where=where, by=by, buckets=buckets, default=default, doc=doc)


def min(  # noqa: A001  # on purpose: it is used as agg.min
    event: type[Event],
    field: str,
    *,
    over: Over,
    where: Condition | None = None,
    by: str | None = None,
    buckets: int = DEFAULT_BUCKETS,
    default: float | None = None,
    doc: str = "",
) -> Declared:  # as sum
    """The smallest value of a field. Nothing seen: null."""
    return _declare(kinds.Min, event, over, field=field, where=where, by=by, buckets=buckets, default=default, doc=doc)


def max(  # noqa: A001  # on purpose: it is used as agg.max
    event: type[Event],
    field: str,
    *,
    over: Over,
    where: Condition | None = None,
    by: str | None = None,
    buckets: int = DEFAULT_BUCKETS,
    default: float | None = None,
    doc: str = "",
) -> Declared:  # as sum
    """The largest value of a field. Nothing seen: null."""
    return _declare(kinds.Max, event, over, field=field, where=where, by=by, buckets=buckets, default=default, doc=doc)


def std(
    event: type[Event],
    field: str,
    *,
    over: Over,
    where: Condition | None = None,
    by: str | None = None,
    buckets: int = DEFAULT_BUCKETS,
    default: float | None = None,
    doc: str = "",
) -> Declared:
    """The population's standard deviation of a field. Nothing seen: null.

    It is off by no more than 1e-9 of itself and 2e-15 of the largest value: nine digits are right where values are up
    to a million times their spread, and four where they are 1e11 times it.
    """
    return _declare(kinds.Std, event, over, field=field, where=where, by=by, buckets=buckets, default=default, doc=doc)


def quantile(
    event: type[Event],
    field: str,
    q: Sequence[float],
    *,
    over: Over,
    where: Condition | None = None,
    default: float | None = None,
    doc: str = "",
) -> Group:
    """Quantiles of a field, each within 1 % of itself. Nothing seen: null.

    Features are named by the percentage: of `price` with `q=[0.5, 0.999]`, `price_p50_24h` and `price_p99_9_24h`, which
    `price["p50"]["24h"]` names in the view. The value of one is that at rank floor(q * (n - 1)). Numbers of less than
    1e-12 count as 0, those over 1e38 as that.
    """
    options: dict[str, Any] = {"field": field, "where": where, "default": default, "doc": doc}
    shares = checked_shares(f"quantile of {field}", q)
    names = [f"p{100 * each:g}".replace(".", "_") for each in shares]
    every = zip(names, shares, strict=True)
    return Group({name: _declare(kinds.Quantile, event, over, q=each, **options) for name, each in every})


def histogram(
    event: type[Event],
    field: str,
    edges: Sequence[float],
    *,
    over: Over,
    where: Condition | None = None,
    doc: str = "",
) -> Group:
    """How many values of a field are below the first edge, from each edge to the next, and from the last on.

    Each is a count with a condition: of `price` with two edges, `price_bin0_24h` to `price_bin2_24h`, which
    `price["bin0"]["24h"]` names in the view. Nothing seen: 0.
    """
    edges = checked_edges(f"histogram of {field}", edges)
    inner = [((col(field) >= low) & (col(field) < high), f"{low:g} to {high:g}") for low, high in pairwise(edges)]
    bins = [(col(field) < edges[0], f"below {edges[0]:g}"), *inner, (col(field) >= edges[-1], f"from {edges[-1]:g}")]
    members, given = {}, cast("object", where)
    for number, (inside, text) in enumerate(bins):
        # What is no condition is for the view's check to refuse.
        both = inside if given is None else given & inside if isinstance(given, Condition) else given
        described = f"{doc}: {text}" if doc else text
        members[f"bin{number}"] = _declare(kinds.Count, event, over, field=field, where=both, doc=described)
    return Group(members)


def entropy(
    event: type[Event],
    *,
    by: str,
    over: Over,
    where: Condition | None = None,
    buckets: int = DEFAULT_BUCKETS,
    default: float | None = None,
    doc: str = "",
) -> Declared:
    """Shannon's entropy, in nats, of a text field's values, of the `buckets` seen latest: 0 if all are the same.

    Nothing seen: null.
    """
    options = {"field": by, "where": where, "buckets": buckets, "default": default, "doc": doc}
    return Declared(kinds.Entropy, event, {"over": _windows(over), **options})


def distinct(
    event: type[Event], field: str | Sequence[str], *, over: Over, where: Condition | None = None, doc: str = ""
) -> Declared:
    """How many distinct values: exact up to 64, within 5 % (one standard error) above. Nothing seen: 0.

    Of several fields (`["item_id", "size"]`), how many combinations, of events that have them all.
    """
    return _declare(kinds.Distinct, event, over, field=field, where=where, doc=doc)


def last(
    event: type[Event],
    field: str,
    *,
    over: Over = (),
    where: Condition | None = None,
    default: float | str | None = None,
    doc: str = "",
) -> Declared:
    """The latest value of a field. Nothing seen: null."""
    return _declare(kinds.Last, event, over, field=field, where=where, default=default, doc=doc)


def last_k(
    event: type[Event], field: str, k: int, *, over: Over = (), where: Condition | None = None, doc: str = ""
) -> Declared:
    """The k latest distinct values of a text field, newest first. Nothing seen: empty."""
    return _declare(kinds.LastK, event, over, field=field, k=k, where=where, doc=doc)


def sequence(
    event: type[Event],
    fields: Sequence[str],
    k: int,
    *,
    over: Over = (),
    where: Condition | None = None,
    doc: str = "",
) -> Group:
    """The k latest events, newest first, equal ones as often as they happened. Nothing seen: empty.

    Each field is a list of its own (`recent["item_id"]`), and so are the times, in ms (`recent["occurred_at"]`).
    Those of one window are of the same events. A derived feature gets numbers as float64[n, k], NaN behind the last.
    """
    options: dict[str, Any] = {"fields": fields, "k": k, "where": where, "doc": doc}
    names = [*(fields if isinstance(fields, list | tuple) else [fields]), TIME]
    return Group({str(name): _declare(kinds.Sequence, event, over, of=name, **options) for name in names})


def seconds_since(
    event: type[Event], *, over: Over = (), where: Condition | None = None, default: float | None = None, doc: str = ""
) -> Declared:
    """Seconds since the latest event. Nothing seen: null."""
    return _declare(kinds.SecondsSince, event, over, where=where, default=default, doc=doc)


def first(
    event: type[Event],
    field: str,
    *,
    over: Over = (),
    where: Condition | None = None,
    default: float | str | None = None,
    doc: str = "",
) -> Declared:
    """The earliest value of a field. Nothing seen: null.

    Without windows, of all events since the entity was last forgotten (`forget_after`).
    """
    return _declare(kinds.First, event, over, field=field, where=where, default=default, doc=doc)


def first_k(event: type[Event], field: str, k: int, *, where: Condition | None = None, doc: str = "") -> Declared:
    """The k earliest distinct values of a text field, oldest first. Nothing seen: empty."""
    return _declare(kinds.FirstK, event, (), field=field, k=k, where=where, doc=doc)


def since_first(
    event: type[Event], *, over: Over = (), where: Condition | None = None, default: float | None = None, doc: str = ""
) -> Declared:
    """Seconds since the earliest event. Nothing seen: null."""
    return _declare(kinds.SinceFirst, event, over, where=where, default=default, doc=doc)


def decayed(
    event: type[Event],
    field: str | None = None,
    *,
    half_life: str,
    where: Condition | None = None,
    by: str | None = None,
    buckets: int = DEFAULT_BUCKETS,
    doc: str = "",
) -> Declared:
    """The sum of x * 2^(-age / half_life), of a field or of 1 an event. Nothing seen: 0."""
    return _declare(
        kinds.Decayed, event, (), field=field, half_life=half_life, where=where, by=by, buckets=buckets, doc=doc
    )


def rate(  # noqa: PLR0913  # as ratio
    event: type[Event],
    of: type[Event],
    field: str | None = None,
    *,
    half_life: str,
    prior: float,
    strength: float,
    where: Condition | None = None,
    of_where: Condition | None = None,
    by: str | None = None,
    buckets: int = DEFAULT_BUCKETS,
    doc: str = "",
) -> Declared:
    """A smoothed rate of decayed sums, (events, or a field's sum, + prior * strength) / (events `of` + strength)."""
    options = {"prior": prior, "strength": strength, "where": where, "of_where": of_where, "doc": doc}
    return _declare(kinds.Rate, event, (), field=field, of=of, half_life=half_life, by=by, buckets=buckets, **options)


def delta(
    event: type[Event],
    field: str | None = None,
    *,
    over: str,
    before: str | None = None,
    where: Condition | None = None,
    doc: str = "",
) -> Declared:
    """Events in a window, or the sum of a field, less those of as wide a window that ended `before` ago.

    By default of the window right before it. Nothing seen: 0.
    """
    before = over if before is None else before
    return _declare(kinds.Delta, event, over, field=field, before=before, where=where, doc=doc)


def top_k(
    event: type[Event],
    field: str,
    k: int,
    *,
    over: Over,
    where: Condition | None = None,
    buckets: int = DEFAULT_BUCKETS,
    doc: str = "",
) -> Declared:
    """The k most frequent values of a text field, of the `buckets` seen latest. Nothing seen: empty."""
    return Declared(
        kinds.TopK,
        event,
        {"over": _windows(over), "field": field, "k": k, "where": where, "buckets": buckets, "doc": doc},
    )


def ratio(  # noqa: PLR0913  # its options are keyword-only, and each says a thing of its own
    event: type[Event],
    of: type[Event],
    *,
    over: Over,
    prior: float,
    strength: float,
    where: Condition | None = None,
    of_where: Condition | None = None,
    by: str | None = None,
    buckets: int = DEFAULT_BUCKETS,
    doc: str = "",
) -> Declared:
    """A smoothed rate, (events + prior * strength) / (events `of` + strength): clicks of impressions, say."""
    return _declare(
        kinds.Ratio,
        event,
        over,
        of=of,
        prior=prior,
        strength=strength,
        where=where,
        of_where=of_where,
        by=by,
        buckets=buckets,
        doc=doc,
    )


def _declare(
    kind: type[Aggregation],
    event: type[Event],
    over: Over,
    *,
    by: str | None = None,
    buckets: int | None = None,
    **options: Any,
) -> Declared:
    return Declared(kind, event, {"over": _windows(over), "by": by, "buckets": buckets if by else None, **options})


def _windows(over: Any) -> tuple[str, ...]:
    # What is no text is for the view's check to refuse, which knows the feature's name.
    return tuple(over) if isinstance(over, list | tuple) else (over,)
