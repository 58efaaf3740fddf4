"""`tsp tune`: search the settings of a job for the least loss on tuning text, within a time.

    document, links = run_search(prepare_search(config, knobs, ...), Path.cwd())

One launch: the model is loaded once, what the trials share is made once, and the weights are put back after each. A
trial is a job without an evaluation: it ends with its loss on the blocks of `data.tuning_blocks`. The texts of a result
are not looked at and no checkpoint is written; `tsp prune --config tuned.yaml` does both.
"""

import gc
import logging
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tsp.choose import choose
from tsp.engine import Engine
from tsp.errors import TspError, is_everywhere
from tsp.grid import in_words
from tsp.job import Job
from tsp.methods import transfer_check
from tsp.methods.base import Bench
from tsp.pipeline import MODEL, make_bench, transfer
from tsp.progress import logging_to
from tsp.search import Search, marks
from tsp.shared import Shared, Stopwatch
from tsp.space import steps_compare, with_settings
from tsp.study import KILLED, Study, Trial
from tsp.tracked import open_run, tracked
from tsp.tracking.null import NullTracker
from tsp.tracking.results import KIND_TAG, runs_by_tag
from tsp.tracking.run import Tracker, start_run
from tsp.tracking.store import mlruns_folder
from tsp.training import StepStats
from tsp.tuned import best_of, publish, write_tuned

log = logging.getLogger("tsp")

AfterStep = Callable[[str, StepStats, list[float]], None]

_FAILURES = 5
"""Failed trials, one after another, after which the search gives up."""
_SEARCH_HASH = "search_hash"


class Stopped(Exception):  # noqa: N818  Not an error.
    """A trial that is not worth its time, or has none left; the sampler learns from it, but not from failures."""


