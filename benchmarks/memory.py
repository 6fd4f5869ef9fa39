"""`memory`: what a user and an item take in Redis after a week, against only the finished values in Feast's store.

Rows are merged in batches of ten minutes, decoded and encoded each time as the stream does, and then written with their
expiry. Events come at random instants, not in sessions: so they lie in as many different tiles as they can.

Bytes are what Redis's used_memory grows by, per entity, without buffers of clients: so all keys, expiry, hash
tables and what the allocator rounds up are in it. Only the commit records, 1 kB a shard, were there before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import redis

from benchmarks.feast_peer import FeastPeer
from benchmarks.harness import Benchmark, Options, Report, Series, main
from benchmarks.population import EVENTS_A_USER, Asked
from benchmarks.project import Project, redis_server
from benchmarks.traffic import SHARES, TOPICS, Block, Traffic
from features.kernel import SLACK_MS, Entries, Events, Rows, merge
from features.layout import families_of
from features.plan import Plan
from store.codec import decode, encode
from store.keys import Keyspace, expire_at_ms

DAYS: Final = 7
BATCH_MS: Final = 600_000
QUICK_BATCH_MS: Final = 7_200_000
USER_EVENTS_A_DAY: Final = 30
ACTIVE: Final = 0.1
"""The items that count as active: the part of all that has the most events."""
SERVICE: Final = "feed_v1"
_DAY_MS: Final = 86_400_000
_SETTLE_S: Final = 2.0
_BULK: Final = 1000


@dataclass(frozen=True)
class Measured:
    """What one kind of entity takes, in bytes each, here and in the peer."""

    ours: float
    by_command: float
    """As MEMORY USAGE adds up, which leaves out hash tables and the index of expiries."""
    peer: float
    features: int
    values: float
    """Features with every element of a list or map as one."""
    tiles: float
    tile_bytes: float


def run(options: Options, report: Report) -> None:
    """Measures some thousand users and items, with another seed in each round."""
    n_users, n_items = options.pick((3_000, 1_500), (300, 150))
    batch_ms = options.pick(BATCH_MS, QUICK_BATCH_MS)
    item_events = round(active_item_events_a_day())
    mix = ", ".join(f"{share:.0%} {topic}" for share, topic in zip(SHARES, TOPICS, strict=True))
    report.note(
        f"after {DAYS} days of events at random instants ({mix}): {n_users:,} users of {USER_EVENTS_A_DAY} a day, "
        f"{n_items:,} items of {item_events} a day, the mean of the busiest {ACTIVE:.0%} of 50,000 items when 100,000 "
        f"users send {EVENTS_A_USER} events a week each"
    )
    users, items = [], []
    for seed in range(7, 7 + options.rounds):
        crowd = Traffic(n_users, 50_000, seed, user_skew=0)
        users.append(_measure("user", n_users, crowd, USER_EVENTS_A_DAY, batch_ms))
        shelf = Traffic(100_000, n_items, seed, item_skew=0)
        items.append(_measure("item", n_items, shelf, item_events, batch_ms))
    _tell(report, users, items)


def _tell(report: Report, users: list[Measured], items: list[Measured]) -> None:
    both = list(zip(users, items, strict=True))
    for name, found in (("user", users), ("item", items)):
        ours, peer = (Series.of(getattr(each, side) for each in found) for side in ("ours", "peer"))
        report.add(f"{name}, all of it", ours, "bytes", key=f"bytes_per_{name}")
        report.add(f"{name}, by MEMORY USAGE", Series.of(each.by_command for each in found), "bytes")
        report.add(f"{name}, Feast's finished values", peer, "bytes")
        limit = {"user": 1.5, "item": 2.0}[name]
        report.add(f"{name}, ours / Feast's", ours / peer, "times", key=f"ratio_{name}", at_most=limit)
        report.add(f"{name}, tile entries in its rows", Series.of(each.tiles for each in found), "entries")
    features = users[0].features + items[0].features
    per_feature = Series.of((user.ours + item.ours) / features for user, item in both)
    report.add(
        f"a feature, of {features} of a user and an item", per_feature, "bytes", key="bytes_per_feature", at_most=20
    )
    per_value = Series.of((user.ours + item.ours) / (user.values + item.values) for user, item in both)
    report.add("a value, each element of a list or map being one", per_value, "bytes")
    per_tile = Series.of((u.tile_bytes + i.tile_bytes) / (u.tiles + i.tiles) for u, i in both)
    report.add("a tile entry, its start and all its columns", per_tile, "bytes", key="bytes_per_tile")


def active_item_events_a_day() -> float:
    """How many events the mean of the active items of the population has."""
    drawn = np.concatenate([block.items for block in Traffic().blocks(1_000_000, 0, 1_000_000)])
    counts = np.sort(np.bincount(drawn, minlength=50_000))[::-1]
    share = counts[: int(50_000 * ACTIVE)].sum() / len(drawn)
    return float(share * 100_000 * EVENTS_A_USER / DAYS / (50_000 * ACTIVE))


class Simulation:
    """Rows of `n` entities of one kind: packed bytes by family, as they would be in Redis."""

    def __init__(self, plan: Plan, entity: str, n: int) -> None:
        self.ids = [f"{entity[0]}{number}".encode() for number in range(n)]
        self.families = [each for view in plan.views for each in families_of(plan, view) if each.entity == entity]
        self.blobs: dict[str, list[bytes | None]] = {family.name: [None] * n for family in self.families}
        self._contracts = {spec.topic: spec.name for spec in plan.events}
        self._entity = entity

    def merge(self, traffic: Traffic, block: Block, now_ms: int) -> None:
        """Merges events into the rows that they concern, as the stream does with a chunk."""
        for family in self.families:
            topics = [number for number, topic in enumerate(TOPICS) if self._contracts[topic] in family.events]
            mine = _take(block, np.isin(block.topics, topics))
            touched, row = np.unique(mine.users if self._entity == "user" else mine.items, return_inverse=True)
            events = {}
            for number in topics:
                of_topic = mine.topics == number
                part = _take(mine, of_topic)
                events[self._contracts[TOPICS[number]]] = Events(row[of_topic], part.times_ms, traffic.columns(part))
            blobs = self.blobs[family.name]
            rows = decode(family, [blobs[at] for at in touched.tolist()])
            merged = merge(family, rows, events, now_ms).rows
            for at, blob in zip(touched.tolist(), encode(family, merged), strict=True):
                blobs[at] = blob

    def write(self, client: Any, keyspace: Keyspace) -> None:
        """Writes all rows with their expiry."""
        for family in self.families:
            blobs = self.blobs[family.name]
            expires = expire_at_ms(family, decode(family, blobs).last_event_ms).tolist()
            with client.pipeline(transaction=False) as pipe:
                for key, blob, expire in zip(keyspace.rows(family, self.ids), blobs, expires, strict=True):
                    if blob:
                        pipe.execute_command("SET", key, blob, "PXAT", expire)
                pipe.execute()

    def tiles(self) -> tuple[int, int]:
        """How many tile entries there are, and the bytes that they take: those of the rows, less of rows without."""
        entries = size = 0
        for family in self.families:
            blobs = self.blobs[family.name]
            rows = decode(family, blobs)
            of_tiles = [layout.table.starts for layout in family.tables]
            if not any(of_tiles):
                continue
            kept = tuple(
                Entries.of_lines(layout, table.lines[:, :0]) if layout.table.starts else table
                for layout, table in zip(family.tables, rows.tables, strict=True)
            )
            entries += sum(len(table) for table, tiles in zip(rows.tables, of_tiles, strict=True) if tiles)
            bare = encode(family, Rows(rows.n, rows.last_event_ms, kept, rows.texts))
            size += sum(len(blob or b"") for blob in blobs) - sum(map(len, bare))
        return entries, size


def _measure(entity: str, n: int, traffic: Traffic, events_a_day: float, batch_ms: int) -> Measured:
    with Project() as project, redis_server() as theirs:
        end_ms = time.time_ns() // 1_000_000
        simulation = Simulation(project.plan, entity, n)
        a_batch = n * events_a_day * batch_ms / _DAY_MS
        batches, done = DAYS * _DAY_MS // batch_ms, 0
        for number in range(batches):
            until_ms = end_ms - (batches - 1 - number) * batch_ms
            due = round(a_batch * (number + 1)) - done
            done += due
            for block in traffic.blocks(due, until_ms - batch_ms, until_ms):
                simulation.merge(traffic, block, until_ms - SLACK_MS)
        before = _used(project.redis.url)
        simulation.write(project.client, Keyspace.of(project.plan))
        ours = (_used(project.redis.url) - before) / n
        by_command = _by_command(project.client, f"*:{entity}:*:*") / n
        peer = FeastPeer(project.folder / "peer", f"127.0.0.1:{theirs.port}", project.plan, SERVICE, (entity,))
        before = _used(theirs.url)
        ids = [entity_id.decode() for entity_id in simulation.ids]
        asked = [Asked(each, []) for each in ids] if entity == "user" else [Asked("u0", ids)]
        with project.serve() as address:
            written = peer.write(address, asked)
        taken = (_used(theirs.url) - before) / n
    tiles, tile_bytes = simulation.tiles()
    return Measured(
        ours,
        by_command,
        taken,
        sum(len(view.features) for view in peer.views),
        _values(written) / n,
        tiles / n,
        tile_bytes / n,
    )


def _used(url: str) -> int:
    """Bytes that Redis has in use for data, once it has tidied up."""
    time.sleep(_SETTLE_S)
    with redis.Redis.from_url(url) as client:
        memory: Any = client.info("memory")
    return int(memory["used_memory"] - memory["mem_clients_normal"])


def _by_command(client: Any, pattern: str) -> int:
    keys = list(client.scan_iter(pattern, count=_BULK))
    total = 0
    for start in range(0, len(keys), _BULK):
        with client.pipeline(transaction=False) as pipe:
            for key in keys[start : start + _BULK]:
                pipe.execute_command("MEMORY", "USAGE", key, "SAMPLES", 0)
            total += sum(pipe.execute())
    return total


def _values(written: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> int:
    """How many single values were written: every element of a list or map, and everything else as one."""
    return sum(
        len(value) if isinstance(value, Sequence | Mapping) and not isinstance(value, str) else 1
        for rows in written.values()
        for features in rows.values()
        for value in features.values()
    )


def _take(block: Block, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> Block:
    return Block(block.topics[mask], block.users[mask], block.items[mask], block.surfaces[mask], block.times_ms[mask])


BENCHMARK: Final = Benchmark(
    "memory",
    work="bytes in Redis of a user and of an active item after 7 days, state and all",
    peer="Feast's Redis store with only the finished values of the same features",
    keys=("bytes_per_user", "bytes_per_item", "bytes_per_feature", "bytes_per_tile", "ratio_user", "ratio_item"),
    run=run,
)

if __name__ == "__main__":
    main(BENCHMARK)
