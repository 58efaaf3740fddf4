"""The typed config tree; its sections, with every default and range, are in `settings.py`.

`load_config(layers)` merges mappings, later ones win, checks the whole tree and reports all faults in one message.
The layers of a job, weakest first: defaults here, the demo's YAML (no model given), the method's preset, the YAML of
`--config`, the command line's options, `--set`. How weights are sharded is not said here but in `ds_configs/*.json`.
"""

import difflib
import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from tsp.errors import ConfigError
from tsp.settings import (
    DataConfig,
    EvalConfig,
    Gpu,
    LacoConfig,
    ModelConfig,
    PruneSection,
    ReplaceMeConfig,
    Section,
    Stage1Config,
    Stage2Config,
    StateConfig,
    TrackingConfig,
    TrainConfig,
)
from tsp.yaml12 import parse_yaml, read_yaml


class JobConfig(Section):
    """One pruning job."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    prune: PruneSection = PruneSection()
    transfer: Literal["stage2", "finetune", "distill", "merge", "replaceme", "none"] = "stage2"
    """How what the doomed layers know is moved: `finetune`, `distill`: drop first, then train as long as stage 2;
    `merge`: add the weights to the layer before; `replaceme`: fold a linear map into it; both without training."""
    budget_s: float | None = Field(None, gt=0)
    """Seconds for selection and transfer together: the transfer trains until they are over; None: `stage2.steps`."""
    save: bool = True
    """Write, prove and register the pruned checkpoint; false: only measure."""
    quantize: Literal["int8"] | None = None
    """Also write the pruned checkpoint with its linear maps in int8 (extra `quantize`), and measure that and the dense
    model in int8; None: off."""
    train: TrainConfig = TrainConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    laco: LacoConfig = LacoConfig()
    replaceme: ReplaceMeConfig = ReplaceMeConfig()
    state: StateConfig = StateConfig()
    tracking: TrackingConfig = TrackingConfig()
    seed: int = Field(0, ge=0)
    """Of the order of the sequences, the adapters' start values and random choices."""


def load_config(layers: Iterable[Mapping[str, Any]]) -> JobConfig:
    """Merge the layers, later ones win, and check the result.

    Raises:
        ConfigError: unknown keys or values out of range; all of them in one message.
    """
    try:
        return JobConfig.model_validate(merged(layers))
    except ValidationError as error:
        raise ConfigError("; ".join(_fault(fault) for fault in error.errors())) from None


def known_gpu(name: str) -> Gpu:
    """A device of `gpus.yaml` by its name, or of a YAML file of the user's own.

    Raises:
        ConfigError: neither, or the file says something else.
    """
    known = read_yaml(Path(__file__).parent / "gpus.yaml")
    if name not in known and not name.endswith((".yaml", ".yml")):
        raise ConfigError(f"--gpu must be one of {', '.join(known)} or a YAML file, got {name!r}")
    try:
        return Gpu.model_validate(known[name] if name in known else read_yaml(Path(name), "--gpu"))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].lower()}" for fault in error.errors()]
        raise ConfigError(f"--gpu {name}: {'; '.join(faults)}") from None


def merged(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping of all; later layers win.

    Raises:
        ConfigError: it has no end.
    """
    tree: dict[str, Any] = {}
    try:
        for layer in layers:
            _merge(tree, layer)
    except RecursionError:
        raise ConfigError(
            "settings are in one another without end; a section of a config has four levels at most"
        ) from None
    return tree


def parse_override(text: str) -> dict[str, Any]:
    """`stage1.steps=20` -> `{"stage1": {"steps": 20}}`; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set must be KEY=VALUE, got {text!r}")
    return nest(key, parse_yaml(value, f"--set {key}"))


def nest(dotted: str, value: Any) -> dict[str, Any]:
    """`nest("a.b", 1)` -> `{"a": {"b": 1}}`."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`, for all leaves: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def number_to_drop(config: PruneSection, num_layers: int) -> int | None:
    """How many layers go, in [1, L - 1]; 0 for the method `dense`; None: the job finds it under a bound.

    Raises:
        ConfigError: the ratio, also as the beginning of a search, gives none, or nothing would be left.
    """
    if config.method == "dense":
        return 0
    if bound_of(config) is not None:
        if num_layers < 2:
            raise ConfigError(f"{bound_of(config)} needs a model of at least 2 layers, got {num_layers}")
        if config.max_ppl_ratio is not None:
            number_by_ratio(config, num_layers)
        return None
    if config.drop is not None:
        return len(config.drop)
    if config.num_drop is not None:
        if config.num_drop >= num_layers:
            raise ConfigError(f"prune.num_drop must be in [1, {num_layers - 1}], got {config.num_drop}")
        return config.num_drop
    return number_by_ratio(config, num_layers)


def number_by_ratio(config: PruneSection, num_layers: int) -> int:
    """How many layers the ratio means; a search under `max_ppl_ratio` begins with it.

    Raises:
        ConfigError: none, or nothing would be left.
    """
    num_drop = math.floor(config.ratio * num_layers + 0.5)
    if not 1 <= num_drop < num_layers:
        raise ConfigError(
            f"prune.ratio drops {num_drop} of {num_layers} layers, got {config.ratio}; "
            f"allowed is [0.5/{num_layers}, {num_layers - 0.5}/{num_layers})"
        )
    return num_drop


def likely_number(config: PruneSection, num_layers: int) -> int:
    """How many layers a search under a bound may come to drop: as many as it tries first, or as the speed-up takes."""
    if config.min_speedup is None:
        return number_by_ratio(config, num_layers)
    return min(max(round(num_layers * (1 - 1 / config.min_speedup)), 1), num_layers - 1)


def bound_of(config: PruneSection) -> str | None:
    """The bound under which the job finds the number of layers, `prune.max_ppl_ratio 1.1`; None: there is none."""
    for name in ("max_ppl_ratio", "min_speedup"):
        if getattr(config, name) is not None:
            return f"prune.{name} {getattr(config, name):g}"
    return None


def _merge(base: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if not isinstance(value, Mapping):
            base[key] = value
        elif isinstance(base.setdefault(key, {}), dict):
            _merge(base[key], value)
        # Else a section was given a value before, which is a fault to be told and not to be replaced.


def _fault(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(fault['loc'])}"
    allowed = fault["msg"][0].lower() + fault["msg"][1:]
    hint = _nearest_choice(fault) if fault["type"] == "literal_error" else ""
    return f"{key}: {allowed}, got {fault['input']!r}{hint}"


def _nearest_choice(fault: Any) -> str:
    near = difflib.get_close_matches(
        str(fault["input"]), re.findall(r"'(.*?)'", fault["ctx"]["expected"]), n=1, cutoff=0.8
    )
    return f"; did you mean {near[0]}?" if near else ""


def _nearest(loc: tuple[str | int, ...]) -> str:
    section: type[BaseModel] = JobConfig
    for part in loc[:-1]:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    near = difflib.get_close_matches(str(loc[-1]), list(section.model_fields), n=1)
    known = textwrap.shorten(", ".join(section.model_fields), 100, placeholder=" ...")
    return f", did you mean {near[0]}?" if near else f"; known are {known}"
