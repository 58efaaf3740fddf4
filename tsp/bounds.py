"""How many layers go, where the job is given a bound and finds the number itself.

`min_speedup`: the fewest layers without which a prompt is fast enough. Nothing has to be trained to know it.
`max_ppl_ratio`: the most layers without which the loss stays within the bound *after the transfer*, measured on the
tuning text. Each number that is tried is a job of its own: layers are chosen for it, what they know is moved, the loss
is measured, the weights are put back.

Both end in a `Trial` with which the job goes on, so that its outcome is that of `--num-drop` with the same number.
"""

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from tsp.choose import choose
from tsp.config import bound_of, number_by_ratio
from tsp.errors import BoundError, ConfigError, ModelError, TspError
from tsp.evaluation.speed import median_pass_s, prompt_of
from tsp.job import Job
from tsp.machine import Weights, copied_weights
from tsp.methods import transfer_check, transfer_verb
from tsp.methods.base import Bench, Tracker, Transfer
from tsp.records import Scores, Selection
from tsp.saving import move_and_round
from tsp.selection import spread
from tsp.shared import Shared, Stopwatch
from tsp.tracking.null import NullTracker

log = logging.getLogger("tsp")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A number of layers that keeps to the bound, and what was made for it."""

    job: Job
    bench: Bench
    selected: tuple[Scores, Selection]
    weights: Weights | None
    """After the transfer; None: this launch has not made it, or there is nothing to be moved."""


def most_within(bound: float, ratio_of: Callable[[int], float], first: int, last: int) -> int:
    """The largest k in [1, last] with `ratio_of(k) <= bound`, if that grows with k; 0: there is none.

    Where it does not grow throughout, still a k that is within the bound, the next larger one being tried and not.

    Args:
        bound: above 1.
        ratio_of: times the dense perplexity; costs a training, and is called once for each k that is tried.
        first: tried first, in [1, last].
        last: the largest k.
    """
    nats = {0: 0.0}
    within, beyond, k = 0, last + 1, first
    while beyond - within > 1:
        ratio = ratio_of(k)
        nats[k] = math.log(ratio)
        within, beyond = (k, beyond) if ratio <= bound else (within, k)
        k = _between(within, beyond, nats, math.log(bound))
    return within


def _between(within: int, beyond: int, nats: dict[int, float], target: float) -> int:
    """The k to try next, by a straight line through what is known: few trainings, each a long one."""
    if beyond not in nats:
        # Nothing was too much so far. The loss grows faster than in proportion: the line promises too many layers.
        slope = nats[within] / within
        promised = math.floor(target / slope) if slope > 0 else beyond
        return max(within + 1, min(promised, 2 * within, beyond - 1))
    # Here it promises too few. A quarter of what is left goes at least, so that it ends soon on any curve.
    promised = within + math.ceil((target - nats[within]) * (beyond - within) / (nats[beyond] - nats[within]))
    margin = max(1, (beyond - within) // 4)
    return max(within + margin, min(promised, beyond - margin))


@dataclass(kw_only=True)
class Search:
    """The search of one job; `find` is called once, the same on every rank."""

    job: Job
    new_bench: Callable[..., Bench]
    """Takes the tracker."""
    tracker: Tracker
    shared: Shared
    watch: Stopwatch
    _curve: dict[int, dict[str, float]] = field(default_factory=dict)
    _refusal: TspError | None = None

    def find(self) -> Trial:
        """Search, with the model's weights as loaded; they are so again afterwards.

        Raises:
            BoundError: no number of layers keeps to the bound.
            ModelError: the transfer cannot deal with this model.
        """
        by_speed = self.job.config.prune.min_speedup is not None
        trial = self._fewest_fast_enough() if by_speed else self._most_within_ppl()
        # Only what led to the outcome is in the run's curves, as if the number had been given.
        for step, values in trial.bench.logged:
            self.tracker.metrics(values, step)
        trial.bench.tracker = self.tracker
        return trial

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was measured, by number of layers, smallest first."""
        return [{"num_drop": num_drop, **self._curve[num_drop]} for num_drop in sorted(self._curve)]

    @property
    def _last(self) -> int:
        return min(len(self.job.candidates), self.job.source.num_layers - 1)

    def _fewest_fast_enough(self) -> Trial:
        bound, job = self.job.config.prune.min_speedup, self.job
        assert bound is not None
        bench = self.new_bench(NullTracker())
        with bench.engine.mounted(bench.decoder.model) as mounted:
            for num_drop in range(1, self._last + 1):
                bench, job = self.new_bench(NullTracker()), job.dropping(num_drop)
                bench.model = mounted
                speedup = self._speedup(bench, spread(job.candidates, num_drop))
                if speedup >= bound:
                    selected = choose(bench, job, self.shared, self.watch)
                    # Layers need not be alike, and the first measurement may have been luck.
                    speedup = self._speedup(bench, selected[1].doomed)
                self._tell(num_drop, speedup=speedup)
                if speedup >= bound:
                    bench.model = None
                    return Trial(job=job, bench=bench, selected=selected, weights=None)
        most, num_drop = max((row["speedup"], num_drop) for num_drop, row in self._curve.items())
        raise BoundError(
            f"{bound_of(job.config.prune)} cannot be reached: the most that was measured is {most:.3f} times the dense "
            f"model's speed, without {num_drop} of {job.source.num_layers} layers; ask for less or protect fewer"
        )

    def _speedup(self, bench: Bench, bypassed: Collection[int]) -> float:
        """How many times as fast a prompt is; the dense model is timed anew each time, as a machine's speed changes."""
        assert bench.model is not None
        prompt_T = prompt_of(self.job.evals[0].blocks, self.job.source.max_positions).to(bench.engine.device)
        with self.watch("evaluate"):
            dense_s = median_pass_s(bench.model, prompt_T, self.job.config.eval.speed_runs)
            with bench.decoder.bypassing(bypassed):
                pruned_s = median_pass_s(bench.model, prompt_T, self.job.config.eval.speed_runs)
        return bench.engine.from_first(dense_s / pruned_s)

    def _most_within_ppl(self) -> Trial:
        prune = self.job.config.prune
        bound, best = prune.max_ppl_ratio, None
        assert bound is not None
        bench = self.new_bench(NullTracker())
        with bench.engine.mounted(bench.decoder.model) as bench.model:
            transfer_check(self.job.config.transfer)(bench, None)
            with self.watch("evaluate"):
                dense_loss = self._loss(bench, ())

        def ratio_of(num_drop: int) -> float:
            nonlocal best
            trial, ratio = self._tried(num_drop, dense_loss, bound)
            if ratio <= bound:
                best, trial = trial, best
            if trial is not None:
                # It is not the outcome; with all weights trained its states are large.
                trial.bench.states.forget("stage2", {"doomed": sorted(trial.selected[1].doomed)})
            return ratio

        first = min(number_by_ratio(prune, self.job.source.num_layers), self._last)
        most_within(bound, ratio_of, first, self._last)
        if best is not None:
            return best
        if self._refusal is not None and not any(self._curve.values()):
            raise self._refusal
        least, num_drop = min((row.get("ppl_ratio", math.inf), num_drop) for num_drop, row in self._curve.items())
        raise BoundError(
            f"{bound_of(prune)} cannot be kept: the least that was measured, on the tuning text, is {least:.4f} times "
            f"the dense model's perplexity, without {num_drop} of {self.job.source.num_layers} layers; allow more, or "
            "move more of what the layers know (transfer, stage2.steps)"
        )

    def _tried(self, num_drop: int, dense_loss: float, bound: float) -> tuple[Trial | None, float]:
        """One number of layers as a job of its own; no trial where that is refused, and the ratio."""
        bench, transfer = self.new_bench(NullTracker()), transfer_verb(self.job.config.transfer)
        weights: Weights | None = None
        # An order of the layers serves for smaller numbers, too, where the method allows it.
        self.job = job = self.job.dropping(num_drop)
        model, engine = bench.decoder.model, bench.engine

        def ratio_without(doomed: Collection[int]) -> float:
            with self.watch("evaluate"):
                nats = self._loss(bench, doomed) - dense_loss
            # Also where the weights grew beyond all numbers and the loss is none.
            return engine.from_first(math.exp(nats) if nats < 100 else math.inf)

        def ratio_after(move: Transfer, doomed: tuple[int, ...]) -> float:
            nonlocal weights
            with engine.restored(model):
                with self.watch("transfer"):
                    move_and_round(job, bench, move, doomed)
                with engine.mounted(model) as bench.model:
                    ratio = ratio_without(doomed)
                bench.model = None
                weights = copied_weights(model) if ratio <= bound else None
            return ratio

        try:
            with engine.mounted(model) as bench.model:
                selected = choose(bench, job, self.shared, self.watch)
                ratio = bare = ratio_without(selected[1].doomed)
        except (ConfigError, ModelError) as error:
            log.info("%d of %d layers cannot go: %s", num_drop, job.source.num_layers, error)
            self._curve[num_drop], self._refusal = {}, error
            return None, math.inf
        bench.model, doomed = None, selected[1].doomed
        if transfer is not None:
            # A job that goes on knows it, and moves nothing for numbers that are not the outcome.
            [ratio] = bench.journal.once({"moved": sorted(doomed)}, lambda: [ratio_after(transfer, doomed)])
        self._tell(num_drop, ppl_ratio_bare=bare, ppl_ratio=ratio)
        return Trial(job=job, bench=bench, selected=selected, weights=weights), ratio

    def _loss(self, bench: Bench, bypassed: Collection[int]) -> float:
        assert self.job.tuning is not None, "checked before the job"
        return bench.loss_without(bypassed, self.job.tuning.blocks, "tuning text")

    def _tell(self, num_drop: int, **measured: float) -> None:
        measured = {name: value for name, value in measured.items() if math.isfinite(value)}
        self._curve[num_drop] = measured
        self.tracker.metrics({f"bound/{name}": value for name, value in measured.items()}, step=num_drop)
        words = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        log.info("without %d of %d layers: %s", num_drop, self.job.source.num_layers, words)
