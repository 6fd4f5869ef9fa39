"""Which features still lack something, by when each shard's stream took up the plans that say so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from features.evolve import complete_from_ms
from features.plan import Plan
from store.commit import decoded_records, taken_by_all
from store.keys import Keyspace

_LOOK_MS = 1_000
"""While a stream has yet to take up the plan."""
_LOOK_AGAIN_MS = 60_000


class Completeness:
    """What a plan's features lack; it is told what Redis has of `keys` whenever `due`.

    Attributes:
        keys: of all commit records; none of a plan whose features lack nothing.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.keys = Keyspace.of(plan).commit_records(plan.stored_entities) if plan.known else []
        self._due_ms = 0
        self._complete_ms = complete_from_ms(plan, {})

    def due(self, now_ms: int) -> bool:
        """Whether it is time to look."""
        return bool(self._complete_ms) and now_ms >= self._due_ms

    def learn(self, stored: Sequence[bytes | None], now_ms: int) -> None:
        """Takes in the values of `keys`.

        Raises:
            RecordError: if one is no commit record.
        """
        taken_ms = taken_by_all(decoded_records(self.keys, stored), self._plan.needs)
        self._due_ms = now_ms + (_LOOK_AGAIN_MS if len(taken_ms) == len(self._plan.needs) else _LOOK_MS)
        found = complete_from_ms(self._plan, taken_ms)
        self._complete_ms = {name: at_ms for name, at_ms in found.items() if _lacks(at_ms, now_ms)}

    def incomplete(self, names: Iterable[str], now_ms: int) -> dict[str, int | None]:
        """Of these features those that lack something at `now_ms`, and until when, ms since the epoch.

        None for what waiting does not mend, and while a stream has yet to take up the plan.
        """
        if not self._complete_ms:
            return {}
        every = self._complete_ms
        return {name: every[name] for name in names if name in every and _lacks(every[name], now_ms)}


def look(completeness: Completeness, client: Any, now_ms: int) -> None:
    """Reads what the commit records say, if it is due."""
    if completeness.due(now_ms):
        completeness.learn(client.mget(completeness.keys), now_ms)


def _lacks(at_ms: int | None, now_ms: int) -> bool:
    return at_ms is None or at_ms > now_ms
