"""Rules of the house that no linter knows: which package may import which, and who may look at the clock."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).parent.parent
BELOW: dict[str, set[str]] = {
    "config": set(),
    "features": set(),
    "store": {"config", "features"},
    "streams": {"config", "features", "store"},
    "training": {"config", "features", "store", "streams"},
    "registry": {"config", "features", "store", "training"},
    "serving": {"config", "features", "store"},
    "headrace": {"config", "features", "store", "streams", "training", "registry", "serving"},
}
"""What each package may import besides itself."""
CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}


def files(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts)


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every absolute import, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, str(node.module).split(".")[0]


def clock_readings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every mention of the wall clock, but for defaults of arguments: there a caller can pass another.

    It knows `time.time` and `datetime.now` by these names; an alias would go unnoticed, `from time import time` not.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from ((node.lineno, f"time.{name.name}") for name in node.names if f"time.{name.name}" in CLOCKS)
    defaults = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.arguments)
        for default in (*node.defaults, *node.kw_defaults)
        if default is not None
        for inner in ast.walk(default)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in defaults:
            name = ".".join(ast.unparse(node).split(".")[-2:])
            if name in CLOCKS:
                yield node.lineno, name


@pytest.mark.parametrize("package", BELOW)
def test_imports_run_one_way(package: str) -> None:
    """The shipped catalogue counts as a user's package: it imports `headrace`, and of ours nothing else but itself."""
    wrong = []
    for path in files(package):
        is_catalogue = path.is_relative_to(ROOT / "features" / "catalog")
        allowed = {"headrace", "features"} if is_catalogue else {package} | BELOW[package]
        for line, name in imported(ast.parse(path.read_text())):
            if name in BELOW.keys() - allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_the_catalogue_imports_what_users_import() -> None:
    """Of `features` it takes only its own modules; everything else comes from `headrace`."""
    wrong = []
    for path in files("features/catalog"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            ours = [name for name in modules if name.split(".")[0] == "features"]
            wrong += [f"{path.name} imports {name}" for name in ours if not name.startswith("features.catalog")]
    assert wrong == []


@pytest.mark.parametrize("package", [name for name in BELOW if name != "headrace"])
def test_nothing_below_the_command_line_looks_at_the_clock(package: str) -> None:
    """A clock is passed in, so that tests and replays can pass another: `clock=time.time` is a default to replace."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} uses {name}"
        for path in files(package)
        for line, name in clock_readings(ast.parse(path.read_text()))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("now = time.time()", 1),
        ("def f():\n    return datetime.datetime.now(tz=UTC)", 1),
        ("from time import time", 1),
        ("def f(*, clock=time.time): return clock()", 0),
        ("def f(clock=lambda: time.time_ns() // 1_000_000): ...", 0),
        ("def f(clock=time.time): return time.time()", 1),
        ("time.monotonic(); loop.time(); self.time.times()", 0),
    ],
)
def test_the_clock_check_finds_what_it_should(code: str, found: int) -> None:
    assert len([*clock_readings(ast.parse(code))]) == found


def test_the_longest_test_files_are_there() -> None:
    """One that was renamed must not silently come last."""
    assert [name for name in LONGEST if not (ROOT / "tests" / name).exists()] == []


def test_every_package_is_there() -> None:
    """A package that moved or was renamed must not make these tests pass by finding no file."""
    assert all((ROOT / package / "__init__.py").exists() for package in BELOW)
