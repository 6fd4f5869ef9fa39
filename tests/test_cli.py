"""The command line in this process: what it prints, and how it fails."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import feast
import msgspec
import pyarrow.parquet as pq
import pytest

from config.settings import Settings
from headrace import cli
from headrace.embedded import EmbeddedBroker, EmbeddedRedis, free_port
from registry.apply import apply
from registry.ordinary import declared
from registry.register import register
from store.archive import forgotten_of
from store.connect import connect
from store.keys import Keyspace, plans_key
from store.plans import ApplyError, append_plan, load_plan
from streams.lane import Lane
from tests.support.archived import archive
from tests.support.served import NOW_MS, SHARDS, Clock, Rows, catalogue, project_folder
from tests.support.stack import wait_for

COMMANDS = [
    "apply",
    "archive",
    "demo",
    "doctor",
    "history",
    "plan",
    "quality",
    "replay",
    "serve",
    "show",
    "stream",
    "train",
]


@dataclass
class Ran:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def flat(self) -> str:
        """All that it printed on one line: tables and messages are wrapped to a terminal's width."""
        return re.sub(r"[\s│]+", " ", self.out + self.err)


Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path, redis_url: str, broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a project where nothing is applied, in the environment."""
    made = Settings(
        repo=project_folder(tmp_path / "project"),
        redis_url=redis_url,
        kafka=broker.bootstrap_servers,
        kafka_options={"log_level": "0"},
        topics="auto",
        shards=SHARDS,
        redis_timeout_s=2,
    )
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HEADRACE_TRACE", raising=False)
    return made


@pytest.fixture
def applied(settings: Settings) -> Settings:
    apply(settings, connect(settings.redis_url.get_secret_value(), 10))
    return settings


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str, **environment: str) -> Ran:
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            patched.setattr(sys, "argv", ["headrace", *arguments])
            patched.setattr("config.logs.set_up_logs", mock.Mock())  # It is for a whole process.
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                cli.main()
        out, err = capsys.readouterr()
        status = ended.value.code
        return Ran(status if isinstance(status, int) else 0, out, err)

    return call


def refused(ran: Ran, *mentioned: str) -> None:
    """It failed in one line that says what to do, and without a stack trace."""
    assert ran.status == 1, ran
    assert "Traceback" not in ran.err
    # The embedded broker gives topics no ids, which is said by who reads them; what changes something is logged first.
    besides = ("HEADRACE_TRACE", "topic_ids_unknown", "] audit ")
    lines = [line for line in ran.err.splitlines() if not any(each in line for each in besides)]
    assert lines[0].startswith("error: ")
    for text in mentioned:
        assert text in ran.flat, ran.err


# Commands


def test_plan_apply_plan(settings: Settings, run: Run) -> None:
    fingerprint = catalogue().fingerprint
    announced = run("plan")
    assert announced.status == 0
    assert "adds view user_activity: " in announced.out
    assert f"plan {fingerprint}: run `headrace apply`" in announced.flat
    first = run("apply")
    assert first.status == 0
    assert f"+ {3 * SHARDS} commit records" in first.flat
    assert f"plan {fingerprint} is applied" in first.flat
    assert set(announced.out.splitlines()[:-1]) <= set(first.out.splitlines())
    assert run("plan").flat.strip() == f"plan {fingerprint}: nothing to do"
    assert run("apply").flat.strip() == f"plan {fingerprint} is applied: there was nothing to do"


def test_what_needs_consent_ends_with_status_2_and_is_applied_once_it_is_named(
    redis_url: str, settings: Settings, run: Run
) -> None:
    """For CI, and for who applies: nothing at all is applied before."""
    plan = catalogue()
    views = list(plan.views)
    at = next(index for index, view in enumerate(views) if view.name == "user_activity")
    features = [
        msgspec.structs.replace(spec, default=30.0) if spec.name == "price_mean" else spec
        for spec in views[at].features
    ]
    views[at] = msgspec.structs.replace(views[at], features=tuple(features), owner="feed")
    client: Any = connect(redis_url, timeout_s=10)
    append_plan(client, msgspec.structs.replace(plan, views=tuple(views)), 0)
    ran = run("plan")
    assert ran.status == 2
    assert "changes meaning feature user_activity.price_mean: default 30.0 -> 25.0" in ran.flat
    assert "would refuse it" in ran.flat
    ran = run("plan", "--json")
    said = json.loads(ran.out)
    assert ran.status == 2
    assert [each["kind"] for each in said["changes"]] == ["describes", "changes meaning"]
    assert [each["name"] for each in said["refused"]] == ["user_activity.price_mean"]
    refused(run("apply"), "nothing is applied", "--replace user_activity.price_mean")
    refused(run("apply", "--replace", "user_activity.price"), "--replace user_activity.price: nothing")
    assert client.llen(plans_key("headrace")) == 1
    consent = ("--replace", "user_activity.price_mean")
    ran = run("plan", "--json", *consent)
    assert (ran.status, json.loads(ran.out)["refused"]) == (0, [])
    assert "is applied" in run("apply", *consent).flat
    assert run("plan").status == 0
    assert "nothing to do" in run("apply", *consent).flat


def test_history_lists_the_applied_plans_the_newest_first(redis_url: str, settings: Settings, run: Run) -> None:
    """When, by whom and what changed, of a roll-back too; a plan that can't be read hides no other."""
    assert "run `headrace apply`" in run("history").flat
    client, plan = connect(redis_url, timeout_s=10), catalogue()
    without = msgspec.structs.replace(plan, services=())
    foreign = msgspec.structs.replace(plan, version=99)
    every = [msgspec.structs.replace(each, number=number) for number, each in enumerate((plan, without, foreign, plan))]
    for at_s, each in enumerate(every):
        append_plan(client, each, at_s * 1000)
    with pytest.raises(ApplyError, match="another plan was applied"):
        append_plan(client, every[-1], 4000)
    ran = run("history")
    lines = ran.out.splitlines()
    applied = [line.split(", ")[:2] for line in lines if line.startswith("plan ")]
    expected = [(each, at_s) for at_s, each in reversed(list(enumerate(every)))]
    assert applied == [[f"plan {each.fingerprint}", f"1970-01-01T00:00:0{at_s}Z"] for each, at_s in expected]
    services = [f"service {spec.name}" for spec in plan.services]
    heads = [at for at, line in enumerate(lines) if line.startswith("plan ")]
    pages = [lines[begin + 1 : end] for begin, end in pairwise([*heads, len(lines)])]
    assert [line.partition(":")[0] for line in pages[0]] == [f"adds {name}" for name in services]
    assert len(pages[1]) == 1
    assert "another version of Headrace" in pages[1][0]
    assert [line.partition(":")[0] for line in pages[2]] == [f"removes {name}" for name in services]
    assert any(line.startswith("adds view user_activity: ") for line in pages[3])


