"""The options of a pruning job, shared by `launchers/prune.py` and `tsp prune`, and the config they make."""

import logging
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsp.errors import ConfigError
from tsp.exits import exit_codes
from tsp.paths import shipped

if TYPE_CHECKING:
    from tsp.config import JobConfig

# Options that are a config field under another name.
_FIELDS = {
    "model": "model.path",
    "trust_remote_code": "model.trust_remote_code",
    "data": "data.source",
    "eval_data": "eval.sources",
    "slices": "eval.slices",
    "tasks": "eval.tasks",
    "method": "prune.method",
    "ratio": "prune.ratio",
    "num_drop": "prune.num_drop",
    "drop": "prune.drop",
    "max_ppl_ratio": "prune.max_ppl_ratio",
    "min_speedup": "prune.min_speedup",
    "experiment": "tracking.experiment",
    "run_name": "tracking.run_name",
    "register": "tracking.register_as",
    "quantize": "quantize",
    "seed": "seed",
}


class OneOrMore(click.ParamType):
    """A value, or several joined by commas: a list then, which makes a sweep."""

    def __init__(self, kind: type) -> None:
        self._kind = click.types.convert_type(kind)
        self.name = self._kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = value.split(",") if isinstance(value, str) else [value]
        values = [self._kind.convert(part, param, ctx) for part in parts]
        return values if len(values) > 1 else values[0]


