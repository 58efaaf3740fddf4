"""What a job tells: its run in MLflow, `result.json`, figures, and the registered version."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tsp.config import flatten
from tsp.data import token_divergence
from tsp.errors import ModelError
from tsp.evaluation.generation_speed import measure_folder
from tsp.evaluation.summary import metrics, summarise
from tsp.machine import weights_dtype
from tsp.numbers import collapses
from tsp.policy import default_model_name
from tsp.quantize import Quantized, plain_speeds
from tsp.records import DropReport, Evaluation, Scores, Selection, write_json
from tsp.sizes import cache_bytes_per_token, size_gib
from tsp.tracking.run import Tracker

if TYPE_CHECKING:
    from tsp.job import Job
    from tsp.shared import Stopwatch

log = logging.getLogger("tsp")

RESULT_SCHEMA = 1
COLLAPSE_TAG = "tsp.collapse"
"""Tag with the reason why a finished job's result is no success."""
PHASES = ("load", "select", "transfer", "evaluate", "save")
_HEATMAPS = 12
"""Pictures of the gate heatmap's step slider."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the steps of a job gave."""

    scores: Scores
    selection: Selection
    states: dict[str, Evaluation]
    """`dense`, `bare_drop`, `pruned`; with `--quantize` also `quantized` (the dense one) and `pruned_quantized`."""
    drop: DropReport | None
    """None: no checkpoint was written."""
    quantized: dict[str, Quantized]
    """By state; empty: not asked for, or there was no room."""
    quantized_checkpoint: Path | None
    dtype: str
    """Of the weights in memory."""
    peak_memory_gib: list[float]
    weights_gib: list[float]
    trained_tokens: int
    transfer_steps: int
    left_out: int
    """Micro-batches of both stages whose loss was not finite."""
    tuning_loss: float | None
    """Mean cross-entropy of the pruned model on the text set aside for tuning, nats per token."""
    curve: list[dict[str, Any]]
    """What a search under a bound measured, by number of layers; empty: the number was given."""
    gate_history: list[tuple[int, str, list[float]]]
    watch: "Stopwatch"


def publish(job: "Job", outcome: Outcome, tracker: Tracker, output: Path, started: float) -> dict[str, Any]:
    """Log the outcome, register the checkpoint, write `result.json`; rank 0 only.

    Returns:
        The content of `result.json`.
    """
    records = {"scores": outcome.scores, "selection": outcome.selection}
    if outcome.drop:
        records["drop"] = outcome.drop
    for name, record in records.items():
        write_json(record, output / f"{name}.json")
        tracker.artifact(output / f"{name}.json")
    for state, evaluation in outcome.states.items():
        write_json(evaluation, output / f"evaluation_{state}.json")
        tracker.artifact(output / f"evaluation_{state}.json")
    result = _result(job, outcome, tracker)
    tracker.metrics(_metrics(result, outcome), step=_last_step(outcome))
    tracker.tags({"dropped": ",".join(map(str, result["dropped"]))} | ({"round_trip": "ok"} if outcome.drop else {}))
    _log_figures(tracker, outcome, output, job.source.name)
    _say_if_slower(job, result)
    if result["collapse"]:
        tracker.tags({COLLAPSE_TAG: "; ".join(result["collapse"])})
    elif outcome.drop and job.config.tracking.register_model:
        result["registered"] = _register(job, tracker, Path(outcome.drop.checkpoint), result)
    result["seconds"]["total"] = round(time.perf_counter() - started, 2)
    result["status"] = "FINISHED"
    write_json(result, output / "result.json")
    tracker.artifact(output / "result.json")
    tracker.artifact(output / "job.log")
    return result


