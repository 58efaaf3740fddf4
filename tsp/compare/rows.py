"""From jobs to the rows of a table: repetitions averaged, settings chosen on the tuning text or kept apart.

A row holds the jobs that differ in nothing but the seed. Where the jobs that a row is asked for differ in more, the
setting with the least mean loss on the tuning text is taken; that text is neither trained nor reported on. Without it
the settings are rows of their own: choosing by the reported perplexity would flatter whoever tries most.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tsp.compare.measures import Stat, over_seeds
from tsp.config import JobConfig, flatten
from tsp.errors import ConfigError
from tsp.methods import TRANSFERS
from tsp.tracking.results import FinishedJob

DEFAULTS = flatten(JobConfig().model_dump(mode="json"))
FLOOR_METHOD = "dense"

_NAMES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "method": lambda result: result["method"],
    "transfer": lambda result: result["transfer"],
    "num_drop": lambda result: result["num_drop"],
    "ratio": lambda result: round(result["num_drop"] / result["num_layers"], 4),
    "sequences": lambda result: (result.get("calibration") or {}).get("num_blocks"),
}
"""What a row may be called by, beside the settings."""

# What two repetitions may differ in: names, what is measured and how fast, and what a table or a group has in common.
_OF_THE_FRAME = (
    "tracking.",
    "eval.",
    "model.path",
    "model.dtype",
    "model.revision",
    "budget_s",
    "save",
    "quantize",
    "seed",
)
# The layers that went are counted; the ratio is only one way to ask for them.
_ASKED_FOR = ("prune.ratio", "prune.num_drop", "prune.max_ppl_ratio", "prune.min_speedup")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Jobs that differ in the seed alone."""

    keys: dict[str, Any]
    """What the table is laid out by."""
    num_drop: int
    ratio: float
    """Share of the layers."""
    chosen: dict[str, Any]
    """Settings that won on the tuning text."""
    differs: dict[str, Any]
    """Settings by which this row is told from others of the same keys."""
    jobs: tuple[FinishedJob, ...]
    stats: dict[str, Stat]
    best: frozenset[str] = field(default=frozenset())
    """Columns in which no row of the same number of layers is better."""
    tied: frozenset[str] = field(default=frozenset())
    """Corpora on which the perplexity cannot be told from the best one's."""

    @property
    def label(self) -> str:
        """What tells the row from others, without the number of layers."""
        words = [str(value) for key, value in self.keys.items() if key not in ("num_drop", "ratio")]
        return " + ".join(words) + "".join(f" {key.rpartition('.')[2]}={value}" for key, value in self.differs.items())

    @property
    def method(self) -> str:
        """Name of the selection."""
        return self.jobs[0].result["method"]

    @property
    def transfer(self) -> str:
        """Name of the transfer."""
        return self.jobs[0].result["transfer"]


def require_keys(by: Sequence[str]) -> None:
    """Raise ConfigError where a key is neither a name of ours nor a setting."""
    known = [*_NAMES, *DEFAULTS]
    for key in by:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"--by must be names like {', '.join(_NAMES)} or settings like stage2.lr, got {key!r}; "
                f"{hint}`tsp prune --dry-run` lists the settings"
            )


def value_of(job: FinishedJob, key: str) -> Any:
    """Of a job, what `--by` may name."""
    return _NAMES[key](job.result) if key in _NAMES else settings_of(job).get(key)


def settings_of(job: FinishedJob) -> dict[str, Any]:
    """All settings of a job; what an earlier release did not know has its default."""
    return DEFAULTS | job.result["settings"]


def make_rows(jobs: Sequence[FinishedJob], by: Sequence[str]) -> list[Row]:
    """Rows by these keys, always apart by the number of layers dropped.

    Args:
        jobs: of one model, the same texts and budget.
        by: keys, as `require_keys` allows them.

    Returns:
        Fewest layers first, then the least perplexity on the first corpus.
    """
    cells: dict[tuple[str, ...], list[FinishedJob]] = {}
    for job in newest_of_each(jobs):
        # In words, as a setting may be a list.
        cell = (str(job.result["num_drop"]), *(str(value_of(job, key)) for key in by))
        cells.setdefault(cell, []).append(job)
    rows = [row for cell in cells.values() for row in _rows_of_cell(cell, by)]
    first = next(iter(jobs[0].result["perplexity"])) if jobs else ""
    return sorted(rows, key=lambda row: (row.num_drop, row.stats[f"ppl/{first}"].mean, row.label))


