"""What all benchmarks share: alternating rounds, figures with their spread, the table, and the command line.

A benchmark is a module with a `Benchmark`; it runs its own servers, measures its sides in turn, and puts figures into
a `Report`:

    def run(options: Options, report: Report) -> None:
        rounds = alternate({"ours": measure_ours, "peer": measure_peer}, options)
        ours, peer = (Series.of(rounds[side]) for side in ("ours", "peer"))
        report.add("npy, 16 connections", ours, "requests/s", key="rps")
        report.add("against feast serve", ours / peer, "times", key="ratio_rps", at_least=60)

    BENCHMARK = Benchmark("read", work="…", peer="…", keys=("rps", "ratio_rps"), run=run)

    if __name__ == "__main__":
        main(BENCHMARK)

Sides are measured in turn, at least three times each, in an order that turns round every time. A ratio is the median of
the ratios of the pairs that were measured in one round: those stood next to each other in time, so a machine that is
slow for a while is slow for both. Machines are noisy: ratios count, absolute figures only inform.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

T = TypeVar("T")

_err = Console(stderr=True, highlight=False)
_began = time.monotonic()


def say(message: str) -> None:
    """One line of progress, with the seconds since the start, on standard error."""
    _err.print(f"{time.monotonic() - _began:5.0f} s  {message}", style="dim", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Options:
    """How to run: `quick` is a small version, of one round, that only shows that everything works."""

    quick: bool = False
    rounds: int = 3

    def pick(self, full: T, quick: T) -> T:
        """A size or duration, for the full or the quick version."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Series:
    """One figure, as it came out in each round."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Series:
        """The figure's value in each round, in order."""
        return cls(tuple(float(value) for value in values))

    @property
    def median(self) -> float:
        """The middle value: what counts."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest value."""
        return max(self.values)

    def __truediv__(self, other: Series) -> Series:
        """Round by round, this over the other."""
        return Series(tuple(mine / theirs for mine, theirs in zip(self.values, other.values, strict=True)))


def smallest(*series: Series) -> Series:
    """The series with the smallest median."""
    return min(series, key=lambda each: each.median)


def largest(*series: Series) -> Series:
    """The series with the largest median."""
    return max(series, key=lambda each: each.median)


def alternate(sides: Mapping[str, Callable[[], T]], options: Options) -> dict[str, list[T]]:
    """Measures the sides in turn, `options.rounds` times each; returns what each returned, round by round."""
    measured: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(options.rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in order:
            say(f"round {number + 1} of {options.rounds}: {name}")
            measured[name].append(sides[name]())
    return measured


class Line(msgspec.Struct, frozen=True):
    """A row of the table: a figure, its spread, and what it must reach."""

    what: str
    unit: str
    median: float
    low: float
    high: float
    key: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def must(self) -> str:
        """What it must reach, in words; empty if nothing."""
        parts = [
            f"{sign} {limit:g}" for sign, limit in (("≥", self.at_least), ("≤", self.at_most)) if limit is not None
        ]
        return " and ".join(parts)

    @property
    def reached(self) -> bool:
        """Whether it does."""
        above = self.at_least is None or self.median >= self.at_least
        return above and (self.at_most is None or self.median <= self.at_most)


@dataclass
class Report:
    """What a benchmark found: the lines of its table, and notes on what was run (sizes, hit rates, configuration)."""

    name: str
    work: str
    peer: str
    quick: bool
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """Texts that go beside the page of tables, such as a plot, by file name."""

    def add(
        self,
        what: str,
        series: Series,
        unit: str,
        *,
        key: str | None = None,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Adds a figure; with `key` it is also in the JSON answer, with a limit it says whether it is reached."""
        self.lines.append(Line(what, unit, series.median, series.low, series.high, key, at_least, at_most))

    def note(self, text: str) -> None:
        """Adds a sentence below the table, and says it at once."""
        self.notes.append(text)
        say(text)

    def result(self) -> dict[str, float]:
        """The medians of the figures that have a key."""
        return {line.key: line.median for line in self.lines if line.key}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: `keys` are those of its JSON answer, no more and no less."""

    name: str
    work: str
    peer: str
    keys: tuple[str, ...]
    run: Callable[[Options, Report], None]

    def __call__(self, options: Options) -> Report:
        """Runs it.

        Raises:
            RuntimeError: if the figures are not those that were promised.
        """
        report = Report(self.name, self.work, self.peer, options.quick)
        say(f"{self.name}: {self.work}")
        self.run(options, report)
        if set(report.result()) != set(self.keys):
            msg = f"{self.name} promises {', '.join(self.keys)}, but reported {', '.join(report.result())}"
            raise RuntimeError(msg)
        return report


def show(report: Report) -> None:
    """Prints the table on standard output."""
    # Whole lines also where there is no terminal to ask for its width.
    out = Console(highlight=False, width=max(120, _err.width))
    title = f"{report.name}: {report.work}\nagainst {report.peer}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("figure")
    for column in ("median", "low – high"):
        table.add_column(column, justify="right")
    for column in ("unit", "must reach", "key"):
        table.add_column(column)
    for line in report.lines:
        verdict = f"{line.must}  {'reached' if line.reached else '[bold red]missed[/]'}" if line.must else ""
        table.add_row(
            line.what,
            figure(line.median),
            f"{figure(line.low)} – {figure(line.high)}",
            line.unit,
            verdict,
            line.key or "",
        )
    out.print(table)
    for note in report.notes:
        out.print(f"- {note}", markup=False, soft_wrap=True)
    if report.quick:
        out.print("This was the quick version: it shows that everything works, its figures mean nothing.")


def figure(value: float) -> str:
    """A number with three or four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def main(benchmark: Benchmark) -> None:
    """The command line of one benchmark."""
    end_on_sigterm()
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark.name}", description=benchmark.work)
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="make the last line of output one JSON object")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write all figures to a file, as JSON")
    given = parser.parse_args()
    report = benchmark(Options(quick=given.quick, rounds=1 if given.quick else given.rounds))
    show(report)
    if given.report:
        given.report.write_bytes(msgspec.json.encode(report))
    if given.json:
        sys.stdout.flush()
        print(json.dumps(report.result()))


def end_on_sigterm() -> None:
    """Lets `with` blocks end, and with them every server, also when a process manager or `timeout` stops us."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit("stopped by SIGTERM")

    signal.signal(signal.SIGTERM, stop)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that make `Options`."""
    parser.add_argument("--quick", action="store_true", help="a small version for smoke tests; figures mean nothing")
    parser.add_argument("--rounds", type=_rounds, default=3, metavar="N", help="rounds of each side (3 or more)")


def _rounds(text: str) -> int:
    value = int(text)
    if value < 3:
        msg = f"{value} rounds are too few for a median with a spread; give 3 or more"
        raise argparse.ArgumentTypeError(msg)
    return value


def read_report(path: Path) -> Any:
    """A report that `--report` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Report)
