"""Which row is the best, and which differences are more than the chance of which windows a corpus happens to have.

The bootstrap is paired: all rows of a group are measured on the same windows. The losses of a window are averaged over
the seeds first, so what is tested is the mean of the repetitions; how far these lie apart is said by their spread.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tsp.compare.measures import Stat, columns
from tsp.compare.rows import Row

Outcome = Literal["wins", "ties", "loses"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One row's perplexity against another's."""

    outcome: Outcome
    percent: float
    """By how much the perplexity lies above (negative: below) the other's; infinite: it diverged."""
    interval_percent: tuple[float, float] | None
    """95 %; None: the losses of the windows were not kept, and the outcome is that of the means."""
    within_spread: bool | None
    """Whether the perplexities lie closer together than the repetitions of the two do, which the interval does not know
    of (root of the sum of both variances); None: there are no repetitions."""


def difference(row: Row, other: Row, corpus: str) -> Difference:
    """Of two rows of a group on a corpus, the first against the second."""
    from tsp.evaluation.confidence import ratio_interval

    mine, theirs = window_losses(row, corpus), window_losses(other, corpus)
    within = _within_spread(row.stats[f"ppl/{corpus}"], other.stats[f"ppl/{corpus}"])
    if mine is None or theirs is None or len(mine) != len(theirs):
        return _of_means(row.stats[f"ppl/{corpus}"].mean, other.stats[f"ppl/{corpus}"].mean, within)
    # The ratio of the geometric means over the seeds, which the interval is of.
    percent = 100 * (math.exp((math.fsum(mine) - math.fsum(theirs)) / len(mine)) - 1)
    low, high = ratio_interval(mine, theirs)
    outcome: Outcome = "wins" if high < 1 else "loses" if low > 1 else "ties"
    interval = (100 * (low - 1), 100 * (high - 1))
    return Difference(outcome=outcome, percent=percent, interval_percent=interval, within_spread=within)


def _of_means(mine: float, theirs: float, within: bool | None) -> Difference:
    outcome: Outcome = "wins" if mine < theirs else "loses" if mine > theirs else "ties"
    ratio = 1.0 if mine == theirs else mine / theirs
    return Difference(outcome=outcome, percent=100 * (ratio - 1), interval_percent=None, within_spread=within)


def _within_spread(mine: Stat, theirs: Stat) -> bool | None:
    if mine.spread is None or theirs.spread is None:
        return None
    return abs(mine.mean - theirs.mean) < math.hypot(mine.spread, theirs.spread)


def window_losses(row: Row, corpus: str) -> list[float] | None:
    """Of each window the mean over the row's jobs, nats per token; None: not kept by all of them, or not finite."""
    losses = [job.window_losses.get(corpus, ()) for job in row.jobs]
    if not all(losses) or len({len(of_job) for of_job in losses}) > 1:
        return None
    if not all(math.isfinite(loss) for of_job in losses for loss in of_job):
        return None
    return [math.fsum(window) / len(window) for window in zip(*losses, strict=True)]


def marked(rows: Sequence[Row], corpora: Sequence[str]) -> list[Row]:
    """The rows with their marks; only rows with the same number of layers compete."""
    return [_marked(row, [rival for rival in rows if rival.num_drop == row.num_drop], corpora) for row in rows]


def best_row(rows: Sequence[Row], corpus: str) -> Row:
    """The row with the least mean perplexity."""
    return min(rows, key=lambda row: row.stats[f"ppl/{corpus}"].mean)


def _marked(row: Row, rivals: Sequence[Row], corpora: Sequence[str]) -> Row:
    best = set()
    for column in columns(row.stats):
        values = [rival.stats[column.name].mean for rival in rivals if column.name in rival.stats]
        winner = {"low": min, "high": max}[column.better](values) if column.better else None
        if len(values) > 1 and row.stats[column.name].mean == winner and len(set(values)) > 1:
            best.add(column.name)
    tied = set()
    for corpus in corpora:
        leader = best_row(rivals, corpus)
        if leader is not row and difference(row, leader, corpus).outcome == "ties":
            tied.add(corpus)
    return replace(row, best=frozenset(best), tied=frozenset(tied))
