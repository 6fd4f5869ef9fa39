"""The command line."""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from headrace.contract_cli import app as contract

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from config.settings import Settings
    from features.changes import Change
    from features.plan import Plan
    from registry.backfill import Backfilled
    from training.run import Progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: drawing it with rich takes longer than all else that `--help` does.
    rich_markup_mode=None,
    help="Headrace: a real-time feature store. Settings are HEADRACE_* variables: see README.md.",
)
_SECRET = (
    *("HEADRACE_REDIS_URL", "HEADRACE_KAFKA_OPTIONS", "HEADRACE_ARCHIVE_OPTIONS"),
    "HEADRACE_SCHEMA_REGISTRY_OPTIONS",
)
"""Variables that hold passwords."""
keys = typer.Typer(no_args_is_help=True, help="API keys of the server: the file HEADRACE_API_KEYS_FILE.")
app.add_typer(keys, name="keys")
app.add_typer(contract, name="contract")
# A table is cut to a terminal's width; who reads a file or a pipe wants all of it.
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, soft_wrap=True)


@app.callback()
def _before_any() -> None:
    """What every command needs, and `--help` does not."""
    from config.logs import set_up_logs

    set_up_logs(as_json=_settings().log_json)


Replace = Annotated[
    list[str] | None,
    typer.Option(
        metavar="VIEW.FEATURE",
        help="What may change its meaning or break producers (also a view, entity, contract or service); repeat it",
    ),
]


@app.command()
def plan(
    replace: Replace = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False,
) -> None:
    """Say what `apply` would change and what follows; nothing is changed.

    Ends with status 2 if a change needs consent that --replace does not give, or is refused.
    """
    import msgspec

    from features.changes import in_the_way, when
    from store.completeness import Completeness, look
    from store.plans import plan_changes

    settings = _settings()
    client, now_ms = _redis(settings), time.time_ns() // 1_000_000
    declared, changed, applied = plan_changes(settings, client)
    refused = in_the_way(declared, changed, replace or ())
    incomplete: dict[str, int | None] = {}
    if applied is not None:
        completeness = Completeness(applied)
        look(completeness, client, now_ms)
        incomplete = completeness.incomplete(applied.features, now_ms)
    if as_json:
        said = {"plan": declared.fingerprint, "number": declared.number, "changes": changed}
        said |= {"refused": refused, "incomplete": incomplete}
        out.print_json(msgspec.json.encode(said).decode())
    else:
        _show_changes(changed)
        for name, at_ms in incomplete.items():
            until = "what came before it was applied" if at_ms is None else f"some of it until {when(at_ms)}"
            out.print(f"incomplete {name}: it lacks {until}", style="dim", highlight=False, markup=False)
        rest = "`headrace apply` would refuse it" if refused else "run `headrace apply`"
        out.print(f"plan {declared.fingerprint}: {rest if changed else 'nothing to do'}")
    raise typer.Exit(2 if refused else 0)


@app.command()
def apply(replace: Replace = None) -> None:
    """Register the declarations in Feast, create their topics, initialise their commit records."""
    from registry.apply import apply as run

    settings = _settings()
    done = run(settings, _redis(settings), replace=replace or ())
    if done:
        _audit("apply", plan=done.plan.fingerprint, changes=len(done.changes), topics=list(done.topics))
    _show_changes(done.changes)
    if done.registered and not done.changes:
        out.print("Feast's registry held another plan, or none")
    for topic in done.topics:
        out.print(f"+ topic {topic}")
    if done.records:
        out.print(f"+ {done.records} commit records")
    out.print(f"plan {done.plan.fingerprint} is applied" + ("" if done else ": there was nothing to do"))


@app.command()
def history() -> None:
    """List the applied plans, the newest first: when, by whom, what each changed."""
    from config.settings import project_of
    from features.changes import changes, when
    from store.plans import applied_plans

    settings = _settings()
    before, found = None, []
    for each in applied_plans(_redis(settings), project_of(settings.repo)):
        try:
            applied = each.decoded()
            changed, before = changes(before, applied, each.at_ms), applied
        except ValueError:  # What follows it is compared with the last one that can be read.
            changed = None
        found.append((each, changed))
    if not found:
        out.print("nothing is applied: run `headrace apply`")
    for each, changed in reversed(found):
        out.print(f"plan {each.fingerprint}, {when(each.at_ms)}, by {each.by}", highlight=False, markup=False)
        if changed is None:
            out.print("it was applied by another version of Headrace, whose `headrace history` can say more")
        _show_changes(changed or ())


