"""docs/topics.md is true: its files work, its commands print what it says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import fastavro
import pytest

from tests.support.docs import _FILE, Block, blocks
from tests.support.stack import commands_of

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "topics.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the document's files."""
    made = tmp_path_factory.mktemp("shop")
    (made / "feature_store.yaml").write_text("project: shop\nprovider: local\nregistry: registry.db\n")
    for block in blocks(DOCUMENT):
        if named := _FILE.match(block.text):
            (made / named[1].replace("features.py", "shop_features.py")).write_text(block.text[named.end() :])
    return made


def run(folder: Path, *argv: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "HEADRACE_DEFINITIONS": "shop_features"}
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", [block for block in blocks(DOCUMENT) if block.language == "console"])
def test_commands_print_what_it_says(folder: Path, block: Block) -> None:
    (command,) = commands_of(block.text)
    assert run(folder, sys.executable, "-m", *command.split()) == block.output


def test_its_python_runs_and_its_contracts_take_what_its_schema_writes(folder: Path) -> None:
    (tried,) = [each for each in blocks(DOCUMENT) if each.language == "python" and not _FILE.match(each.text)]
    run(folder, sys.executable, "-c", tried.text.replace("from features ", "from shop_features "))
    schema = fastavro.parse_schema(json.loads((folder / "interactions.avsc").read_text()))
    data = io.BytesIO()
    article = {"id": 12, "labels": ["new"], "price": None}
    written = {"id": "e", "at": 1_763_683_200_000, "kind": "click", "customer": {"id": 4711}, "article": article}
    fastavro.schemaless_writer(data, schema, written)
    (folder / "record.avro").write_bytes(data.getvalue())
    (folder / "judge.py").write_text(JUDGE)
    assert run(folder, sys.executable, "judge.py") == "[] [4711.0] [['new']]\n"


JUDGE = """
from pathlib import Path

import numpy as np

from features.compile import event_spec
from shop_features import Click, Like
from streams.chunk import Chunk, Partition
from streams.contract import ContractDecoder
from streams.decode import Topic
from streams.schemas import avro_of

read = avro_of(Path("interactions.avsc").read_text())
decoders = {each.__name__: ContractDecoder(each.__name__, each) for each in (Click, Like)}
topic = Topic([event_spec(Click), event_spec(Like)], decoders, lambda _format, value: read(value, 0))
value, at, times_ms = Path("record.avro").read_bytes(), np.zeros(1, np.int64), np.array([1_763_683_200_000])
judged = topic.judge([Chunk(Partition("interactions", 0), 0, 1, 0, [value], [None], at, times_ms)], times_ms, at)
(_, found), _ = judged.accepted
print(judged.refused, found.fields["user_id"].tolist(), found.fields["labels"].to_pylist())
"""
