"""Compiling ahead: afterwards neither a worker nor a server has anything left to compile."""

from __future__ import annotations

import importlib

from numba.core.registry import CPUDispatcher

from headrace.compiled import compile_all

MODULES = (
    "features.fold",
    "features.formulas",
    "features.texts",
    "features.tiles",
    "store.keys",
    "store.mirror",
    "store.packing",
    "store.places",
    "store.resp",
    "streams.dedupe",
)


def test_nothing_is_left_to_compile() -> None:
    """Every loop that Python calls has been compiled for the arguments that it gets; a new module is to be added here.

    Loops that begin with an underscore are mostly called by others, and are compiled with them.
    """
    compile_all()
    loops = {
        f"{name}.{attribute}": loop
        for name in MODULES
        for attribute, loop in vars(importlib.import_module(name)).items()
        if isinstance(loop, CPUDispatcher)
        and (attribute[0] != "_" or attribute in ("_hashes", "_judge", "_look_up", "_merged", "_shards", "_take"))
    }
    assert len(loops) > 10
    # Called by other loops; by Python only `look_up`, for a `top_k` that is looked into: the catalogue has none.
    called = (".look_up", ".tail_of", ".tails_of", ".begin", ".fold")
    loops = {name: loop for name, loop in loops.items() if not name.endswith(called)}
    assert [name for name, loop in loops.items() if not loop.signatures] == []
