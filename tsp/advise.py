"""What the finished jobs of an experiment say to who wants to prune this model, in plain words and from measurements.

    for advice in advise(compare(finished_jobs(root, "mine"))):
        print(advice.topic, advice.text)

Nothing is run; what no job has measured is said, with the command that measures it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tsp.compare.groups import Comparison, Group
from tsp.compare.rows import Row, all_but_the_amount, make_rows
from tsp.compare.verdict import TWO_STAGE
from tsp.tracking.results import FinishedJob

ALLOWANCES = (1.05, 1.10, 1.25)
"""Times the dense perplexity: how far can one go within them."""
_UNEVEN = 1.25
"""A part of the text whose loss grew so much more than that of all the text is worth more calibration text."""
_UNLIKE_TIMES, _UNLIKE_NATS = 2.0, 0.2
"""Texts differ: in token statistics by so much more than two halves of one, or in the dense model's loss by as much."""
_WORTH_IT = 0.01
"""More calibration text is worth it where twice as much lowers perplexity by so much."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One thing that the measurements say."""

    model: str
    topic: str
    """`reach`, `parts`, `calibration`, `more text` or `next`."""
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)
    """What it rests on."""


def advise(comparison: Comparison) -> list[Advice]:
    """All advice, group by group."""
    return [advice for group in comparison.groups for advice in _of_group(group)]


def _of_group(group: Group) -> Iterator[Advice]:
    rows = [row for table in group.tables for row in table.rows]
    if not rows:
        yield _advice(group, "next", "Nothing was dropped in any job yet: `tsp prune --ratio 0.125,0.25`.")
        return
    best = {num_drop: _best(group, rows, num_drop) for num_drop in sorted({row.num_drop for row in rows})}
    yield _reach(group, best)
    farthest = best[max(best)]
    newest = max(farthest.jobs, key=lambda job: job.started_ms)
    yield _parts(group, newest)
    yield _calibration(group, newest)
    yield _more_text(group, rows)
    yield from (_advice(group, "next", step) for step in _next_steps(group, rows, best))


def _advice(group: Group, topic: str, text: str, **numbers: Any) -> Advice:
    return Advice(model=group.model, topic=topic, text=text, numbers=numbers)


def _ratio(group: Group, row: Row) -> float:
    """Perplexity, times the dense model's, on the corpus where it grew most."""
    return max(row.stats[f"ppl_ratio/{corpus}"].mean for corpus in group.dense)


def _best(group: Group, rows: Sequence[Row], num_drop: int) -> Row:
    return min((row for row in rows if row.num_drop == num_drop), key=lambda row: _ratio(group, row))


def _reach(group: Group, best: dict[int, Row]) -> Advice:
    ratios = {num_drop: _ratio(group, row) for num_drop, row in best.items()}
    words = []
    for allowance in ALLOWANCES:
        within = [num_drop for num_drop, ratio in ratios.items() if ratio <= allowance]
        reached = f"{max(within)} of {group.num_layers} layers ({_cost(best[max(within)])})" if within else "none tried"
        words.append(f"up to {100 * (allowance - 1):.0f} % more perplexity: {reached}")
    curve = "; ".join(
        f"{num_drop}: {ratio:.3f} times dense ({best[num_drop].label})" for num_drop, ratio in ratios.items()
    )
    return _advice(group, "reach", f"{'; '.join(words)}. By layers dropped: {curve}.", ratios=ratios)


def _cost(row: Row) -> str:
    stats = row.stats
    speed = f", a prompt {stats['prompt_speedup'].mean:.2f} times as fast" if "prompt_speedup" in stats else ""
    return row.label + speed


def _parts(group: Group, job: FinishedJob) -> Advice:
    parts = [
        (row["ppl"]["pruned"] / row["ppl"]["dense"], f"{name} ({corpus})")
        for corpus, found in (job.result.get("slices") or {}).items()
        for name, row in found.items()
    ]
    if not parts:
        return _advice(
            group, "parts", "What breaks first is not known: name parts of the text with `--slices parts.yaml`."
        )
    overall = max(ppl["pruned"] / ppl["dense"] for ppl in job.result["perplexity"].values())
    worst = sorted(parts, reverse=True)[:3]
    listed = ", ".join(f"{name} {ratio:.3f} times dense" for ratio, name in worst)
    uneven = worst[0][0] > _UNEVEN * overall
    hint = "; calibrate on more text of that kind" if uneven else ": no part suffers much more than the rest"
    numbers = {name: ratio for ratio, name in parts}
    return _advice(group, "parts", f"Worst parts: {listed}; all the text {overall:.3f}{hint}.", **numbers)


