"""A user of the Feast SDK: reads features again and again, and says how long that took.

The same few lines for both sides, each time in a fresh process: which store answers is the repository's own affair.
Nothing of ours is imported here, where it would be in the way of the peer: Feast's collection of garbage takes the
longer, the more there is.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import cycle
from pathlib import Path

import msgspec
import numpy as np
from feast import FeatureStore

Asked = tuple[str, list[str]]
"""A user and candidate items."""


def read(repo: Path, service: str, requests: list[Asked], seconds: float, warm_s: float) -> dict[str, object]:
    """Latencies of `get_online_features(…).to_dict()` in ms, how many calls, and the first answer."""
    store = FeatureStore(repo_path=str(repo))
    features = store.get_feature_service(service)
    rows = [[{"user_id": user_id, "item_id": item_id} for item_id in item_ids] for user_id, item_ids in requests]
    first = store.get_online_features(features, rows[0], full_feature_names=True).to_dict()
    took_s: list[float] = []
    counted_from = time.perf_counter() + warm_s
    for entity_rows in cycle(rows):
        began = time.perf_counter()
        if began > counted_from + seconds:
            break
        store.get_online_features(features, entity_rows, full_feature_names=True).to_dict()
        if began >= counted_from:
            took_s.append(time.perf_counter() - began)
    p50, p99 = np.percentile(np.array(took_s) * 1000, (50, 99))
    return {"p50_ms": float(p50), "p99_ms": float(p99), "n": len(took_s), "first": first}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sdk_client", description="Read by the Feast SDK")
    parser.add_argument("--repo", type=Path, required=True, help="folder of a feature_store.yaml")
    parser.add_argument("--service", required=True, help="a feature service of it")
    parser.add_argument("--requests", type=Path, required=True, help="users and items, as msgpack")
    parser.add_argument("--seconds", type=float, required=True, help="how long to read")
    parser.add_argument("--warm", type=float, required=True, help="seconds of warm-up before")
    given = parser.parse_args()
    asked = msgspec.msgpack.decode(given.requests.read_bytes(), type=list[Asked])
    print(json.dumps(read(given.repo, given.service, asked, given.seconds, given.warm)))
