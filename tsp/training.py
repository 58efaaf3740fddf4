"""The one training loop: batches, loss, backward, update -> a stream of step statistics.

The order of the sequences depends on the seed alone, not on the number of ranks; a step sees the same global batch on
any number of them, and its losses are means over that batch's tokens, of which not all need count (`targets.py`).
"""

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tsp.config import TrainConfig
from tsp.decoder import Decoder
from tsp.engine import Engine
from tsp.errors import NumbersError
from tsp.interrupts import NOTHING, Pending, interrupt
from tsp.mounted import Mounted
from tsp.numbers import finite_everywhere, first_not_finite
from tsp.targets import share

# Takes tokens [b, T] of a micro-batch, and the share of the whole step's targets that count (`targets.share`); returns
# the parts of the loss, each `[]`; `total` is what is differentiated.
LossFunction = Callable[[Tensor, float], dict[str, Tensor]]

PATIENCE = 3
"""Steps in a row without a finite loss that end the job."""


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What one optimizer step did."""

    step: int
    losses: Mapping[str, float]
    """Means over the global batch."""
    seconds: float
    """Mean over the ranks, which therefore agree."""
    tokens: int
    """Of the global batch."""
    left_out: int = 0
    """Micro-batches whose loss was not finite on some rank; of all: nothing was updated, and there are no losses."""
    interrupted: bool = False
    """A signal has come to some rank: it is the last step."""


def train(
    engine: Engine,
    model: Mounted,
    blocks_NT: Tensor,
    config: TrainConfig,
    *,
    num_steps: int,
    seconds: float | None = None,
    seed: int,
    loss: LossFunction,
    decoder: Decoder | None = None,
    pending: Pending = NOTHING,
    first_step: int = 0,
    before_step: Callable[[int, int], None] = lambda step, num_steps: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> Iterator[StepStats]:
    """Run `num_steps` steps, or as many as fit into some seconds. A signal ends it behind the step that it comes in.

    Args:
        engine: averages the losses over the ranks.
        model: what is trained, or carries the gates.
        blocks_NT: calibration tokens `[N, T]` int64.
        config: global batch and accumulation.
        num_steps: optimizer steps.
        seconds: instead of `num_steps`, by rank 0's clock; at least two steps are done.
        seed: of the order of the blocks.
        loss: of one micro-batch.
        decoder: layers, one of which is named where numbers are not finite.
        pending: signals that wait for the end of a step (`interrupts.deferred`).
        first_step: to begin with, of `num_steps`; what is trained is as it was then.
        before_step: called with the step's number and the number of all steps before its forward passes (schedules);
            of a training in seconds that is an estimate, made anew before each step.
        after_step: called after its backward passes (updates of what DeepSpeed does not train).

    A micro-batch whose loss is not finite on some rank is left out on all; another of the step then counts twice.

    Raises:
        NumbersError: `PATIENCE` steps in a row had no other.
        KeyboardInterrupt: on every rank, where a signal came to one; the step's stats have been yielded.
    """
    estimate = _fixed(num_steps) if seconds is None else _within(engine, num_steps, seconds, first_step)
    in_a_row = 0
    for step in itertools.count(first_step):
        total = estimate(step)
        if step >= total:
            if pending.number is not None:  # It came behind the last exchange.
                raise interrupt(pending.number)
            return
        started = time.perf_counter()
        before_step(step, total)
        batches = micro_batches(engine, blocks_NT, config, step, seed)
        sums, left_out = _learn(engine, model, batches, loss)
        if sums:
            after_step(step)
        in_a_row = 0 if sums else in_a_row + 1
        if in_a_row == PATIENCE:
            place = first_not_finite(engine, decoder, model, left_out[0]) if decoder else "no layer was looked at"
            raise NumbersError(
                f"the loss was not finite in {PATIENCE} steps in a row, the last is {step}: {place}; give a smaller "
                "learning rate (stage1.lr, stage2.lr) or model.dtype=fp32, or look at the model's weights"
            )
        # One exchange for all that the ranks have to agree on.
        own = [time.perf_counter() - started, pending.number is not None]
        losses = [value / config.accumulation for value in sums.values()]
        exchanged = torch.stack([*losses, *torch.tensor(own, device=engine.device)])
        *means, mean_seconds, interrupted = engine.mean(exchanged).tolist()
        yield StepStats(
            step=step,
            losses=dict(zip(sums, means, strict=True)),
            seconds=mean_seconds,
            tokens=config.batch_size * blocks_NT.shape[1] if sums else 0,
            left_out=len(left_out),
            interrupted=interrupted > 0,
        )
        if interrupted:
            raise interrupt(pending.number or signal.SIGTERM)


def _learn(
    engine: Engine, model: Mounted, batches: Iterable[tuple[Tensor, float]], loss: LossFunction
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The backward passes of a step, at whose last one what is trained by DeepSpeed is updated.

    Returns:
        The sums of the parts of the loss, of none if nothing was finite, and the micro-batches that were left out.
    """
    sums: dict[str, Tensor] = {}
    left_out: list[Tensor] = []
    for parts in usable(engine, batches, loss, left_out):
        model.backward(parts["total"])
        model.end_micro_batch()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.detach().float()
    return sums, left_out


