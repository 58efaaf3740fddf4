"""Registered models on the command line: look at them, take one out, serve one, and clear away what none needs."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from tsp.exits import exit_codes, stdout_kept_clean
from tsp.options import Command, Group

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
_debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
_model = click.argument("model", metavar="models:/NAME@ALIAS")


@click.group(cls=Group)
def models() -> None:
    """Look at registered models: list, show, diff."""


@models.command("list", cls=Command)
@click.argument("name", required=False)
@_json
@_debug
def list_models(name: str | None, as_json: bool, debug: bool) -> None:
    """Print all versions of NAME, or of all models: what they lack, what they cost, who points to them."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        from tsp.registered import overview
        from tsp.report_registry import print_overview
        from tsp.tracking.versions import registry

        with registry(Path.cwd()) as client:
            rows = overview(client, name)
        if as_json:
            print(json.dumps(rows), file=stdout)
        else:
            print_overview(rows, stdout)


@models.command(cls=Command)
@click.argument("model", metavar="NAME[@ALIAS|/VERSION]")
@_json
@_debug
def show(model: str, as_json: bool, debug: bool) -> None:
    """Print all that is known of a version; without alias or number, of the newest."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        from tsp.registered import describe, find
        from tsp.report_registry import print_version
        from tsp.tracking.versions import registry

        with registry(Path.cwd()) as client:
            document = describe(client, find(client, model))
        if as_json:
            print(json.dumps(document), file=stdout)
        else:
            print_version(document, stdout)


@models.command(cls=Command)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@_json
@_debug
def diff(first: str, second: str, as_json: bool, debug: bool) -> None:
    """Print where two versions differ: NAME@ALIAS, NAME/VERSION or NAME each."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        from tsp.registered import compare
        from tsp.report_registry import print_comparison
        from tsp.tracking.versions import registry

        with registry(Path.cwd()) as client:
            document = compare(client, first, second)
        if as_json:
            print(json.dumps(document), file=stdout)
        else:
            print_comparison(document, stdout)


@click.command(cls=Command)
@_model
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["hf", "gguf"]),
    default="hf",
    show_default=True,
    help="A Hugging Face folder, or model.gguf for llama.cpp.",
)
@_json
@_debug
def export(model: str, output: Path, file_format: str, as_json: bool, debug: bool) -> None:
    """Write a registered version into a folder OUTPUT, its hashes checked."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        from tsp.export import export as write

        document = write(model, output, file_format=file_format, root=Path.cwd())
        if as_json:
            print(json.dumps(document), file=stdout)
        else:
            found = "as registered" if document["hashes"] == "ok" else "without recorded hashes"
            print(
                f"{output} is version {document['version']} of {document['model']}, {document['files']} files {found}",
                file=stdout,
            )


@click.command(cls=Command)
@_model
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=5001, show_default=True, help="To listen on.")
@_debug
def serve(model: str, host: str, port: int, debug: bool) -> None:
    """Answer over HTTP with a registered version, by MLflow's own scoring server in this environment."""
    with exit_codes(debug=debug):
        from tsp.tracking.serving import serve_model

        sys.exit(serve_model(model, Path.cwd(), host=host, port=port))


@click.command(cls=Command)
@click.option("--delete/--dry-run", default=False, help="Remove it; else only say what would go [--dry-run].")
@click.option("--unregistered", is_flag=True, help="Also checkpoints of finished jobs that were never registered.")
@_json
@_debug
def gc(delete: bool, unregistered: bool, as_json: bool, debug: bool) -> None:
    """Remove what no registered version and no running job needs, below mlruns/."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        from tsp.report_registry import print_leftovers
        from tsp.tracking.leftovers import leftovers, remove

        found = leftovers(Path.cwd(), unregistered=unregistered)
        document: dict[str, Any] = {"leftovers": [one.as_row() for one in found], "deleted": delete}
        if delete:
            remove(Path.cwd(), found)
        if as_json:
            print(json.dumps(document), file=stdout)
        else:
            print_leftovers(document, stdout)
