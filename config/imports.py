"""What a process of ours does without."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec


class _NoPandas(MetaPathFinder):
    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if name == "pandas":
            raise ModuleNotFoundError(name=name)
        return None


def keep_pandas_out() -> None:
    """Spares this process pandas, which takes longer to import than all else together.

    PyArrow imports it, if it is there, at the first `pa.array` of whatever, only to see whether it was given something
    of it; it asks once. For processes of our own alone: in one of a user's, `Table.to_pandas` would fail afterwards.
    """
    import pyarrow as pa  # many commands need no arrays

    hidden = _NoPandas()
    sys.meta_path.insert(0, hidden)
    try:
        pa.array([])
    finally:
        sys.meta_path.remove(hidden)
