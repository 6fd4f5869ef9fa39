"""Compiling ahead: afterwards neither a worker nor a server has anything left to compile."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from numba.core.registry import CPUDispatcher

from headrace.compiled import compile_all
from tests.support.served import Clock, Rows, catalogue, random_events, served, settings_of

MODULES = (
    "features.fold",
    "features.formulas",
    "features.sketch",
    "features.texts",
    "features.tiles",
    "store.keys",
    "store.mirror",
    "store.packing",
    "store.places",
    "store.resp",
    "streams.dedupe",
)


def all_loops() -> dict[str, CPUDispatcher]:
    """Every compiled loop by name."""
    return {
        f"{name}.{attribute}": loop
        for name in MODULES
        for attribute, loop in vars(importlib.import_module(name)).items()
        if isinstance(loop, CPUDispatcher) and loop.py_func.__module__ == name
    }


def test_nothing_is_left_to_compile() -> None:
    """Every loop that Python calls has been compiled for the arguments that it gets; a new module is to be added here.

    Loops that begin with an underscore are mostly called by others, and are compiled with them.
    """
    compile_all()
    private = ("_hashes", "_join", "_judge", "_look_up", "_merged", "_shards", "_take")
    loops = {name: loop for name, loop in all_loops().items() if "._" not in name or name.endswith(private)}
    assert len(loops) > 10
    # Called by other loops; by Python only `look_up`, for a `top_k` that is looked into: the catalogue has none.
    called = (".look_up", ".tail_of", ".tails_of", ".begin", ".fold")
    loops = {name: loop for name, loop in loops.items() if not name.endswith(called)}
    assert [name for name, loop in loops.items() if not loop.signatures] == []


def kinds() -> set[str]:
    """For which arguments each loop has been compiled."""
    return {f"{name}{signature}" for name, loop in all_loops().items() for signature in loop.signatures}


async def compiled_in_use(redis_url: str) -> set[str]:
    """What a stream and a server compile after `compile_all`."""
    compile_all()
    ahead = kinds()
    plan, clock = catalogue(), Clock()
    Rows(plan, redis_url, clock).write_all(random_events(1, users=4, items=8, n=300))
    async with served(settings_of(redis_url), plan, clock) as http:
        for n_items in (0, 1, 8):
            body = {"service": "ranking_v1", "user_id": "u1", "item_ids": [f"i{number}" for number in range(n_items)]}
            for kind in ("application/json", "application/x-npy", "application/vnd.apache.arrow.stream"):
                answers = [await http.post("/v1/features", json=body, headers={"Accept": kind}) for _ in range(2)]
                assert [answer.status_code for answer in answers] == [200, 200]
        for entity in ("user/u1", "item/i1", "seller/s1", "user/nobody"):
            assert (await http.get(f"/v1/entities/{entity}")).status_code == 200
    return kinds() - ahead


def in_use(redis_url: str) -> set[str]:
    """As `compiled_in_use`, for another process."""
    return asyncio.run(compiled_in_use(redis_url))


def test_nothing_is_compiled_once_it_is_in_use(redis_url: str) -> None:
    """Loops are compiled for each kind of array: one in Fortran's order, or one that may be written to, is another.
    The first request of a new installation took 4 s, since `compile_all` had one user with one item only.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
        assert apart.submit(in_use, redis_url).result(timeout=300) == set()
