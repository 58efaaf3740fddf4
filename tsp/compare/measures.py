"""What is compared: a job's result as flat numbers by name, and how each is called, judged and written.

    measures(result)["ppl/wikitext"]

A number that was not measured is absent, so results of older and of newer jobs stand beside each other.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tsp.evaluation.accuracy import accuracy, counted_tasks

TOKENS_SERVED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Stat:
    """A number over the seeds of a row."""

    mean: float
    spread: float | None
    """Sample standard deviation; None: of one value there is none."""
    n: int


@dataclass(frozen=True, kw_only=True)
class Column:
    """One kind of number."""

    name: str
    title: str
    better: Literal["low", "high"] | None
    digits: int
    """Behind the point; negative: significant digits of a large number."""

    def text(self, value: float) -> str:
        """The number as it stands in a table."""
        if self.digits < 0:
            return f"{value:,.0f}"
        return f"{value:.{self.digits}f}"


def measures(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `result.json` that are compared.

    Args:
        result: of one job; keys that are missing were not measured.

    Returns:
        By name, as in `columns`.
    """
    found: dict[str, float | None] = {}
    for corpus, ppl in result["perplexity"].items():
        found[f"ppl_bare_drop/{corpus}"] = ppl["bare_drop"]
    for corpus, states in (result.get("fidelity") or {}).items():
        pruned = states.get("pruned") or {}
        found |= {f"kl/{corpus}": pruned.get("kl"), f"top1/{corpus}": pruned.get("top1")}
    written = (result.get("generation") or {}).get("pruned") or {}
    found |= {name: written.get(name) for name in ("repetition", "agreement")}
    found["worst_slice"] = (result.get("worst_slice") or {}).get("ratio")
    found |= _tasks(result) | _speed(result) | _cost(result)
    finite = {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}
    # A model that diverged is the worst there is, and not one that was not measured.
    if result.get("tuning_loss") is not None:
        finite["tuning_loss"] = _or_infinite(result["tuning_loss"])
    for corpus, ppl in result["perplexity"].items():
        pruned = _or_infinite(ppl["pruned"])
        finite |= {f"ppl/{corpus}": pruned, f"ppl_ratio/{corpus}": pruned / ppl["dense"]}
    return finite


def columns(names: Iterable[str]) -> list[Column]:
    """Columns for the numbers of these names, in the order of the table."""
    present = list(dict.fromkeys(names))
    return [column for pattern in _COLUMNS for column in _matching(pattern, present)]


def stat(values: Sequence[float]) -> Stat:
    """Mean and spread; no spread where a value is infinite."""
    if not all(map(math.isfinite, values)):
        return Stat(mean=math.inf, spread=None, n=len(values))
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Stat(mean=statistics.fmean(values), spread=spread, n=len(values))


def over_seeds(results: Iterable[Mapping[str, Any]]) -> dict[str, Stat]:
    """Mean and spread of each number over some results; n counts those in which it was measured."""
    values: dict[str, list[float]] = {}
    for result in results:
        for name, value in measures(result).items():
            values.setdefault(name, []).append(value)
    return {name: stat(found) for name, found in values.items()}


