"""The steps of a training set on a Ray cluster: for what one machine is too small. Needs the extra `ray`."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import ray

from training.point_in_time import Entities, Job
from training.run import Run

_AHEAD = 4
"""So many more steps than processors are handed out: who is done finds the next one there."""


@contextmanager
def on_ray(address: str) -> Iterator[Run]:
    """Runs steps on the cluster at an address (`ray://host:10001`, `auto`), or on one of this machine: `local`.

    The job and its entities are sent to each machine once. The steps' files must be in a folder
    that all machines see.
    """
    where: Any = {"address": address}
    if address == "local":
        where |= {"_node_ip_address": "127.0.0.1", "num_cpus": max(2, os.cpu_count() or 1), "include_dashboard": False}
    ray.init(**where, log_to_driver=False)
    try:
        yield _run
    finally:
        ray.shutdown()


def _run(step: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    known: dict[int, tuple[Any, Any]] = {}

    def sent(argument: Any) -> Any:
        if not isinstance(argument, Job | Entities | dict):
            return argument
        if id(argument) not in known:
            known[id(argument)] = argument, ray.put(argument)
        return known[id(argument)][1]

    remote = ray.remote(step)
    todo = iter(arguments)
    resources: Any = ray.cluster_resources()  # type: ignore[no-untyped-call]  # it has no types
    n = int(resources.get("CPU", 1)) + _AHEAD

    def begun(count: int) -> Iterator[Any]:
        for given in islice(todo, count):
            yield remote.remote(*map(sent, given))

    running = deque(begun(n))
    while running:
        result = ray.get(running.popleft())
        running.extend(begun(1))
        yield result
