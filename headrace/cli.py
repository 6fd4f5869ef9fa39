"""The command line."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated, Any

import typer
from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Table

from registry.logs import set_up_logs
from registry.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Headrace: a real-time feature store. Settings are HEADRACE_* variables: see README.md.",
)
out = Console()
err = Console(stderr=True)


@app.command()
def plan() -> None:
    """Show what `apply` would change; nothing is changed."""
    from registry.apply import plan_changes

    declared, changed = plan_changes(Settings())
    _show_changes(changed)
    out.print(f"plan {declared.fingerprint}: " + ("run `headrace apply`" if changed else "nothing to do"))


@app.command()
def apply() -> None:
    """Register the declarations in Feast, create their topics, initialise their commit records."""
    from registry.apply import apply as run

    settings = Settings()
    done = run(settings, _redis(settings))
    _show_changes(done.changes)
    for topic in done.topics:
        out.print(f"+ topic {topic}")
    if done.records:
        out.print(f"+ {done.records} commit records")
    out.print(
        f"plan {done.plan.fingerprint} is applied"
        + ("" if done.changes or done.topics or done.records else ": there was nothing to do")
    )


@app.command()
def stream(
    processes: Annotated[int, typer.Option(min=1, help="Worker processes")] = 1,
) -> None:
    """Run the dataflow of the applied plan, starting its workers again when they stop."""
    from streams.supervise import supervise

    raise typer.Exit(supervise(Settings(), processes))


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one")] = None,
) -> None:
    """Serve features over HTTP."""
    from serving.run import run

    settings = Settings()
    run(
        settings.model_copy(
            update={key: value for key, value in {"host": host, "port": port}.items() if value is not None}
        )
    )


@app.command()
def show(
    entity: Annotated[str, typer.Argument(help="user, item, seller, …")],
    entity_id: Annotated[str, typer.Argument(metavar="ID")],
    service: Annotated[str | None, typer.Option(help="Only the features of this service")] = None,
) -> None:
    """Show an entity's features as they are now."""
    from registry.online import Reader
    from registry.store import load_plan

    settings = Settings()
    applied = load_plan(settings)
    known = {spec.name: spec for spec in applied.entities}
    if entity not in known:
        message = f"there is no entity {entity!r}; applied are: {', '.join(known)}"
        raise typer.BadParameter(message)
    wanted = applied.service(service).features if service else tuple(applied.features)
    names = [name for name in wanted if applied.features[name].entities == (entity,)]
    response = Reader(applied, names).read(
        _redis(settings).mget, {known[entity].key: [entity_id]}, time.time_ns() // 1_000_000, full=True
    )
    values = response.to_dict()
    table = Table("feature", "value", "what it is", title=f"{entity} {entity_id}: {response.statuses()[0][0]}")
    for name in names:
        table.add_row(name, str(values[name][0]), applied.features[name].doc)
    out.print(table)


@app.command()
def doctor() -> None:
    """Check that Kafka, Redis and the registry can be reached and agree."""
    from headrace.doctor import examine

    healthy = True
    for check in examine(Settings()):
        healthy &= check.good
        out.print(
            f"[{'green' if check.good else 'red'}]{'ok ' if check.good else 'NOT OK'}[/] {check.what}: {check.found}",
            highlight=False,
        )
    raise typer.Exit(0 if healthy else 1)


def _redis(settings: Settings) -> Any:
    from store.connect import connect

    return connect(settings.redis_url.get_secret_value(), settings.redis_timeout_s)


def _show_changes(changed: list[str]) -> None:
    for line in changed:
        out.print(line, style={"+": "green", "-": "red", "~": "yellow"}[line[0]], highlight=False, markup=False)


def main() -> None:
    """Runs the command line; what a user can mend is one line, not a stack trace."""
    try:
        set_up_logs(as_json=Settings().log_json)
        app()
    except (ValueError, LookupError, OSError, RuntimeError, RedisError) as error:
        if "HEADRACE_TRACE" in os.environ:
            raise
        err.print(f"error: {error}", style="red", highlight=False, markup=False)
        err.print("(HEADRACE_TRACE=1 shows where)", style="dim")
        sys.exit(1)


if __name__ == "__main__":
    main()