def _calibration(group: Group, job: FinishedJob) -> Advice:
    about = job.result.get("calibration") or {}
    divergence, halves, nats = (about.get(name) for name in ("divergence", "divergence_of_halves", "loss_dense"))
    if divergence is None or halves is None or nats is None:
        return _advice(
            group, "calibration", "Whether the calibration text is like the evaluation text was not measured."
        )
    words, unlike = [], False
    for corpus, bits in divergence.items():
        gap = math.log(group.dense[corpus]) - nats
        unlike |= bits > _UNLIKE_TIMES * halves or abs(gap) > _UNLIKE_NATS
        words.append(f"{corpus}: token statistics {bits:.3f} bits apart, the dense model's loss {gap:+.2f} nats")
    verdict = (
        "is not of the same kind as all of the evaluation text; calibrate on text like that which the model will see"
        if unlike
        else "is like the evaluation text"
    )
    text = f"The calibration text {verdict} ({'; '.join(words)}; two halves of it are {halves:.3f} bits apart)."
    return _advice(group, "calibration", text, divergence=divergence, halves=halves, loss_dense=nats)


def _more_text(group: Group, rows: Sequence[Row]) -> Advice:
    """From jobs that differ in nothing but the amount of calibration text."""
    found = []
    for same in _by_combination(group):
        amounts = {row.keys["sequences"]: row for row in same if row.keys["sequences"]}
        if len(amounts) > 1:
            fewer, more = sorted(amounts)[-2:]
            gain = 1 - _ratio(group, amounts[more]) / _ratio(group, amounts[fewer])
            # As if it had been doubled, whatever the step was.
            doubled = 1 - (1 - gain) ** (1 / math.log2(more / fewer))
            found.append((doubled, fewer, more, amounts[more].keys))
    if not found:
        most = max(((job.result.get("calibration") or {}).get("num_blocks") or 0) for row in rows for job in row.jobs)
        halves = f"[{max(1, most // 4)}, {max(1, most // 2)}, {most}]"
        return _advice(
            group, "more text", f'Whether more calibration text helps: `--set "data.max_blocks={halves}"`, then again.'
        )
    doubled, fewer, more, keys = max(found, key=lambda one: one[0])
    verdict = "more would help" if doubled > _WORTH_IT else "more would hardly help"
    text = f"From {fewer} to {more} sequences perplexity fell by {100 * doubled:.1f} % a doubling: {verdict}."
    return _advice(group, "more text", f"{keys['method']} + {keys['transfer']}: {text}", per_doubling=doubled)


def _by_combination(group: Group) -> Iterator[list[Row]]:
    """Rows that differ in the amount of calibration text, and in no setting or budget beside it."""
    together: dict[str, list[FinishedJob]] = {}
    for job in group.jobs:
        if job.result["num_drop"]:
            together.setdefault(str(all_but_the_amount(job)), []).append(job)
    for jobs in together.values():
        yield make_rows(jobs, ("method", "transfer", "sequences"))


def _next_steps(group: Group, rows: Sequence[Row], best: dict[int, Row]) -> Iterator[str]:
    least, most = min(best), max(best)
    if _ratio(group, best[most]) <= ALLOWANCES[1] and most < group.num_layers - 1:
        bound = f"`--max-ppl-ratio {ALLOWANCES[1]:.2f}`"
        yield f"{most} layers cost little: try more, or let the job find how many ({bound})."
    if _ratio(group, best[least]) > ALLOWANCES[-1] and least > 1:
        yield f"{least} layers cost much: try fewer, or a longer transfer (`--set stage2.steps=...`)."
    tried = {(row.method, row.transfer) for row in rows}
    if not any(method in TWO_STAGE and transfer == "stage2" for method, transfer in tried):
        yield "The two-stage method was not run: `--method tsp`."
    if not any(transfer == "finetune" for _, transfer in tried):
        yield "Plain training after the drop was not run: `--set transfer=finetune` shows what the rest adds."
    if max(row.stats[f"ppl/{next(iter(group.dense))}"].n for row in rows) < 2:
        yield "Each combination ran with one seed: `--seed 0,1,2` shows what is chance."
    if len(group.dense) < 2:
        yield "One corpus was measured on: give `--eval-data` several times, one of them of your own."
