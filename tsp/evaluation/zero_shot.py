"""Tasks of lm-evaluation-harness on a model in memory: opened before anything starts, then measured for each state.

The harness (extra `eval`) brings tasks, prompts, metrics and their standard errors; the model is ours (`harness.py`).
Source: Gao et al., A framework for few-shot language model evaluation.
"""

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tsp.config import EvalConfig
from tsp.errors import ConfigError, DataError

# As lm-evaluation-harness's own command has it, so that the examples shown before a question are the same.
_FEWSHOT_SEED = 1234
_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Opened tasks, their data at hand."""

    loaded: Any
    """`lm_eval.tasks.TaskDict`."""
    tokenizer: Any
    max_positions: int
    """Of the model."""
    limit: int | None
    """Examples per task."""


def open_tasks(config: EvalConfig, tokenizer: Any, max_positions: int) -> Tasks | None:
    """Find the tasks of `eval.tasks`, get their data and build a first request of each.

    Raises:
        ConfigError: lm-evaluation-harness is not installed.
        DataError: a task that is unknown, whose data cannot be had, or that a language model alone cannot do.
    """
    if not config.tasks:
        return None
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("--tasks need lm-evaluation-harness: pip install 'tsp[eval]'") from None
    if config.task_folder is not None and not Path(config.task_folder).is_dir():
        raise DataError(f"eval.task_folder must be a folder of task YAMLs, got {config.task_folder}")
    # To index the thousands of tasks that come with the harness takes seconds.
    manager = TaskManager(include_path=config.task_folder, include_defaults=False)
    if not set(config.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=config.task_folder)
    unknown = [name for name in config.tasks if name not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=1)
        raise DataError(
            f"lm-evaluation-harness knows no task {', '.join(unknown)}"
            + (f", did you mean {near[0]}?" if near else "; a YAML of your own goes into eval.task_folder")
        )
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in config.tasks:
        with _one_error(name):
            found = manager.load([name])
            for task in found["tasks"].values():
                _prepare(task, config.num_fewshot)
        for part in loaded:
            loaded[part] |= found[part]
    return Tasks(loaded=loaded, tokenizer=tokenizer, max_positions=max_positions, limit=config.task_limit)


def task_metrics(
    tasks: Tasks, forward: Callable[[Tensor], Tensor], sharing: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Measure one state on all tasks.

    Args:
        tasks: from `open_tasks`.
        forward: tokens `[b, t]` -> logits `[b, t, V]`.
        sharing: of `per_window`; the ranks share the requests.

    Returns:
        `{task: {acc, acc_stderr, acc_norm, ...}}`, groups of tasks too; the same on every rank. A metric of a filter
        other than the plain one is called `metric.filter`.
    """
    from lm_eval import evaluate

    from tsp.evaluation.harness import ForwardModel

    model = ForwardModel(forward, tasks.tokenizer, tasks.max_positions, sharing)
    with _one_process():
        found = evaluate(model, tasks.loaded, limit=tasks.limit, bootstrap_iters=_RESAMPLES, log_samples=False)
    assert found is not None, "each rank is a world of its own for the harness"
    return {name: _numbers(row) for name, row in found["results"].items()}


def _prepare(task: Any, num_fewshot: int | None) -> None:
    """As lm-evaluation-harness's `simple_evaluate` sets a task up; then one request, which meets most faults."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError("it runs code that the model writes")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError("it is more than text")
    # A task that says 0 means it.
    stated = task.get_config("num_fewshot")
    if stated != 0 and (num_fewshot is not None or stated is None):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    task.build_all_requests(limit=1, rank=0, world_size=1)


@contextmanager
def _one_error(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a task is foreign YAML, templates and code, and may raise anything
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"task {name} cannot be opened: {what}") from None


@contextmanager
def _one_process() -> Iterator[None]:
    """The harness resamples in forked processes unless told otherwise: not beside a GPU and other ranks."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """`{"acc,none": 0.5, "alias": ...}` -> `{"acc": 0.5}`."""
    numbers = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if comma and isinstance(value, int | float):
            numbers[metric if kind == "none" else f"{metric}.{kind}"] = float(value)
    return numbers