_COLUMNS = (
    Column(name="ppl_bare_drop/*", title="bare drop {}", better="low", digits=2),
    Column(name="ppl/*", title="ppl {}", better="low", digits=2),
    Column(name="ppl_ratio/*", title="x dense {}", better="low", digits=3),
    Column(name="worst_slice", title="worst slice, x dense", better="low", digits=3),
    Column(name="tasks", title="tasks, mean", better="high", digits=3),
    Column(name="kl/*", title="KL {}", better="low", digits=4),
    Column(name="top1/*", title="top-1 {}", better="high", digits=3),
    Column(name="repetition", title="repetition", better="low", digits=3),
    Column(name="agreement", title="agreement with dense", better="high", digits=3),
    # Only rows with as many layers compete, and these are equally fast but for the noise of the clock.
    Column(name="prompt_speedup", title="prompt speed, x dense", better=None, digits=2),
    Column(name="generation_speedup", title="generation speed, x dense", better=None, digits=2),
    Column(name="parameters", title="parameters", better="low", digits=-1),
    Column(name="trained_tokens", title="trained tokens", better=None, digits=-1),
    Column(name="seconds", title="seconds", better="low", digits=1),
    Column(name="peak_memory_gib", title="peak GiB", better="low", digits=2),
    # On the page alone, in tables of their own.
    Column(name="task/*", title="{}", better="high", digits=3),
    Column(name="select_s", title="select s", better="low", digits=1),
    Column(name="transfer_s", title="transfer s", better="low", digits=1),
    Column(name="device_hours", title="device-hours", better="low", digits=4),
    Column(name="served_s", title="s per million served tokens", better="low", digits=1),
    Column(name="served_device_hours", title="device-hours per million served tokens", better="low", digits=4),
    Column(name="tuning_loss", title="tuning loss", better=None, digits=4),
)
COST = (
    "trained_tokens",
    "select_s",
    "transfer_s",
    "device_hours",
    "peak_memory_gib",
    "served_s",
    "served_device_hours",
)
"""Columns of the table of costs."""
_PAGE_ONLY = ("task/", "select_s", "transfer_s", "device_hours", "served_", "tuning_loss")


def of_the_table(found: Iterable[Column]) -> list[Column]:
    """Those of the main table."""
    return [column for column in found if not column.name.startswith(_PAGE_ONLY)]


def _or_infinite(value: float) -> float:
    return float(value) if math.isfinite(value) else math.inf


def _matching(pattern: Column, present: Sequence[str]) -> list[Column]:
    stem = pattern.name.removesuffix("*")
    if stem == pattern.name:
        return [pattern] if stem in present else []
    return [
        Column(
            name=name,
            title=pattern.title.format(name.removeprefix(stem)),
            better=pattern.better,
            digits=pattern.digits,
        )
        for name in present
        if name.startswith(stem)
    ]


def _tasks(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Accuracy of each task, members of groups too, and the mean over those that were asked for."""
    scores = {task: accuracy(states.get("pruned", {})) for task, states in (result.get("tasks") or {}).items()}
    counted = [score for task in counted_tasks(result) if (score := scores[task]) is not None]
    mean = statistics.fmean(counted) if counted else None
    return {f"task/{task}": score for task, score in scores.items()} | {"tasks": mean}


def _speed(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Times the dense model, and what a million tokens cost: generated ones if that was measured, else read ones."""
    found: dict[str, float | None] = {}
    tokens_per_s = None
    for kind in ("prompt", "generation"):
        by_state = (result.get("speed") or {}).get(f"{kind}_tokens_per_s") or {}
        if by_state.get("dense") and by_state.get("pruned"):
            found[f"{kind}_speedup"] = by_state["pruned"] / by_state["dense"]
            tokens_per_s = by_state["pruned"]
    if tokens_per_s:
        found["served_s"] = TOKENS_SERVED / tokens_per_s
        found["served_device_hours"] = num_ranks(result) * TOKENS_SERVED / tokens_per_s / 3600
    return found


def _cost(result: Mapping[str, Any]) -> dict[str, float | None]:
    seconds = result.get("seconds") or {}
    select_s, transfer_s = seconds.get("select"), seconds.get("transfer")
    both = None if select_s is None or transfer_s is None else select_s + transfer_s
    return {
        "parameters": (result.get("parameters") or {}).get("pruned"),
        "trained_tokens": result.get("trained_tokens"),
        "select_s": select_s,
        "transfer_s": transfer_s,
        "seconds": both,
        "device_hours": None if both is None else num_ranks(result) * both / 3600,
        "peak_memory_gib": max(result.get("peak_memory_gib") or [], default=None),
    }


def num_ranks(result: Mapping[str, Any]) -> int:
    """Devices that the job ran on."""
    return len(result.get("weights_gib") or [0])