def usable(
    engine: Engine, batches: Iterable[tuple[Tensor, float]], loss: LossFunction, left_out: list[Tensor]
) -> Iterator[dict[str, Tensor]]:
    """The parts of the loss of each micro-batch where `total` is finite on every rank.

    DeepSpeed counts micro-batches: the first of them stands in for each that is left out. None, if none is finite.

    Args:
        engine: compares the ranks.
        batches: of `micro_batches`.
        loss: of one of them.
        left_out: the tokens of those that are left out are added to it.
    """
    first: tuple[Tensor, float] | None = None
    for batch in batches:
        parts = loss(*batch)
        if finite_everywhere(engine, parts["total"]):
            first = first or batch
            yield parts
        else:
            left_out.append(batch[0])
            del parts  # No backward pass lets go of what it holds for one.
    if first is not None:
        for _ in left_out:
            yield loss(*first)


def micro_batches(
    engine: Engine, blocks_NT: Tensor, config: TrainConfig, step: int, seed: int
) -> Iterator[tuple[Tensor, float]]:
    """This rank's part of a step in equal parts `[b, T]`, each with the share of the step's targets that counts."""
    indices = step_indices(len(blocks_NT), config.batch_size, step, seed)
    counted = share(blocks_NT[indices])
    for micro_batch in blocks_NT[_mine(engine, indices)].to(engine.device).chunk(config.accumulation):
        yield micro_batch, counted


def _fixed(num_steps: int) -> Callable[[int], int]:
    return lambda step: num_steps


def _within(engine: Engine, guess: int, seconds: float, first_step: int) -> Callable[[int], int]:
    """The number of steps that fit, from the time of those done; the first is not counted, for it warms up."""
    started = first_done = time.perf_counter()

    def estimate(step: int) -> int:
        nonlocal first_done
        now = time.perf_counter()
        done = step - first_step
        if done <= 1:
            first_done = now
        if done < 2:
            return max(guess, first_step + 2)
        each = (now - first_done) / (done - 1)
        left = max(0.0, seconds - (now - started))
        # Half a step over is as good as half a step under.
        return engine.from_first(step + math.floor(left / each + 0.5))

    return estimate


def step_indices(num_blocks: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The blocks of one step, `[batch_size]`; every epoch has another order, and epochs join without a gap."""
    samples = range(step * batch_size, (step + 1) * batch_size)
    orders: dict[int, Tensor] = {}
    indices = []
    for sample in samples:
        epoch, position = divmod(sample, num_blocks)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(num_blocks, generator=generator)
        indices.append(int(orders[epoch][position]))
    return torch.tensor(indices)


def _mine(engine: Engine, indices: Tensor) -> Tensor:
    return indices.chunk(engine.world_size)[engine.rank]
