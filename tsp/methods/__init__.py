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


_HERE = Path(__file__).parent
# Published as selections only: nothing is trained unless a transfer is asked for.
_BASELINE = _HERE / "baseline.yaml"

_GATES = "tsp.methods.trsp.stage1:score"

METHODS: Mapping[str, Entry] = {
    "tsp": Entry(_GATES, None, "gates under a budget, then distillation into the kept layers", seeded=True),
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
    "magnitude": Entry("tsp.methods.simple:magnitude", _BASELINE, "layers with the smallest weights"),
    "random": Entry("tsp.methods.simple:random", _BASELINE, "a seeded random choice", seeded=True),
    "tail": Entry("tsp.methods.simple:tail", _BASELINE, "the last layers but the very last"),
    "dense": Entry("tsp.methods.simple:dense", _HERE / "dense.yaml", "no layer goes: what fine-tuning alone reaches"),
}


TRANSFERS: Mapping[str, str | None] = {
    "stage2": "tsp.methods.trsp.stage2:transfer",
    "finetune": "tsp.methods.controls:finetune",
    "distill": "tsp.methods.controls:distill",
    "replaceme": "tsp.methods.replaceme:replaceme",
    "none": None,
}


def score_verb(method: str) -> Callable[..., Any]:
    """The verb `score` of a method."""
    return _function(METHODS[method].verb)


def is_nested(config: "JobConfig") -> bool:
    """Whether the method's order for n layers begins with its orders for fewer."""
    entry = METHODS[config.prune.method]
    # Gates under a budget are learned for a number of layers; those under a penalty are not.
    return entry.nested and not (entry.verb == _GATES and config.stage1.schedule == "budget")


def transfer_verb(name: str) -> Callable[..., Any] | None:
    """The verb `transfer`; None where nothing is to be moved."""
    path = TRANSFERS[name]
    return _function(path) if path else None


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
