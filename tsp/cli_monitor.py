"""`tsp monitor`: look at a pruned model in use, on what it is asked there."""

import json
from pathlib import Path

import click

from tsp.exits import exit_codes, stdout_kept_clean
from tsp.launch import is_first_rank, world_size
from tsp.options import Command, slices_option


@click.command(cls=Command)
@click.argument("model", metavar="models:/NAME@ALIAS")
@click.option(
    "--against", required=True, metavar="MODEL", help="models:/NAME@previous_champion, dense (what it was), or a model."
)
@click.option(
    "--requests", type=click.Path(path_type=Path), required=True, metavar="FILE.jsonl", help="What it was asked."
)
@slices_option
@click.option(
    "--policy", type=click.Path(path_type=Path), metavar="FILE.yaml", help="Requirements, under the key monitor."
)
@click.option("--require", multiple=True, metavar="EXPR", help="Like kl<=0.1 or slice_top1/german>=0.8; repeatable.")
@click.option("--ds", type=click.Path(path_type=Path), help="DeepSpeed JSON that says how to shard [not at all].")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Dotted config key; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def monitor(
    model: str,
    against: str,
    requests: Path,
    slices: str | None,
    policy: Path | None,
    require: tuple[str, ...],
    ds: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Watch a model in use: KL, top-1, repetition, loss by slice, each time a run; exit 3 where a bound is crossed."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        from tsp.monitor import read_asked, refuse_broken, take_look, write_down
        from tsp.report_monitor import print_look

        root = Path.cwd()
        asked = read_asked(policy, require)
        look = take_look(
            model,
            against,
            requests,
            asked,
            slices=slices,
            overrides=overrides,
            ds_path=ds,
            root=root,
            world_size=world_size(),
        )
        if not is_first_rank():
            return
        document = write_down(look, root)
        if as_json:
            print(json.dumps(document), file=stdout)
        else:
            print_look(document, stdout)
        stdout.flush()
        refuse_broken(document)