def _result(job: "Job", outcome: Outcome, tracker: Tracker) -> dict[str, Any]:
    dropped = outcome.selection.doomed
    parameters = job.source.num_parameters
    measured = summarise(outcome.states)
    measured["speed"]["generation_tokens_per_s"] = _generation_speed(job, outcome)
    if outcome.quantized:
        measured["speed"]["plain_prompt_tokens_per_s"] = plain_speeds(outcome.quantized)
    sizes = {state: one.size_gib for state, one in outcome.quantized.items()}
    cuts = {"dense": (), "pruned": dropped}
    return {
        "schema": RESULT_SCHEMA,
        "run_id": tracker.run_id,
        "experiment": tracker.experiment,
        "status": "RUNNING",
        "method": job.config.prune.method,
        "transfer": job.config.transfer,
        "model": job.source.name,
        "num_layers": job.source.num_layers,
        "num_drop": job.num_drop,
        "dtype": outcome.dtype,
        "seed": job.config.seed,
        "settings": flatten(job.config.model_dump(mode="json")),
        "calibration": job.calibration.about("num_blocks") | _likeness(job, outcome),
        "corpora": {corpus.name: corpus.about("num_windows") for corpus in job.evals},
        "dropped": list(dropped),
        "scores": list(outcome.scores.values),
        **measured,
        "parameters": {
            "dense": parameters,
            "pruned": parameters - sum(job.source.layer_parameters[index] for index in dropped),
        },
        "size_gib": {state: size_gib(job.source, cut) for state, cut in cuts.items()} | sizes,
        "kv_cache_bytes_per_token": {state: cache_bytes_per_token(job.source, cut) for state, cut in cuts.items()},
        "seconds": {phase: round(outcome.watch.seconds.get(phase, 0.0), 2) for phase in PHASES},
        "shared": sorted(outcome.watch.shared),
        "peak_memory_gib": outcome.peak_memory_gib,
        "weights_gib": outcome.weights_gib,
        "trained_tokens": outcome.trained_tokens,
        "stage2_steps": outcome.transfer_steps,
        "left_out": outcome.left_out,
        "collapse": collapses(outcome.scores, job.protected, measured["perplexity"]),
        "tuning_loss": outcome.tuning_loss,
        "curve": outcome.curve,
        "checkpoint": outcome.drop.checkpoint if outcome.drop else None,
        "quantized_checkpoint": str(outcome.quantized_checkpoint) if outcome.quantized_checkpoint else None,
        "registered": None,
    }


def _say_if_slower(job: "Job", result: dict[str, Any]) -> None:
    """A machine that has other things to do makes one measurement differ from the next."""
    wanted, speed = job.config.prune.min_speedup, result["speed"]["prompt_tokens_per_s"]
    if wanted is not None and speed["pruned"] < wanted * speed["dense"]:
        ratio = speed["pruned"] / speed["dense"]
        log.warning("measured again at the end, a prompt is %.3f times as fast, %g was asked for", ratio, wanted)


def _likeness(job: "Job", outcome: Outcome) -> dict[str, Any]:
    """What tells whether the calibration text is like what is evaluated on."""
    blocks_NT = job.calibration.blocks
    half = len(blocks_NT) // 2
    return {
        "loss_dense": outcome.selection.loss_dense,
        "divergence": {corpus.name: token_divergence(blocks_NT, corpus.blocks) for corpus in job.evals},
        "divergence_of_halves": token_divergence(blocks_NT[:half], blocks_NT[half:]) if half else None,
    }


def _generation_speed(job: "Job", outcome: Outcome) -> dict[str, float]:
    """Tokens per second of the dense and of the pruned folder; empty: not asked for, or there is no room for them."""
    if not job.config.eval.generation_runs or outcome.drop is None:
        return {}
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = weights_dtype(job.config, device)
    folders = {"dense": str(job.source.folder), "pruned": outcome.drop.checkpoint}
    try:
        return {
            state: measure_folder(folder, job.config.eval, device, dtype, trust=job.source.trust_remote_code)
            for state, folder in folders.items()
        }
    except ModelError as error:
        # The job has done its work; it is not to fail for a figure.
        log.warning("generation is not measured: %s", error)
        return {}


