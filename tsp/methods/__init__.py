"""Methods and transfers by name. To add one: write a sibling module with the verb, and list it here."""

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.errors import ConfigError
from tsp.yaml12 import read_yaml

if TYPE_CHECKING:
    from tsp.config import JobConfig
    from tsp.methods.base import Method, Transfer


@dataclass(frozen=True)
class Entry:
    """A method: where its verb `score` is, and what its preset changes of the config's defaults."""

    verb: str
    """`module:function`."""
    preset: Path | None
    summary: str
    nested: bool = True
    """The order for n layers begins with the orders for fewer (a greedy trace, a ranking), so one serves all ratios."""
    seeded: bool = False
    """The order depends on the seed."""


@dataclass(frozen=True)
class Move:
    """A transfer: where its verb is, `module:function`."""

    verb: str | None
    check: str | None = None
    """`module:function` that refuses, before the transfer begins, doomed layers it cannot deal with."""
    trains: bool = False
    folds: bool = False
    """Each run of doomed layers goes into the kept layer before it."""


_HERE = Path(__file__).parent
# Published as selections only: nothing is trained unless a transfer is asked for.
_BASELINE = _HERE / "baseline.yaml"

_GATES = "tsp.methods.trsp.stage1:score"

METHODS: Mapping[str, Entry] = {
    "tsp": Entry(_GATES, None, "gates closed one by one under a budget, then distillation", seeded=True),
    "trsp": Entry(_GATES, _HERE / "trsp" / "paper.yaml", "the paper: l1 gates, LM loss, gap penalty", seeded=True),
    "shortgpt": Entry("tsp.methods.similarity:shortgpt", _BASELINE, "layers that turn the hidden state least"),
    "angular": Entry(
        "tsp.methods.similarity:angular", _BASELINE, "the block that turns the last token least", nested=False
    ),
    "streamline": Entry(
        "tsp.methods.similarity:streamline", _BASELINE, "the block that turns the tokens least", nested=False
    ),
    "sleb": Entry("tsp.methods.leave_out:sleb", _BASELINE, "again and again the layer that is missed least"),
    "ppl": Entry("tsp.methods.leave_out:ppl", _BASELINE, "the layers that are missed least, one by one"),
    "taylor": Entry("tsp.methods.taylor:taylor", _BASELINE, "layers whose weights the loss depends on least"),
    "laco": Entry(
        "tsp.methods.laco:laco", _HERE / "laco.yaml", "layers that can be merged into the one before", nested=False
    ),
    "magnitude": Entry("tsp.methods.simple:magnitude", _BASELINE, "layers with the smallest weights"),
    "random": Entry("tsp.methods.simple:random", _BASELINE, "a seeded random choice", seeded=True),
    "tail": Entry("tsp.methods.simple:tail", _BASELINE, "the last layers but the very last"),
    "dense": Entry("tsp.methods.simple:dense", _HERE / "dense.yaml", "no layer goes: what fine-tuning alone reaches"),
}


TRANSFERS: Mapping[str, Move] = {
    "stage2": Move("tsp.methods.trsp.stage2:transfer", trains=True),
    "finetune": Move("tsp.methods.controls:finetune", trains=True),
    "distill": Move("tsp.methods.controls:distill", trains=True),
    "merge": Move("tsp.methods.laco:merge", check="tsp.methods.laco:check", folds=True),
    "replaceme": Move("tsp.methods.replaceme:replaceme", check="tsp.methods.replaceme:check", folds=True),
    "none": Move(None),
}


def score_verb(method: str) -> "Method":
    """The verb `score` of a method."""
    return _function(METHODS[method].verb)


def is_nested(config: "JobConfig") -> bool:
    """Whether the method's order for n layers begins with its orders for fewer."""
    entry = METHODS[config.prune.method]
    # Gates under a budget are learned for a number of layers; those under a penalty are not.
    return entry.nested and not (entry.verb == _GATES and config.stage1.schedule == "budget")


def is_learned(config: "JobConfig") -> bool:
    """Whether the method chooses by gates that are learned."""
    return METHODS[config.prune.method].verb == _GATES and config.stage1.schedule != "search"


def is_seeded(config: "JobConfig") -> bool:
    """Whether the method's order depends on the seed."""
    entry = METHODS[config.prune.method]
    return entry.seeded and not (entry.verb == _GATES and config.stage1.schedule == "search")


def transfer_verb(name: str) -> "Transfer | None":
    """The verb `transfer`; None where nothing is to be moved."""
    path = TRANSFERS[name].verb
    return _function(path) if path else None


def transfer_check(name: str) -> Callable[..., None]:
    """Takes the bench with the model mounted, and the doomed layers or None; raises ModelError."""
    path = TRANSFERS[name].check
    return _function(path) if path else lambda bench, doomed: None


def refuse_nonsense(config: "JobConfig") -> None:
    """Settings that are each allowed and do not go together.

    Raises:
        ConfigError: these do not.
    """
    if config.prune.method == "laco" and config.transfer == "stage2":
        raise ConfigError(
            "prune.method laco chooses layers to merge into others and stage 2 trains with them in place, got "
            "transfer stage2; give transfer=merge, the method's own, or finetune, distill, replaceme, none"
        )
    if config.transfer in ("finetune", "distill") and config.stage2.trainable == "none":
        raise ConfigError(
            f"transfer {config.transfer} trains nothing with stage2.trainable none; give lora or full, or transfer=none"
        )
    if config.transfer == "stage2" and config.stage2.trainable == "none" and config.stage2.lr is None:
        raise ConfigError("stage2.trainable none moves gates, for which stage2.lr has to be given, got none; give 0.01")
    if config.transfer == "stage2" and not any(dict(config.stage2.task).values()) and config.stage2.lr is None:
        raise ConfigError(
            "stage2.lr is found by the loss of stage2.task, got lm 0 and distill 0; give one of them, or stage2.lr=1e-4"
        )
    if config.quantize and not config.save:
        raise ConfigError(
            f"quantize {config.quantize} starts from the pruned checkpoint, got save false, which writes none; "
            "leave one of them out"
        )
    if config.quantize and config.prune.method == "dense":
        raise ConfigError(
            f"quantize {config.quantize} starts from the pruned checkpoint, and prune.method dense writes none; "
            "leave it out"
        )
    _refuse_amounts(config)


def _refuse_amounts(config: "JobConfig") -> None:
    prune = config.prune
    asked = ("drop", "num_drop", "max_ppl_ratio", "min_speedup")
    stated = [f"prune.{name}" for name in asked if getattr(prune, name) is not None]
    if len(stated) > 1:
        raise ConfigError(f"each of {' and '.join(stated)} says how many layers go; give one of them")
    if prune.max_ppl_ratio is not None and config.budget_s is not None:
        raise ConfigError(
            "prune.max_ppl_ratio tries several numbers of layers, each with the whole transfer; "
            f"give stage2.steps instead of budget_s, got budget_s {config.budget_s:g}"
        )
    if prune.max_ppl_ratio is not None and not config.data.tuning_blocks:
        raise ConfigError("prune.max_ppl_ratio is measured on data.tuning_blocks sequences, got 0; give at least 1")
    if prune.min_speedup is not None and not config.eval.speed_runs:
        raise ConfigError("prune.min_speedup is measured in eval.speed_runs passes, got 0; give at least 1")


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def preset(name: str) -> dict[str, Any]:
    """The config layer of a method.

    Raises:
        ConfigError: no such method.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"prune.method must be one of {', '.join(METHODS)}, got {name!r}{hint}")
    path = METHODS[name].preset
    return read_yaml(path) if path else {}
