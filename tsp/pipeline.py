"""The whole way of the data, for every method: load, score, select, transfer, drop, evaluate, register.

`prune` runs a job that `job.prepare` has checked, and leaves `result.json`, the checkpoint and a finished MLflow run;
`run_job` is what a sweep calls for each of its own.
"""

import logging
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tsp import saving
from tsp.bounds import Search, Trial
from tsp.checkpoint import load
from tsp.choose import choose
from tsp.decoder import Decoder
from tsp.engine import Engine
from tsp.evaluation.state import Exam, evaluate_state
from tsp.job import Job
from tsp.journal import Journal
from tsp.machine import put_back
from tsp.methods import transfer_check, transfer_verb
from tsp.methods.base import Bench
from tsp.numbers import require_finite
from tsp.outcome import Outcome, publish
from tsp.progress import logging_to
from tsp.records import DropReport, Evaluation, Scores, Selection
from tsp.resume import clear, resumed
from tsp.shared import Shared, Stopwatch
from tsp.states import States
from tsp.tracked import open_run, tracked
from tsp.tracking.earlier import OUTPUT_TAG, RESUMED_TAG, EarlierRun
from tsp.tracking.null import NullTracker
from tsp.tracking.run import Tracker

log = logging.getLogger("tsp")

MODEL = "model"
"""The key of the loaded model among what jobs share."""


