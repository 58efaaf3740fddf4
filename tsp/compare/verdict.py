"""Who won, in words: computed from the rows, for every group, budget, number of layers, calibration text and corpus.

The two-stage method (`trsp`: the paper, `tsp`: the project's preset) is held against the best baseline, and against its
own control: the same selection, then plain fine-tuning for as long.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tsp.compare.rows import FLOOR_METHOD, Row, make_rows
from tsp.compare.significance import Difference, best_row, difference
from tsp.tracking.results import FinishedJob

TWO_STAGE = {"trsp": "the paper's method", "tsp": "the project's preset"}
TRANSFER, CONTROL = "stage2", "finetune"


@dataclass(frozen=True, kw_only=True)
class Duel:
    """The two-stage method against one rival."""

    method: str
    against: str
    """`baseline`: the best selection and transfer of others; `control`: same selection, then fine-tuning."""
    rival: str
    difference: Difference


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """What came out for one number of layers on one corpus."""

    group: int
    """Index of the group."""
    budget_s: float | None
    calibration: str | None
    """Fingerprint of the calibration text, where jobs of the same budget differ in it."""
    num_drop: int
    num_layers: int
    corpus: str
    best: str
    ppl: float
    ppl_ratio: float
    """Times the dense model's."""
    not_distinguishable: list[str]
    """Rows that may be as good as the best."""
    floor_ppl: float | None
    """Of the dense model with the same training."""
    duels: list[Duel]
    missing: list[str]
    """Comparisons that no job was run for."""
    chosen_on_result: list[str]
    """Rows of which several settings were run without a tuning text: the best was taken by the result itself."""

    @property
    def text(self) -> str:
        """The same in words."""
        budget = "at equal tokens" if self.budget_s is None else f"in {self.budget_s:g} s each"
        calibration = f", calibrated on text {self.calibration}" if self.calibration else ""
        words = [
            f"{self.num_drop} of {self.num_layers} layers dropped ({100 * self.num_drop / self.num_layers:.3g} %), "
            f"{budget}{calibration}: {self.best} has the least perplexity on {self.corpus}, {self.ppl:.4g} "
            f"({self.ppl_ratio:.3f} times dense)"
        ]
        if self.not_distinguishable:
            words[0] += f"; {_listed(self.not_distinguishable)} cannot be told from it"
        words += _in_words(self.duels)
        words += [f"Not run: {comparison}" for comparison in self.missing]
        if self.floor_ppl is not None:
            words.append(f"The dense model with the same training has {self.floor_ppl:.4g}")
        if self.chosen_on_result:
            several = _listed(self.chosen_on_result)
            words.append(
                f"Of {several} several settings were run without a tuning text; this very result chose the best"
            )
        return " ".join(f"{sentence}." for sentence in words)


def judge(
    jobs: Sequence[FinishedJob], *, group: int, budget_s: float | None, num_layers: int, dense: Mapping[str, float]
) -> list[Sentence]:
    """Sentences on the jobs of one group and budget, fewest layers first.

    Args:
        jobs: of the group and budget.
        group: its index.
        budget_s: seconds; None: equal tokens.
        num_layers: of the dense model.
        dense: its perplexity by corpus.
    """
    by_text: dict[Any, list[FinishedJob]] = {}
    for job in jobs:
        by_text.setdefault((job.result.get("calibration") or {}).get("fingerprint"), []).append(job)
    found = []
    for fingerprint, same in by_text.items():
        all_rows = make_rows(same, ("method", "transfer"))
        floors = [row for row in all_rows if row.method == FLOOR_METHOD and row.transfer != "none"]
        for num_drop in sorted({row.num_drop for row in all_rows if row.method != FLOOR_METHOD}):
            rows = [row for row in all_rows if row.num_drop == num_drop and row.method != FLOOR_METHOD]
            frame = {
                "group": group,
                "budget_s": budget_s,
                "calibration": fingerprint if len(by_text) > 1 else None,
                "num_drop": num_drop,
                "num_layers": num_layers,
            }
            found += [_sentence(rows, floors, corpus, ppl, frame) for corpus, ppl in dense.items()]
    return found


def _sentence(rows: Sequence[Row], floors: Sequence[Row], corpus: str, dense: float, frame: dict[str, Any]) -> Sentence:
    best = best_row(rows, corpus)
    ppl = best.stats[f"ppl/{corpus}"].mean
    others = [row for row in rows if row is not best and (row.method, row.transfer) != (best.method, best.transfer)]
    tied = {_name(row): None for row in others if difference(row, best, corpus).outcome == "ties"}
    duels, missing = _duels(rows, corpus)
    names = [_name(row) for row in rows]
    return Sentence(
        **frame,
        corpus=corpus,
        best=_name(best),
        ppl=ppl,
        ppl_ratio=ppl / dense,
        not_distinguishable=list(tied),
        floor_ppl=best_row(floors, corpus).stats[f"ppl/{corpus}"].mean if floors else None,
        duels=duels,
        missing=missing,
        chosen_on_result=sorted({name for name in names if names.count(name) > 1}),
    )


def _duels(rows: Sequence[Row], corpus: str) -> tuple[list[Duel], list[str]]:
    # A baseline's selection with stage 2 is half of the two-stage method, and no rival of it.
    baselines = [row for row in rows if row.method not in TWO_STAGE and row.transfer != TRANSFER]
    duels, missing = [], []
    for method, title in TWO_STAGE.items():
        own = [row for row in rows if row.method == method and row.transfer == TRANSFER]
        if not own:
            missing.append(f"{title} ({method} + {TRANSFER})")
            continue
        mine = best_row(own, corpus)
        control = [row for row in rows if row.method == method and row.transfer == CONTROL]
        for against, rivals in (("baseline", baselines), ("control", control)):
            if not rivals:
                missing.append(
                    f"a {against} for {method}" + (f" ({method} + {CONTROL})" if against == "control" else "")
                )
                continue
            rival = best_row(rivals, corpus)
            duels.append(
                Duel(method=method, against=against, rival=_name(rival), difference=difference(mine, rival, corpus))
            )
    return duels, missing


def _in_words(duels: Sequence[Duel]) -> list[str]:
    """A sentence on each two-stage method."""
    texts = []
    for method, title in TWO_STAGE.items():
        parts = [_duel_in_words(duel) for duel in duels if duel.method == method]
        if parts:
            texts.append(f"{title[0].upper()}{title[1:]} ({method} + {TRANSFER}) {', and '.join(parts)}")
    return texts


def _duel_in_words(duel: Duel) -> str:
    rival = f"the best baseline, {duel.rival}," if duel.against == "baseline" else f"its plain control, {duel.rival},"
    found = duel.difference
    if math.isinf(found.percent):
        return f"loses to {rival.rstrip(',')}: it diverged"
    notes = ["not tested: the losses of the windows were not kept"]
    if found.interval_percent is not None:
        low, high = found.interval_percent
        if found.outcome == "wins":
            low, high = -high, -low
        signs = "+" if found.outcome == "ties" else ""
        notes = [f"95 %: {low:{signs}.1f} to {high:{signs}.1f} %"]
    if found.within_spread and found.outcome != "ties":
        notes.append("less than the spread over the seeds")
    note = f" ({'; '.join(notes)})"
    if found.outcome == "ties":
        # Without a minus before zero.
        return f"cannot be told from {rival} {round(found.percent, 1) + 0.0:+.1f} %{note}"
    verb = "wins against" if found.outcome == "wins" else "loses to"
    return f"{verb} {rival} by {abs(found.percent):.1f} %{note}"


def _name(row: Row) -> str:
    return f"{row.method} + {row.transfer}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
