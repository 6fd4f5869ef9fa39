"""The request that the read benchmarks make: one user and 200 items of `ranking_v1`, and what its answers must hold."""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import orjson

from benchmarks.feast_peer import FeastPeer, feast_columns, post
from benchmarks.load import http_request
from benchmarks.population import Asked
from features.aggregations import Last, LastK
from features.plan import Given, Plan

SERVICE: Final = "ranking_v1"
NPY: Final = "application/x-npy"
JSON: Final = "application/json"
_IN_EARNEST: Final = 0.5
# At least one feature of every family of rows that the service reads.
_SHOWN: Final = (
    "user_activity__clicks_24h",
    "user_taste__top_categories_7d",
    "user_history__clicked",
    "user_history__liked",
    "item_activity__clicks_1h",
    "item_activity__seller",
    "user_item__category_clicks",
)
_DEMANDED: Final = ("users", "items", *_SHOWN[:-1])


def body(asked: Asked, service: str = SERVICE) -> dict[str, Any]:
    """The body of `POST /v1/features`."""
    return {"service": service, "user_id": asked.user_id, "item_ids": asked.item_ids}


def http(asked: Iterable[Asked], accept: str, service: str = SERVICE) -> list[bytes]:
    """The requests as they go over the wire."""
    return [http_request("POST", "/v1/features", orjson.dumps(body(each, service)), accept) for each in asked]


def columns_of(answer: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Every feature of a JSON answer by its full name, with a value for each item."""
    n = len(answer["items"])
    columns = {name: [value] * n for name, value in answer["user"]["features"].items()}
    rows = (item["values"] for item in answer["items"])
    columns |= zip(answer["features"], map(list, zip(*rows, strict=True)), strict=True)
    return columns


def hit_rates(address: str, asked: Sequence[Asked], *, demand: bool) -> str:
    """How much of what is asked for is there, in a sentence: rows found, and features that are not null, 0 or empty.

    Raises:
        RuntimeError: if `demand` and some rows, lists or texts are there for less than half: that would not be read in
            earnest.
    """
    users = items = 0
    filled: dict[str, list[float]] = {}
    for each in asked:
        answer = post(f"{address}/v1/features", body(each))
        users += answer["user"]["status"] == "PRESENT"
        items += sum(item["status"] == "PRESENT" for item in answer["items"])
        columns = columns_of(answer)
        for name in _SHOWN:
            filled.setdefault(name, []).append(sum(map(bool, columns[name])) / len(each.item_ids))
    shares = {
        "users": users / len(asked),
        "items": items / sum(len(each.item_ids) for each in asked),
        **{name: float(np.mean(values)) for name, values in filled.items()},
    }
    if demand and (empty := [name for name in _DEMANDED if shares[name] < _IN_EARNEST]):
        msg = f"less than half of the requests' {', '.join(empty)} hold anything; the population is too thin"
        raise RuntimeError(msg)
    return "found or not empty: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def check_equal(ours: str, theirs: str, peer: FeastPeer, written: Mapping[str, Any], asked: Sequence[Asked]) -> None:
    """Both servers' answers to some requests, compared.

    The peer must answer exactly what was written, which is what Headrace answered then. What no passing of time changes
    (last values, lists) must still be the same in Headrace's JSON and matrix.

    Raises:
        RuntimeError: naming the first feature, item and values that differ.
    """
    matrix_names = _get_json(f"{ours}/v1/services/{peer.service}")["matrix"]
    for each in asked:
        answered = feast_columns(post(f"{theirs}/get-online-features", peer.request(each)))
        check_written(peer, written, answered)
        check_same(peer.plan, columns_of(post(f"{ours}/v1/features", body(each, peer.service))), answered)
        matrix = np.load(io.BytesIO(_post_npy(ours, each, peer.service)))
        if matrix.shape != (len(each.item_ids), len(matrix_names)):
            msg = f"the matrix has shape {matrix.shape}, where {len(each.item_ids)} x {len(matrix_names)} was expected"
            raise RuntimeError(msg)
        numbers = {name: np.array(answered[name], np.float32).tolist() for name in matrix_names}
        check_same(peer.plan, dict(zip(matrix_names, matrix.T.tolist(), strict=True)), numbers)


def check_users(ours: str, theirs: str, peer: FeastPeer, written: Mapping[str, Any], asked: Sequence[Asked]) -> None:
    """As `check_equal`, for requests of the user alone."""
    for each in asked:
        answered = feast_columns(post(f"{theirs}/get-online-features", peer.request(each)))
        check_written(peer, written, answered)
        features = _get_json(f"{ours}/v1/entities/user/{each.user_id}?service={SERVICE}")["features"]
        check_same(peer.plan, {name: [value] for name, value in features.items()}, answered)


def check_written(peer: FeastPeer, written: Mapping[str, Any], answered: Mapping[str, list[Any]]) -> None:
    """Raises RuntimeError unless the peer's answer holds what was written, every value of it."""
    for view in peer.views:
        for feature in view.features:
            values = [written[view.name][entity_id][feature.full_name] for entity_id in answered[view.key]]
            _check(feature.full_name, answered[feature.full_name], values)


def check_same(plan: Plan, ours: Mapping[str, list[Any]], theirs: Mapping[str, list[Any]]) -> None:
    """Raises RuntimeError unless both have the same last values and lists; both are columns by name."""
    for name in steady(plan) & set(ours):
        _check(name, ours[name], theirs[name])


def steady(plan: Plan) -> set[str]:
    """Full names of the features whose value no passing of time changes: `last` and `last_k`, and given ones."""
    return {
        each.full_name
        for each in plan.features.values()
        if isinstance(each.spec, Given) or (isinstance(each.spec, Last | LastK) and not each.spec.over)
    }


def _check(name: str, left: Sequence[Any], right: Sequence[Any]) -> None:
    # Feast's protocol has null where we have an empty list, and in a matrix null is NaN.
    for at, (one, other) in enumerate(zip(left, right, strict=True)):
        if one != other and not (_nothing(one) and _nothing(other)):
            msg = f"{name} is {one!r} on one side and {other!r} on the other, in row {at} of an answer"
            raise RuntimeError(msg)


def _nothing(value: Any) -> bool:
    return value is None or value == [] or value != value  # noqa: PLR0124  # only NaN differs from itself


def keys_read(client: Any) -> int:
    """How many keys Redis was ever asked for, by its own statistics: what a mirror saves, whatever it says itself."""
    stats = client.info("stats")
    return int(stats["keyspace_hits"]) + int(stats["keyspace_misses"])


def hit_rate(keys_a_request: float, of_mirror: float, n_items: int) -> str:
    """Share of item rows that a mirror did not read, in words, from the keys that Redis was asked for a request."""
    return (
        f"no writes meanwhile; hit rate {(keys_a_request - of_mirror) / n_items:.1%} of the item rows, by Redis's own "
        f"count: {of_mirror:.1f} keys a request instead of {keys_a_request:.1f}"
    )


def _get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  # our own address, with http
        return orjson.loads(answer.read())


def _post_npy(address: str, asked: Asked, service: str) -> bytes:
    request = urllib.request.Request(  # noqa: S310  # our own address, with http
        f"{address}/v1/features", orjson.dumps(body(asked, service)), {"Content-Type": JSON, "Accept": NPY}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310  # as above
        content: bytes = answer.read()
        return content
