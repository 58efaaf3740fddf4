"""The command line: click -> typed config -> one call. Heavy imports are made inside the commands."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from tsp import __version__
from tsp.cli_compare import advise, compare
from tsp.cli_models import export, gc, models, serve
from tsp.cli_monitor import monitor
from tsp.cli_plan import plan
from tsp.cli_registry import audit, promote, rollback
from tsp.cli_runs import runs, sync
from tsp.cli_server import server, ui
from tsp.cli_tune import tune
from tsp.errors import CollapseError
from tsp.exits import exit_codes, run_passing_signals, stdout_kept_clean
from tsp.launch import is_first_rank, launch_command, launcher_options, world_size
from tsp.options import (
    Command,
    Group,
    configs_from_options,
    job_options,
    layer_indices,
    sharding_path,
    slices_option,
    tasks_option,
)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tsp")
def main() -> None:
    """Make language models smaller by removing whole layers without losing what they know."""


_OF_RUNS = (advise, compare, plan, runs, sync, tune, ui)
_OF_MODELS = (audit, export, gc, models, monitor, promote, rollback, serve, server)
for _command in (*_OF_RUNS, *_OF_MODELS):
    main.add_command(_command)


@click.command(cls=Command)
@click.option("--local_rank", type=int, hidden=True, help="Given by the deepspeed launcher.")
@job_options
def launched_prune(local_rank: int | None, **options: Any) -> None:
    """Prune a model on the ranks that `deepspeed` started."""
    with exit_codes(debug=options["debug"]):
        _prune(options, world_size=world_size())


@main.command()
@launcher_options
@job_options
@click.pass_context
def prune(context: click.Context, /, **options: Any) -> None:
    """Prune a model: `deepspeed launchers/prune.py` with the same options."""
    with exit_codes(debug=options["debug"]):
        configs_from_options(options)
        if options["dry_run"]:
            _prune(options, world_size=options["nproc"] or 1)
            return
        command = launch_command(context, launched_prune, "prune.py")
    sys.exit(run_passing_signals(command))


@main.command()
@click.option("--model", required=True, help="Hub id, folder or models:/name@alias.")
@click.option("--eval-data", multiple=True, required=True, help="Corpus to measure on; repeatable.")
@click.option("--against", metavar="MODEL", help="The dense model it came from: compare with it.")
@slices_option
@tasks_option
@click.option("--ds", type=click.Path(path_type=Path), help="DeepSpeed JSON that says how to shard [not at all].")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Dotted config key; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def evaluate(
    model: str,
    eval_data: tuple[str, ...],
    against: str | None,
    slices: str | None,
    tasks: tuple[str, ...],
    ds: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Measure a model: perplexity, slices, tasks, generation, speed, size; also against the dense one."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        from tsp.config import load_config, nest, parse_override
        from tsp.evaluate import evaluate_model

        given = [nest("model.path", model), nest("eval.sources", list(eval_data)), nest("eval.slices", slices)]
        given.append(nest("eval.tasks", list(tasks)))
        config = load_config([*given, *map(parse_override, overrides)])
        dense = config.model.model_copy(update={"path": against, "revision": None}) if against else None
        result = evaluate_model(config, ds, root=Path.cwd(), world_size=world_size(), against=dense)
        if not is_first_rank():
            return
        if as_json:
            print(json.dumps(result), file=stdout)
        else:
            from tsp.report import print_evaluation

            print_evaluation(result, stdout)


@main.command()
@click.argument("model")
@click.option("--layers", required=True, metavar="3,7,9", help="0-based layers that go.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def drop(model: str, layers: str, output: Path, trust_remote_code: bool, debug: bool) -> None:
    """Write a model without some layers, shard by shard, without building it."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        dropped = layer_indices("--layers", layers)
        from tsp.drop import drop_to

        print(drop_to(model, dropped, output, root=Path.cwd(), trust=trust_remote_code), file=stdout)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="The dense model: compare logits.")
