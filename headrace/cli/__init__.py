"""The command line: the list of its commands, and how it ends."""

from __future__ import annotations

import atexit
import gc
import os
import sys

import typer

from headrace.cli.console import err, read_settings
from headrace.cli.console import out as out
from headrace.cli.declare import apply, demo, history, plan, replay, show
from headrace.cli.operate import accept_topic, add_key, archive, doctor, forget, list_keys, revoke_key, serve, stream
from headrace.cli.past import backfill, compare, quality, rebuild, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: drawing it with rich takes longer than all else that `--help` does.
    rich_markup_mode=None,
    help="Headrace: a real-time feature store. Settings are HEADRACE_* variables: see README.md.",
)
keys = typer.Typer(no_args_is_help=True, help="API keys of the server: the file HEADRACE_API_KEYS_FILE.")
app.add_typer(keys, name="keys")
for command in (  # in the order of `--help`
    *(plan, apply, history),
    *(stream, archive),
    *(train, backfill, rebuild, compare, quality),
    *(forget, accept_topic),
    *(serve, replay, demo, show, doctor),
):
    app.command()(command)
keys.command("add")(add_key)
keys.command("list")(list_keys)
keys.command("revoke")(revoke_key)


@app.callback()
def _before_any() -> None:
    """What every command needs, and `--help` does not."""
    from config.logs import set_up_logs

    set_up_logs(as_json=read_settings().log_json)


def _mendable() -> tuple[type[Exception], ...]:
    """What a user can mend; asked for once something was raised."""
    from redis.exceptions import RedisError

    return ValueError, LookupError, OSError, RuntimeError, RedisError


def main() -> None:
    """Runs the command line; what a user can mend is one line, not a stack trace."""
    # Imports make many objects, and no cycles that anybody waits for: to look for those takes a tenth of a command's
    # time meanwhile, and a fifth at its end.
    gc.set_threshold(100_000, 50, 100)
    atexit.register(gc.freeze)
    try:
        app()
    except Exception as error:
        if "HEADRACE_TRACE" in os.environ or not isinstance(error, _mendable()):
            raise
        err.print(f"error: {error}", style="red", highlight=False, markup=False)
        err.print("(HEADRACE_TRACE=1 shows where)", style="dim")
        sys.exit(1)
