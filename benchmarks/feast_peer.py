"""Feast with its own Redis store, as well set up as its users can: what the read benchmarks compare with.

It serves as many features as `ranking_v1` has, of the same types, in as many views of the same entities; the values are
those that Headrace answers at the time of writing, and are finished: nothing is left to compute when they are read. The
features of a user and an item together, which Feast would have to compute in an on-demand view (some hundred times as
long as the rest), are plain columns of the item here.

Tuned: redis-py with hiredis; `skip_dedup`, no key expiry, no `ttl`; the registry in memory, not refreshed during a
run; `feast serve` with one gunicorn worker that is never restarted (`--max-requests 0`), without access log and
metrics, on uvloop and httptools, which its worker class takes by itself.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pandas as pd
from redis.utils import HIREDIS_AVAILABLE

from benchmarks.population import Asked
from benchmarks.project import server
from features.plan import Feature, Plan

# After Feast is set up by our own package: see registry/__init__.py.
from registry.compile import FEAST_TYPES  # isort: skip
import feast  # isort: skip

_DTYPES: Final[dict[str, Any]] = {"int": "int64", "float": "float64", "bool": "bool"}
_YAML: Final = """\
project: peer
provider: local
registry:
  path: registry.db
  cache_ttl_seconds: 86400
online_store:
  type: redis
  connection_string: {address}
  skip_dedup: true
  full_scan_for_deletion: false
offline_store:
  type: file
