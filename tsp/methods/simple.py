"""Selections that need no text: random, tail, magnitude; and dense, which drops nothing."""

import torch

from tsp.methods.base import Bench
from tsp.records import Scores
from tsp.selection import ascending


def random(bench: Bench, num_drop: int) -> Scores:
    """A seeded random order: what every other selection has to beat."""
    generator = torch.Generator().manual_seed(bench.config.seed)
    order = torch.randperm(bench.decoder.num_layers, generator=generator).tolist()
    return _ordered("random", order)


def tail(bench: Bench, num_drop: int) -> Scores:
    """The last layers but the very last, from the end."""
    last = bench.decoder.num_layers - 1
    return _ordered("tail", [*range(last - 1, -1, -1), last])


def magnitude(bench: Bench, num_drop: int) -> Scores:
    """Sum of |w| over a layer's weights; the lowest go (arXiv 2402.02834, section 2.1)."""
    values = []
    for layer in bench.decoder.layers:
        size = 0.0
        for parameter in layer.parameters():
            with bench.engine.gathered([parameter]):
                size += float(parameter.detach().abs().sum(dtype=torch.float64))
        values.append(size)
    return Scores(method="magnitude", values=tuple(values), order=tuple(ascending(values)))


def dense(bench: Bench, num_drop: int) -> Scores:
    """No layer goes: with a transfer, the floor under what any pruned model can be compared with."""
    return Scores(method="dense", values=(1.0,) * bench.decoder.num_layers, order=())


def _ordered(method: str, order: list[int]) -> Scores:
    return Scores(method=method, values=tuple(float(order.index(i)) for i in range(len(order))), order=tuple(order))