@app.command()
def stream(
    processes: Annotated[int, typer.Option(min=1, help="Worker processes")] = 1,
) -> None:
    """Run the dataflow of the applied plan, starting its workers again when they stop."""
    from streams.supervise import supervise

    raise typer.Exit(supervise(_settings(), processes))


@app.command()
def archive(
    processes: Annotated[int, typer.Option(min=1, help="Worker processes")] = 1,
    status: Annotated[bool, typer.Option("--status", help="Say what is archived, and end")] = False,
    compact: Annotated[bool, typer.Option("--compact", help="Write small files as large ones, and end")] = False,
    keep: Annotated[str | None, typer.Option(help="Delete the events of days before, such as 400d, and end")] = None,
    vacuum: Annotated[
        bool, typer.Option("--vacuum", help="Delete files that nothing has named for a week, and end")
    ] = False,
) -> None:
    """Archive accepted events (HEADRACE_ARCHIVE), each once; or look after what is archived, also while another does.

    With several of the options, they are done in the order above.
    """
    settings = _settings()
    if not (status or compact or keep or vacuum):
        from streams.supervise import supervise

        raise typer.Exit(supervise(settings, processes, "archive"))
    from features.changes import when
    from features.times import duration_ms
    from store.archive import archive_forgotten, tables_of
    from store.forgotten import Forgotten
    from store.plans import load_plan

    applied = load_plan(settings)
    before_ms = None if keep is None else time.time_ns() // 1_000_000 - duration_ms(keep)
    keys, forgotten = {each.name: each.key for each in applied.entities}, Forgotten()
    if compact:
        forgotten = archive_forgotten(settings, applied, _redis(settings))
    for topic, archived in tables_of(settings, applied).items():
        if not archived.exists:
            out.print(f"{topic}: nothing is archived", highlight=False)
            continue
        if compact:
            if n_events := archived.erase(keys, forgotten):
                _audit("archive_erase", topic=topic, events=n_events)
                out.print(f"{topic}: {n_events:,} events of who was forgotten are out of it", highlight=False)
            done = archived.compact()
            out.print(f"{topic}: {done['numFilesRemoved']} files are {done['numFilesAdded']} now", highlight=False)
        if before_ms is not None:
            n_events = archived.forget_before(before_ms)
            _audit("archive_forget", topic=topic, events=n_events, before=when(before_ms))
            out.print(f"{topic}: {n_events:,} events are deleted; their files go with --vacuum", highlight=False)
        if vacuum:
            out.print(f"{topic}: {len(archived.vacuum())} files are deleted", highlight=False)
        if status:
            out.print(f"{topic}: about {archived.n_rows:,} events in {archived.url}", highlight=False)
            for number, at in sorted(archived.complete().items()):
                until = f"all before offset {at.next:,}, the last of {when(at.recorded_ms)}"
                out.print(f"  partition {number}: {until}", highlight=False)