def _metrics(result: dict[str, Any], outcome: Outcome) -> dict[str, float]:
    values = {
        "prune/num_dropped": len(result["dropped"]),
        "prune/parameters_ratio": result["parameters"]["pruned"] / result["parameters"]["dense"],
        "prune/loss_dense": outcome.selection.loss_dense,
        "prune/loss_bypassed": outcome.selection.loss_bypassed,
        "perf/peak_memory_gib": max(result["peak_memory_gib"]),
    }
    if outcome.drop:
        values["prune/max_logit_difference"] = outcome.drop.max_logit_difference
    values |= {f"prune/size_gib_{state}": gib for state, gib in result["size_gib"].items()}
    if outcome.tuning_loss is not None:
        values["tune/loss"] = outcome.tuning_loss
    values |= {f"perf/{phase}_s": seconds for phase, seconds in result["seconds"].items()}
    values["prune/trained_tokens"] = outcome.trained_tokens
    values |= {f"perf/weights_gib_rank_{rank:03d}": gib for rank, gib in enumerate(result["weights_gib"])}
    return values | metrics(result)


def _last_step(outcome: Outcome) -> int:
    return outcome.gate_history[-1][0] + 1 if outcome.gate_history else 0


def _log_figures(tracker: Tracker, outcome: Outcome, output: Path, name: str) -> None:
    import numpy as np

    from tsp.figures import gate_heatmap, gate_trajectories

    history, doomed = outcome.gate_history, outcome.selection.doomed
    if not history:
        return
    folder = output / "figures"
    folder.mkdir(exist_ok=True)
    steps = [step for step, _, _ in history]
    gates_SL = np.array([values for _, _, values in history])
    stride = max(1, len(history) // _HEATMAPS)
    # MLflow's slider stands at the first step when the chart opens: there has to be a picture.
    for end in sorted({1, *range(stride, len(history), stride), len(history)}):
        picture = gate_heatmap(folder / "gate_heatmap.png", gates_SL[:end], steps=steps[:end], doomed=doomed)
        tracker.image(picture, key="gates/heatmap", step=steps[end - 1])
    # Nor does it say which step is the last.
    tracker.artifact(picture, folder="figures")
    boundary = next((step for step, stage, _ in history if stage == "stage2"), None)
    trajectories = gate_trajectories(
        folder / "gate_trajectories.png",
        gates_SL,
        steps=steps,
        doomed=doomed,
        stage_boundary=boundary,
        title=f"{name}: gates of both stages, and the layers that went",
    )
    tracker.artifact(trajectories, folder="figures")


def _register(job: "Job", tracker: Tracker, checkpoint: Path, result: dict[str, Any]) -> dict[str, Any]:
    config, source = job.config, job.source
    name = config.tracking.register_as or default_model_name(source.name)
    ppl = "; ".join(
        f"{corpus} {values['dense']:.2f} -> {values['pruned']:.2f} (bare drop {values['bare_drop']:.2f})"
        for corpus, values in result["perplexity"].items()
    )
    dropped = ",".join(map(str, result["dropped"]))
    tags = {
        "base_model": source.name,
        "base_revision": source.revision or "",
        "method": config.prune.method,
        "transfer": config.transfer,
        "dropped": dropped,
        "run_id": tracker.run_id,
        "calibration_fingerprint": job.calibration.fingerprint,
        **{
            f"ppl_{state}/{corpus}": f"{value:.4f}"
            for corpus, row in result["perplexity"].items()
            for state, value in row.items()
        },
    }
    description = f"{source.name} without layers {dropped} of {source.num_layers}. Perplexity: {ppl}."
    metadata = {"base_model": source.name, "dropped": result["dropped"]}
    version = tracker.register(checkpoint, name, tags=tags, description=description, metadata=metadata)
    return {"name": name, "version": version}
