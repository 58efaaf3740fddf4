"""Stage 2: regularise the gap of the doomed layers, so that the others take over what they know; then they can go.

L2 = task + hidden * relative distance to the dense model's hidden states + lambda2 * sum_{i in doomed} ||gap_i||
(paper, section 3.2), with task = lm * cross-entropy + distill * KL(dense || pruned). Gates of the doomed layers `hold`
at 1 (paper), `anneal` to 0, or are `off` from the first step; the others' gates are 1 throughout.
"""

import functools
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsp.adapters import adapters_off, add_adapters, merge_adapters, remove_adapters
from tsp.checkpoint import round_weights
from tsp.config import Stage2Config
from tsp.decoder import Decoder
from tsp.gates import Gates
from tsp.interrupts import deferred
from tsp.losses import hidden_loss, lm_loss, task_loss
from tsp.methods.base import Bench
from tsp.methods.trsp.peak_lr import peak_lr
from tsp.mounted import Mounted
from tsp.optimizer_state import set_adam
from tsp.penalties import gap_norm
from tsp.progress import phase
from tsp.sharding import AdamW
from tsp.states import State
from tsp.training import StepStats, micro_batches, train, usable


class Taught(NamedTuple):
    """What the dense model makes of some tokens, without gradient."""

    logits_BTV: Tensor
    hidden: list[Tensor]
    """`[B, T, D]`, see `Decoder.hidden_states`; empty without `stage2.hidden`."""


# Takes tokens [B, T].
Teacher = Callable[[Tensor], Taught]


def transfer(bench: Bench, doomed: Collection[int], *, save_dtype: torch.dtype) -> None:
    """Train what `stage2.trainable` says; afterwards the weights hold it, in values that `save_dtype` can represent.

    Args:
        bench: the frozen, unmounted model and what goes with it.
        doomed: layers that will be dropped.
        save_dtype: of the checkpoint to come.
    """
    config, engine, decoder = bench.config.stage2, bench.engine, bench.decoder
    if config.steps == 0 or (bench.seconds_left is not None and bench.seconds_left <= 0):
        return
    # The adapters' start values do not depend on what ran before in this process.
    torch.manual_seed(bench.config.seed)
    _make_trainable(bench, doomed)
    gates = Gates(decoder, gated=doomed, recorded=doomed)
    optimizer = AdamW(weight_decay=config.weight_decay, clip=config.clip) if config.trainable != "none" else None
    known = bench.known("stage2", {"doomed": sorted(doomed)})
    try:
        started = time.perf_counter()
        peak = known.about["peak_lr"] if known else config.lr
        if peak is None:
            peak = peak_lr(bench, doomed)
        if bench.seconds_left is not None:
            bench.seconds_left -= time.perf_counter() - started
        with (
            engine.mounted(decoder.model, optimizer) as model,
            _teacher(bench, model, gates) as teacher,
            gates.attached(),
        ):
            bench.model = model
            weight = known.about["weight"] if known else _penalty_weight(bench, model, gates)
            _Training(bench, model, teacher, gates, sorted(doomed), peak, weight).run(known)
    except Exception:
        # Who stops it between two steps goes on with the model, whose own weights he has put aside.
        remove_adapters(decoder.model)
        decoder.model.requires_grad_(False)
        raise
    finally:
        bench.model = None
        decoder.bypass(())
    if config.trainable == "lora":
        changed = merge_adapters(decoder.model, engine.gathered)
    else:
        changed = [parameter for parameter in decoder.model.parameters() if parameter.requires_grad]
    round_weights(changed, save_dtype, engine.gathered)
    decoder.model.requires_grad_(False)


def learning_rate(step: int, num_steps: int, peak: float, warmup_share: float) -> float:
    """Linear warm-up, then a half cosine from the peak to a tenth of it."""
    warmup = warmup_share * num_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def gate_value(step: int, num_steps: int, config: Stage2Config) -> float:
    """What the doomed layers' gates are at a step."""
    if config.gates == "anneal":
        return max(0.0, 1.0 - step / (config.anneal_share * num_steps))
    return {"hold": 1.0, "off": 0.0}[config.gates]


