"""What a method is, and what it is given.

A method has a verb `score(bench, num_drop)` that returns an order of the layers; selection only cuts, protects and
swaps it. A transfer is a verb of its own, `transfer(bench, doomed, save_dtype=...)`, so that every selection can be
combined with every transfer. Neither knows of ranks, DeepSpeed or MLflow.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tsp.config import JobConfig
from tsp.decoder import Decoder
from tsp.engine import Engine
from tsp.evaluation.perplexity import window_losses
from tsp.journal import Journal, digest_of
from tsp.mounted import Mounted
from tsp.records import Scores
from tsp.states import State, States, Tensors
from tsp.training import StepStats

log = logging.getLogger("tsp")


class Tracker(Protocol):
    """The part of `tracking.Tracker` that methods use."""

    def metrics(self, values: dict[str, float], step: int) -> None: ...


@dataclass
class Bench:
    """Everything a method works with."""

    config: JobConfig
    engine: Engine
    decoder: Decoder
    blocks_NT: Tensor
    """Calibration tokens, int64."""
    tracker: Tracker
    load_again: Callable[[], Decoder]
    """A second, frozen copy of the dense model: the teacher where all weights are trained."""
    model: Mounted | None = None
    """The model, mounted; while scoring, and between two steps of stage 2."""
    protected: Collection[int] = ()
    read_by_others: Collection[int] = ()
    """Layers whose keys and values later ones read (`source.Source`): they always have to run."""
    journal: Journal = field(default_factory=Journal)
    """What this job has measured before it was interrupted."""
    states: States = field(default_factory=States)
    """What it has learned before that."""
    gate_history: list[tuple[int, str, list[float]]] = field(default_factory=list)
    """`(global step, stage, gates [L])` of every logged step, for the figures."""
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """What the tracker was told, by global step: a later job with the same selection tells it again."""
    global_step: int = 0
    trained_tokens: int = 0
    seconds_left: float | None = None
    """For the transfer; None: it trains for `stage2.steps`."""
    transfer_steps: int = 0
    """Optimizer steps that the transfer did."""
    left_out: int = 0
    """Micro-batches whose loss was not finite."""
    after_step: Callable[[str, StepStats, list[float]], None] = lambda stage, stats, gates: None
    """Called on every rank between two steps; what it raises, on all of them alike, stops the job there."""

    @property
    def transfer_seed(self) -> int:
        """Of the order of the blocks in a training transfer; learned gates take them in that of `seed`."""
        return self.config.seed + 1

    def loss_without(self, bypassed: Collection[int], blocks_NT: Tensor, name: str | None = None) -> float:
        """Mean cross-entropy on some blocks with these layers bypassed, nats per token; the same on every rank."""
        model = self.model
        assert model is not None, "measured while it is mounted"

        def measured() -> list[float]:
            sharing = self.engine.sharing(self.config.eval.batch_size)
            with self.decoder.bypassing(bypassed):
                return [float(window_losses(model, blocks_NT, **sharing, name=name).mean())]

        question = {"without": sorted(bypassed), "blocks": digest_of(blocks_NT), "trained": self.trained_tokens}
        return self.journal.once(question, measured)[0]

    def log(self, stage: str, stats: StepStats, gates: list[float], more: Mapping[str, float] | None = None) -> None:
        """Log one step of a stage under the metric names of the contract, and count it."""
        values = {f"{stage}/loss/{name}": loss for name, loss in stats.losses.items()}
        values |= {"perf/step_s": stats.seconds, "perf/tokens_per_s": stats.tokens / stats.seconds}
        if stats.left_out:
            self.left_out += stats.left_out
            values[f"{stage}/left_out"] = stats.left_out
            log.warning(
                "%s, step %d: %d micro-batches with a loss that is not finite were left out",
                stage,
                stats.step,
                stats.left_out,
            )
        self.log_gates(stage, gates, values | dict(more or {}))
        self.trained_tokens += stats.tokens
        self.transfer_steps += stage == "stage2"
        self.after_step(stage, stats, gates)

    def known(self, stage: str, question: Mapping[str, Any]) -> State | None:
        """What a run before has kept of a stage, counted and logged as if it had been learned just now.

        Args:
            stage: `stage1` or `stage2`.
            question: what it depends on beside the job's settings; JSON.
        """
        state = self.states.last(stage, question)
        if state is None:
            return None
        told = state.about["bench"]
        for name in ("trained_tokens", "transfer_steps", "left_out"):
            setattr(self, name, told[name])
        self.gate_history = [(step, of_stage, gates) for step, of_stage, gates in told["gate_history"]]
        self.logged = [(step, values) for step, values in told["logged"]]
        for step, values in self.logged:
            if step >= self.global_step:
                self.tracker.metrics(values, step)
        self.global_step = told["global_step"]
        return state

    def keep(
        self,
        stage: str,
        question: Mapping[str, Any],
        stats: StepStats,
        tensors: Callable[[], Tensors],
        about: Mapping[str, Any],
    ) -> None:
        """Behind a step that is logged: for a run that may have to go on from here.

        Args:
            stage: as for `known`.
            question: as for `known`.
            stats: of the step.
            tensors: gives what the stage trains, the same on every rank.
            about: what else it has to know; JSON.
        """
        counted = ("global_step", "trained_tokens", "transfer_steps", "left_out", "gate_history", "logged")

        def told() -> dict[str, Any]:
            return {**about, "bench": {name: getattr(self, name) for name in counted}}

        self.states.after(stage, question, stats, self.global_step, tensors, told)

    def log_gates(self, stage: str, gates: list[float], values: Mapping[str, float]) -> None:
        """Log the gates `[L]` and what was measured with them as the next step of the run."""
        if self.global_step % self.config.tracking.log_every == 0:
            by_layer = {f"{stage}/gate/layer_{index:03d}": gate for index, gate in enumerate(gates)}
            self.logged.append((self.global_step, by_layer | dict(values)))
            self.tracker.metrics(self.logged[-1][1], self.global_step)
            self.gate_history.append((self.global_step, stage, gates))
        self.global_step += 1


class Method(Protocol):
    """A way to choose layers."""

    def __call__(self, bench: Bench, num_drop: int) -> Scores: ...


class Transfer(Protocol):
    """A way to move what the doomed layers know into the others, whose weights then are values of `save_dtype`.

    Leaves the model unmounted and frozen.
    """

    def __call__(self, bench: Bench, doomed: Collection[int], *, save_dtype: torch.dtype) -> None: ...
