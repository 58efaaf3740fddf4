"""A learning rate in units of the problem, for `stage2.lr` that is not given.

AdamW's first step moves each weight by the learning rate, against the sign of its gradient, so the loss falls by
`lr * |gradient|_1` as far as it is linear. What there is to win is the task's loss above that of the dense model. Their
ratio is Polyak's step length (Introduction to Optimization, 1987, section 5.3) for descent by signs: it falls with the
number of weights that move, and with a large model is small by itself.
"""

import logging
from collections.abc import Collection

import torch
from torch import Tensor

from tsp.errors import NumbersError
from tsp.losses import lm_loss, task_loss
from tsp.methods.base import Bench
from tsp.numbers import first_not_finite
from tsp.sharding import Gradients
from tsp.training import micro_batches, usable

log = logging.getLogger("tsp")

NOTHING_LOST = 1e-3
"""Where the model without its doomed layers is no worse on the first step's sequences: there is nothing to go by."""


def peak_lr(bench: Bench, doomed: Collection[int]) -> float:
    """`stage2.lr_scale` times the step length on the first step's sequences, without the doomed layers.

    Args:
        bench: the model unmounted; what trains has `requires_grad`, and the weights are those of the dense model.
        doomed: layers that will be dropped.

    Raises:
        NumbersError: no micro-batch has a finite loss.
    """
    config, engine, model = bench.config.stage2, bench.engine, bench.decoder.model
    excesses: list[Tensor] = []
    left_out: list[Tensor] = []
    with engine.mounted(model, Gradients(num_micro_batches=bench.config.train.accumulation)) as mounted:

        def loss(tokens_BT: Tensor, share: float) -> dict[str, Tensor]:
            with torch.no_grad():
                dense_BTV = mounted(tokens_BT)
                floor = config.task.lm * lm_loss(dense_BTV, tokens_BT, share)
            with bench.decoder.bypassing(doomed):
                pruned_BTV = mounted(tokens_BT)
            task = task_loss(
                pruned_BTV,
                tokens_BT,
                share,
                **dict(config.task),
                teacher_BTV=dense_BTV,
                temperature=config.temperature,
            )
            return {"total": task.total, "floor": floor}

        first = micro_batches(engine, bench.blocks_NT, bench.config.train, 0, bench.transfer_seed)
        for number, parts in enumerate(usable(engine, first, loss, left_out)):
            if number:
                mounted.end_micro_batch()
            # Under activation checkpointing the layers run again.
            with bench.decoder.bypassing(doomed):
                mounted.backward(parts["total"])
            excesses.append(parts["total"].detach() - parts["floor"])
        if not excesses:
            with bench.decoder.bypassing(doomed):
                place = first_not_finite(engine, bench.decoder, mounted, left_out[0])
            raise NumbersError(
                f"without the doomed layers the loss is not finite on the first step's sequences: {place}; "
                "give stage2.lr, model.dtype=fp32 or fewer layers to drop, or look at the model's weights"
            )
        mounted.release()
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        norm = sum(float(engine.gradient(parameter).float().abs().sum()) for parameter in trained)
    model.zero_grad()
    excess = float(engine.mean(torch.stack(excesses).mean()))
    if excess <= 0 or norm == 0:
        log.info("stage 2: nothing was lost on the first sequences, learning rate %g", NOTHING_LOST)
        return NOTHING_LOST
    lr = config.lr_scale * excess / norm
    log.info("stage 2: learning rate %.3g = %g * %.4g / %.4g", lr, config.lr_scale, excess, norm)
    return lr
