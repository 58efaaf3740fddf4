"""What `tsp tune` may change: dotted settings, each with a range or a list of choices.

    stage2.lr: {low: 2.0e-4, high: 5.0e-3, log: true}
    stage2.gates: [off, anneal]
    stage2.lambda2: {low: 0.01, high: 2, log: true, if: {stage2.gates: [anneal]}}

Read from a YAML file, or made around the values of a job. How a space is searched is not known here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tsp.config import JobConfig, flatten, load_config
from tsp.errors import ConfigError
from tsp.grid import kinds_of, layers_of
from tsp.methods import refuse_nonsense

_NOT_COMPARABLE = {
    **dict.fromkeys(("model", "data", "eval"), "the losses would be of another model or text"),
    **dict.fromkeys(("prune.ratio", "prune.num_drop", "prune.drop"), "whoever drops least would win"),
    "budget_s": "whoever trains longest would win",
    "seed": "whoever is luckiest would win",
    "prune.method": "a method comes with settings of its own; compare methods with a sweep",
    **dict.fromkeys(("save", "tracking"), "it does not change the model"),
}


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One setting that may be changed: a range from `low` to `high`, or `choices`."""

    key: str
    """Dotted."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    """All orders of magnitude of the range are equally likely."""
    whole: bool = False
    """Whole numbers only."""
    choices: tuple[Any, ...] = ()
    only_if: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Other settings, with the values at which this one has an effect."""

    def applies(self, settings: Mapping[str, Any]) -> bool:
        """Whether it has an effect beside these settings, by dotted key."""
        return all(settings[key] in values for key, values in self.only_if.items())

    def holds(self, value: Any) -> bool:
        """Whether the value is one that may be chosen."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high

    def in_words(self) -> str:
        """As a person reads it: `0.0002 to 0.005 (log)`."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        return f"{self.low:g} to {self.high:g}{' (log)' if self.log else ''}"

    def ends(self) -> tuple[Any, ...]:
        """The values with which a config is checked."""
        return self.choices or (self.low, self.high)


def read_space(content: Mapping[str, Any], config: JobConfig) -> tuple[Knob, ...]:
    """The space that a YAML file states, checked against the job.

    Args:
        content: of the file.
        config: the job that every trial differs from.

    Raises:
        ConfigError: unknown settings, values out of range, settings whose trials could not be compared.
    """
    if not content:
        raise ConfigError(
            "the search space names no setting; give at least one, like stage2.lr: {low: 1e-4, high: 1e-2}"
        )
    knobs = tuple(_knob(key, given) for key, given in content.items())
    for place, knob in enumerate(knobs):
        for value in knob.ends():
            try:
                with_settings(config, {knob.key: value})
            except ConfigError as error:
                raise ConfigError(f"search space: {error}") from None
        known = {other.key for other in knobs[:place]} | set(flatten(config.model_dump()))
        missing = [key for key in knob.only_if if key not in known]
        if missing:
            raise ConfigError(f"search space: {knob.key}.if names {missing[0]}, which is no setting above it")
    return knobs


def default_space(config: JobConfig) -> dict[str, Any]:
    """What matters for the job's transfer, around its own values, as a YAML file would say it.

    Raises:
        ConfigError: the transfer has no setting to search.
    """
    stage2 = config.stage2
    lr = {"stage2.lr": _around(stage2.lr, 5, 5)} if stage2.lr else {"stage2.lr_scale": _around(stage2.lr_scale, 4, 4)}
    temperature = {"stage2.temperature": _around(stage2.temperature, 2, 4)}
    # AdamW does not feel the size of a loss, only the mix of its parts: the lighter part's weight is searched.
    lighter, heavier = sorted(("lm", "distill"), key=lambda part: getattr(stage2.task, part))
    most = getattr(stage2.task, heavier)
    mix = {f"stage2.task.{lighter}": {"low": 0.0, "high": most}} if most else {}
    hidden = {"stage2.hidden": _around(stage2.hidden, 10, 10)} if stage2.hidden else {}
    opened = [gates for gates in dict.fromkeys((stage2.gates, "off", "anneal")) if gates != "off"]
    gates = {
        "stage2.gates": ["off", *opened],
        "stage2.lambda2": {"low": 0.01, "high": 2.0, "log": True, "if": {"stage2.gates": opened}},
    }
    spaces: dict[str, dict[str, Any]] = {
        "stage2": lr | mix | temperature | hidden | gates,
        "distill": lr | temperature,
        "finetune": lr,
        "replaceme": {"replaceme.ridge": _around(config.replaceme.ridge or 1.0, 100, 10)},
    }
    if config.transfer not in spaces:
        raise ConfigError(
            f"transfer {config.transfer} has no setting to search; take one of {', '.join(spaces)}, or name settings "
            "of the selection with --space FILE.yaml"
        )
    return spaces[config.transfer]


def with_settings(config: JobConfig, settings: Mapping[str, Any]) -> JobConfig:
    """The job with some settings, by dotted key, changed.

    Raises:
        ConfigError: unknown settings, values out of range or that do not go together.
    """
    changed = load_config([config.model_dump(), *layers_of(settings)])
    refuse_nonsense(changed)
    return changed


def steps_compare(knobs: Sequence[Knob], config: JobConfig) -> bool:
    """Whether step n of every trial is the same part of a training on the same tokens."""
    lengths = ("train", "stage2.steps")
    return config.budget_s is None and not any(knob.key.startswith(lengths) for knob in knobs)


def _knob(key: str, given: Any) -> Knob:
    _refuse_incomparable(key)
    if isinstance(given, list):
        if not given:
            raise ConfigError(f"search space: {key} is a list without choices; give at least two, or leave it out")
        return Knob(key=key, choices=tuple(given))
    allowed = {"low", "high", "log", "choices", "if"}
    shaped = isinstance(given, Mapping) and set(given) <= allowed and ("choices" in given) != ("low" in given)
    if not shaped or not isinstance(given.get("choices", []), list) or not isinstance(given.get("if", {}), Mapping):
        raise ConfigError(
            f"search space: {key} must be {{low, high, log}} or a list of choices, or {{choices, if}}, under a setting "
            f"written with dots like stage2.lr, got {given!r}"
        )
    only_if = {name: values if isinstance(values, list) else [values] for name, values in given.get("if", {}).items()}
    if "choices" in given:
        return Knob(key=key, choices=_knob(key, given["choices"]).choices, only_if=only_if)
    low, high, log = given["low"], given.get("high"), given.get("log", False)
    if not _is_number(low) or not _is_number(high) or not low < high or not isinstance(log, bool) or (log and low <= 0):
        raise ConfigError(
            f"search space: {key} must have numbers low < high, and low above 0 where log is true, got {given!r}"
        )
    kinds = kinds_of(key)
    return Knob(key=key, low=low, high=high, log=log, whole=int in kinds and float not in kinds, only_if=only_if)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_incomparable(key: str) -> None:
    for name, reason in _NOT_COMPARABLE.items():
        if key == name or key.startswith(f"{name}."):
            raise ConfigError(f"search space: {key} cannot be searched: {reason}")


def _around(value: float, below: float, above: float) -> dict[str, Any]:
    return {"low": readable(value / below), "high": readable(value * above), "log": True}


def readable(value: float) -> float:
    """Three digits are what a person reads, and finer than anything that can be told apart."""
    return float(f"{value:.3g}") if math.isfinite(value) else value
