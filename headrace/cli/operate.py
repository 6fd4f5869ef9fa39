"""For who keeps it running: the processes, what they keep, and who may ask."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from headrace.cli.console import audit, connect_redis, out, progress, read_settings


def stream(
    processes: Annotated[int, typer.Option(min=1, help="Worker processes")] = 1,
) -> None:
    """Run the dataflow of the applied plan, starting its workers again when they stop."""
    from streams.supervise import supervise

    raise typer.Exit(supervise(read_settings(), processes))


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
    settings = read_settings()
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
        forgotten = archive_forgotten(settings, applied, connect_redis(settings))
    for topic, archived in tables_of(settings, applied).items():
        if not archived.exists:
            out.print(f"{topic}: nothing is archived", highlight=False)
            continue
        if compact:
            if n_events := archived.erase(keys, forgotten):
                audit("archive_erase", topic=topic, events=n_events)
                out.print(f"{topic}: {n_events:,} events of who was forgotten are out of it", highlight=False)
            done = archived.compact()
            out.print(f"{topic}: {done['numFilesRemoved']} files are {done['numFilesAdded']} now", highlight=False)
        if before_ms is not None:
            n_events = archived.forget_before(before_ms)
            audit("archive_forget", topic=topic, events=n_events, before=when(before_ms))
            out.print(f"{topic}: {n_events:,} events are deleted; their files go with --vacuum", highlight=False)
        if vacuum:
            out.print(f"{topic}: {len(archived.vacuum())} files are deleted", highlight=False)
        if status:
            out.print(f"{topic}: about {archived.n_rows:,} events in {archived.url}", highlight=False)
            for number, at in sorted(archived.complete().items()):
                until = f"all before offset {at.next:,}, the last of {when(at.recorded_ms)}"
                out.print(f"  partition {number}: {until}", highlight=False)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Server processes that share the port")] = None,
) -> None:
    """Serve features over HTTP."""
    from serving.run import run

    options = {"host": host, "port": port, "server_processes": processes}
    given = {name: value for name, value in options.items() if value is not None}
    raise typer.Exit(run(read_settings().model_copy(update=given), "headrace.server"))


def accept_topic(topic: Annotated[str, typer.Argument(help="A topic that was deleted and made anew")]) -> None:
    """Have the stream read a topic that was made anew from its beginning; features keep what they have."""
    from confluent_kafka import KafkaException

    from config.brokers import unreachable
    from store.plans import load_plan
    from streams.kafka import accept_topic as run

    settings = read_settings()
    applied = load_plan(settings)
    if topic not in (topics := [spec.topic for spec in applied.events]):
        message = f"no event is read from {topic!r}; topics are: {', '.join(topics)}"
        raise typer.BadParameter(message)
    try:
        changed = run(settings, applied, connect_redis(settings), topic)
    except KafkaException as error:
        raise RuntimeError(unreachable(settings, error)) from None
    if changed:
        audit("topic_accepted", topic=topic, shards=changed)
    out.print(
        f"topic {topic} is read from its beginning: {changed} shards were of the one before it"
        if changed
        else f"topic {topic} is the one that is read: there was nothing to do"
    )


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
    from features.plan import NOBODY
    from features.times import duration_ms
    from store.plans import load_plan
    from training.forget import forget as run
    from training.forget import idle

    settings = read_settings()
    applied, now_ms = load_plan(settings), time.time_ns() // 1_000_000
    known = [spec.name for spec in applied.entities if spec != NOBODY]
    if entity not in known:
        message = f"there is no entity {entity!r}; applied are: {', '.join(known)}"
        raise typer.BadParameter(message)
    # Not by splitlines: an id may hold what Unicode calls the end of a line.
    listed = file.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n") if file else ()
    with progress(settings) as on_progress:
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
        audit("forget", entity=entity, n_ids=len(wanted), ids=wanted[:10])
        done = run(settings, applied, connect_redis(settings), entity, wanted, on_progress=on_progress)
    for each in done.letters:
        out.print(f"dead letter {each}", highlight=False, markup=False)
    what = f"{len(done.times_ms):,} {entity}s are" if len(wanted) > 1 else f"{entity} {wanted[0]} is"
    out.print(f"{what} forgotten; {len(done.letters):,} dead letters name them", highlight=False, markup=False)
    out.print("their events leave the archive with `headrace archive --compact`, its files with --vacuum")


def doctor() -> None:
    """Check that Kafka, Redis and the applied plan are there and agree."""
    from headrace.doctor import examine

    healthy = True
    said = {True: "[green]ok [/]", None: "[yellow]LOOK[/]", False: "[red]NOT OK[/]"}
    for check in examine(read_settings()):
        healthy &= check.good is not False
        out.print(f"{said[check.good]} {check.what}: {escape(check.found)}", highlight=False)
    raise typer.Exit(0 if healthy else 1)


class _Scope(StrEnum):
    read = "read"
    write = "write"
    admin = "admin"


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
    audit("keys add", key=key.id, name=name, scopes=sorted(key.scopes))
    out.print(secret, highlight=False, markup=False)


def list_keys() -> None:
    """Show all keys, without their secrets."""
    from serving.keys import KeyFile

    table = Table("id", "name", "scopes", "requests/s")
    for key in KeyFile.read(_keys_path()).keys:
        table.add_row(
            key.id, Text(key.name), ", ".join(sorted(key.scopes)), "" if key.rate is None else f"{key.rate:g}"
        )
    out.print(table)


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
    audit("keys revoke", key=key_id)
    out.print(f"key {key_id} is revoked", highlight=False)


def _keys_path() -> Path:
    path = read_settings().api_keys_file
    if path is None:
        message = "HEADRACE_API_KEYS_FILE must name the file of keys"
        raise ValueError(message)
    return path
