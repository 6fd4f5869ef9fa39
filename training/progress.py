"""How far a training set is, shown where somebody looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID

from training.run import Progress


@contextmanager
def shown() -> Iterator[Progress]:
    """A bar a step on standard error, if that is a terminal."""
    console = Console(stderr=True)
    with Bars(console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def on_progress(step: str, done: int, of: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=of)
            bars.update(tasks[step], completed=done, total=of)

        yield on_progress
