"""Choose the doomed layers: score by the method, cut the order, verify by the calibration loss, swap if asked for."""

import logging
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tsp import selection
from tsp.data import evenly_spread
from tsp.job import Job
from tsp.methods import is_nested, is_seeded, score_verb, transfer_check
from tsp.methods.base import Bench
from tsp.methods.leave_out import losses_without
from tsp.records import Scores, Selection
from tsp.shared import Shared, Stopwatch
from tsp.source import check_drop

Value = TypeVar("Value")

log = logging.getLogger("tsp")

# What an order of the layers does not depend on.
_AFTER_THE_ORDER = {
    "transfer",
    "stage2",
    "replaceme",
    "eval",
    "state",
    "tracking",
    "data",
    "budget_s",
    "save",
    "quantize",
    "seed",
}
_OF_THE_CUT = {"ratio", "num_drop", "drop", "max_ppl_ratio", "min_speedup", "verify_blocks", "swap_rounds"}


@dataclass(frozen=True)
class _Trace:
    """A method's order, and what its making left in the bench: another job with the same order tells the same."""

    scores: Scores
    logged: list[tuple[int, dict[str, float]]]
    gate_history: list[tuple[int, str, list[float]]]
    global_step: int
    trained_tokens: int
    left_out: int


def choose(bench: Bench, job: Job, shared: Shared, watch: Stopwatch) -> tuple[Scores, Selection]:
    """The scores and the selection; the model is mounted.

    Raises:
        ConfigError, ModelError: the method finds no such number of layers, or these cannot go.
    """
    scores = _given(job) if job.config.prune.drop is not None else _score(bench, job, shared, watch)
    chosen = _select(bench, job, scores, shared, watch)
    check_drop(job.source, chosen.doomed)
    transfer_check(job.config.transfer)(bench, chosen.doomed)
    return scores, chosen


def _given(job: Job) -> Scores:
    given = job.config.prune.drop or ()
    values = tuple(float(index not in given) for index in range(job.source.num_layers))
    return Scores(method="given", values=values, order=tuple(given))


def order_key(job: Job) -> tuple[Any, ...]:
    """What the order of a job's layers depends on, beside the model and the number of layers to drop."""
    config = job.config
    settings = config.model_dump(mode="json", exclude=_AFTER_THE_ORDER)
    settings["prune"] = {key: value for key, value in settings["prune"].items() if key not in _OF_THE_CUT}
    return (str(settings), job.calibration.fingerprint, config.seed if is_seeded(config) else None)


def _score(bench: Bench, job: Job, shared: Shared, watch: Stopwatch) -> Scores:
    num_drop = job.trace_to if is_nested(job.config) else job.num_drop
    made_here = False

    def make() -> _Trace:
        nonlocal made_here
        made_here = True
        scores = score_verb(job.config.prune.method)(bench, num_drop)
        logged, history = list(bench.logged), list(bench.gate_history)
        return _Trace(scores, logged, history, bench.global_step, bench.trained_tokens, bench.left_out)

    trace = _once(bench, shared, watch, ("order", num_drop, *order_key(job)), make)
    if not made_here:
        for step, values in trace.logged:
            bench.tracker.metrics(values, step)
        bench.logged = list(trace.logged)
        bench.gate_history = list(trace.gate_history)
        bench.global_step = trace.global_step
        bench.trained_tokens = trace.trained_tokens
        bench.left_out = trace.left_out
    return trace.scores


def _once(bench: Bench, shared: Shared, watch: Stopwatch, key: Hashable, make: Callable[[], Value]) -> Value:
    """`Shared.once` for the selection; whoever is charged for it pays what runs before have spent on it, too.

    Else a job that goes on with what is known would have the more of `budget_s` left for its transfer.
    """

    def timed() -> tuple[Value, float]:
        before = bench.journal.known_s + bench.states.known_s
        value = make()
        return value, bench.journal.known_s + bench.states.known_s - before

    paid = key in watch.paid
    value, known_s = shared.once(key, watch, "select", timed)
    if not paid:
        watch.add("select", known_s)
    return value


def _select(bench: Bench, job: Job, scores: Scores, shared: Shared, watch: Stopwatch) -> Selection:
    config = job.config.prune
    protected = () if config.drop is not None else job.protected
    blocks = evenly_spread(bench.blocks_NT, config.verify_blocks)

    def loss(doomed: Collection[int]) -> float:
        key = ("loss", job.calibration.fingerprint, config.verify_blocks, frozenset(doomed))
        return _once(bench, shared, watch, key, lambda: bench.loss_without(doomed, blocks, "verify"))

    def losses(gone: Collection[int], candidates: Sequence[int]) -> Mapping[int, float]:
        key = ("losses", job.calibration.fingerprint, config.verify_blocks, frozenset(gone), tuple(candidates))
        return _once(bench, shared, watch, key, lambda: losses_without(bench, gone, candidates, blocks, "swap"))

    doomed = selection.cut(scores.order, job.num_drop, protected)
    rounds = config.swap_rounds if config.drop is None else 0
    best, best_loss = selection.swap_search(
        doomed, bench.decoder.num_layers, losses, loss=loss, protected=protected, max_rounds=rounds
    )
    log.info("doomed layers %s", ",".join(map(str, best)) or "none")
    return Selection(doomed=best, loss_dense=loss(()), loss_bypassed=best_loss, swapped=best != doomed)