def prune(job: Job, root: Path, resume: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Run the job on this rank; the same call on every rank.

    Args:
        job: from `job.prepare`.
        root: working directory; the embedded store is `mlruns/` below it.
        resume: run id, or `latest`: go on with that run of the same job.

    Returns:
        The content of `result.json`, and on rank 0 where to look at the run in MLflow's UI.
    """
    engine = Engine.start(job.config, job.sharding)
    earlier = engine.on_first(lambda: resumed(job, root, resume)) if resume else None
    result, links = run_job(job, engine, root, Shared(), earlier=earlier)
    engine.stop()
    return result, links


def run_job(
    job: Job,
    engine: Engine,
    root: Path,
    shared: Shared,
    parent: str | None = None,
    earlier: EarlierRun | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """One job as one MLflow run; however it ends, the run says so.

    Args:
        job: from `job.prepare`.
        engine: started for this job.
        root: working directory.
        shared: what the jobs before this one have left.
        parent: run id of the sweep.
        earlier: the run to go on with.

    Returns:
        As `prune`.
    """
    resume = earlier.run_id if earlier else None
    with tracked(engine, lambda: open_run(job, engine, root, parent, resume=resume)) as (tracker, run_id):
        output = earlier.output if earlier else (job.output or root / "mlruns" / "output" / run_id).absolute()
        tracker.tags({OUTPUT_TAG: output})
        if earlier:
            tracker.tags({RESUMED_TAG: "yes"})
        # Of an earlier attempt; a folder of somebody else was refused.
        engine.on_first(lambda: clear(output))
        with logging_to(output / "job.log" if engine.is_first else None):
            state = output / "state"
            journal = Journal.open(state / "journal.jsonl", engine, lambda: job.hash)
            kept = States(engine, state, journal.job, job.config.state)
            result = _run(job, engine, tracker, output, shared, journal, kept)
            kept.clear()
    return result, tracker.links()


def make_bench(
    job: Job,
    engine: Engine,
    tracker: Tracker | NullTracker,
    *,
    shared: Shared,
    watch: Stopwatch,
    journal: Journal | None = None,
    states: States | None = None,
) -> Bench:
    """What a method works with; the model is loaded if no job before this one did."""
    load_model = partial(_load, job, engine)
    return Bench(
        config=job.config,
        engine=engine,
        decoder=shared.once(MODEL, watch, "load", load_model),
        blocks_NT=job.calibration.blocks,
        tracker=tracker,
        load_again=load_model,
        protected=job.protected,
        read_by_others=job.source.read_by_others,
        journal=journal or Journal(),
        states=states or States(),
    )


def transfer(job: Job, bench: Bench, doomed: tuple[int, ...], watch: Stopwatch) -> None:
    """Move what the doomed layers know into the others, if that is asked for; the model is unmounted."""
    move = transfer_verb(job.config.transfer)
    if move is None:
        return
    if job.config.budget_s is not None:
        # Each rank has a clock of its own, and all have to agree on whether anything is left.
        bench.seconds_left = bench.engine.from_first(job.config.budget_s - watch.seconds["select"])
    with watch("transfer"):
        saving.move_and_round(job, bench, move, doomed)


def _run(
    job: Job,
    engine: Engine,
    tracker: Tracker | NullTracker,
    output: Path,
    shared: Shared,
    journal: Journal,
    kept: States,
) -> dict[str, Any]:
    watch, started = Stopwatch(), time.perf_counter()
    new_bench = partial(make_bench, job, engine, shared=shared, watch=watch, journal=journal, states=kept)
    bench, trial, curve = new_bench(tracker), None, []
    model = bench.decoder.model
    weights_gib = engine.weights_gib(model)
    exam = shared.once(("exam", *_exam_key(job)), watch, "evaluate", lambda: _exam(job, engine))
    if job.plan.num_drop is None:
        search = Search(job=job, new_bench=new_bench, tracker=tracker, shared=shared, watch=watch)
        trial = search.find()
        job, bench, curve = trial.job, trial.bench, search.rows
        tracker.tags({"num_drop": job.num_drop})
    scores, chosen, states = _choose(job, bench, exam, shared, watch, trial)
    moves = job.config.transfer != "none"
    with engine.restored(model) if shared.more_to_come and moves else nullcontext():
        if trial is not None and trial.weights is not None:
            put_back(trial.weights)
            trial = None  # Frees host memory.
        else:
            transfer(job, bench, chosen.doomed, watch)
        known = None if moves else states["bare_drop"]
        states["pruned"], tuning_loss, report = _drop(job, bench, exam, chosen.doomed, known, output / "model", watch)
    peak_memory_gib = engine.peak_memory_gib()
    quantized = {}
    if job.config.quantize:
        quantized = saving.quantized(job, engine, exam, _exam_key(job), shared, output, watch)
    outcome = Outcome(
        scores=scores,
        selection=chosen,
        states=states | {state: one.evaluation for state, one in quantized.items()},
        drop=report,
        quantized=quantized,
        quantized_checkpoint=output / "model-int8" if (output / "model-int8").is_dir() else None,
        dtype=str(engine.dtype).removeprefix("torch."),
        peak_memory_gib=peak_memory_gib,
        weights_gib=weights_gib,
        trained_tokens=bench.trained_tokens,
        transfer_steps=bench.transfer_steps,
        left_out=bench.left_out,
        tuning_loss=tuning_loss,
        curve=curve,
        gate_history=bench.gate_history,
        watch=watch,
    )

    def told() -> dict[str, Any]:
        assert isinstance(tracker, Tracker)
        return publish(job, outcome, tracker, output, started)

    return engine.on_first(told)


def _choose(
    job: Job, bench: Bench, exam: Exam, shared: Shared, watch: Stopwatch, trial: Trial | None
) -> tuple[Scores, Selection, dict[str, Evaluation]]:
    """Choose the doomed layers, and measure the model with and, nothing else done yet, without them.

    The layers of a trial are chosen.
    """

    def evaluated(state: str, dropped: tuple[int, ...] = ()) -> Evaluation:
        key = (*_exam_key(job), state, dropped)
        assert bench.model is not None
        model = bench.model
        return shared.once(key, watch, "evaluate", lambda: evaluate_state(exam, model, state))

    with bench.engine.mounted(bench.decoder.model) as bench.model:
        transfer_check(job.config.transfer)(bench, job.config.prune.drop)
        dense = evaluated("dense")
        require_finite(bench.engine, bench.decoder, bench.model, dense.perplexity, job.evals)
        scores, chosen = trial.selected if trial else choose(bench, job, shared, watch)
        with bench.decoder.bypassing(chosen.doomed):
            bare_drop = evaluated("bare_drop", chosen.doomed)
    bench.model = None
    return scores, chosen, {"dense": dense, "bare_drop": bare_drop}


def _drop(
    job: Job,
    bench: Bench,
    exam: Exam,
    doomed: tuple[int, ...],
    known: Evaluation | None,
    checkpoint: Path,
    watch: Stopwatch,
) -> tuple[Evaluation, float | None, DropReport | None]:
    """Measure the model without the doomed layers, and save it if asked to.

    Where the weights are those of an evaluation made before, that one is `known`. Returned are the evaluation, the loss
    on tuning text if some is set aside, and what was proved of the checkpoint.
    """
    engine, decoder = bench.engine, bench.decoder
    probe = saving.probe(job)
    tuning_loss = report = None
    with engine.mounted(decoder.model) as bench.model, decoder.bypassing(doomed):
        with watch("evaluate"):
            pruned = known or evaluate_state(exam, bench.model, "pruned")
            if job.tuning is not None:
                tuning_loss = bench.loss_without(doomed, job.tuning.blocks, "tuning text")
        with torch.no_grad():
            logits = bench.model(probe.to(engine.device))
    if job.config.save and doomed:
        with watch("save"):
            report = saving.save(job, engine, decoder, checkpoint, doomed, probe, logits)
    return pruned, tuning_loss, report


def _load(job: Job, engine: Engine) -> Decoder:
    started, source = time.perf_counter(), job.source
    decoder = load(source, engine.dtype, engine.loading())
    gib = engine.weights_gib(decoder.model)[0]
    log.info("load: %d layers in %.1f s, %.4f GiB on rank 0", source.num_layers, time.perf_counter() - started, gib)
    if source.text_only and engine.is_first:
        log.warning("%s holds more than a language model; the checkpoint will be the language model alone", source.name)
    return decoder


def _exam_key(job: Job) -> tuple[str, ...]:
    return (job.config.eval.model_dump_json(), *(corpus.fingerprint for corpus in job.evals))


def _exam(job: Job, engine: Engine) -> Exam:
    return Exam(
        config=job.config.eval,
        corpora=job.evals,
        max_positions=job.source.max_positions,
        sharing=engine.sharing(job.config.eval.batch_size),
        tasks=job.tasks,
    )
