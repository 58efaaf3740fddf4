"""What may be compared with what: a group has one model, precision and set of evaluation texts, a table one budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tsp.compare.rows import FLOOR_METHOD, Row, make_rows, newest_of_each, require_keys, settings_of
from tsp.compare.significance import marked
from tsp.compare.verdict import Sentence, judge
from tsp.evaluation.accuracy import counted_tasks
from tsp.tracking.results import FinishedJob

DEFAULT_BY = ("method", "transfer", "num_drop")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Jobs of a group with the same budget."""

    budget_s: float | None
    rows: list[Row]
    floor: list[Row]
    """The dense model with the training of the others: nothing that was dropped is hoped to get below it."""

    @property
    def heading(self) -> str:
        """What is equal between the rows."""
        if self.budget_s is None:
            return "at equal tokens: every transfer trains for the steps of its settings"
        return f"at equal seconds: {self.budget_s:g} s for selection and transfer together"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Jobs whose numbers may stand beside each other."""

    model: str
    revision: str | None
    precision: str
    num_layers: int
    parameters: int
    corpora: dict[str, dict[str, Any]]
    """By name: fingerprint, num_windows, block_tokens."""
    dense: dict[str, float]
    """Perplexity of the dense model by corpus."""
    tables: list[Table]
    jobs: list[FinishedJob]

    @property
    def heading(self) -> str:
        """The group in a line."""
        revision = f" at {self.revision}" if self.revision else ""
        texts = ", ".join(
            f"{name} ({about['num_windows']} x {about['block_tokens']} tokens)" for name, about in self.corpora.items()
        )
        return f"{self.model}{revision}, {self.num_layers} layers, precision {self.precision}, measured on {texts}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that `tsp compare` tells."""

    experiment: str
    by: tuple[str, ...]
    groups: list[Group]
    verdict: list[Sentence]


def compare(jobs: Sequence[FinishedJob], by: Sequence[str] = DEFAULT_BY) -> Comparison:
    """Put finished jobs into groups, tables and rows, and say what came out.

    Args:
        jobs: at least one, as from `tracking.results.finished_jobs`.
        by: what the rows of a table are: names of `compare.rows` or dotted settings.

    Raises:
        ConfigError: an unknown key in `by`.
    """
    require_keys(by)
    assert jobs, "an experiment without jobs is refused where it is read"
    groups = [_group(same, by) for same in _apart(jobs, _group_key)]
    verdict = [sentence for number, group in enumerate(groups) for sentence in _verdict(number, group)]
    return Comparison(experiment=jobs[0].result.get("experiment", ""), by=tuple(by), groups=groups, verdict=verdict)


def _verdict(number: int, group: Group) -> list[Sentence]:
    sentences = []
    for table in group.tables:
        jobs = _of_budget(group.jobs, table.budget_s)
        sentences += judge(jobs, group=number, budget_s=table.budget_s, num_layers=group.num_layers, dense=group.dense)
    return sentences


def _group(jobs: Sequence[FinishedJob], by: Sequence[str]) -> Group:
    newest, settings = jobs[-1].result, settings_of(jobs[-1])
    budgets = sorted({settings_of(job)["budget_s"] for job in jobs}, key=lambda budget: budget or 0)
    return Group(
        model=newest["model"],
        revision=settings["model.revision"],
        precision=_precision(jobs[-1]),
        num_layers=newest["num_layers"],
        parameters=newest["parameters"]["dense"],
        corpora={name: dict(about) for name, about in newest["corpora"].items()},
        dense={corpus: ppl["dense"] for corpus, ppl in newest["perplexity"].items()},
        tables=[_table(budget, _of_budget(jobs, budget), by) for budget in budgets],
        jobs=_newest_of_each(jobs),
    )


def _newest_of_each(jobs: Sequence[FinishedJob]) -> list[FinishedJob]:
    # The same settings under two budgets are two jobs.
    return [job for same in _apart(jobs, lambda job: settings_of(job)["budget_s"]) for job in newest_of_each(same)]


def _of_budget(jobs: Sequence[FinishedJob], budget_s: float | None) -> list[FinishedJob]:
    return [job for job in jobs if settings_of(job)["budget_s"] == budget_s]


def _table(budget_s: float | None, jobs: Sequence[FinishedJob], by: Sequence[str]) -> Table:
    corpora = list(jobs[0].result["perplexity"])
    pruned = [job for job in jobs if job.result["method"] != FLOOR_METHOD]
    floor = [job for job in jobs if job.result["method"] == FLOOR_METHOD]
    rows, below = make_rows(pruned, by), make_rows(floor, by)
    asked = [counted_tasks(job.result) for row in (*rows, *below) for job in row.jobs]
    if len({frozenset(tasks) for tasks in asked if tasks}) > 1:
        for row in (*rows, *below):
            row.stats.pop("tasks", None)  # A mean over other tasks is another number.
    return Table(budget_s=budget_s, rows=marked(rows, corpora), floor=below)


def _apart(jobs: Sequence[FinishedJob], key: Callable[[FinishedJob], Any]) -> list[list[FinishedJob]]:
    """Jobs with the same key together, in the order of the first of each."""
    found: dict[Any, list[FinishedJob]] = {}
    for job in jobs:
        found.setdefault(key(job), []).append(job)
    return list(found.values())


def _group_key(job: FinishedJob) -> tuple[Any, ...]:
    result = job.result
    texts = sorted(
        (name, about["fingerprint"], about["num_windows"], about["block_tokens"])
        for name, about in result["corpora"].items()
    )
    # The number of parameters tells models apart that lie in one folder one after the other.
    return (
        result["model"],
        settings_of(job)["model.revision"],
        _precision(job),
        result["num_layers"],
        result["parameters"]["dense"],
        tuple(texts),
    )


def _precision(job: FinishedJob) -> str:
    """Of the weights, as it was in fact where the job says so, else as it was asked for."""
    return str(job.result.get("dtype") or settings_of(job)["model.dtype"])
