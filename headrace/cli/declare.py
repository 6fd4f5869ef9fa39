"""For who declares features: what a change would do, doing it, and how the features come out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from headrace.cli.console import audit, connect_redis, err, out, read_settings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from features.changes import Change


Replace = Annotated[
    list[str] | None,
    typer.Option(
        metavar="VIEW.FEATURE",
        help="What may change its meaning or break producers (also a view, entity, contract or service); repeat it",
    ),
]


def plan(
    replace: Replace = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False,
) -> None:
    """Say what `apply` would change and what follows; nothing is changed.

    Ends with status 2 if a change needs consent that --replace does not give, or is refused.
    """
    import msgspec

    from features.changes import in_the_way, when
    from registry.ordinary import declared as declared_in_feast
    from store.completeness import Completeness, look
    from store.plans import plan_changes

    settings = read_settings()
    client, now_ms = connect_redis(settings), time.time_ns() // 1_000_000
    declared, changed, applied = plan_changes(settings, client, ordinary=declared_in_feast(settings).plan)
    refused = in_the_way(declared, changed, replace or ())
    incomplete: dict[str, int | None] = {}
    drifted: list[str] = []
    if applied is not None:
        from registry.apply import drift

        # Of what changes here, it follows what changes there; but for what goes, each is said.
        drifted = [each for each in drift(settings, declared) if not changed or each.startswith("deletes")]
        completeness = Completeness(applied)
        look(completeness, client, now_ms)
        incomplete = completeness.incomplete(applied.features, now_ms)
    if as_json:
        said = {"plan": declared.fingerprint, "number": declared.number, "changes": changed}
        said |= {"refused": refused, "incomplete": incomplete, "registry": drifted}
        out.print_json(msgspec.json.encode(said).decode())
    else:
        _show_changes(changed)
        for each in drifted:
            out.print(f"in Feast's registry, {each}", highlight=False, markup=False)
        for name, at_ms in incomplete.items():
            until = "what came before it was applied" if at_ms is None else f"some of it until {when(at_ms)}"
            out.print(f"incomplete {name}: it lacks {until}", style="dim", highlight=False, markup=False)
        rest = "`headrace apply` would refuse it" if refused else "run `headrace apply`"
        out.print(f"plan {declared.fingerprint}: {rest if changed or drifted else 'nothing to do'}")
    raise typer.Exit(2 if refused else 0)


def apply(replace: Replace = None) -> None:
    """Register the declarations in Feast, create their topics, initialise their commit records."""
    from registry.apply import apply as run

    settings = read_settings()
    done = run(settings, connect_redis(settings), replace=replace or ())
    if done:
        audit("apply", plan=done.plan.fingerprint, changes=len(done.changes), topics=list(done.topics))
    _show_changes(done.changes)
    if done.registered and not done.changes:
        out.print("Feast's registry was not as applied; now it is")
    for topic in done.topics:
        out.print(f"+ topic {topic}")
    if done.records:
        out.print(f"+ {done.records} commit records")
    out.print(f"plan {done.plan.fingerprint} is applied" + ("" if done else ": there was nothing to do"))


def history() -> None:
    """List the applied plans, the newest first: when, by whom, what each changed."""
    from config.settings import project_of
    from features.changes import changes, when
    from store.plans import applied_plans

    settings = read_settings()
    before, found = None, []
    for each in applied_plans(connect_redis(settings), project_of(settings.repo)):
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
    settings = read_settings()
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
    client = connect_redis(settings)
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
    from features.plan import find_contract
    from headrace.replay import Replay, ReplayError, SystemClock, run
    from store.plans import load_plan

    settings = read_settings()
    contracts = {spec.topic: find_contract(spec) for spec in load_plan(settings).events}
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


def demo(
    seconds: Annotated[float | None, typer.Option(help="Stop after so long; otherwise at Ctrl-C", min=1)] = None,
    port: Annotated[int, typer.Option(help="Port of the server; 0 for any free one", min=0, max=65535)] = 0,
    rate: Annotated[int, typer.Option(help="Simulated events a second", min=1)] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the simulated shoppers")] = 7,
) -> None:
    """Run everything here, with simulated shoppers; the address is printed first."""
    from headrace.demo import run_demo

    raise typer.Exit(run_demo(read_settings(), seconds, port, rate=rate, seed=seed))
