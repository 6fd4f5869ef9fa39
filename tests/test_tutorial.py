"""docs/tutorial.md is true: every block runs, and prints what it says there; the notebook is the same."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

from headrace.embedded import EmbeddedRedis, free_port
from tests.support.docs import Reader, blocks, notebook, same, with_outputs
from tests.support.kafka import RealKafka
from tests.support.stack import ROOT, run_shell, wait_for

TUTORIAL = ROOT / "docs" / "tutorial.md"
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"


def printed(folder: Path, kafka: RealKafka) -> list[str]:
    """What every block prints, in an empty folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    # `python` and `headrace` are those of this environment, as after activating it; and this source.
    environment |= {"PATH": f"{Path(sys.prefix, 'bin')}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}

    def before(command: str) -> str:
        if "rank.py" in command:
            wait_for("the stream has caught up", lambda: caught_up(reader, folder))
        return command

    with EmbeddedRedis() as redis:
        places = {
            "127.0.0.1:9092": kafka.bootstrap_servers,
            "redis://127.0.0.1:6379/0": redis.url,
            "PYTHONPATH=.": f"PYTHONPATH=.:{ROOT}",
            "8000": str(free_port()),
        }
        with Reader(folder, environment, places, before) as reader:
            return [reader.run(block) for block in blocks(TUTORIAL.read_text())]


def caught_up(reader: Reader, folder: Path) -> bool:
    """Whether all that was sent is in the features, as `headrace doctor` tells."""
    found = run_shell("headrace doctor || true", reader.environment, folder)
    return re.findall(r"lag of \S+: (.*)", found) == ["0 records"] * 2


def test_every_block_of_the_tutorial_prints_what_it_says(tmp_path: Path, real_kafka: RealKafka) -> None:
    """In order, in an empty folder; run `python -m tests.test_tutorial` to write the outputs and the notebook anew."""
    for block, said in zip(blocks(TUTORIAL.read_text()), printed(tmp_path, real_kafka), strict=True):
        assert same(block.output or "", said), f"{block.text}\nprints\n{said}"


def test_the_ranker_is_better_than_popularity_by_more_than_chance() -> None:
    """By more than the best of five markets is better than the worst, of either; and in each of them."""
    (table,) = re.findall(r"^ .*ranker\n(?:\d+ .*\n)+mean .*\nspread .*\n", TUTORIAL.read_text(), re.MULTILINE)
    *markets, mean, spread = np.array([line.split()[1:] for line in table.splitlines()[1:]], float)
    assert len(markets) == 5
    assert all(ranker > popularity for popularity, ranker in markets)
    assert mean[1] - mean[0] > max(spread)


def test_the_notebook_is_the_tutorial() -> None:
    """Its cells are the tutorial's blocks, and say the same."""
    assert NOTEBOOK.read_text() == notebook(TUTORIAL.read_text())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty, RealKafka() as broker:
        TUTORIAL.write_text(with_outputs(TUTORIAL.read_text(), printed(Path(empty), broker)))
    NOTEBOOK.write_text(notebook(TUTORIAL.read_text()))