@app.command()
def train(  # noqa: PLR0913, PLR0917  # each is an option of the command
    labels: Annotated[Path, typer.Argument(help="Parquet, or CSV with a header", exists=True, dir_okay=False)],
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE", help="The training set, a Parquet file")],
    service: Annotated[str | None, typer.Option(help="The service whose features are wanted")] = None,
    feature: Annotated[
        list[str] | None, typer.Option(metavar="VIEW:FEATURE", help="A feature, instead; repeat it")
    ] = None,
    time_column: Annotated[str, typer.Option(help="The column with each label's time")] = "event_timestamp",
    since: Annotated[datetime | None, typer.Option(help="No event before counts (UTC); to read less")] = None,
    start: Annotated[datetime | None, typer.Option(help="Only labels from then on (UTC)")] = None,
    end: Annotated[datetime | None, typer.Option(help="Only labels before then (UTC)")] = None,
    tail: Annotated[bool, typer.Option(help="Read from Kafka what the archive has not yet")] = True,
    declared: Annotated[bool, typer.Option("--declared", help="Features as declared here, applied or not")] = False,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Do it on a Ray cluster; `local` for one here")
    ] = None,
    spill: Annotated[
        Path | None, typer.Option(help="Folder for intermediate files; all machines of a Ray cluster must see it")
    ] = None,
) -> None:
    """Add to labels every feature as of their times, from the events strictly before: a training set.

    Labels have a column with the ids of each entity that features are about (user_id, item_id), a time, and whatever
    else, which is kept. A column such as item__price stands in for what the item is known by.
    """
    from confluent_kafka import KafkaException

    from config.brokers import unreachable
    from config.settings import project_of
    from features.definitions import compile_definitions
    from store.archive import archive_forgotten
    from store.plans import load_plan
    from training.progress import shown
    from training.run import Limits, read_labels, write_training_set

    settings = _settings()
    if declared:
        known = compile_definitions(settings.definitions, project_of(settings.repo), settings.shards)
    else:
        known = load_plan(settings)
        archive_forgotten(settings, known, _redis(settings))
    if (service is None) == (not feature):
        message = f"name a service ({', '.join(spec.name for spec in known.services)}), or features by --feature"
        raise typer.BadParameter(message)
    named = known.service(service).features if service else (name.replace(":", "__", 1) for name in feature or ())
    names = list(dict.fromkeys(named))
    if unknown := [name for name in names if name not in known.features]:
        message = (
            f"{', '.join(unknown)}: no such feature is applied; with --declared, those that are not may be named too"
        )
        raise typer.BadParameter(message)
    limits = Limits(*map(_ms, (since, start, end)))
    given: dict[str, Any] = {"limits": limits, "time_column": time_column, "with_tail": tail, "ray": ray}
    with shown() as on_progress:
        wanted = (settings, known, names, read_labels(labels, known), out_file)
        try:
            made = write_training_set(*wanted, **given, folder=spill, on_progress=on_progress)
        except KafkaException as error:
            raise RuntimeError(f"{unreachable(settings, error)} (--no-tail does without)") from None  # noqa: EM102  # ours
    out.print(f"{out_file}: {made}", highlight=False)


def _ms(at: datetime | None) -> int | None:
    return None if at is None else int(at.replace(tzinfo=UTC).timestamp() * 1000)


@app.command()
def backfill(
    view: Annotated[list[str] | None, typer.Option(help="All features of a view; repeat it")] = None,
    feature: Annotated[list[str] | None, typer.Option(metavar="VIEW:FEATURE", help="A feature; repeat it")] = None,
    since: Annotated[datetime | None, typer.Option(help="No event before counts (UTC); to read less")] = None,
) -> None:
    """Give features the history that they lack, or those that are named, from the archive and Kafka.

    The stream adds it: it runs, and so do servers. Stopped at any point, it goes on when it is run again.
    """
    from registry.backfill import backfill as run
    from store.plans import load_plan

    settings = _settings()
    known = load_plan(settings).features.values()
    wanted = {each.full_name for each in known if each.view in (view or ())}
    wanted |= {name.replace(":", "__", 1) for name in feature or ()}
    names = {each.full_name for each in known}
    views = {each.view for each in known}
    if unknown := sorted({*(view or ())} - views) or sorted(wanted - names):
        message = f"{unknown[0]}: nothing applied has this name; run `headrace apply` first"
        raise typer.BadParameter(message)
    asked = wanted if view or feature else None
    _fill(
        "backfill",
        lambda client, on_progress: run(settings, client, asked, since_ms=_ms(since) or 0, on_progress=on_progress),
    )


@app.command()
def rebuild(
    entity: Annotated[str | None, typer.Option(help="Only the features of user, item, …; by default all")] = None,
    since: Annotated[datetime | None, typer.Option(help="No event before counts (UTC); to read less")] = None,
) -> None:
    """Make rows anew from the archive and Kafka: after Redis lost them, or for another HEADRACE_SHARDS.

    What is served is what was, until the new rows are there.
    """
    from registry.backfill import backfill
    from registry.backfill import rebuild as run
    from store.plans import load_plan

    settings, since_ms = _settings(), _ms(since) or 0
    if entity is None:
        _fill("rebuild", lambda client, on_progress: run(settings, client, since_ms=since_ms, on_progress=on_progress))
        return
    names = [each.full_name for each in load_plan(settings).features.values() if each.entities == (entity,)]
    if not names:
        message = f"no feature is of {entity!r} alone"
        raise typer.BadParameter(message)
    _fill(
        "rebuild",
        lambda client, on_progress: backfill(
            settings, client, names, since_ms=since_ms, may_lose=True, on_progress=on_progress
        ),
    )


