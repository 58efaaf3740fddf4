"""Selection by the first-order Taylor term of the loss: how much a layer's weights matter as they are.

The gradients of all layers' weights are needed at once. DeepSpeed holds them as it does in training, without a state of
an optimizer: the weights' size in gradients, and in bf16 twice that in fp32 copies of the weights, all of it shared
among the ranks from ZeRO-2 on and offloaded where the DeepSpeed JSON says so. One tensor at a time is whole on a rank.
"""

import math

import torch
from torch import Tensor

from tsp.data import evenly_spread
from tsp.evaluation.perplexity import mean_losses
from tsp.evaluation.windows import batches
from tsp.methods.base import Bench
from tsp.mounted import Mounted
from tsp.records import Scores
from tsp.selection import ascending
from tsp.sharding import Gradients


def taylor(bench: Bench, num_drop: int) -> Scores:
    """Sum of |w * dL/dw| over a layer's weights; the lowest go (arXiv 2402.02834, section 2.1).

    L is the mean cross-entropy on the calibration text: the gradient is that of all of it, and only then the absolute
    value is taken.
    """
    blocks, config = evenly_spread(bench.blocks_NT, bench.config.prune.score_blocks), bench.config.train
    # As many sequences at once as a training step can hold.
    micro_batch = config.batch_size // (bench.engine.world_size * config.accumulation)
    optimizer = Gradients(num_micro_batches=math.ceil(len(blocks) / (micro_batch * bench.engine.world_size)))
    bench.decoder.layers.requires_grad_(True)
    try:
        with bench.engine.mounted(bench.decoder.model, optimizer) as model:
            _backward(bench, model, blocks, micro_batch, optimizer)
            model.release()
            values = tuple(_saliency(bench, layer) for layer in bench.decoder.layers)
    finally:
        bench.decoder.layers.requires_grad_(False)
        # Below ZeRO-1 the gradients are the parameters' own.
        bench.decoder.layers.zero_grad()
    return Scores(method="taylor", values=values, order=tuple(ascending(values)))


def _backward(bench: Bench, model: Mounted, blocks_NT: Tensor, micro_batch: int, optimizer: Gradients) -> None:
    engine = bench.engine
    # DeepSpeed takes the mean over ranks and micro-batches; what is wanted is the mean over sequences.
    scale = engine.world_size * optimizer.num_micro_batches / len(blocks_NT)
    ranks = {"rank": engine.rank, "world_size": engine.world_size}
    mine = batches(blocks_NT, batch_size=micro_batch, **ranks, device=engine.device, name="taylor")
    for number, (tokens_bT, counted) in enumerate(mine):
        if number:
            model.end_micro_batch()
        losses = mean_losses(model(tokens_bT), tokens_bT)[: counted.stop - counted.start]
        model.backward((losses.sum() * scale).float())


def _saliency(bench: Bench, layer: torch.nn.Module) -> float:
    total = 0.0
    for parameter in layer.parameters():
        with bench.engine.gathered([parameter]):
            product = parameter.detach().float() * bench.engine.gradient(parameter).float()
            total += float(product.abs().sum(dtype=torch.float64))
    return total
