"""The mirror's index holds what a dictionary would hold; packed keys are the keys."""

from __future__ import annotations

import hiredis
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from features.definitions import compile_definitions
from features.layout import families_of
from store.keys import Keyspace
from store.places import PlaceIndex
from store.resp import Arguments, command

PLAN = compile_definitions("features.catalog", "shop", 16)
FAMILIES = [family for view in PLAN.views for family in families_of(PLAN, view)]
SIZE = 8
IDS = pa.array([f"i{number}" for number in range(3 * SIZE)])


class Places(RuleBasedStateMachine):
    """Puts and removes in any order, as a dictionary does them; few slots, so that searches run into each other.

    Catches a removal that leaves a hole in the middle of a run, or moves an id to before its first slot.
    """

    def __init__(self) -> None:
        super().__init__()
        self.index, self.known = PlaceIndex(SIZE), dict[int, int]()
        self.digests = self.index.digests(IDS)

    @precondition(lambda self: len(self.known) < SIZE)
    @rule(number=st.integers(0, len(IDS) - 1), place=st.integers(0, SIZE - 1))
    def put(self, number: int, place: int) -> None:
        if number not in self.known:
            self.index.put(self.digests[number], place)
            self.known[number] = place

    @rule(number=st.integers(0, len(IDS) - 1))
    def remove(self, number: int) -> None:
        assert self.index.remove(self.digests[number]) == self.known.pop(number, -1)

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.known.clear()

    @invariant()
    def holds_the_same(self) -> None:
        assert self.index.find(self.digests).tolist() == [self.known.get(number, -1) for number in range(len(IDS))]


TestPlaces = Places.TestCase


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=20), st.integers(1, 300))
def test_packed_keys_are_the_keys_of_every_family(ids: list[str], shards: int) -> None:
    """Family by family, in the order of the ids; and sent as hiredis would send them."""
    space = Keyspace("shop", shards)
    keys = [key for family in FAMILIES for key in space.rows(family, [text.encode() for text in ids])]
    packed = space.arguments(FAMILIES, pa.array(ids, pa.string()))
    assert (len(packed), list(packed)) == (len(keys), keys)
    assert packed.packed == Arguments.of(keys).packed
    assert command(b"MGET", packed) == hiredis.pack_command(("MGET", *keys))  # type: ignore[arg-type]  # stub: 1-tuple


def test_ids_are_known_by_more_than_one_process_could_forge() -> None:
    """Two indexes know an id by different digests: what collides in one, or in `hash64`, does not in another."""
    assert (PlaceIndex(1).digests(IDS) != PlaceIndex(1).digests(IDS)).all()