def _between_commas(context: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    """`a,b` given once is `a` and `b` given one by one."""
    return tuple(name for word in words for name in word.split(",") if name)


_AMOUNTS = ("ratio", "num_drop", "drop", "max_ppl_ratio", "min_speedup")
# A search under this bound begins with the ratio.
_TOGETHER = {"ratio", "max_ppl_ratio"}

# Also those of `tsp evaluate`.
slices_option = click.option("--slices", metavar="FILE", help="YAML that names parts of the text to measure alone.")
tasks_option = click.option(
    "--tasks",
    multiple=True,
    callback=_between_commas,
    metavar="a,b",
    help="Tasks of lm-evaluation-harness (pip install 'tsp[eval]').",
)

_OF_A_JOB = [
    click.option("--ds", type=click.Path(path_type=Path), help="DeepSpeed JSON that says how to shard [zero3]."),
    click.option("--model", help="Hub id, folder or models:/name@alias [embedded demo model]."),
    click.option("--data", help="Calibration text: hub id, .txt/.jsonl/.parquet file, folder, or stdlib [stdlib]."),
    click.option("--eval-data", multiple=True, help="Corpus to measure on; repeatable [10 % held out of --data]."),
    slices_option,
    tasks_option,
    click.option(
        "--method", type=OneOrMore(str), help="tsp (default), trsp (the paper's settings) or a baseline; a,b: a sweep."
    ),
    click.option("--ratio", type=OneOrMore(float), help="Share of the layers to drop [0.25]; a,b: a sweep."),
    click.option("--num-drop", type=int, help="Number of layers to drop."),
    click.option("--drop", metavar="3,7,9", help="Drop exactly these 0-based layers."),
    click.option(
        "--max-ppl-ratio",
        type=OneOrMore(float),
        help="Drop as many layers as keep perplexity, after the transfer, within so many times the dense model's.",
    ),
    click.option(
        "--min-speedup", type=OneOrMore(float), help="Drop as few layers as make a prompt so many times as fast."
    ),
    click.option("--config", type=click.Path(path_type=Path), help="YAML that states what differs from the defaults."),
    click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Dotted config key; repeatable."),
    click.option("--experiment", help="MLflow experiment [tsp]."),
    click.option("--run-name", help="Name of the MLflow run."),
    click.option(
        "--seed", type=OneOrMore(int), help="Of the order of sequences and of start values [0]; a,b: a sweep."
    ),
    click.option("--quantize", metavar="int8", help="Also save and measure it in int8 (pip install 'tsp[quantize]')."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
    click.option("--dry-run", is_flag=True, help="Print the resolved config and the plan, and exit."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
]
_OF_ITS_RESULT = [
    click.option("--register", metavar="NAME", help="Name in the model registry [<model>-pruned]."),
    click.option("--no-register", is_flag=True, help="Do not register the pruned model."),
    click.option("--output", type=click.Path(path_type=Path), help="New folder [mlruns/output/<run id>]."),
    click.option("--resume", metavar="RUN_ID|latest", help="Go on with an unfinished run of the same job."),
]


class _EndsLikeUs:
    """Of a click command: what click itself complains about ends in our one `error:` line, too."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # torchao 0.18, which transformers imports with any model where it is installed, warns of kernels for other
        # hardware and of its own enums.
        for library in ("torchao", "torch.utils._pytree"):
            logging.getLogger(library).setLevel(logging.ERROR)
        with exit_codes():
            try:
                return super().main(*args, **{**kwargs, "standalone_mode": False})  # type: ignore[misc]
            except click.exceptions.NoArgsIsHelpError as request:
                click.echo(request.format_message(), err=True)
                sys.exit(2)
            except click.UsageError as error:
                hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
                raise ConfigError(f"{error.format_message().rstrip('.')}{hint}") from None


class Command(_EndsLikeUs, click.Command):
    pass


class Group(_EndsLikeUs, click.Group):
    pass


def is_given(value: Any) -> bool:
    """Whether an option was on the command line; 0 and an empty word are values."""
    return value is not None and value is not False and value != ()


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a job to a click command."""
    for option in reversed([*_OF_ITS_RESULT, *_OF_A_JOB]):
        command = option(command)
    return command


def trial_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add those of a job that is only measured: nothing is saved or registered."""
    for option in reversed(_OF_A_JOB):
        command = option(command)
    return command


def configs_from_options(options: Mapping[str, Any]) -> "list[tuple[dict[str, Any], JobConfig]]":
    """Merge defaults, demo, preset, `--config`, options and `--set`.

    Returns:
        Each job's config, with what a sweep varies and its values here; a single job is alone and varies nothing.

    Raises:
        ConfigError: unknown keys, values out of range, options that exclude each other.
    """
    # pydantic would take half of the time in which `tsp --help` answers.
    from tsp.grid import choices, grids_of, in_words, layers_of
    from tsp.yaml12 import read_yaml

    _refuse_contradictions(options)
    file, grids = grids_of(read_yaml(options["config"]) if options["config"] else {})
    given = _given(options)
    jobs: dict[JobConfig, dict[str, Any]] = {}
    for grid in grids:
        stated = [file, *_deciding(grid), *_deciding(given)]
        for choice in choices(grid, stated):
            try:
                config = _config([*stated, *layers_of(choice)], sweep=bool(choice))
            except ConfigError as error:
                raise ConfigError(f"{error} (in the job {in_words(choice)})" if choice else str(error)) from None
            # Two places of the grids may be the same job: without layers to drop there is but one ratio.
            jobs.setdefault(config, choice)
    if any(jobs.values()) and options.get("resume") not in (None, "latest"):
        raise ConfigError("--resume RUN_ID is for a single job; a sweep goes on when the same command is repeated")
    return [(choice, config) for config, choice in jobs.items()]


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says, as a layer of a config."""
    from tsp.config import merged, nest, parse_override

    given: list[Mapping[str, Any]] = [
        nest(field, list(options[option]) if isinstance(options[option], tuple) else options[option])
        for option, field in _FIELDS.items()
        if is_given(options[option]) and option != "drop"
    ]
    if options["drop"] is not None:
        given.append(nest("prune.drop", layer_indices("--drop", options["drop"])))
    if options["ratio"] is not None:
        # The key `prune.ratio` may be where a search under this bound begins; the option is how many layers go.
        given.append(nest("prune.max_ppl_ratio", None))
    if options["register"] or options["no_register"]:
        given.append(nest("tracking.register_model", not options["no_register"]))
    whole = merged([*given, *map(parse_override, options["overrides"])])
    stated = _amounts_of(whole)
    if "ratio" in stated and stated[1:] not in ([], ["max_ppl_ratio"]):
        words = " and ".join(f"prune.{name}" for name in stated)
        raise ConfigError(f"each of {words} says how many layers go; give one of them")
    return whole


def _amounts_of(layer: Mapping[str, Any]) -> list[str]:
    """Those that a layer of a config states."""
    from tsp.config import flatten

    flat = flatten(layer)
    return [name for name in _AMOUNTS if flat.get(f"prune.{name}") is not None]


def _deciding(layer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A layer with an amount, and what takes back the others of weaker layers, which else might win over it."""
    stated = set(_amounts_of(layer))
    kept = stated | _TOGETHER if stated & _TOGETHER else stated
    return [layer, _unstated(kept)] if stated else [layer]


def _unstated(kept: Collection[str] = ()) -> dict[str, Any]:
    """A layer in which all amounts are as if nobody had stated them, but for those that are kept."""
    from tsp.settings import PruneSection

    return {"prune": {name: PruneSection.model_fields[name].default for name in _AMOUNTS if name not in kept}}


def _config(stated: list[Mapping[str, Any]], *, sweep: bool) -> "JobConfig":
    """The whole config from what was stated of it; a sweep registers nothing unless it is asked to."""
    from tsp.config import load_config
    from tsp.methods import preset, refuse_nonsense
    from tsp.policy import check_model_name
    from tsp.settings import TUNING_BLOCKS
    from tsp.yaml12 import read_yaml

    known = load_config(stated)
    layers = [preset(known.prune.method), *stated]
    if known.prune.method == "dense":
        layers.append(_unstated())
    if known.model.path is None:
        layers.insert(0, read_yaml(Path(__file__).parent / "demo" / "prune.yaml"))
    weakest: dict[str, Any] = {"tracking": {"register_model": not sweep}}
    if known.prune.max_ppl_ratio is not None:
        weakest["data"] = {"tuning_blocks": TUNING_BLOCKS}
    config = load_config([weakest, *layers])
    if config.tracking.register_as is not None:
        check_model_name(config.tracking.register_as)
    refuse_nonsense(config)
    return config


def differing(config: "JobConfig") -> dict[str, Any]:
    """What a `--config` file has to state so that it alone gives this job, names in MLflow aside; nested."""
    from tsp.config import flatten, merged, nest

    model_and_method = {"model": {"path": config.model.path}, "prune": {"method": config.prune.method}}
    unstated, wanted = (
        flatten(given.model_dump(mode="json", exclude={"state", "tracking"}))
        for given in (_config([model_and_method], sweep=False), config)
    )
    return merged(
        nest(key, value)
        for key, value in wanted.items()
        if value != unstated[key] or (key == "model.path" and value) or (key == "prune.method" and value != "tsp")
    )


def sharding_path(options: Mapping[str, Any]) -> Path:
    """The DeepSpeed JSON that is asked for; without one, ZeRO-3."""
    return options["ds"] or shipped("ds_configs/zero3.json")


def _refuse_contradictions(options: Mapping[str, Any]) -> None:
    flags = {name: f"--{name.replace('_', '-')}" for name in _AMOUNTS}
    amounts = [flag for name, flag in flags.items() if options[name] is not None]
    if len(amounts) > 1:
        raise ConfigError(f"give one of {', '.join(flags.values())}, got {' and '.join(amounts)}")
    if options["register"] and options["no_register"]:
        raise ConfigError("give one of --register and --no-register, got both")


def layer_indices(option: str, text: str) -> list[int]:
    """`3,7,9` -> [3, 7, 9].

    Raises:
        ConfigError: anything else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} must be layer numbers joined by commas, like 3,7,9, got {text!r}") from None
