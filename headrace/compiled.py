"""Compiles all loops that this machine has not compiled yet: `python -m headrace.compiled`, half a minute, once.

Whoever comes first compiles what it needs by itself; this spares the first worker and the first server that wait.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa

from features.definitions import compile_definitions
from features.events import Kind, column_of
from features.kernel import Events, merge
from features.layout import Bundle, Family, families_of
from features.plan import Plan
from features.program import Asked, Program
from features.rows import Rows
from features.sketch import cells
from features.texts import hash64
from features.totals import Totals
from serving.lookup import mirrored_families
from store.codec import decode, encode
from store.keys import Keyspace
from store.mirror import Mirror
from streams.dedupe import Dedupe

_NOW_MS = 1_763_683_200_000


def compile_all(definitions: str = "features.catalog") -> None:
    """Sends a few events all the way through everything that `definitions` declares."""
    plan = compile_definitions(definitions, "compiled", 16)
    families = [family for view in plan.views for family in families_of(plan, view)]
    blobs = {family: _row(plan, family) for family in families}
    ids = {entity.name: ["a"] for entity in plan.entities}
    pairs = {entity.name: np.zeros(1, np.intp) for entity in plan.entities}
    apart = [family.name for family in mirrored_families(plan)]
    for service in plan.services:
        for alone in ((), apart):
            program = Program(plan, service.features, alone)
            states = {bundle.name: _state(bundle, blobs, mirrored=bundle.name in alone) for bundle in program.bundles}
            frame = program.evaluate(states, Asked(ids, pairs, {}), _NOW_MS)
            frame.matrix()
            list(frame.values.items())
    Keyspace("compiled", 16).arguments(families[:1], pa.array(["a"]))
    dedupe, hashes, times_ms = Dedupe(1), hash64(pa.array(["a"])), np.zeros(1, np.int64)
    # Of what a sketch counts, reading meets more than 64 values at once.
    cells(hashes)
    for offset in range(2):
        dedupe.duplicates(np.full(1, offset), hashes, times_ms)


_OF_KIND: Final[dict[Kind, list[Any]]] = {"str": ["a", None], "list[str]": [["a"], None]}


def _row(plan: Plan, family: Family) -> bytes:
    events = {}
    for spec in plan.events:
        if spec.name in family.events:
            fields = {name: column_of(kind, _OF_KIND.get(kind, [1.0, None])) for name, kind in spec.fields.items()}
            events[spec.name] = Events(np.zeros(2, np.intp), np.full(2, _NOW_MS - 60_000), fields)
    rows = merge(family, Rows.empty(family, 1), events, _NOW_MS).rows
    return encode(family, merge(family, decode(family, encode(family, rows)), events, _NOW_MS).rows)[0]


def _state(bundle: Bundle, blobs: dict[Family, bytes], *, mirrored: bool) -> Rows | Totals:
    rows = decode(bundle, [blobs[family] for family in bundle.families])
    if not mirrored:
        return rows
    mirror = Mirror(bundle.families[0], 1)
    with mirror.reading(pa.array(["a"]), _NOW_MS) as reading:
        totals = reading.totals(rows)
    mirror.forget("a")
    return totals


if __name__ == "__main__":
    compile_all()
