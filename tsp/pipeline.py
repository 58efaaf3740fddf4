"""The whole way of the data, for every method: load, score, select, transfer, drop, evaluate, register.

`prepare` checks everything that can be checked before anything is opened; `prune` does the work and leaves
`result.json`, the checkpoint and a finished MLflow run.
"""

import logging
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsp import selection
from tsp.checkpoint import load, prove, require_new, save_without
from tsp.config import JobConfig, ModelConfig, number_to_drop
from tsp.data import Corpus, evenly_spread, load_corpora
from tsp.engine import Engine, weights_dtype
from tsp.errors import ModelError
from tsp.evaluation.generation_speed import check_fits
from tsp.evaluation.state import Exam, evaluate_state
from tsp.evaluation.zero_shot import Tasks, open_tasks
from tsp.methods import score_verb, transfer_verb
from tsp.methods.base import Bench
from tsp.outcome import Outcome, open_run, publish
from tsp.plan import Plan, make_plan
from tsp.progress import logging_to
from tsp.records import DropReport, Scores, Selection
from tsp.sharding import read_json, resolve
from tsp.source import Source, check_drop, load_tokenizer, open_source
from tsp.tracking.null import NullTracker
from tsp.tracking.registry import located
from tsp.tracking.run import Tracker

log = logging.getLogger("tsp")

_PROBE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked job, ready to run."""

    config: JobConfig
    sharding: dict[str, Any]
    source: Source
    calibration: Corpus
    evals: list[Corpus]
    tasks: Tasks | None
    plan: Plan
    output: Path | None
    command: str


@dataclass
class Stopwatch:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def prepare(config: JobConfig, ds_path: Path, output: Path | None, *, root: Path, world_size: int) -> Job:
    """Check config, DeepSpeed JSON, model files and corpora.

    Args:
        config: of the job.
        ds_path: DeepSpeed JSON.
        output: folder to make; None: below `mlruns/`.
        root: working directory; the registry of `models:/...` is the one of its store.
        world_size: ranks.

    Raises:
        TspError: with exit code 2; nothing has been opened or written.
    """
    content = read_json(ds_path)
    if output is not None:
        require_new(output)
    source = open_source(located(config.model, root))
    num_drop = number_to_drop(config.prune, source.num_layers)
    dropped = config.prune.drop
    if dropped is None:
        candidates = [index for index in range(source.num_layers) if index not in _protected(config, source)]
        selection.cut(candidates, num_drop)
        # It is not known yet which will go; a model that cannot lose just any is refused now.
        dropped = tuple(candidates[(2 * n + 1) * len(candidates) // (2 * num_drop)] for n in range(num_drop))
    check_drop(source, dropped)
    dtype = weights_dtype(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    hidden_size = source.config.get_text_config(decoder=True).hidden_size
    sharding = resolve(content, config, world_size=world_size, hidden_size=hidden_size, dtype=dtype)
    tokenizer = load_tokenizer(source)
    check_fits(config.eval, source.max_positions)
    calibration, evals = load_corpora(config, tokenizer, source.max_positions)
    tasks = open_tasks(config.eval, tokenizer, source.max_positions)
    plan = make_plan(
        config,
        source,
        calibration,
        evals,
        world_size=world_size,
        zero_stage=sharding["zero_optimization"]["stage"],
        bytes_per_weight=dtype.itemsize,
    )
    return Job(
        config=config,
        sharding=sharding,
        source=source,
        calibration=calibration,
        evals=evals,
        tasks=tasks,
        plan=plan,
        output=output,
        command=" ".join(sys.argv),
    )


def prune(job: Job, root: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Run the job on this rank; the same call on every rank.

    Args:
        job: from `prepare`.
        root: working directory; the embedded store is `mlruns/` below it.

    Returns:
        The content of `result.json`, and on rank 0 where to look at the run in MLflow's UI.
    """
    engine = Engine.start(job.config, job.sharding)
    tracker: Tracker | NullTracker = open_run(job, engine, root) if engine.is_first else NullTracker()
    try:
        run_id = engine.from_first(tracker.run_id)
        output = (job.output or root / "mlruns" / "output" / run_id).absolute()
        with logging_to(output / "job.log" if engine.is_first else None):
            result = _prune(job, engine, tracker, output)
        tracker.finish("FINISHED")
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt)
        tracker.finish("KILLED" if killed else "FAILED", reason=f"{type(error).__name__}: {error}"[:500])
        raise
    engine.stop()
    return result, tracker.links()