@dataclass
class _Training:
    """The steps of stage 2 on a mounted model."""

    bench: Bench
    model: Mounted
    teacher: Teacher
    gates: Gates
    doomed: list[int]
    peak: float
    """Learning rate."""
    weight: float
    """lambda2, in the unit of the loss."""

    def __post_init__(self) -> None:
        self.config = self.bench.config.stage2
        self.gap_sizes = torch.zeros(len(self.gates.values), device=self.bench.engine.device)
        """Mean gap of each layer in the last step, this rank's."""
        self.own_gates: torch.optim.Adam | None = None
        """The optimizer where only gates are trained."""
        if self.config.trainable == "none":
            self.own_gates = torch.optim.Adam([self.gates.values], lr=self.peak)
            self.gates.values.requires_grad_(True)

    def run(self, known: State | None) -> None:
        """All steps, or those that are left.

        Args:
            known: of a run before, which went on from here.
        """
        bench, seconds, spent, first_step = self.bench, self.bench.seconds_left, 0.0, 0
        if known:
            self._go_on_from(known)
            spent, first_step = known.about["seconds"], known.step
        started = time.perf_counter() - spent
        with deferred() as pending:
            stats = self._train(
                num_steps=self.config.steps,
                seconds=None if seconds is None else seconds - spent,
                pending=pending,
                first_step=first_step,
                before_step=self._before_step,
                after_step=self._after_step,
            )
            total = self.config.steps if seconds is None else None
            for step in phase(stats, "stage 2", total, show=bench.engine.is_first):
                gaps = enumerate(bench.engine.mean(self.gap_sizes).tolist())
                more = {f"stage2/gap/layer_{index:03d}": gap for index, gap in gaps} | {"stage2/peak_lr": self.peak}
                bench.log("stage2", step, self.gates.readable(), more)
                about = {"peak_lr": self.peak, "weight": self.weight, "seconds": time.perf_counter() - started}
                bench.keep("stage2", {"doomed": self.doomed}, step, self._state, about)

    def _train(self, **options: Any) -> Iterator[StepStats]:
        bench = self.bench
        options |= {"seed": bench.transfer_seed, "loss": self._loss, "decoder": bench.decoder}
        return train(bench.engine, self.model, bench.blocks_NT, bench.config.train, **options)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        if self.own_gates:
            yield "gates", self.gates.values
            yield from self.own_gates.state[self.gates.values].items()
        yield from self.model.state()

    def _go_on_from(self, known: State) -> None:
        if self.own_gates:
            moments = dict(known.tensors)
            with torch.no_grad():
                self.gates.values.copy_(moments.pop("gates"))
            set_adam(self.own_gates, self.gates.values, moments)
            return

        def still(step: int, num_steps: int) -> None:
            self._before_step(step, num_steps)
            self.model.set_lr(0.0)

        for _ in self._train(num_steps=1, before_step=still):
            pass  # AdamW's state is made at its first step.
        self.model.set_state(known.tensors, self.bench.engine.gathered)

    def _before_step(self, step: int, num_steps: int) -> None:
        self.model.set_lr(learning_rate(step, num_steps, self.peak, self.config.warmup_share))
        self.gap_sizes.zero_()
        if self.own_gates is None:
            gate = gate_value(step, num_steps, self.config)
            self.gates.values[self.doomed] = gate
            # A closed layer is not computed, and under ZeRO-3 not gathered either.
            self.bench.decoder.bypass(self.doomed if gate == 0 else ())
            if gate == 0:
                for index in self.doomed:
                    # Else deepspeed 0.19 goes on with its last gradient, which then counts in the norm for clipping.
                    self.bench.decoder.layers[index].requires_grad_(False)

    def _after_step(self, step: int) -> None:
        if self.own_gates is not None and self.gates.values.grad is not None:
            self.gates.values.grad = self.bench.engine.mean(self.gates.values.grad)
            self.own_gates.step()
            self.own_gates.zero_grad()

    def _loss(self, tokens_BT: Tensor, share: float) -> dict[str, Tensor]:
        config = self.config
        dense = self.teacher(tokens_BT) if config.has_teacher else None
        self.gates.gaps.clear()
        with self.bench.decoder.hidden_states(config.hidden > 0) as states:
            logits_BTV = self.model(tokens_BT)
        gaps = _sizes(self.bench, self.gates)
        task = task_loss(
            logits_BTV,
            tokens_BT,
            share,
            **dict(config.task),
            teacher_BTV=dense.logits_BTV if dense and config.task.distill else None,
            temperature=config.temperature,
        )
        gap = self.weight * sum(gaps.values(), start=logits_BTV.new_zeros((), dtype=torch.float32))
        parts = {"total": task.total + gap, "gap": gap, "lm": task.lm}
        if config.task.distill:
            parts["distill"] = task.distill
        if dense and dense.hidden:
            parts["hidden"] = hidden_loss(states, dense.hidden, self.doomed)
            parts["total"] = parts["total"] + config.hidden * parts["hidden"]
        if torch.isfinite(parts["total"]):  # Else it is left out.
            for index, size in gaps.items():
                self.gap_sizes[index] += size.detach() / self.bench.config.train.accumulation
        return parts


