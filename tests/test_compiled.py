"""Compiling ahead: afterwards neither a worker nor a server has anything left to compile."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from numba.core.registry import CPUDispatcher

from headrace.compiled import compile_all
from tests.support.served import Clock, Rows, catalogue, random_events, served, settings_of

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("config", "features", "store", "registry", "streams", "serving", "headrace")
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


_COMPILED = """if True:
    from numba.core.event import install_recorder
    with install_recorder("numba:compile") as recorder:
        from headrace.compiled import compile_all
        compile_all()
    print(len(recorder.buffer))
"""


def compiled_by(root: Path, *before: str) -> int:
    """How much a new process compiles that has our rooms from `root`; `before` is what runs it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    done = subprocess.run(
        [*before, sys.executable, "-W", "ignore", "-c", _COMPILED],
        env={**environment, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_what_one_machine_has_compiled_serves_on_others_where_nobody_may_write(tmp_path: Path) -> None:
    """An image is built once, by one user, and run by others, on other processors, with no right to write in it.

    By numba itself loops are for the processor at hand, and are compiled again, or not imported at all, where their
    cache can't be written to.
    """
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room)
    compiled_by(tmp_path)
    targets: set[Any] = {loop.targetctx for loop in all_loops().values()}
    assert {target.codegen().magic_tuple()[1:] for target in targets} == {(os.environ["NUMBA_CPU_NAME"], "")}
    # Root may write anywhere, unless that is taken from it.
    no_root = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    folders = [path for path in (tmp_path, *tmp_path.rglob("*")) if path.is_dir()]
    try:
        for folder in folders:
            folder.chmod(0o555)
        assert compiled_by(tmp_path, *no_root) == 0
        assert subprocess.run([*no_root, "touch", str(tmp_path / "features/mine")], check=False).returncode != 0
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_loop_is_compiled_again_when_what_it_uses_of_another_file_changes(tmp_path: Path) -> None:
    """To numba a loop is as old as its own file: it would go on with another file's loops and constants of before."""
    theirs = "from features.loops import compiled\nSIZE = {}\n@compiled\ndef more(n):\n    return n + {}\n"
    ours = "from features.loops import compiled\nfrom theirs import SIZE, more\n"
    ours += "@compiled\ndef f():\n    return more(SIZE)\n"
    (tmp_path / "ours.py").write_text(ours)
    for size, added, expected in ((10, 1, "11"), (20, 1, "21"), (20, 2, "22")):
        (tmp_path / "theirs.py").write_text(theirs.format(size, added))
        done = subprocess.run(
            [sys.executable, "-c", "import ours; print(ours.f())"],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        )
        assert done.stdout.strip() == expected