def _fill(name: str, run: Callable[[Any, Any], Backfilled]) -> None:
    """Does it, and says what came of it."""
    from features.changes import when

    settings = _settings()
    with _shown(settings) as on_progress:
        done = run(_redis(settings), on_progress)
    if done.features:
        _audit(name, plan=done.plan.fingerprint, features=list(done.features))
    for each in done.features:
        at_ms = done.incomplete.get(each, 0)
        lacks = "what the archive and Kafka no longer have" if at_ms is None else f"some until {when(at_ms)}"
        out.print(f"{each}: {'complete' if at_ms == 0 else f'lacks {lacks}'}", highlight=False)
    out.print(f"plan {done.plan.fingerprint} runs" + ("" if done.features else ": no feature lacks anything"))


@contextmanager
def _shown(settings: Settings) -> Iterator[Progress]:
    """Shows how far it is, and says it if Kafka can't be reached."""
    from confluent_kafka import KafkaException

    from config.brokers import unreachable
    from training.progress import shown

    with shown() as on_progress:
        try:
            yield on_progress
        except KafkaException as error:
            raise RuntimeError(unreachable(settings, error)) from None


@app.command()
def compare(
    since: Annotated[str, typer.Option(help="What was served within so long before now, such as 1h")] = "1h",
    service: Annotated[list[str] | None, typer.Option(help="Only what was asked for this service; repeat it")] = None,
    settle: Annotated[
        str, typer.Option(help="An event so shortly before or after the answer may be in it or not")
    ] = "2s",
    as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False,
) -> None:
    """Compute again what was served (a sample: HEADRACE_SAMPLE), from the archive and Kafka, and say what differs.

    Ends with status 1 if anything does.
    """
    import msgspec

    from config.settings import project_of
    from features.changes import when
    from features.times import duration_ms
    from store.archive import archive_forgotten
    from store.plans import applied_plan
    from training.compare import compare as run

    settings = _settings()
    client = _redis(settings)
    since_ms = time.time_ns() // 1_000_000 - duration_ms(since)
    if (applied := applied_plan(client, project_of(settings.repo))) is not None:
        archive_forgotten(settings, applied, client)
    given: dict[str, Any] = {"services": service or (), "settle_ms": duration_ms(settle)}
    with _shown(settings) as on_progress:
        found = run(settings, _plans(settings), since_ms, **given, on_progress=on_progress)
    if as_json:
        out.print_json(msgspec.json.encode(found).decode())
        raise typer.Exit(1 if found.mismatches else 0)
    table = Table("service", Column("feature", no_wrap=True))
    for name in ("rows", "undecided", "mismatches", "null differs", "largest", "mean"):
        table.add_column(name, justify="right")
    for each in found.features:
        numbers = (f"{n:,}" for n in (each.rows, each.undecided, each.mismatches, each.null_differences))
        table.add_row(each.service, each.feature, *numbers, f"{each.largest:.2g}", f"{each.mean:.2g}")
    out.print(table)
    for each in found.features:
        for example in each.examples:
            whose = ", ".join(f"{key} {value}" for key, value in example.ids.items())
            values = f"{example.served!r} was served, it is {example.computed!r}"
            out.print(
                f"{each.feature} of {whose} at {when(example.at_ms)}: {values}",
                style="bold red",
                highlight=False,
                markup=False,
            )
            for event in example.events:
                fields = " ".join(f"{name}={value}" for name, value in event.items() if name not in ("t", "contract"))
                out.print(f"  {when(event['t'])} {event['contract']} {fields}", highlight=False, markup=False)
    undecided = f"{found.undecided:.2%} of the values undecided, with an event on its way"
    left_out = f"; left out: {found.unknown:,} rows of plans that can't be read" if found.unknown else ""
    left_out += f"; left out: {found.forgotten:,} rows about who was forgotten since" if found.forgotten else ""
    out.print(f"{found.rows:,} rows compared, {found.mismatches:,} mismatches; {undecided}{left_out}", highlight=False)
    raise typer.Exit(1 if found.mismatches else 0)