def _penalty_weight(bench: Bench, model: Mounted, gates: Gates) -> float:
    """lambda2, in the unit that the first step's sequences give before anything is trained."""
    config, engine = bench.config.stage2, bench.engine
    if config.lambda2_unit == "one" or config.gates == "off" or not config.lambda2:
        return config.lambda2

    def loss(tokens_BT: Tensor, share: float) -> dict[str, Tensor]:
        gates.gaps.clear()
        lm = lm_loss(model(tokens_BT), tokens_BT, share)
        parts = torch.stack([lm, *_sizes(bench, gates).values()])
        return {"total": parts.sum(), "all": parts}

    with torch.no_grad():
        batches = micro_batches(engine, bench.blocks_NT, bench.config.train, 0, bench.transfer_seed)
        parts = [found["all"] for found in usable(engine, batches, loss, [])]
    if not parts:
        return config.lambda2  # The training will say why.
    first = engine.mean(torch.stack(parts).mean(dim=0))
    gap = float(first[1:].sum())
    return config.lambda2 * float(first[0]) / gap if gap else config.lambda2


def _sizes(bench: Bench, gates: Gates) -> dict[int, Tensor]:
    """Of this micro-batch's gaps, by layer; the mean over those of a step, on all ranks, is the step's."""
    config, parts = bench.config.stage2, bench.engine.world_size * bench.config.train.accumulation
    return {index: gap_norm(gap, config.gap_norm, config.gap_reduction, parts) for index, gap in gates.gaps.items()}


def _make_trainable(bench: Bench, doomed: Collection[int]) -> None:
    config, decoder = bench.config.stage2, bench.decoder
    # A layer that is closed from the first step would never get a gradient.
    closed = doomed if config.gates == "off" else ()
    learning = [index for index in range(decoder.num_layers) if index not in closed]
    if config.trainable == "lora":
        add_adapters(decoder, learning, config.lora, bench.engine.dtype)
    elif config.trainable == "full":
        decoder.model.requires_grad_(True)
        for index in closed:
            decoder.layers[index].requires_grad_(False)


@contextmanager
def _teacher(bench: Bench, student: Mounted, gates: Gates) -> Iterator[Teacher]:
    """The dense model: the student's own frozen weights where only adapters or gates train, else a second copy."""
    config, decoder = bench.config.stage2, bench.decoder

    def taught(dense: Decoder, model: Mounted, tokens_BT: Tensor) -> Taught:
        with torch.no_grad(), dense.hidden_states(config.hidden > 0) as states:
            logits_BTV = model(tokens_BT)
        return Taught(logits_BTV, states)

    def adapters_off_forward(tokens_BT: Tensor) -> Taught:
        with gates.opened(), decoder.bypassing(()), adapters_off(decoder.model), student.apart():
            return taught(decoder, student, tokens_BT)

    if config.trainable == "full" and config.has_teacher:
        dense = bench.load_again()
        with bench.engine.mounted(dense.model) as copy:
            yield functools.partial(taught, dense, copy)
    else:
        yield adapters_off_forward
