"""Methods and transfers by name. To add one: write a sibling module with the verb, and list it here."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsp.errors import ConfigError
from tsp.yaml12 import read_yaml


@dataclass(frozen=True)
class Entry:
    """A method: the module with its verb `score`, and what its preset changes of the config's defaults."""

    module: str
    preset: Path | None
    summary: str


_HERE = Path(__file__).parent

METHODS: Mapping[str, Entry] = {
    "tsp": Entry("tsp.methods.trsp.stage1", None, "gates under a budget, then distillation into the kept layers"),
    "trsp": Entry(
        "tsp.methods.trsp.stage1", _HERE / "trsp" / "paper.yaml", "the paper: l1 gates, LM loss, gap penalty"
    ),
}


TRANSFERS: Mapping[str, str | None] = {"stage2": "tsp.methods.trsp.stage2", "none": None}


def score_verb(method: str) -> Callable[..., Any]:
    """The verb `score` of a method."""
    return importlib.import_module(METHODS[method].module).score


def transfer_verb(name: str) -> Callable[..., Any] | None:
    """The verb `transfer`; None where nothing is to be moved."""
    module = TRANSFERS[name]
    return importlib.import_module(module).transfer if module else None


def preset(name: str) -> dict[str, Any]:
    """The config layer of a method.

    Raises:
        ConfigError: no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"prune.method must be one of {', '.join(METHODS)}, got {name!r}")
    path = METHODS[name].preset
    return read_yaml(path) if path else {}