def test_what_is_printed_into_a_pipe_is_not_wrapped(settings: Settings, run: Run) -> None:
    """A wrapped line can't be searched for: a change, or an error, is one line."""
    assert run("apply").status == 0
    ran = run("plan", HEADRACE_SHARDS="8")
    lines = [line for line in ran.err.splitlines() if "HEADRACE_TRACE" not in line]
    assert len(lines) == 1, lines


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal on which no cell of a table is wrapped."""
    monkeypatch.setattr(cli.out, "width", 300)


def test_show_prints_an_entitys_features(applied: Settings, run: Run, wide: None) -> None:
    clock = Clock(time.time_ns() // 1_000_000)
    rows = Rows(catalogue(), applied.redis_url.get_secret_value(), clock)
    event = {"t": clock.now_ms, "user_id": "u1", "item_id": "i1", "category": "boots", "price": 12.5}
    rows.write("clicks", [event, event])
    shown = run("show", "user", "u1")
    assert shown.status == 0
    assert "user u1: PRESENT" in shown.flat
    assert "user_activity__clicks_7d 2 Items opened" in shown.flat
    assert "['i1']" in shown.flat
    assert "seller_activity" not in shown.flat
    of_service = run("show", "item", "i1", "--service", "ranking_v1")
    assert "item_activity__category boots" in of_service.flat
    assert "viewers" not in of_service.flat
    assert "user nobody: NOT_FOUND" in run("show", "user", "nobody").flat


def test_show_prints_ids_and_values_that_look_like_markup(applied: Settings, run: Run, wide: None) -> None:
    clock = Clock(time.time_ns() // 1_000_000)
    rows = Rows(catalogue(), applied.redis_url.get_secret_value(), clock)
    rows.write("clicks", [{"t": clock.now_ms, "user_id": "u1", "item_id": "[/x]", "category": "[red]"}])
    shown = run("show", "item", "[/x]")
    assert shown.status == 0
    assert "item [/x]: PRESENT" in shown.flat
    assert "item_activity__category [red]" in shown.flat


def test_show_says_what_there_is(applied: Settings, run: Run) -> None:
    wrong = run("show", "shop", "x")
    assert wrong.status == 2
    assert "item, seller, user" in wrong.flat
    refused(run("show", "user", "u1", "--service", "nope"), "nope", "ranking_v1")


def test_show_of_a_service_without_the_entity_says_so(applied: Settings, run: Run) -> None:
    shown = run("show", "seller", "s1", "--service", "ranking_v1")
    assert shown.status in (1, 2)
    assert "ranking_v1" in shown.flat
    assert "seller" in shown.flat
    assert "index out of range" not in shown.flat


def test_nothing_applied_is_said_in_one_line(settings: Settings, run: Run, tmp_path: Path) -> None:
    for command in (["show", "user", "u1"], ["serve"]):
        refused(run(*command), "nothing is applied", "headrace apply")
    refused(run("plan", HEADRACE_REPO=str(tmp_path)), "feature_store.yaml", "HEADRACE_REPO")


def test_what_was_taken_out_of_feasts_registry_is_noticed_and_comes_back(applied: Settings, run: Run) -> None:
    """By `plan` and the doctor; what a plan no longer has is listed before it goes."""
    store: Any = feast.FeatureStore(str(applied.repo))
    store.registry.delete_feature_view("user_activity", "headrace")
    said = "adds StreamFeatureView user_activity"
    ran = run("plan")
    assert (ran.status, said in ran.flat, "run `headrace apply`" in ran.flat) == (0, True, True)
    assert said in json.loads(run("plan", "--json").out)["registry"]
    ran = run("doctor")
    assert (ran.status, f"LOOK feast registry: not as applied: `headrace apply` {said}" in ran.flat) == (0, True)
    assert "Feast's registry was not as applied" in run("apply").flat
    assert "nothing to do" in run("plan").flat
    assert "ok feast registry: as applied" in run("doctor").flat
    plan = catalogue()
    more = msgspec.structs.replace(plan, services=(*plan.services, msgspec.structs.replace(plan.services[0], name="x")))
    register(feast.FeatureStore(str(applied.repo)), more, applied, declared(applied).objects)
    assert json.loads(run("plan", "--json").out)["registry"] == [
        "changes RequestSource headrace_plan",
        "deletes FeatureService x",
    ]


# The doctor


def test_the_doctor_finds_a_healthy_project_healthy(applied: Settings, run: Run) -> None:
    ran = run("doctor")
    assert ran.status == 0
    assert all(line.startswith("ok ") for line in ran.out.splitlines()), ran.out
    for what in ("plan", "definitions", "redis", "maxmemory-policy", "commit records", "kafka", "topic clicks"):
        assert what in ran.out


def test_the_doctor_finds_what_is_not_applied(settings: Settings, run: Run) -> None:
    ran = run("doctor")
    assert ran.status == 1
    assert "NOT OK plan: nothing is applied" in ran.flat
    assert "ok redis: version" in ran.flat
    assert "ok kafka" in ran.flat


def test_the_doctor_finds_what_is_away_and_looks_at_the_rest(applied: Settings, run: Run) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    ran = run("doctor", HEADRACE_REDIS_URL=f"redis://{nobody}/0")
    assert ran.status == 1
    assert "NOT OK redis: ConnectionError" in ran.flat
    assert "HEADRACE_REDIS_URL" in ran.flat
    assert "ok kafka" in ran.flat
    ran = run("doctor", HEADRACE_KAFKA=nobody)
    assert ran.status == 1
    assert f"NOT OK kafka: {nobody}" in ran.flat
    assert "HEADRACE_KAFKA" in ran.flat
    assert "ok redis: version" in ran.flat


def test_the_doctor_finds_what_redis_has_lost(applied: Settings, run: Run) -> None:
    """One record, and all."""
    client: Any = connect(applied.redis_url.get_secret_value(), 10)
    client.delete(Keyspace("headrace", applied.shards).commit_record("user", 1))
    ran = run("doctor")
    assert ran.status == 1
    assert "NOT OK commit records" in ran.flat
    client.flushall()
    ran = run("doctor")
    assert ran.status == 1
    assert "NOT OK plan: nothing is applied" in ran.flat
    assert "headrace apply" in ran.flat
    assert "ok kafka" in ran.flat


def test_the_doctor_does_not_blame_the_address_for_lost_records(applied: Settings, run: Run) -> None:
    """Redis answered: HEADRACE_REDIS_URL is not what to look at first."""
    client: Any = connect(applied.redis_url.get_secret_value(), 10)
    client.delete(Keyspace("headrace", applied.shards).commit_record("user", 1))
    (line,) = [line for line in re.split(r"(?=ok |NOT OK )", run("doctor").flat) if "commit record" in line]
    assert line.startswith("NOT OK ")
    assert "is HEADRACE_REDIS_URL right?" not in line


def test_the_doctor_finds_a_redis_that_loads_half_a_commit(applied: Settings, run: Run) -> None:
    client: Any = connect(applied.redis_url.get_secret_value(), 10)
    client.config_set("appendonly", "yes")
    try:
        ran = run("doctor")
        assert ran.status == 1
        assert "NOT OK redis aof-load-truncated: yes: set no" in ran.flat
        client.config_set("aof-load-truncated", "no")
        assert "ok redis aof-load-truncated: no" in run("doctor").flat
    finally:
        client.config_set("appendonly", "no")
        client.config_set("aof-load-truncated", "yes")


def test_the_doctor_says_what_it_was_not_told(applied: Settings, run: Run) -> None:
    """A provider's Redis refuses CONFIG: that a setting is not known is not that it is right."""
    client: Any = connect(applied.redis_url.get_secret_value(), 10)
    client.config_set("appendonly", "yes")
    client.execute_command("ACL", "SETUSER", "default", "-config")
    try:
        ran = run("doctor")
        assert ran.status == 0
        assert "LOOK redis aof-load-truncated: this Redis does not say: see to it that it is no" in ran.flat
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+@all")
        client.config_set("appendonly", "no")


