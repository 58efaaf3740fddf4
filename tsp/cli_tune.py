"""`tsp tune`: search the settings of a job, within a time; and what `deepspeed` starts for it on each rank."""

import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsp.errors import ConfigError
from tsp.exits import exit_codes, run_passing_signals, stdout_kept_clean
from tsp.launch import is_first_rank, launch_command, launcher_options, world_size
from tsp.options import Command, configs_from_options, differing, sharding_path, trial_options

if TYPE_CHECKING:
    from tsp.config import JobConfig
    from tsp.space import Knob

_OPTIONS = [
    click.option(
        "--minutes",
        type=click.FloatRange(min=0, min_open=True),
        default=8.0,
        show_default=True,
        help="For this launch.",
    ),
    click.option("--trials", type=click.IntRange(min=1), help="At most so many, with those of earlier launches."),
    click.option(
        "--space",
        type=click.Path(path_type=Path),
        metavar="FILE.yaml",
        help="What may be changed: stage2.lr: {low: 1e-4, high: 1e-2, log: true} [what matters for the transfer].",
    ),
    click.option(
        "--best",
        type=click.Path(path_type=Path),
        default=Path("tuned.yaml"),
        show_default=True,
        metavar="FILE.yaml",
        help="Best settings, for tsp prune --config.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
]


def _search_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = trial_options(command)
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command(cls=Command)
@click.option("--local_rank", type=int, hidden=True, help="Given by the deepspeed launcher.")
@click.option("--document", type=click.Path(path_type=Path), hidden=True, help="Where the JSON document goes.")
@_search_options
def launched_tune(local_rank: int | None, document: Path | None, **options: Any) -> None:
    """Search settings on the ranks that `deepspeed` started."""
    with exit_codes(debug=options["debug"]):
        _tune(options, world_size=world_size(), document=document)


@click.command(cls=Command)
@launcher_options
@_search_options
@click.pass_context
def tune(context: click.Context, /, **options: Any) -> None:
    """Search the settings of a job for the least loss on tuning text: `deepspeed launchers/tune.py`."""
    with exit_codes(debug=options["debug"]):
        _asked_for(options)
        if options["dry_run"]:
            _tune(options, world_size=options["nproc"] or 1)
            return
        command = launch_command(context, launched_tune, "tune.py")
        if options["as_json"]:
            # What deepspeed itself says goes to stdout, which belongs to the document.
            with tempfile.TemporaryDirectory(prefix="tsp-") as folder:
                document = Path(folder) / "search.json"
                code = run_passing_signals([*command, "--document", str(document)], stdout=sys.stderr)
                sys.stdout.write(document.read_text(encoding="utf-8") if code == 0 else "")
        else:
            code = run_passing_signals(command)
    sys.exit(code)


def _asked_for(options: Mapping[str, Any]) -> "tuple[JobConfig, tuple[Knob, ...]]":
    """The job and what may be changed of it."""
    from tsp.space import default_space, read_space
    from tsp.study import require_optuna
    from tsp.yaml12 import read_yaml

    require_optuna()
    if not math.isfinite(options["minutes"]):
        raise ConfigError(f"--minutes must be a number of minutes, got {options['minutes']}")
    configs = configs_from_options({**options, "register": None, "no_register": False})
    if len(configs) > 1 or configs[0][0]:
        raise ConfigError(
            f"tsp tune searches one job, got several by {', '.join(configs[0][0])}; give one value each, and lists of "
            "choices with --space FILE.yaml"
        )
    config, file = configs[0][1], options["space"]
    return config, read_space(read_yaml(file, "--space") if file else default_space(config), config)


def _tune(options: dict[str, Any], world_size: int, document: Path | None = None) -> None:
    config, knobs = _asked_for(options)
    from tsp.job import inputs_of
    from tsp.nodes import agreed
    from tsp.search import prepare_search

    prepare = partial(
        prepare_search,
        config,
        knobs,
        sharding_path(options),
        minutes=options["minutes"],
        max_trials=options["trials"],
        best=options["best"],
        differing=differing,
        root=Path.cwd(),
        world_size=world_size,
    )
    search = agreed(prepare, lambda search: inputs_of(search.job))
    if options["dry_run"]:
        if is_first_rank():
            from tsp.report import print_plan

            print_plan(search.job, space={knob.key: knob.in_words() for knob in knobs})
        return
    from tsp.tune import run_search

    with stdout_kept_clean() as stdout:
        found, links = run_search(search, Path.cwd())
        if not is_first_rank():
            return
        if document is not None:
            document.write_text(json.dumps(found) + "\n", encoding="utf-8")
        elif options["as_json"]:
            stdout.write(json.dumps(found) + "\n")
        else:
            from tsp.report_tune import print_search

            print_search(found, links["run"], stdout)
