"""Of the metrics of a task the one that is its accuracy, and which tasks a mean or a worst is taken over.

    [accuracy(result["tasks"][task]["pruned"]) for task in counted_tasks(result)]

Tables and promotions share it, so that a task has one accuracy.
"""

from collections.abc import Mapping
from typing import Any

_KINDS = ("acc_norm", "acc", "exact_match")
"""Metrics of lm-evaluation-harness. As papers on pruning report it: normalised by length where a task has that."""


def accuracy(metrics: Mapping[str, float]) -> float | None:
    """The accuracy of a task in one state; None: it has none, like a task of perplexities.

    Args:
        metrics: by name, `metric.filter` for a filter other than the plain one. Of several filters the plain one
            counts, else the first that the task lists.
    """
    for kind in _KINDS:
        values = [value for name, value in metrics.items() if name.partition(".")[0] == kind]
        if values:
            return metrics.get(kind, values[0])
    return None


def counted_tasks(result: Mapping[str, Any]) -> list[str]:
    """The tasks that were asked for, in the order measured: a group counts once, and its members do not beside it.

    All that were measured where it is not said, or one of them has no numbers of its own (a tag, a group without a
    total): which tasks are its members is not in a result.
    """
    measured = result.get("tasks") or {}
    # What `tsp evaluate` prints has no settings.
    asked = result.get("asked_tasks") or (result.get("settings") or {}).get("eval.tasks") or ()
    if asked and all(any(measured.get(name, {}).values()) for name in asked):
        return [name for name in measured if name in asked]
    return list(measured)