@app.command()
def quality(
    since: Annotated[str, typer.Option(help="What was served, and the events, within so long before now")] = "1h",
    service: Annotated[list[str] | None, typer.Option(help="Only what was asked for this service; repeat it")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Parquet, as `train` writes it: what values are compared with", exists=True)
    ] = None,
    psi_max: Annotated[
        float | None, typer.Option(min=0, help="A population stability index above it, such as 0.25, is a breach")
    ] = None,
    prometheus: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it as metrics too, for node_exporter to collect")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False,
) -> None:
    """Say how the values are that were served (a sample: HEADRACE_SAMPLE), and whether events are as contracts expect.

    Ends with status 1 if anything is not as expected.
    """
    import msgspec

    from features.times import duration_ms
    from store.plans import load_plan
    from training.quality import quality as run
    from training.quality import write_metrics

    settings, now_ms = _settings(), time.time_ns() // 1_000_000
    given: dict[str, Any] = {"services": service or (), "reference": reference}
    with _shown(settings) as on_progress:
        wanted = (settings, load_plan(settings), _plans(settings), now_ms - duration_ms(since), now_ms)
        found = run(*wanted, **given, on_progress=on_progress)
    if prometheus is not None:
        write_metrics(found, prometheus)
    breaches = found.breaches(psi_max)
    if as_json:
        out.print_json(msgspec.json.encode(found).decode())
        raise typer.Exit(1 if breaches else 0)
    table = Table("service", Column("feature", no_wrap=True))
    for name in ("rows", "null", "default", "p5", "p50", "p95", "psi"):
        table.add_column(name, justify="right")
    for each in found.features:
        numbers = [each.null, each.default, *(each.quantiles.get(at) for at in ("0.05", "0.5", "0.95")), each.psi]
        table.add_row(each.service, each.feature, f"{each.rows:,}", *map(_number, numbers))
    if found.features:
        out.print(table)
    else:
        out.print(f"nothing that was served since then is in {settings.sample_path()}", highlight=False, markup=False)
    checks = Table("contract", Column("check", no_wrap=True), Column("events", justify="right"), "it is", "")
    for check in found.checks:
        said = "[red]BREACH[/]" if check.breached else "[green]ok[/]"
        checks.add_row(check.contract, escape(check.check), f"{check.events:,}", _number(check.value), said)
    if found.checks:
        out.print(checks)
    for breach in breaches:
        out.print(breach, style="bold red", highlight=False, markup=False)
    if found.unknown:
        out.print(f"left out: {found.unknown:,} rows of plans that can't be read", highlight=False)
    raise typer.Exit(1 if breaches else 0)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _plans(settings: Settings) -> Callable[[int], Plan | None]:
    """The applied plans, by number; None for what can't be read."""
    from config.settings import project_of
    from store.plans import applied_plan

    client, project = _redis(settings), project_of(settings.repo)

    def plan_of(number: int) -> Plan | None:
        try:
            return applied_plan(client, project, number)
        except ValueError:  # It is one of another version of Headrace.
            return None

    return plan_of