entity_key_serialization_version: 3
"""
_BULK: Final = 1000


@dataclass(frozen=True)
class View:
    """A view of the peer: the entity whose key it is under, and its features."""

    name: str
    entity: str
    key: str
    features: tuple[Feature, ...]


class FeastPeer:
    """A Feast repository in a folder, over a Redis at `host:port`, with the features of a service.

    Args:
        folder: where it keeps its files; made if need be.
        address: of an empty Redis.
        plan, service: whose features it holds.
        entities: only features of these, such as `("user",)`; by default all.
    """

    def __init__(
        self, folder: Path, address: str, plan: Plan, service: str, entities: Sequence[str] = ("user", "item")
    ) -> None:
        if not HIREDIS_AVAILABLE:
            msg = "hiredis is not installed, and without it the peer would be slower than it can be: `make bench` does"
            raise RuntimeError(msg)
        self.folder = folder
        self.plan = plan
        self.service = service
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "feature_store.yaml").write_text(_YAML.format(address=address))
        self.views = tuple(_views(plan, service, entities))
        self._store = feast.FeatureStore(repo_path=str(folder))
        self._apply()

    def describe(self) -> str:
        """What it holds, in a sentence."""
        views = ", ".join(f"{view.name} ({len(view.features)}, by {view.entity})" for view in self.views)
        total = sum(len(view.features) for view in self.views)
        held = f"{total} features in {len(self.views)} views: {views}"
        return f"Feast {feast.__version__} on its own Redis store holds {held}"

    def write(self, address: str, asked: Sequence[Asked]) -> dict[str, dict[str, dict[str, Any]]]:
        """Writes values for all users and items that are asked for, taken from the server at `address`.

        Returns them: by view, then by the entity's id, a feature's value by its full name.
        """
        ids = {
            "user": list(dict.fromkeys(each.user_id for each in asked)),
            "item": list(dict.fromkeys(item for each in asked for item in each.item_ids)),
        }
        written = {}
        for view in self.views:
            values = _read_values(address, view, ids[view.entity], asked[0].user_id)
            self._write(view, values)
            written[view.name] = {
                entity_id: dict(zip(values, row, strict=True))
                for entity_id, row in zip(ids[view.entity], zip(*values.values(), strict=True), strict=True)
            }
        return written

    def request(self, asked: Asked) -> dict[str, Any]:
        """The body of `POST /get-online-features`: an entity row an item."""
        keys = {view.entity: view.key for view in self.views}
        columns = {"user": [asked.user_id] * (len(asked.item_ids) if "item" in keys else 1), "item": asked.item_ids}
        return {
            "feature_service": self.service,
            "entities": {key: columns[entity] for entity, key in keys.items()},
            "full_feature_names": True,
        }

    @contextmanager
    def serve(self, env: Mapping[str, str]) -> Iterator[str]:
        """`feast serve`, for the length of a `with` block; gives its address."""
        argv = [str(Path(sys.executable).with_name("feast")), "--chdir", str(self.folder), "serve"]
        argv += ["--workers", "1", "--max-requests", "0", "--no-access-log", "--registry_ttl_sec", "86400"]
        with server("feast", argv, self.folder, env, ready="/health") as address:
            yield address

    def _apply(self) -> None:
        entities = {
            view.entity: feast.Entity(name=view.entity, join_keys=[view.key], value_type=feast.ValueType.STRING)
            for view in self.views
        }
        source = feast.FileSource(name="none", path="none.parquet", timestamp_field="event_timestamp")
        views: list[Any] = [
            feast.FeatureView(
                name=view.name,
                entities=[entities[view.entity]],
                ttl=timedelta(0),
                schema=[
                    feast.Field(name=view.key, dtype=FEAST_TYPES["str"]),
                    *(feast.Field(name=each.name, dtype=FEAST_TYPES[each.value_type]) for each in view.features),
                ],
                source=source,
            )
            for view in self.views
        ]
        self._store.apply([*entities.values(), *views, feast.FeatureService(name=self.service, features=views)])

    def _write(self, view: View, values: Mapping[str, list[Any]]) -> None:
        columns: dict[str, Any] = {view.key: values[view.key]}
        for feature in view.features:
            own = values[feature.full_name]
            if feature.value_type == "map[str, float]":
                # Feast takes maps as JSON too; dictionaries it would give the keys of all rows, by way of Arrow.
                own = [json.dumps(value) for value in own]
            columns[feature.name] = pd.Series(own, dtype=_DTYPES.get(feature.value_type, "object"))
        frame = pd.DataFrame(columns)
        frame["event_timestamp"] = datetime.now(UTC)
        for start in range(0, len(frame), 10 * _BULK):
            self._store.write_to_online_store(view.name, frame.iloc[start : start + 10 * _BULK])


def post(url: str, body: Any) -> Any:
    """The JSON that a server answers to JSON."""
    request = urllib.request.Request(  # noqa: S310  # our own address, with http
        url, json.dumps(body).encode(), {"Content-Type": "application/json", "Accept": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310  # as above
        return json.load(answer)


def feast_columns(answer: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The columns by name of an answer of `/get-online-features`, Feast's own or ours."""
    names = answer["metadata"]["feature_names"]
    return {name: result["values"] for name, result in zip(names, answer["results"], strict=True)}


def _views(plan: Plan, service: str, entities: Sequence[str]) -> Iterator[View]:
    features: dict[str, list[Feature]] = {}
    for name in plan.service(service).features:
        feature = plan.features[name]
        if set(feature.entities) <= set(entities):
            features.setdefault(feature.view, []).append(feature)
    for name, own in features.items():
        entity = "item" if len(own[0].entities) > 1 else own[0].entities[0]
        yield View(name, entity, plan.entity(entity).key, tuple(own))


def _read_values(address: str, view: View, ids: Sequence[str], user_id: str) -> dict[str, list[Any]]:
    """What Headrace answers for the view's features, by full name, and the ids under the key's name."""
    found: dict[str, list[Any]] = {view.key: []}
    for start in range(0, len(ids), _BULK):
        chunk = list(ids[start : start + _BULK])
        entities = {view.key: chunk}
        if len(view.features[0].entities) > 1:
            entities["user_id"] = [user_id] * len(chunk)
        body = {
            "features": [f"{view.name}:{feature.name}" for feature in view.features],
            "entities": entities,
            "full_feature_names": True,
        }
        columns = feast_columns(post(f"{address}/get-online-features", body))
        for name in (view.key, *(feature.full_name for feature in view.features)):
            found.setdefault(name, []).extend(columns[name])
    return found