def newest_of_each(jobs: Sequence[FinishedJob]) -> list[FinishedJob]:
    """One of each job: of those that agree in settings, seed and texts the newest counts."""
    newest = {(str(_variant(job)), job.result["seed"]): job for job in sorted(jobs, key=lambda job: job.started_ms)}
    return list(newest.values())


def all_but_the_amount(job: FinishedJob) -> dict[str, Any]:
    """What makes a job another job, its budget too, but for the seed and how much calibration text it had."""
    same = {key: value for key, value in _variant(job).items() if key not in ("data.max_blocks", "calibration text")}
    return same | {"budget_s": settings_of(job)["budget_s"]}


def _rows_of_cell(jobs: Sequence[FinishedJob], by: Sequence[str]) -> list[Row]:
    variants: dict[str, list[FinishedJob]] = {}
    for job in jobs:
        variants.setdefault(str(_variant(job)), []).append(job)
    differing = _differing([_variant(same[0]) for same in variants.values()])
    if len(variants) == 1:
        return [_row(jobs, by)]
    if _can_choose(jobs):
        same = min(variants.values(), key=lambda same: over_seeds(job.result for job in same)["tuning_loss"].mean)
        return [_row(same, by, chosen=_picked(same[0], differing))]
    return [_row(same, by, differs=_picked(same[0], differing)) for same in variants.values()]


def _can_choose(jobs: Sequence[FinishedJob]) -> bool:
    """All have a loss on the tuning text, and it is one text: the same calibration text was split for it."""
    texts = {str((_calibration(job), settings_of(job)["data.tuning_blocks"])) for job in jobs}
    return len(texts) == 1 and all(job.result.get("tuning_loss") is not None for job in jobs)


def _row(
    jobs: Sequence[FinishedJob],
    by: Sequence[str],
    *,
    chosen: dict[str, Any] | None = None,
    differs: dict[str, Any] | None = None,
) -> Row:
    jobs = sorted(jobs, key=lambda job: job.result["seed"])
    first = jobs[0].result
    return Row(
        keys={key: value_of(jobs[0], key) for key in by},
        num_drop=first["num_drop"],
        ratio=first["num_drop"] / first["num_layers"],
        chosen=chosen or {},
        differs=differs or {},
        jobs=tuple(jobs),
        stats=over_seeds(job.result for job in jobs),
    )


def _variant(job: FinishedJob) -> dict[str, Any]:
    """What makes a job another job, but for the seed."""
    settings = {
        key: value
        for key, value in settings_of(job).items()
        if not key.startswith(_OF_THE_FRAME) and key not in _ASKED_FOR
    }
    if not TRANSFERS[job.result["transfer"]].trains:
        # Settings without effect.
        settings = {key: value for key, value in settings.items() if not key.startswith("stage2.")}
    elif settings_of(job)["budget_s"] is not None:
        settings.pop("stage2.steps")
    return settings | {"num_drop": job.result["num_drop"], "calibration text": _calibration(job)}


def _calibration(job: FinishedJob) -> str | None:
    return (job.result.get("calibration") or {}).get("fingerprint")


def _differing(variants: Sequence[dict[str, Any]]) -> list[str]:
    """Keys in which some differ; the text's fingerprint only where no setting says why."""
    keys = list(dict.fromkeys(key for variant in variants for key in variant))
    found = [key for key in keys if len({str(variant.get(key)) for variant in variants}) > 1]
    said = [key for key in found if key.startswith("data.")]
    return [key for key in found if not (said and key == "calibration text")]


def _picked(job: FinishedJob, keys: Sequence[str]) -> dict[str, Any]:
    variant = _variant(job)
    return {key: variant[key] for key in keys if key in variant}