@app.command()
def forget(
    entity: Annotated[str, typer.Argument(help="user, item, seller, …")],
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Whom to forget")] = None,
    file: Annotated[
        Path | None, typer.Option("--ids", help="A file of ids, one a line", exists=True, dir_okay=False)
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(help="All of whom nothing happened for so long, such as 400d")
    ] = None,
) -> None:
    """Have entities forgotten: their rows go, and nothing that happened until now counts for them ever again.

    The stream does it: it runs, and so do servers. Their events leave the archive at the next `headrace archive
    --compact`; dead letters that name them are listed.
    """
    from features.events import TEXT_LENGTH_MAX
    from features.times import duration_ms
    from store.plans import load_plan
    from training.forget import forget as run
    from training.forget import idle

    settings = _settings()
    applied, now_ms = load_plan(settings), time.time_ns() // 1_000_000
    if entity not in applied.stored_entities:
        message = f"there is no entity {entity!r}; applied are: {', '.join(applied.stored_entities)}"
        raise typer.BadParameter(message)
    # Not by splitlines: an id may hold what Unicode calls the end of a line.
    listed = file.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n") if file else ()
    with _shown(settings) as on_progress:
        found = dict.fromkeys([*(ids or ()), *listed])
        if older_than is not None:
            found |= dict.fromkeys(idle(settings, applied, entity, now_ms - duration_ms(older_than)))
        wanted = [each for each in found if each]
        if unfit := [each for each in wanted if len(each) > TEXT_LENGTH_MAX]:
            message = f"{unfit[0][:50]!r}… is no id: it has more than {TEXT_LENGTH_MAX} characters"
            raise typer.BadParameter(message)
        if not wanted:
            message = "nobody is to be forgotten: name ids, a file of them (--ids), or --older-than"
            raise typer.BadParameter(message)
        _audit("forget", entity=entity, n_ids=len(wanted), ids=wanted[:10])
        done = run(settings, applied, _redis(settings), entity, wanted, on_progress=on_progress)
    for each in done.letters:
        out.print(f"dead letter {each}", highlight=False, markup=False)
    what = f"{len(done.times_ms):,} {entity}s are" if len(wanted) > 1 else f"{entity} {wanted[0]} is"
    out.print(f"{what} forgotten; {len(done.letters):,} dead letters name them", highlight=False, markup=False)
    out.print("their events leave the archive with `headrace archive --compact`, its files with --vacuum")


@app.command()
def accept_topic(topic: Annotated[str, typer.Argument(help="A topic that was deleted and made anew")]) -> None:
    """Have the stream read a topic that was made anew from its beginning; features keep what they have."""
    from confluent_kafka import KafkaException

    from config.brokers import unreachable
    from store.plans import load_plan
    from streams.kafka import accept_topic as run

    settings = _settings()
    applied = load_plan(settings)
    if topic not in (topics := list(applied.topics)):
        message = f"no event is read from {topic!r}; topics are: {', '.join(topics)}"
        raise typer.BadParameter(message)
    try:
        changed = run(settings, applied, _redis(settings), topic)
    except KafkaException as error:
        raise RuntimeError(unreachable(settings, error)) from None
    if changed:
        _audit("topic_accepted", topic=topic, shards=changed)
    out.print(
        f"topic {topic} is read from its beginning: {changed} shards were of the one before it"
        if changed
        else f"topic {topic} is the one that is read: there was nothing to do"
    )


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Server processes that share the port")] = None,
) -> None:
    """Serve features over HTTP."""
    from serving.run import run

    options = {"host": host, "port": port, "server_processes": processes}
    given = {name: value for name, value in options.items() if value is not None}
    raise typer.Exit(run(_settings().model_copy(update=given)))


@app.command()
def replay(  # noqa: PLR0913, PLR0917  # each is an option of the command
    file: Annotated[Path, typer.Argument(help="CSV, JSON Lines or Parquet", exists=True, dir_okay=False)],
    topic: Annotated[str | None, typer.Option(help="The topic of all events")] = None,
    topic_column: Annotated[str | None, typer.Option(help="The column that says which topic")] = None,
    topics: Annotated[list[str] | None, typer.Option(metavar="VALUE=TOPIC", help="Its values' topics")] = None,
    columns: Annotated[str, typer.Option(help="Comma-separated columns of a CSV file without a header")] = "",
    mapping: Annotated[
        list[str] | None, typer.Option("--map", metavar="FIELD=COLUMN", help="A contract field's column")
    ] = None,
    time_unit: Annotated[str, typer.Option(help="What numbers in occurred_at count: s or ms")] = "ms",
    rebase_to_now: Annotated[bool, typer.Option(help="Shift all times so that the last is now")] = False,
    speed: Annotated[
        float | None, typer.Option(help="Event time that passes a second; otherwise at once", min=0.001)
    ] = None,
) -> None:
    """Send events from a file to Kafka."""
    from confluent_kafka import KafkaException
    from rich.progress import Progress

    from config.brokers import kafka_python, unreachable
    from headrace.replay import Replay, ReplayError, SystemClock, contracts_of, run
    from store.plans import load_plan

    settings = _settings()
    contracts = contracts_of(load_plan(settings))
    try:
        kafka_options = kafka_python(settings, Replay.timeout_s)
    except KafkaException as error:
        raise ReplayError(unreachable(settings, error)) from error
    todo = Replay(
        file=file,
        topic=topic,
        topic_column=topic_column,
        topics=_pairs("--topics", topics) or ({name: name for name in contracts} if topic_column else {}),
        columns=tuple(filter(None, columns.split(","))),
        mapping=_pairs("--map", mapping),
        time_unit=time_unit,  # type: ignore[arg-type]  # checked by replay, whose error names the option
        rebase_to_now=rebase_to_now,
        speed=speed,
        kafka_options=kafka_options,
    )
    with Progress(console=err, disable=not err.is_terminal) as progress:
        summary = run(todo, contracts, settings.kafka, SystemClock(), progress)
    out.print(summary)


