"""Events written to an archive as an archiver writes them, without Kafka."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from config.settings import Settings
from features.plan import EventSpec, Plan
from store.archive import Complete, rows_of, tables_of

Event = Mapping[str, Any]


def archive(settings: Settings, plan: Plan, events: Mapping[str, Sequence[Event]], rng: random.Random) -> None:
    """Writes events by contract, each with its effective time `t` (ms), in random order and in several commits."""
    tables = tables_of(settings, plan)
    for contract, many in events.items():
        spec, shuffled = plan.event(contract), list(many)
        rng.shuffle(shuffled)
        table = tables[spec.topic]
        table.claim()
        for begin in range(0, len(shuffled), max(1, len(shuffled) // 3)):
            part = shuffled[begin : begin + max(1, len(shuffled) // 3)]
            # Nothing of Kafka's: there they never were.
            table.append(_rows(spec, part, begin), {0: Complete(0, part[-1]["t"])}, {0: 0})


def _rows(spec: EventSpec, events: Sequence[Event], first: int) -> pa.Table:
    fields: dict[str, Any] = {}
    for name, kind in spec.fields.items():
        values = [event.get(name) for event in events]
        of_text = kind == "str"
        fields[name] = pa.array(values, pa.string()) if of_text else np.array(values, np.float64)
    times_ms = np.array([event["t"] for event in events], np.int64)
    ids = pa.array([f"{spec.name}{first + at}" for at in range(len(events))])
    return rows_of(spec, ids, times_ms, times_ms + 5, 0, np.arange(first, first + len(events)), fields)