def _prune(job: Job, engine: Engine, tracker: Tracker | NullTracker, output: Path) -> dict[str, Any]:
    watch, config, source = Stopwatch(), job.config, job.source
    started = time.perf_counter()
    with watch("load"):
        load_model = partial(load, source, engine.dtype)
        decoder = load_model(engine.loading())
        weights_gib = engine.weights_gib(decoder.model)
    log.info("load: %d layers in %.1f s, %.4f GiB on rank 0", source.num_layers, watch.seconds["load"], weights_gib[0])
    if source.text_only and engine.is_first:
        log.warning("%s holds more than a language model; the checkpoint will be the language model alone", source.name)
    bench = Bench(
        config=config,
        engine=engine,
        decoder=decoder,
        blocks_NT=job.calibration.blocks,
        tracker=tracker,
        load_again=lambda: load_model(engine.loading()),
        protected=_protected(config, source),
    )
    exam = Exam(
        config=config.eval,
        corpora=job.evals,
        max_positions=source.max_positions,
        sharing=engine.sharing(config.eval.batch_size),
        tasks=job.tasks,
    )
    with engine.mounted(decoder.model) as model:
        bench.model = model
        with watch("evaluate"):
            dense = evaluate_state(exam, model, "dense")
        with watch("select"):
            scores = _score(bench, job.plan.num_drop)
            chosen = _select(bench, scores, job.plan.num_drop)
            check_drop(source, chosen.doomed)
        with watch("evaluate"), decoder.bypassing(chosen.doomed):
            bare_drop = evaluate_state(exam, model, "bare_drop")
        bench.model = None
    with watch("transfer"):
        transfer = transfer_verb(config.transfer)
        if transfer is not None:
            transfer(bench, chosen.doomed, save_dtype=source.dtype)
    probe = job.evals[0].blocks[:2, :_PROBE_TOKENS]
    with engine.mounted(decoder.model) as model, decoder.bypassing(chosen.doomed):
        with watch("evaluate"):
            pruned = evaluate_state(exam, model, "pruned")
        with torch.no_grad():
            logits = model(probe.to(engine.device))
    with watch("save"):
        checkpoint = output / "model"
        save_without(decoder, source, chosen.doomed, checkpoint, gathered=engine.gathered, write=engine.is_first)
        report = _prove(checkpoint, probe, logits, chosen.doomed, source) if engine.is_first else None
        report = engine.from_first(report)
    outcome = Outcome(
        scores=scores,
        selection=chosen,
        states={"dense": dense, "bare_drop": bare_drop, "pruned": pruned},
        drop=report,
        peak_memory_gib=engine.peak_memory_gib(),
        weights_gib=weights_gib,
        trained_tokens=bench.trained_tokens,
        gate_history=bench.gate_history,
    )
    result = None
    if isinstance(tracker, Tracker):
        result = publish(job, outcome, tracker, output, watch.seconds, started)
    return engine.from_first(result)


def _protected(config: JobConfig, source: Source) -> frozenset[int]:
    """Layers that stay: those the user protects, and those without which others cannot run."""
    ends = selection.protected_layers(source.num_layers, config.prune.protect_first, config.prune.protect_last)
    return ends | source.read_by_others


def _score(bench: Bench, num_drop: int) -> Scores:
    if bench.config.prune.drop is None:
        return score_verb(bench.config.prune.method)(bench, num_drop)
    given = bench.config.prune.drop
    values = tuple(float(index not in given) for index in range(bench.decoder.num_layers))
    return Scores(method="given", values=values, order=tuple(given))


def _select(bench: Bench, scores: Scores, num_drop: int) -> Selection:
    """Cut the order, verify by the calibration loss, and swap if that is asked for."""
    given = bench.config.prune.drop is not None
    protected = () if given else bench.protected
    blocks = evenly_spread(bench.blocks_NT, bench.config.prune.verify_blocks)

    def loss(doomed: Collection[int]) -> float:
        return bench.loss_without(doomed, blocks, "verify")

    doomed = selection.cut(scores.order, num_drop, protected)
    best, best_loss = doomed, loss(doomed)
    if bench.config.prune.swap_rounds and not given:
        best, best_loss = selection.swap_search(
            doomed,
            bench.decoder.num_layers,
            loss,
            protected=protected,
            max_rounds=bench.config.prune.swap_rounds,
        )
    log.info("doomed layers %s", ",".join(map(str, best)))
    return Selection(doomed=best, loss_dense=loss(()), loss_bypassed=best_loss, swapped=best != doomed)


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