@app.command()
def demo(
    seconds: Annotated[float | None, typer.Option(help="Stop after so long; otherwise at Ctrl-C", min=1)] = None,
    port: Annotated[int, typer.Option(help="Port of the server; 0 for any free one", min=0, max=65535)] = 0,
    rate: Annotated[int, typer.Option(help="Simulated events a second", min=1)] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the simulated shoppers")] = 7,
) -> None:
    """Run everything here, with simulated shoppers; the address is printed first."""
    from headrace.demo import run_demo

    raise typer.Exit(run_demo(_settings(), seconds, port, rate=rate, seed=seed))


@app.command()
def show(
    entity: Annotated[str, typer.Argument(help="user, item, seller, …")],
    entity_id: Annotated[str, typer.Argument(metavar="ID")],
    service: Annotated[str | None, typer.Option(help="Only the features of this service")] = None,
) -> None:
    """Show an entity's features as they are now."""
    from config.imports import keep_pandas_out
    from features.changes import when
    from store.completeness import Completeness, look
    from store.plans import layouts_of, load_plan
    from store.reader import Reader

    keep_pandas_out()
    settings = _settings()
    applied = load_plan(settings)
    known = {spec.name: spec for spec in applied.entities}
    if entity not in known:
        message = f"there is no entity {entity!r}; applied are: {', '.join(known)}"
        raise typer.BadParameter(message)
    wanted = applied.service(service).features if service else tuple(applied.features)
    names = [name for name in wanted if applied.features[name].entities == (entity,)]
    if not names:
        message = f"{service} has no feature of {entity} alone; leave out --service for all"
        raise typer.BadParameter(message)
    client = _redis(settings)
    now_ms = time.time_ns() // 1_000_000
    completeness = Completeness(applied)
    look(completeness, client, now_ms)
    response = Reader(applied, names, layouts_of(client, applied), completeness).read(
        client.mget, {known[entity].key: [entity_id]}, now_ms, full=True
    )
    values = response.to_dict()
    named = Column("feature", no_wrap=True)  # Whatever else is long: names are what is looked for, and piped to grep.
    table = Table(named, "value", "what it is", title=Text(f"{entity} {entity_id}: {response.statuses(0)[0]}"))
    for name in names:
        doc = applied.features[name].doc
        if name in response.incomplete:
            at_ms = response.incomplete[name]
            doc += f" (incomplete{'' if at_ms is None else f' until {when(at_ms)}'})"
        table.add_row(name, Text(str(values[name][0])), Text(doc.strip()))
    out.print(table)


class _Scope(StrEnum):
    read = "read"
    write = "write"
    admin = "admin"


@keys.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Whose it is, for people")],
    scope: Annotated[list[_Scope], typer.Option(help="What it is good for; may be given again")] = [_Scope.read],  # noqa: B006  # typer's way to have a default
    rate: Annotated[float | None, typer.Option(help="Most requests a second of each server process", min=0.001)] = None,
) -> None:
    """Make a key and print it: it can't be seen again. Servers take it within a second."""
    from serving.keys import KeyFile, new_key

    path = _keys_path()
    known = KeyFile.read(path) if path.exists() else KeyFile()
    key, secret = new_key(name, [each.value for each in scope], rate)
    KeyFile(keys=[*known.keys, key]).write(path)
    _audit("keys add", key=key.id, name=name, scopes=sorted(key.scopes))
    out.print(secret, highlight=False, markup=False)


