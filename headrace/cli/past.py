"""What is computed from the archive and Kafka: training sets, history for rows, a second look at what was served."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from headrace.cli.console import audit, connect_redis, out, progress, read_settings, utc_ms

if TYPE_CHECKING:
    from collections.abc import Callable

    from config.settings import Settings
    from features.plan import Plan
    from registry.backfill import Backfilled


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

    settings = read_settings()
    if declared:
        known = compile_definitions(settings.definitions, project_of(settings.repo), settings.shards)
    else:
        known = load_plan(settings)
        archive_forgotten(settings, known, connect_redis(settings))
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
    limits = Limits(*map(utc_ms, (since, start, end)))
    given: dict[str, Any] = {"limits": limits, "time_column": time_column, "with_tail": tail, "ray": ray}
    with shown() as on_progress:
        given_labels = read_labels(labels, known)
        if any(view.given for view in known.views):
            from registry.offline import with_rows

            given_labels = with_rows(settings, known, names, given_labels, time_column)
        wanted = (settings, known, names, given_labels, out_file)
        try:
            made = write_training_set(*wanted, **given, folder=spill, on_progress=on_progress)
        except KafkaException as error:
            raise RuntimeError(f"{unreachable(settings, error)} (--no-tail does without)") from None  # noqa: EM102  # ours
    out.print(f"{out_file}: {made}", highlight=False)


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

    settings = read_settings()
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
        lambda client, on_progress: run(settings, client, asked, since_ms=utc_ms(since) or 0, on_progress=on_progress),
    )


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

    settings, since_ms = read_settings(), utc_ms(since) or 0
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

    settings = read_settings()
    with progress(settings) as on_progress:
        done = run(connect_redis(settings), on_progress)
    if done.features:
        audit(name, plan=done.plan.fingerprint, features=list(done.features))
    for each in done.features:
        at_ms = done.incomplete.get(each, 0)
        lacks = "what the archive and Kafka no longer have" if at_ms is None else f"some until {when(at_ms)}"
        out.print(f"{each}: {'complete' if at_ms == 0 else f'lacks {lacks}'}", highlight=False)
    out.print(f"plan {done.plan.fingerprint} runs" + ("" if done.features else ": no feature lacks anything"))


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

    settings = read_settings()
    client = connect_redis(settings)
    since_ms = time.time_ns() // 1_000_000 - duration_ms(since)
    if (applied := applied_plan(client, project_of(settings.repo))) is not None:
        archive_forgotten(settings, applied, client)
    given: dict[str, Any] = {"services": service or (), "settle_ms": duration_ms(settle)}
    with progress(settings) as on_progress:
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
    left_out += f"; left out: {len(found.given)} features that others' values are part of" if found.given else ""
    out.print(f"{found.rows:,} rows compared, {found.mismatches:,} mismatches; {undecided}{left_out}", highlight=False)
    raise typer.Exit(1 if found.mismatches else 0)


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

    settings, now_ms = read_settings(), time.time_ns() // 1_000_000
    given: dict[str, Any] = {"services": service or (), "reference": reference}
    with progress(settings) as on_progress:
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

    client, project = connect_redis(settings), project_of(settings.repo)

    def plan_of(number: int) -> Plan | None:
        try:
            return applied_plan(client, project, number)
        except ValueError:  # It is one of another version of Headrace.
            return None

    return plan_of