@click.option("--layers", metavar="3,7,9", help="0-based layers that the dense model is to lose.")
@click.option("--for", "loaders", metavar="vllm,gguf", help="Other programs that are to read the folder.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the models.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def verify(
    folder: Path,
    against: str | None,
    layers: str | None,
    loaders: str | None,
    trust_remote_code: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Prove that a pruned checkpoint works with transformers alone; exit 3 where it does not."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        dropped = layer_indices("--layers", layers) if layers else []
        from tsp.report import print_verification
        from tsp.verify import verify as look

        readers = loaders.split(",") if loaders else []
        rows = look(folder, against=against, dropped=dropped, loaders=readers, trust=trust_remote_code)
        if as_json:
            print(json.dumps(rows), file=stdout)
        else:
            print_verification(rows, stdout)
    sys.exit(0 if all(row["ok"] for row in rows) else 3)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def doctor(as_json: bool) -> None:
    """Check this machine: Python, compiler, packages, GPUs, tracking store; and say what to do."""
    with exit_codes(), stdout_kept_clean() as stdout:
        from tsp.doctor import examine
        from tsp.report import print_checks

        checks = examine(Path.cwd())
        if as_json:
            print(json.dumps(checks), file=stdout)
        else:
            print_checks(checks, stdout)
    sys.exit(0 if all(check["ok"] for check in checks) else 1)


@main.group()
def demo() -> None:
    """The embedded demo model."""


@demo.command("train")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write, or to go on with.")
@click.option("--tokens", type=int, help="To train on [those of the shipped model].")
@click.option("--tiny", is_flag=True, help="A few steps of a tiny model, to see the script work.")
@click.option("--compile", is_flag=True, help="Fuse operations; pays in a long training.")
def demo_train(output: Path, tokens: int | None, tiny: bool, compile: bool) -> None:
    """Train the demo checkpoint from scratch on the standard library's sources."""
    with exit_codes():
        from tsp.demo.train import TINY, DemoRecipe, train_demo

        recipe = TINY if tiny else DemoRecipe(**({"total_tokens": tokens} if tokens else {}))
        print(json.dumps(train_demo(recipe, output, compile=compile), indent=1))


def _prune(options: dict[str, Any], world_size: int) -> None:
    configs = configs_from_options(options)
    root, ds_path, output = Path.cwd(), sharding_path(options), options["output"]
    from tsp.job import inputs_of, prepare
    from tsp.nodes import agreed
    from tsp.report import print_plan, print_result

    if configs[0][0]:
        _sweep(options, configs, world_size)
        return
    config, resume = configs[0][1], options["resume"]
    job = agreed(
        lambda: prepare(config, ds_path, output, root=root, world_size=world_size, resume=bool(resume)), inputs_of
    )
    if options["dry_run"]:
        if is_first_rank():
            print_plan(job)
        return
    from tsp.pipeline import prune

    result, links = prune(job, root, resume)
    if is_first_rank():
        from tsp.tracking.store import resolve_uri, shown

        print_result(result, links["run"], shown(resolve_uri(root)))
    if result["collapse"]:
        raise CollapseError(
            f"the job is done, but it is no success, and nothing is registered: {result['collapse'][0]}"
        )


def _sweep(options: dict[str, Any], configs: list[tuple[dict[str, Any], Any]], world_size: int) -> None:
    from tsp.job import inputs_of
    from tsp.nodes import agreed
    from tsp.report import print_plan, print_sweep
    from tsp.sweep import prepare_sweep, run_sweep

    root, ds_path, output = Path.cwd(), sharding_path(options), options["output"]
    jobs = agreed(
        lambda: prepare_sweep(configs, ds_path, output, root=root, world_size=world_size),
        lambda jobs: inputs_of(*jobs),
    )
    if options["dry_run"]:
        if is_first_rank():
            print_plan(*jobs)
        return
    children, links = run_sweep(jobs, root)
    if is_first_rank():
        from tsp.tracking.run import experiment_name

        print_sweep(children, experiment_name(jobs[0].config.tracking.experiment), links["run"])
    if any(child.status == "FAILED" for child in children):
        sys.exit(1)
