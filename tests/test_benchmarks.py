"""The benchmarks: the harness, the load generator, and each of them in a small version. No speed is judged."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import NAMES, PAGE, markdown, write
from benchmarks.harness import Benchmark, Options, Report, Series, alternate, figure, largest, smallest
from benchmarks.load import http_request, measure, write_requests
from benchmarks.population import Population

ROOT = Path(__file__).parent.parent


def report() -> Report:
    made = Report("read", "work", "peer", quick=False, notes=["one note"])
    made.add("ours", Series.of([3, 1, 2]), "requests/s", key="rps")
    made.add("against it", Series.of([60.5, 59, 61]), "times", key="ratio", at_least=60)
    made.add("slower", Series.of([0.5]), "times", at_most=0.4)
    return made


class TestHarness:
    def test_a_ratio_pairs_the_measurements_of_a_round(self) -> None:
        """A machine that is slow in one round is slow for both: the ratio of medians (2 / 20) would be another."""
        ours, peer = Series.of([1, 2, 3]), Series.of([10, 40, 20])
        assert (ours / peer).values == (0.1, 0.05, 0.15)
        assert (ours / peer).median == 0.1

    def test_sides_are_measured_in_turn_and_the_order_turns_round(self) -> None:
        calls = count(1)
        sides = {name: partial(next, calls) for name in "ab"}
        assert alternate(sides, Options(rounds=3)) == {"a": [1, 4, 5], "b": [2, 3, 6]}

    def test_the_worse_of_several_is_chosen_by_its_median(self) -> None:
        one, other = Series.of([1, 5, 9]), Series.of([4, 4, 4])
        assert smallest(one, other) is other
        assert largest(one, other) is one

    def test_a_limit_is_reached_or_missed(self) -> None:
        assert [(line.must, line.reached) for line in report().lines] == [("", True), ("≥ 60", True), ("≤ 0.4", False)]

    def test_the_answer_has_the_promised_keys_and_no_others(self) -> None:
        def run(_options: Options, made: Report) -> None:
            made.add("ours", Series.of([1]), "ms", key="p50_ms")

        assert Benchmark("x", "work", "peer", ("p50_ms",), run)(Options()).result() == {"p50_ms": 1.0}
        with pytest.raises(RuntimeError, match="x promises p50_ms, ratio, but reported p50_ms"):
            Benchmark("x", "work", "peer", ("p50_ms", "ratio"), run)(Options())

    @pytest.mark.parametrize(
        ("value", "shown"), [(12345.6, "12,346"), (999.4, "999"), (59.96, "60"), (0.01234, "0.0123"), (2, "2")]
    )
    def test_figures_are_short(self, value: float, shown: str) -> None:
        assert figure(value) == shown


class TestPage:
    def test_every_benchmark_has_its_place(self) -> None:
        text = PAGE.read_text()
        for name in NAMES:
            assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1

    def test_a_table_replaces_the_one_before(self, tmp_path: Path) -> None:
        page = tmp_path / "README.md"
        page.write_text("above\n<!-- read: begin -->\nold\n<!-- read: end -->\nbelow\n")
        for _ in range(2):
            write(page, report(), "- here and now")
        text = page.read_text()
        assert text.startswith("above\n<!-- read: begin -->\n| figure | median |")
        assert text.endswith("- one note\n- here and now\n<!-- read: end -->\nbelow\n")
        assert "old" not in text
        assert "| against it | 60.5 | 59 – 61 | times | ≥ 60, **reached** | `ratio` |" in text
        assert markdown(report()) in text

    def test_a_page_without_the_place_is_refused(self, tmp_path: Path) -> None:
        page = tmp_path / "README.md"
        page.write_text("nothing here\n")
        with pytest.raises(ValueError, match=r"README\.md lacks the lines <!-- read: begin -->"):
            write(page, report(), "")


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]


@contextmanager
def serving(answer: bytes, pieces: int = 1) -> Iterator[str]:
    """A server that answers every request without a body with these bytes, in pieces; in a process of its own."""
    script = f"""
import asyncio, sys
async def serve(reader, writer):
    answer, n = {answer!r}, {pieces}
    while await reader.readuntil(b"\\r\\n\\r\\n"):
        for at in range(n):
            writer.write(answer[len(answer) * at // n : len(answer) * (at + 1) // n])
            await writer.drain()
            await asyncio.sleep(0)
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.stdout.close()
    finally:
        process.kill()
        process.wait()


class TestLoad:
    @pytest.mark.parametrize("pieces", [1, 7])
    def test_every_request_that_was_begun_is_counted(self, tmp_path: Path, pieces: int) -> None:
        """However the answer is cut into packets, also within its head."""
        body = b"x" * 5000
        requests = write_requests(tmp_path / "requests", [http_request("GET", f"/{number}") for number in range(3)])
        with serving(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body), pieces) as address:
            load = measure(address, requests, connections=2, seconds=0.2, warm_s=0.1)
        assert load.n >= 2
        assert load.sent > load.n
        assert 0 < load.p50_ms <= load.p99_ms

    @pytest.mark.parametrize(
        ("answer", "says"),
        [
            (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\naway", "not 200.*503.*away"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "no content-length"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\ntoo long", "longer than its content-length"),
        ],
    )
    def test_a_wrong_answer_ends_the_run_and_is_shown(self, tmp_path: Path, answer: bytes, says: str) -> None:
        requests = write_requests(tmp_path / "requests", [http_request("GET", "/")])
        with serving(answer) as address, pytest.raises(RuntimeError, match=f"(?s)http://127.*{says}"):
            measure(address, requests, connections=1, seconds=0.2, warm_s=0.1)


class TestPopulation:
    def test_requests_are_fixed_and_their_items_differ_and_follow_zipf(self) -> None:
        """Under Zipf's law the first of 1,000 items is in nearly every request, and a late one in few."""
        population = Population(100, 1000, 0, 0, popular=np.arange(1000)[::-1])
        asked = population.requests(200, items_each=50)
        assert asked == population.requests(200, items_each=50)
        assert all(len(set(each.item_ids)) == 50 for each in asked)
        times = {item: sum(item in each.item_ids for each in asked) for item in ("i999", "i0")}
        assert times["i999"] > 190
        assert times["i0"] < 20


@pytest.mark.parametrize("name", ["read", "read_sdk", "read_floor", "read_one", "start"])
def test_each_benchmark_runs_and_answers_with_its_keys(name: str) -> None:
    """In its small version, with real servers; it compares the answers of both sides itself."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", "--quick", "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert set(answer) == set(__import__(f"benchmarks.{name}", fromlist=["BENCHMARK"]).BENCHMARK.keys)
    assert all(value > 0 for value in answer.values())
