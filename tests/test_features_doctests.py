"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

import features
import store
from features import aggregations
from features.aggregations import Aggregation

NO_AGGREGATION = {"base", "worked"}


def names() -> Iterator[str]:
    """Every module of `features` and `store`."""
    for package in (features, store):
        yield package.__name__
        yield from (module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))


@pytest.mark.parametrize("name", list(names()))
def test_examples_of_a_module(name: str) -> None:
    """Each `>>>` of the module gives what is written below it."""
    module = importlib.import_module(name)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(example, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize(
    "name", sorted({module.name for module in pkgutil.iter_modules(aggregations.__path__)} - NO_AGGREGATION)
)
def test_an_aggregation_shows_a_stream_of_values_and_the_result(name: str) -> None:
    """One aggregation a file, and its docstring runs it: events first, then what `worked` makes of them."""
    module = importlib.import_module(f"features.aggregations.{name}")
    own = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
    (kind,) = (kind for kind in own if issubclass(kind, Aggregation))
    examples = doctest.DocTestParser().get_examples(kind.__doc__ or "")
    results = [example.want for example in examples if example.source.startswith("worked(")]
    assert any(results), f"{kind.__name__} needs an example: >>> worked({kind.__name__}(…), {{…}}, at=…)"
