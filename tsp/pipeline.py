"""The whole way of the data, for every method: load, score, select, transfer, drop, evaluate, register.

`prune` runs a job that `job.prepare` has checked, and leaves `result.json`, the checkpoint and a finished MLflow run;
`run_job` is what a sweep calls for each of its own.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsp.bounds import Search, Trial
from tsp.checkpoint import load, prove, save_without
from tsp.choose import choose
from tsp.config import ModelConfig
from tsp.decoder import Decoder
from tsp.engine import Engine
from tsp.errors import ModelError
from tsp.evaluation.state import Exam, evaluate_state
from tsp.job import Job
from tsp.machine import put_back
from tsp.methods import transfer_check, transfer_verb
from tsp.methods.base import Bench
from tsp.outcome import Outcome, open_run, publish
from tsp.progress import logging_to
from tsp.quantize import Quantized, in_int8
from tsp.records import DropReport, Evaluation, Scores, Selection
from tsp.shared import Shared, Stopwatch
from tsp.source import Source, open_source
from tsp.tracking.null import NullTracker
from tsp.tracking.run import Tracker

log = logging.getLogger("tsp")

MODEL = "model"
"""The key of the loaded model among what jobs share."""
_PROBE_TOKENS = 64


def prune(job: Job, root: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Run the job on this rank; the same call on every rank.

    Args:
        job: from `job.prepare`.
        root: working directory; the embedded store is `mlruns/` below it.

    Returns:
        The content of `result.json`, and on rank 0 where to look at the run in MLflow's UI.
    """
    engine = Engine.start(job.config, job.sharding)
    result, links = run_job(job, engine, root, Shared())
    engine.stop()
    return result, links


def run_job(
    job: Job, engine: Engine, root: Path, shared: Shared, parent: str | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """One job as one MLflow run; however it ends, the run says so.

    Args:
        job: from `job.prepare`.
        engine: started for this job.
        root: working directory.
        shared: what the jobs before this one have left.
        parent: run id of the sweep.

    Returns:
        As `prune`.
    """
    with tracked(engine, lambda: open_run(job, engine, root, parent)) as (tracker, run_id):
        output = (job.output or root / "mlruns" / "output" / run_id).absolute()
        with logging_to(output / "job.log" if engine.is_first else None):
            result = _run(job, engine, tracker, output, shared)
    return result, tracker.links()


@contextmanager
def tracked(engine: Engine, start: Callable[[], Tracker]) -> Iterator[tuple[Tracker | NullTracker, str]]:
    """A run for the length of a block; however that ends, the run says so, unless it was finished inside.

    Args:
        engine: tells every rank the run's id, or why there is none.
        start: opens the run; called on rank 0.

    Yields:
        The tracker, off rank 0 one that does nothing, and the run's id.
    """
    tracker: Tracker | NullTracker = NullTracker()

    def open_own() -> str:
        nonlocal tracker
        tracker = start()
        return tracker.run_id

    run_id = engine.on_first(open_own)
    try:
        yield tracker, run_id
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt)
        tracker.finish("KILLED" if killed else "FAILED", reason=f"{type(error).__name__}: {error}"[:500])
        raise
    tracker.finish("FINISHED")


def make_bench(job: Job, engine: Engine, tracker: Tracker | NullTracker, *, shared: Shared, watch: Stopwatch) -> Bench:
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
    )


def transfer(job: Job, bench: Bench, doomed: tuple[int, ...], watch: Stopwatch) -> None:
    """Move what the doomed layers know into the others, if that is asked for; the model is unmounted."""
    move = transfer_verb(job.config.transfer)
    if move is None:
        return
    bench.seconds_left = job.config.budget_s and job.config.budget_s - watch.seconds["select"]
    with watch("transfer"):
        move(bench, doomed, save_dtype=job.source.dtype)


def _run(job: Job, engine: Engine, tracker: Tracker | NullTracker, output: Path, shared: Shared) -> dict[str, Any]:
    watch, started = Stopwatch(), time.perf_counter()
    new_bench = partial(make_bench, job, engine, shared=shared, watch=watch)
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
    quantized = _quantized(job, engine, exam, shared, output, watch) if job.config.quantize else {}
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
    probe = _probe(job)
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
            report = _save(job, engine, decoder, checkpoint, doomed, probe, logits)
    return pruned, tuning_loss, report


def _quantized(
    job: Job, engine: Engine, exam: Exam, shared: Shared, output: Path, watch: Stopwatch
) -> dict[str, Quantized]:
    """The dense and the pruned model in int8; what does not fit beside the job's own model is left out.

    The pruned one stays, beside the checkpoint that it was made from.
    """
    options: dict[str, Any] = {"dtype": engine.dtype, "probe": _probe(job), "trust": job.source.trust_remote_code}
    dense = partial(in_int8, job.source.folder, output / "dense-int8", exam, "quantized", keep=False, **options)
    pruned = partial(in_int8, output / "model", output / "model-int8", exam, "pruned_quantized", keep=True, **options)
    made: dict[str, Quantized] = {}
    for state, make, key in (("quantized", dense, _exam_key(job)), ("pruned_quantized", pruned, output)):
        try:
            made[state] = shared.once((state, key), watch, "evaluate", partial(engine.on_first, make))
        except ModelError as error:
            # The job has done its work; it is not to fail for this.
            if engine.is_first:
                log.warning("%s is left out: %s", state.replace("_", " "), error)
    return made


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


def _probe(job: Job) -> Tensor:
    """Tokens `[B, T]` whose logits prove a saved folder."""
    return job.evals[0].blocks[:2, :_PROBE_TOKENS]


def _exam(job: Job, engine: Engine) -> Exam:
    return Exam(
        config=job.config.eval,
        corpora=job.evals,
        max_positions=job.source.max_positions,
        sharing=engine.sharing(job.config.eval.batch_size),
        tasks=job.tasks,
    )


def _save(
    job: Job,
    engine: Engine,
    decoder: Decoder,
    checkpoint: Path,
    dropped: Sequence[int],
    tokens: Tensor,
    logits: Tensor,
) -> DropReport:
    """Write the checkpoint and prove it in a fresh process."""
    source = job.source
    save_without(decoder, source, dropped, checkpoint, gathered=engine.gathered, write=engine.is_first)
    return engine.on_first(lambda: _prove(checkpoint, tokens, logits, dropped, source))


def _prove(checkpoint: Path, tokens: Tensor, logits: Tensor, dropped: Sequence[int], source: Source) -> DropReport:
    pruned = open_source(ModelConfig(path=str(checkpoint), trust_remote_code=source.trust_remote_code))
    proof = prove(pruned, tokens, logits)
    if proof["faults"]:
        raise ModelError(f"the saved checkpoint {checkpoint} is not the pruned model: {'; '.join(proof['faults'])}")
    return DropReport(
        dropped=tuple(dropped),
        num_layers=source.num_layers,
        checkpoint=str(checkpoint),
        max_logit_difference=proof["max_logit_difference"],
        cached_equals_uncached=proof["cached_equals_uncached"],
    )