def run_search(search: Search, root: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Run trials on this rank until the time is over; the same call on every rank.

    Args:
        search: from `prepare_search`.
        root: working directory.

    Returns:
        What `--json` prints, and on rank 0 where to look at the parent run in MLflow's UI.

    Raises:
        TspError: no trial came to its end.
    """
    engine = Engine.start(search.job.config, search.job.sharding)
    with tracked(engine, lambda: _open_parent(search, root)) as (tracker, parent):
        document = _Launch(search, root, engine, tracker, parent).run()
    engine.stop()
    return document, tracker.links()


class _Launch:
    """One launch of a search on this rank."""

    def __init__(self, search: Search, root: Path, engine: Engine, tracker: Tracker | NullTracker, parent: str) -> None:
        self._search = search
        self._root = root
        self._engine = engine
        self._tracker = tracker
        self._parent = parent
        self._shared = Shared(more_to_come=True)
        self._seconds: list[float] = []
        """Of this launch's complete trials."""
        self._failures = 0
        """Since the last trial that did not fail."""
        self._study: Study
        """On rank 0 only."""

    def run(self) -> dict[str, Any]:
        """All trials that fit, and what the search has found."""
        engine = self._engine
        engine.on_first(self._open_study)
        try:
            if engine.on_first(self._has_room):
                self._measure_untrained()
            while (trial := engine.on_first(self._next)) is not None:
                self._attempt(trial)
            return engine.on_first(self._conclude)
        finally:
            if engine.is_first:
                self._study.close()

    def _open_study(self) -> None:
        search = self._search
        # Beside the embedded store, also where the runs go to a server: a study needs a file of its own.
        self._study = Study(mlruns_folder(self._root) / "tune.db", search.hash, search.knobs, search.job.config)

    def _has_room(self) -> bool:
        """Whether one more trial may be begun."""
        most = self._search.max_trials
        if most is not None and sum(trial.reason != KILLED for trial in self._study.trials()) >= most:
            return False
        if self._failures >= _FAILURES:
            log.warning("%d trials failed one after another: no more are tried", self._failures)
            return False
        expected = statistics.mean(self._seconds) if self._seconds else 0.0
        return self._elapsed() + expected < self._search.seconds

    def _next(self) -> Trial | None:
        return self._study.ask() if self._has_room() else None

    def _elapsed(self) -> float:
        return time.monotonic() - self._search.started

    def _measure_untrained(self) -> None:
        """Select, which most trials share, and measure the untrained model; no trial is charged for it."""
        folder = mlruns_folder(self._root) / "output" / self._parent
        with logging_to(folder / "job.log" if self._engine.is_first else None):
            bench = make_bench(self._search.job, self._engine, self._tracker, shared=self._shared, watch=Stopwatch())
            _, losses = self._choose(self._search.job, bench, Stopwatch())
        self._engine.on_first(lambda: self._study.keep(losses))

    def _choose(self, job: Job, bench: Bench, watch: Stopwatch) -> tuple[tuple[int, ...], dict[str, float]]:
        """The doomed layers, and the losses with and without them before anything is trained."""
        assert job.tuning is not None
        blocks = job.tuning.blocks

        def loss(dropped: tuple[int, ...]) -> float:
            key = ("tuning", dropped)
            return self._shared.once(key, watch, "evaluate", lambda: bench.loss_without(dropped, blocks, "tuning text"))

        with self._engine.mounted(bench.decoder.model) as bench.model:
            transfer_check(job.config.transfer)(bench, job.config.prune.drop)
            _, chosen = choose(bench, job, self._shared, watch)
            losses = {"dense": loss(()), "bare_drop": loss(chosen.doomed)}
        bench.model = None
        return chosen.doomed, losses

    def _attempt(self, trial: Trial) -> None:
        """Run one trial, and tell the study how it ended; a failed one is left behind."""
        started = time.monotonic()
        ended: dict[str, Any]
        try:
            ended = self._run(trial)
        except Exception as error:
            # As in a sweep: what is wrong on one rank alone would leave the others waiting.
            if self._engine.world_size > 1 and not is_everywhere(error):
                raise
            ended = {"state": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:500]}
            # The model in memory is not to be trusted any more; what was measured of it before, is.
            self._shared.forget(MODEL)
        # What stopped a trial held its optimizer.
        gc.collect()
        self._failures = self._failures + 1 if ended["state"] == "failed" else 0
        seconds = time.monotonic() - started
        if ended["state"] == "complete":
            self._seconds.append(seconds)
        self._engine.on_first(lambda: self._keep(trial, ended, seconds))

    def _keep(self, trial: Trial, ended: dict[str, Any], seconds: float) -> None:
        self._study.end(trial.number, **ended, seconds=seconds)
        found = f"loss {ended['loss']:.4f}" if ended["state"] == "complete" else f"{ended['state']}: {ended['reason']}"
        log.warning("trial %d: %s, %.0f s (%s)", trial.number, found, seconds, in_words(trial.settings) or "the preset")
        self._write_best()

    def _run(self, trial: Trial) -> dict[str, Any]:
        """The trial as a child run, and how it ended."""
        search = self._search
        config = with_settings(search.job.config, trial.settings)
        job = search.preparation.job(config, None, {"trial": trial.number} | trial.settings)
        self._engine = engine = Engine.start(job.config, job.sharding)
        with tracked(engine, lambda: open_run(job, engine, self._root, self._parent, kind="trial")) as (
            tracker,
            run_id,
        ):
            folder = mlruns_folder(self._root) / "output" / run_id
            ended: dict[str, Any]
            engine.on_first(lambda: self._study.tracked(trial.number, run_id))
            with logging_to(folder / "job.log" if engine.is_first else None):
                try:
                    ended = {"state": "complete", "loss": self._loss(job, tracker, trial)}
                    tracker.metrics({"tune/loss": ended["loss"]}, step=0)
                except Stopped as stop:
                    ended = {"state": "pruned", "reason": str(stop)}
            tracker.tags({"trial": trial.number, "trial_state": ended["state"]})
            tracker.artifact(folder / "job.log")
        return ended

    def _loss(self, job: Job, tracker: Tracker | NullTracker, trial: Trial) -> float:
        """On tuning text, of the model that the trial's settings give."""
        engine, watch = self._engine, Stopwatch()
        bench = make_bench(job, engine, tracker, shared=self._shared, watch=watch)
        doomed, _ = self._choose(job, bench, watch)
        assert job.tuning is not None
        with engine.restored(bench.decoder.model):
            bench.after_step = self._judge(job, bench, trial, doomed)
            transfer(job, bench, doomed, watch)
            with engine.mounted(bench.decoder.model) as bench.model:
                loss = bench.loss_without(doomed, job.tuning.blocks, "tuning text")
        if not math.isfinite(loss):
            raise Stopped(f"the loss on tuning text is {loss}")
        return loss

    def _judge(self, job: Job, bench: Bench, trial: Trial, doomed: tuple[int, ...]) -> AfterStep:
        """Between two steps: does the trial go on? Rank 0 decides for all.

        At half and at three quarters of the steps the loss on tuning text is measured without the doomed layers, though
        their gates may be open still. The training's own loss would not do: it favours settings that learn the training
        text best. Trials of one seed have seen the same batches in the same order by then, so that what is compared
        differs by the settings alone.
        """
        stops = marks(job.config.stage2.steps)
        compare = steps_compare(self._search.knobs, self._search.job.config)

        def after_step(stage: str, stats: StepStats, gates: list[float]) -> None:
            done = stats.step + 1
            if stage != "stage2":
                return
            loss = stats.losses.get("lm", math.nan)  # without any usable micro-batch there is none
            if not math.isfinite(loss):
                raise Stopped(f"the loss of step {done} is {loss}")
            if done not in stops:
                return
            assert job.tuning is not None
            tuning_loss = bench.loss_without(doomed, job.tuning.blocks) if compare else None
            reason = self._engine.on_first(lambda: self._verdict(trial, done, tuning_loss))
            if reason:
                raise Stopped(reason)

        return after_step

    def _verdict(self, trial: Trial, done: int, loss: float | None) -> str | None:
        """Why the trial is stopped after so many steps; None: it goes on."""
        # Without any trial there is no result, and the preset is the one that all others are compared with.
        if not trial.preset and self._elapsed() > self._search.seconds:
            return f"the time was over after {done} steps"
        if loss is not None and self._study.is_hopeless(trial.number, done, loss):
            return f"behind the median after {done} steps, with {loss:.4f}"
        return None

    def _write_best(self) -> None:
        search, best = self._search, best_of(self._study.trials())
        if best is not None:
            write_tuned(search, best, self._study.trials())

    def _conclude(self) -> dict[str, Any]:
        """Write and log what was found; rank 0 only."""
        search, trials = self._search, self._study.trials()
        best = best_of(trials)
        if best is None:
            reasons = [trial.reason for trial in trials if trial.reason]
            why = f"; the last one: {reasons[-1]}" if reasons else f"; give more than {search.seconds / 60:g} minutes"
            raise TspError(f"no trial of {len(trials)} came to its end{why}")
        self._write_best()
        assert isinstance(self._tracker, Tracker)
        return publish(search, self._tracker, self._root, self._study.losses(), trials, best, self._elapsed())


def _open_parent(search: Search, root: Path) -> Tracker:
    """The parent run; that of an earlier launch of the same search goes on."""
    tracking = search.job.config.tracking
    return start_run(
        root,
        experiment=tracking.experiment,
        run_name=tracking.run_name or f"search over {', '.join(knob.key for knob in search.knobs)}",
        tags={KIND_TAG: "tune", _SEARCH_HASH: search.hash},
        params={knob.key: knob.in_words() for knob in search.knobs},
        resume=runs_by_tag(root, tracking.experiment, _SEARCH_HASH).get(search.hash),
    )
