"""README.md is true: its settings table is that of the code, and every block runs."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import httpx
import pytest

from config.settings import Settings
from features.definitions import compile_definitions
from features.plan import Plan
from features.program import Program
from headrace import DeclarationError
from headrace.embedded import EmbeddedRedis, free_port
from registry.ordinary import declared
from tests.support.docs import Reader, blocks
from tests.support.kafka import RealKafka
from tests.support.stack import project_copy, wait_for

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DEMO_SECONDS = 6


def settings_table() -> str:
    """The table as it should be."""
    rows = ["| variable | default | what |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default.get_secret_value() if name == "redis_url" else field.default
        rows.append(f"| `HEADRACE_{name.upper()}` | `{default}` | {field.description} |")
    return "\n".join(rows)


def test_the_settings_table_is_that_of_the_code() -> None:
    """Run `python -m tests.test_docs` to write it anew."""
    written = re.search(r"<!-- settings -->\n(.*)\n<!-- /settings -->", README, re.DOTALL)
    assert written is not None
    assert written[1] == settings_table()


def test_links_in_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_block_of_the_readme_runs(tmp_path: Path, real_kafka: RealKafka) -> None:
    """In order, in a fresh copy, as a newcomer would; only addresses are those of this test's servers."""
    port = free_port()

    def before(command: str) -> str:
        if command == "make demo":
            # What make would install is already here; it is tried from a bare clone in CI.
            return f".venv/bin/headrace demo --seconds {DEMO_SECONDS}"
        if command == "make test":
            return ".venv/bin/pytest --collect-only -q tests/test_docs.py"
        if "entities/user/u1" in command:
            wait_for("the stream has caught up", lambda: clicks(port) == 1)
        return command

    with EmbeddedRedis() as redis, project_copy(tmp_path) as folder:
        places = {
            "127.0.0.1:9092": real_kafka.bootstrap_servers,
            "redis://127.0.0.1:6379/0": redis.url,
            "8000": str(port),
        }
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(folder)}
        environment["PATH"] = f"{folder / '.venv' / 'bin'}:{environment['PATH']}"
        environment.pop("HEADRACE_REPO", None)
        found = blocks(README)
        assert len(found) == len(re.findall("^```\\w", README, re.MULTILINE)) > 5
        with Reader(folder, environment, places, before) as reader:
            for block in found:
                reader.run(block)


def test_ordinary_views_as_docs_show_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the catalogue's profiles the example is a plan, and its service can be read."""
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "feast.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "shown_in_docs.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = compile_definitions("shown_in_docs", "shown", 4, declared(Settings()).plan)
    program = Program(plan, plan.service("ranking_v2").features)
    assert {view.view for view in program.given} == {"item_profile", "user_profile"}
    with pytest.raises(DeclarationError, match="names item_profile, which no ordinary view has"):
        compile_definitions("shown_in_docs", "shown", 4, Plan("shown", 4, (), (), (), ()))


def clicks(port: int) -> int:
    """How many clicks of u1 are served."""
    time.sleep(0.05)
    found: int = httpx.get(f"http://127.0.0.1:{port}/v1/entities/user/u1", timeout=5).json()["features"][
        "user_activity__clicks_1h"
    ]
    return found


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(
        re.sub(r"(<!-- settings -->\n).*(\n<!-- /settings -->)", rf"\1{settings_table()}\2", README, flags=re.DOTALL)
    )
    print("written", file=sys.stderr)