def test_the_doctor_finds_a_replicated_redis_that_keeps_nothing(applied: Settings, run: Run) -> None:
    """A master that restarts empty and is promoted again empties its replicas: all counts would be lost at once."""
    client: Any = connect(applied.redis_url.get_secret_value(), 10)
    assert "persistence" not in run("doctor").flat
    port = client.connection_pool.connection_kwargs["port"]
    with EmbeddedRedis(args=["--replicaof", "127.0.0.1", str(port), "--repl-diskless-sync-delay", "0"]):
        wait_for("the replica is known", lambda: client.info("replication")["connected_slaves"] == 1)
        ran = run("doctor")
        assert ran.status == 1
        assert "NOT OK redis persistence: none, but replicas" in ran.flat
        try:
            client.config_set("save", "3600 1")
            assert "ok redis persistence: save 3600 1" in run("doctor").flat
        finally:
            client.config_set("save", "")


def test_the_doctor_finds_a_redis_that_evicts(applied: Settings, run: Run) -> None:
    client: Any = connect(applied.redis_url.get_secret_value(), 10)
    try:
        client.config_set("maxmemory-policy", "allkeys-lfu")
        ran = run("doctor")
    finally:
        client.config_set("maxmemory-policy", "noeviction")
    assert ran.status == 1
    assert "NOT OK redis maxmemory-policy: allkeys-lfu" in ran.flat


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HEADRACE_SHARDS", "8"), ("HEADRACE_DEFINITIONS", "no_such_package")],
)
def test_the_doctor_examines_everything_whatever_is_wrong(
    applied: Settings, run: Run, variable: str, value: str
) -> None:
    """One wrong setting is one `NOT OK`, which names it, and no end of the examination."""
    ran = run("doctor", **{variable: value})
    assert ran.status == 1
    assert "NOT OK" in ran.out
    assert variable in ran.flat
    assert "ok kafka" in ran.flat


