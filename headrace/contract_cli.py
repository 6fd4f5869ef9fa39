"""`headrace contract`: its commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from config.settings import Settings
    from features.events import Event

app = typer.Typer(no_args_is_help=True, help="Contracts of topics that exist: drafts, and what schemas say of them.")
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it there rather than say it")]
_SAMPLE: Final = 1000


@app.command("from-schema")
def from_schema(
    schema: Annotated[
        str,
        typer.Argument(metavar="FILE|SUBJECT", help="Avro, JSON Schema or protoc's output; or a registry's subject"),
    ],
    topic: Annotated[str, typer.Option(help="Its topic; by default the subject's")] = "",
    message: Annotated[str, typer.Option(help="Which message of a Protobuf schema; by default the first")] = "",
    out_file: Out = None,
) -> None:
    """Draft a contract's class from a schema."""
    from headrace.contract import class_name, draft, header, parts_of_file, parts_of_registered

    if Path(schema).is_file():
        format_, name, parts = parts_of_file(Path(schema), message)
        topic = topic or Path(schema).stem
    else:
        format_, name, parts = parts_of_registered(_registered(_settings(), schema), message)
        topic = topic or schema.removesuffix("-value")
    keywords = {} if format_ == "json" else {"format": json.dumps(format_)}
    text = draft(class_name(name), topic, parts, keywords=keywords)
    _say(header(text) + text, out_file)


@app.command()
def check(
    contract: Annotated[str | None, typer.Argument(help="By default all that are declared")] = None,
    schema: Annotated[
        str | None,
        typer.Option(metavar="FILE|SUBJECT", help="By default what the contract's topic has in the registry"),
    ] = None,
) -> None:
    """Compare contracts with their schemas, and say what each side's next change may be.

    Ends with status 1 if a contract reads what its schema does not have.
    """
    from config.settings import project_of
    from features.definitions import compile_definitions
    from features.plan import find_contract

    settings = _settings()
    specs = compile_definitions(settings.definitions, project_of(settings.repo), settings.shards).events
    if contract is not None and contract not in (names := [spec.name for spec in specs]):
        msg = f"no contract {contract!r} is declared; there is: {', '.join(names)}"
        raise typer.BadParameter(msg)
    n_wrong = n_checked = 0
    for spec in specs:
        wanted = contract == spec.name if contract else schema is not None or spec.reads.format != "json"
        for topic in spec.topics if wanted else ():
            n_checked += 1
            n_wrong += _check(settings, find_contract(spec), topic, schema)
    if not n_checked:
        typer.echo("no contract's records have a schema: name one by --schema FILE|SUBJECT")
    raise typer.Exit(1 if n_wrong else 0)


def _check(settings: Settings, contract: type[Event], topic: str, schema: str | None) -> int:
    from headrace.contract import ContractError, compare, parts_of_file, parts_of_registered

    source = contract.declared_source
    if schema is not None and Path(schema).is_file():
        where, (_, _, parts) = schema, parts_of_file(Path(schema))
    elif source.format == "plain_avro" and schema is None:
        from headrace.contract import parts_of_avro

        where, parts = "its own schema", parts_of_avro(json.loads(source.schema))
    else:
        where = schema or f"{topic}-value"
        try:
            _, _, parts = parts_of_registered(_registered(settings, where))
        except ContractError as error:
            typer.echo(f"{contract.__name__}: {error}")
            return 1
    found = compare(contract, parts)
    typer.echo(f"{contract.__name__} and {where}: {'they do not fit' if found.wrong else 'they fit'}")
    for title, lines in (
        ("wrong", found.wrong),
        ("doubtful", found.doubtful),
        ("the producer's next schema", found.producer),
        ("the contract's next", found.contract),
    ):
        for line in lines:
            typer.echo(f"  {title}: {line}")
    return len(found.wrong)


@app.command()
def sample(
    topic: Annotated[str, typer.Argument(help="A topic of Kafka's")],
    records: Annotated[int, typer.Option(min=1, help="How many of the last records to read")] = _SAMPLE,
    out_file: Out = None,
) -> None:
    """Draft contracts from what is in a topic: names, types, the share of nulls, examples."""
    from headrace.sampling import drafted, read_sample

    settings = _settings()
    text, said = drafted(settings, topic, read_sample(settings, topic, records))
    _say(text, out_file)
    for line in said:
        typer.echo(line, err=True)


def _registered(settings: Settings, subject: str) -> Any:
    from headrace.contract import ContractError
    from streams.schemas import Schemas

    schemas = Schemas(settings)
    try:
        found = schemas.get(lambda client: client.get_latest_version(subject))
        if found.schema.schema_type == "PROTOBUF":
            found = schemas.get(lambda client: client.get_latest_version(subject, fmt="serialized"))
    except LookupError as error:
        msg = f"there is no file and no subject {subject!r}: {error.args[0]}"
        raise ContractError(msg) from None
    return found


def _settings() -> Settings:
    from config.settings import Settings

    return Settings()


def _say(text: str, out_file: Path | None) -> None:
    if out_file is None:
        typer.echo(text)
    else:
        out_file.write_text(text)
        typer.echo(f"written to {out_file}", err=True)