@keys.command("list")
def list_keys() -> None:
    """Show all keys, without their secrets."""
    from serving.keys import KeyFile

    table = Table("id", "name", "scopes", "requests/s")
    for key in KeyFile.read(_keys_path()).keys:
        table.add_row(
            key.id, Text(key.name), ", ".join(sorted(key.scopes)), "" if key.rate is None else f"{key.rate:g}"
        )
    out.print(table)


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(metavar="ID", help="The part of the key before the dot")]) -> None:
    """Take a key away. Servers refuse it within a second."""
    from serving.keys import KeyFile

    path = _keys_path()
    known = KeyFile.read(path)
    kept = [key for key in known.keys if key.id != key_id]
    if len(kept) == len(known.keys):
        message = f"there is no key {key_id!r} in {path}; `headrace keys list` shows those that there are"
        raise LookupError(message)
    KeyFile(keys=kept).write(path)
    _audit("keys revoke", key=key_id)
    out.print(f"key {key_id} is revoked", highlight=False)


@app.command()
def doctor() -> None:
    """Check that Kafka, Redis and the applied plan are there and agree."""
    from config.imports import keep_pandas_out
    from headrace.doctor import examine

    keep_pandas_out()
    healthy = True
    said = {True: "[green]ok [/]", None: "[yellow]LOOK[/]", False: "[red]NOT OK[/]"}
    for check in examine(_settings()):
        healthy &= check.good is not False
        out.print(f"{said[check.good]} {check.what}: {escape(check.found)}", highlight=False)
    raise typer.Exit(0 if healthy else 1)


def _keys_path() -> Path:
    path = _settings().api_keys_file
    if path is None:
        message = "HEADRACE_API_KEYS_FILE must name the file of keys"
        raise ValueError(message)
    return path


def _audit(action: str, **what: Any) -> None:
    """A line in the log for whatever changes something."""
    import structlog

    structlog.get_logger().info("audit", action=action, uid=os.getuid(), **what)


def _settings() -> Settings:
    """The settings, or an error that names the variable."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from config.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if not first["loc"]:  # Settings that don't fit together, which its text names.
            message = f"{first['msg'].removeprefix('Value error, ')}; see the settings in README.md"
            raise ValueError(message) from error
        variable = f"HEADRACE_{str(first['loc'][0]).upper()}"
        shown = "" if variable in _SECRET else f"={os.environ.get(variable, '')!r}"
        message = f"{variable}{shown}: {first['msg']}; see the settings in README.md"
        raise ValueError(message) from error
    except SettingsError as error:
        field = re.search(r'field "(\w+)"', str(error))
        variable = f"HEADRACE_{field[1].upper()}" if field else "a setting"
        message = f"{variable} is no JSON, as a value of several parts must be: see the settings in README.md"
        raise ValueError(message) from error


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    """`a=b` options as a dictionary."""
    pairs = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            message = f"{option} {text!r}: write it as NAME=VALUE"
            raise typer.BadParameter(message)
        pairs[name] = value
    return pairs


def _redis(settings: Settings) -> Any:
    from store.connect import connect

    return connect(settings.redis_url.get_secret_value(), settings.redis_timeout_s)


_STYLES = {
    "adds": "green",
    "describes": "dim",
    "changes meaning": "yellow",
    "removes": "red",
    "breaks producers": "bold red",
}


def _show_changes(changed: Iterable[Change]) -> None:
    for each in changed:
        out.print(str(each), style=_STYLES[each.kind], highlight=False, markup=False)


def _mendable() -> tuple[type[Exception], ...]:
    """What a user can mend; asked for once something was raised."""
    from redis.exceptions import RedisError

    return ValueError, LookupError, OSError, RuntimeError, RedisError


def main() -> None:
    """Runs the command line; what a user can mend is one line, not a stack trace."""
    # A process that ends would otherwise look through all that was imported for cycles, for a fifth of its time.
    atexit.register(gc.freeze)
    try:
        app()
    except Exception as error:
        if "HEADRACE_TRACE" in os.environ or not isinstance(error, _mendable()):
            raise
        err.print(f"error: {error}", style="red", highlight=False, markup=False)
        err.print("(HEADRACE_TRACE=1 shows where)", style="dim")
        sys.exit(1)


if __name__ == "__main__":
    main()