# Wrong settings


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HEADRACE_SHARDS", "zero"),
        ("HEADRACE_SHARDS", "0"),
        ("HEADRACE_PORT", "99999"),
        ("HEADRACE_TOPICS", "sometimes"),
        ("HEADRACE_KAFKA_OPTIONS", "{x"),
        ("HEADRACE_DEFINITIONS", "no_such_package"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_its_variable(
    settings: Settings, run: Run, variable: str, value: str
) -> None:
    ran = run("plan", **{variable: value})
    refused(ran, variable)
    assert "pydantic" not in ran.flat
    assert "validation error" not in ran.flat


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:6379"])
def test_a_wrong_address_of_redis_names_its_variable(applied: Settings, run: Run, url: str) -> None:
    refused(run("show", "user", "u1", HEADRACE_REDIS_URL=url), "HEADRACE_REDIS_URL")


def test_a_redis_that_is_away_is_one_line(applied: Settings, run: Run) -> None:
    address = f"127.0.0.1:{free_port()}"
    refused(run("show", "user", "u1", HEADRACE_REDIS_URL=f"redis://{address}/0"), address)


def test_a_password_is_never_printed(applied: Settings, run: Run) -> None:
    ran = run("doctor", HEADRACE_REDIS_URL=f"redis://:hunter2@127.0.0.1:{free_port()}/0")
    assert ran.status == 1
    assert "hunter2" not in ran.flat
    assert "hunter2" not in repr(Settings(redis_url="redis://:hunter2@h/0", kafka_options={"sasl.password": "hunter2"}))


def test_a_kafka_that_is_away_is_one_line(settings: Settings, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.apply._KAFKA_TIMEOUT_S", 1.0)
    nobody = f"127.0.0.1:{free_port()}"
    for topics in ("auto", "create"):
        refused(run("apply", HEADRACE_KAFKA=nobody, HEADRACE_TOPICS=topics), nobody, "HEADRACE_KAFKA")


@pytest.mark.parametrize("text", ["a: [b", "a: b", "", "- a"])
def test_a_broken_feature_store_yaml_is_one_line_that_names_it(settings: Settings, run: Run, text: str) -> None:
    (settings.repo / "feature_store.yaml").write_text(text)
    refused(run("plan"), "feature_store.yaml")


def test_the_stack_trace_is_there_for_who_asks(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_TRACE", "1")
    monkeypatch.setenv("HEADRACE_SHARDS", "zero")
    monkeypatch.setattr(sys, "argv", ["headrace", "plan"])
    with pytest.raises(ValueError, match="HEADRACE_SHARDS"):
        cli.main()


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(settings: Settings, run: Run, command: str) -> None:
    ran = run(command, "--help")
    assert ran.status == 0
    assert f" {command} [OPTIONS]" in ran.flat
    function = getattr(cli, command)
    assert function.__doc__.splitlines()[0].rstrip(".")[:30] in ran.flat


def test_help_lists_every_command(settings: Settings, run: Run) -> None:
    ran = run("--help")
    assert ran.status == 0
    assert all(re.search(rf"\b{command}\b", ran.out) for command in COMMANDS)
    assert "README.md" in ran.flat


def test_the_module_is_the_command(settings: Settings) -> None:
    """Once as a process: light. Any of these imported at the top of a module would make `--help` take a second."""
    program = """if True:
        import sys
        import headrace.cli

        sys.argv = ["headrace", "--help"]
        try:
            headrace.cli.main()
        finally:
            heavy = ("feast", "numpy", "pydantic", "pyarrow", "redis", "structlog")
            print([each for each in heavy if each in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_pairs_need_both_halves(applied: Settings, run: Run, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("a,b\n")
    ran = run("replay", str(tmp_path / "events.csv"), "--topic", "clicks", "--map", "user_id")
    assert ran.status == 2
    assert "--map 'user_id': write it as NAME=VALUE" in ran.flat


# train, archive


def test_forget_takes_ids_of_a_file_and_waits_until_a_stream_has_done_it(applied: Settings, run: Run) -> None:
    """A line each, as either system ends them. Who is not there is forgotten as well; without a stream it says so."""
    file = applied.repo / "ids.txt"
    file.write_bytes("u1\r\nü 2\r\n\nu3".encode())
    assert run("forget", "nobody", "u1").status == 2
    assert run("forget", "user").status == 2
    with mock.patch("training.forget._PATIENCE_S", 0.2):
        refused(run("forget", "user", "u0"), "1 of 1 are not forgotten", "headrace stream", "The order stands")
    client, ends = connect(applied.redis_url.get_secret_value(), 10), threading.Event()
    lane = Lane(load_plan(applied), 0, 1, client)

    def stream() -> None:
        while not ends.wait(0.1):
            lane.write([])

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        ran = run("forget", "user", "--ids", str(file))
    finally:
        ends.set()
        thread.join()
    assert ran.status == 0, ran.err
    assert "3 users are forgotten; 0 dead letters name them" in ran.flat
    known = forgotten_of(applied)["user"]
    assert known.keys() == {b"u0", b"u1", "ü 2".encode(), b"u3"}


@pytest.mark.usefixtures("wide")
def test_quality_says_which_checks_are_breached_and_ends_with_status_1(applied: Settings, run: Run) -> None:
    """Of the events of the archive and of nothing in Kafka; without any sample it says where there is none."""
    refused(run("quality"), str(applied.sample_path()), applied.archive_url(), "HEADRACE_SAMPLE", "expect=[")
    now_ms = time.time_ns() // 1_000_000
    known = {"user_id": "u1", "item_id": "i1", "category": "coats", "price": 30.0}
    clicks = [{"t": now_ms - 60_000, **known}] * 9 + [{"t": now_ms - 60_000, **known, "category": None}]
    late = {"t": now_ms - 7_200_000, **known, "price": None}
    archive(applied, catalogue(), {"Click": [*clicks, late]}, random.Random(1))
    ran = run("quality")
    assert ran.status == 1, ran.err
    assert f"nothing that was served since then is in {applied.sample_path()}" in ran.flat
    assert 'Click share_null("category") < 0.05 10 0.1 BREACH' in ran.flat
    assert 'Click share_null("price") < 0.05 10 0 ok' in ran.flat
    assert 'Like share_null("price") < 0.05 0 ok' in ran.flat
    assert 'Click: share_null("category") < 0.05, it is 0.1' in ran.flat
    assert run("quality", "--since", "1d", "--json").status == 1


@pytest.fixture
def labels(settings: Settings) -> Path:
    """One label; of its user's click and like the archive knows, and no server is asked."""
    file = settings.repo / "labels.csv"
    file.write_text("user_id,item_id,event_timestamp,label\nu1,i1,2033-05-18T10:00:00Z,7\n")
    click = {"t": NOW_MS - 1, "user_id": "u1", "item_id": "i1"}
    archive(settings, catalogue(), {"Click": [click], "Like": [click]}, random.Random(1))
    return file


def test_train_needs_no_server_for_features_as_declared(run: Run, labels: Path) -> None:
    """What is not applied yet can be trained on: neither Redis nor Kafka has to be there."""
    out = labels.with_name("training.parquet")
    with mock.patch.dict("os.environ", HEADRACE_REDIS_URL="redis://127.0.0.1:1", HEADRACE_KAFKA="127.0.0.1:1"):
        named = ["--feature", "user_activity:likes_1h", "--feature", "user_item:clicked"]
        done = run("train", str(labels), "--out", str(out), *named, "--declared", "--no-tail")
    assert done.status == 0, done.err
    assert "1 labels with 2 features" in done.flat
    assert pq.read_table(out).to_pylist() == [
        {
            "user_id": "u1",
            "item_id": "i1",
            "event_timestamp": datetime(2033, 5, 18, 10, tzinfo=UTC),
            "label": 7,
            "user_activity__likes_1h": 1,
            "user_item__clicked": True,
        }
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--service", "ranking_v1", "--feature", "user_activity:clicks_1h"], "name a service (feed_v1, ranking_v1"),
        ([], "or features by --feature"),
        (["--feature", "user_activity:clicks_2h"], "user_activity__clicks_2h: no such feature is applied"),
        (["--service", "ranking_v9"], "no service 'ranking_v9' in the plan; there is: feed_v1"),
        (
            ["--service", "seller_v1"],
            "labels have no column 'seller_id', the key of seller; they have: user_id, item_id",
        ),
    ],
)
def test_train_says_what_is_wrong(run: Run, labels: Path, given: list[str], said: str) -> None:
    """And leaves no half of a file behind."""
    before = sorted(labels.parent.iterdir())
    done = run("train", str(labels), "--out", str(labels.with_name("out.parquet")), *given, "--declared", "--no-tail")
    assert done.status != 0
    assert said in done.flat
    assert sorted(labels.parent.iterdir()) == before


def test_train_takes_labels_of_a_time_only(run: Run, labels: Path) -> None:
    with labels.open("a") as file:
        file.write("u1,i1,2033-05-19T10:00:00Z,8\n")
    out = labels.with_name("training.parquet")
    wanted = ["--feature", "user_activity:clicks_7d", "--declared", "--no-tail", "--out", str(out)]
    for limits, left in (
        (["--start", "2033-05-19"], [8]),
        (["--end", "2033-05-19"], [7]),
        (["--end", "2033-05-01"], []),
        (["--since", "2033-05-18T10:00:00"], [7, 8]),
    ):
        assert run("train", str(labels), *wanted, *limits).status == 0
        table = pq.read_table(out)
        assert table["label"].to_pylist() == left
        expected = [0] * len(left) if "--since" in limits else [1] * len(left)
        assert table["user_activity__clicks_7d"].to_pylist() == expected


def test_archive_is_looked_after(run: Run, applied: Settings) -> None:
    """Small files become large ones, old days go, and it is said what is there."""
    now_ms = time.time_ns() // 1_000_000
    clicks = [{"t": now_ms - days * 86_400_000, "user_id": "u1", "item_id": "i1"} for days in range(9)]
    archive(applied, catalogue(), {"Click": clicks}, random.Random(1))
    assert "impressions: nothing is archived likes: nothing is archived" in run("archive", "--status").flat
    assert "clicks: about 9 events in" in run("archive", "--status").flat
    archive(applied, catalogue(), {"Click": clicks}, random.Random(2))
    assert re.search(r"clicks: 1\d files are 9 now", run("archive", "--compact").flat)
    assert "clicks: 10 events are deleted" in run("archive", "--keep", "3d").flat
    assert "clicks: about 8 events in" in run("archive", "--vacuum", "--status").flat
