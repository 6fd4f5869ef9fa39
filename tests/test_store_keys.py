"""Keys: an entity's shard is the same, whoever computes it."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from store.keys import shard_of, shards_of

IDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(st.lists(IDS, max_size=20), st.integers(1, 4096), st.data())
def test_shards_in_bulk_are_those_of_each_id(ids: list[str], shards: int, data: st.DataObject) -> None:
    """Of any texts, also of a slice of an array: the stream routes in bulk, and readers one by one."""
    first = data.draw(st.integers(0, len(ids)))
    array = pa.array(ids, pa.string())[first:]
    assert shards_of(array, shards).tolist() == [shard_of(each.encode(), shards) for each in ids[first:]]


def test_an_id_that_is_null_is_in_the_shard_of_an_empty_one() -> None:
    """It has no row; but its event has other entities, whose shards must not move."""
    ids = pa.array([None, "", "u1"], pa.string())
    assert shards_of(ids, 16).tolist() == [shard_of(b"", 16), shard_of(b"", 16), shard_of(b"u1", 16)]


def test_stored_keys_depend_on_the_shard() -> None:
    """Known values: a change would leave every row where nobody looks for it."""
    assert shards_of(pa.array(["u1", "i42", "käse"], pa.string()), 16).tolist() == [6, 10, 7]
