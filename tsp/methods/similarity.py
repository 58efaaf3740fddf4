"""Selections that compare hidden states, in one pass without gradient: shortgpt, angular, streamline.

h_i is what layer i receives, `[B, T, D]`; h_L is what the last layer emits, before the final norm (method.md, section
5). A layer, or a block of them, that turns the hidden state little is thought to do little.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tsp.data import evenly_spread
from tsp.errors import ConfigError
from tsp.evaluation.windows import per_window
from tsp.methods.base import Bench
from tsp.records import Scores
from tsp.selection import ascending


def shortgpt(bench: Bench, num_drop: int) -> Scores:
    """Block influence 1 - mean_t cos(h_i[t], h_{i+1}[t]); the lowest go, at once (arXiv 2403.03853, equation 1)."""
    values = _distances(bench, 1, _turn, "shortgpt")
    return Scores(method="shortgpt", values=tuple(values), order=tuple(ascending(values)))


def angular(bench: Bench, num_drop: int) -> Scores:
    """arccos(cos(h_l[T], h_{l+n}[T])) / pi at the last token; the block with the least goes (arXiv 2403.17887)."""

    def distance(a_BTD: Tensor, b_BTD: Tensor) -> Tensor:
        cosine = F.cosine_similarity(a_BTD[:, -1], b_BTD[:, -1], dim=-1)
        return torch.arccos(cosine.clamp(-1, 1)) / math.pi

    return _block(bench, num_drop, _distances(bench, num_drop, distance, "angular"), "angular")


def streamline(bench: Bench, num_drop: int) -> Scores:
    """The block with the greatest mean_t cos(h_l[t], h_{l+n}[t]) goes (arXiv 2403.19135, selection only)."""
    return _block(bench, num_drop, _distances(bench, num_drop, _turn, "streamline"), "streamline")


def _turn(a_BTD: Tensor, b_BTD: Tensor) -> Tensor:
    """1 - mean_t cos, `[B]`."""
    return 1 - F.cosine_similarity(a_BTD, b_BTD, dim=-1).mean(dim=1)


def _distances(bench: Bench, span: int, distance: Callable[[Tensor, Tensor], Tensor], name: str) -> list[float]:
    """Mean over the windows of the distance of h_l and h_{l+span}, for each l in [0, L - span].

    Args:
        bench: with the model mounted.
        span: n.
        distance: of two fp32 `[B, T, D]`, `[B]`.
        name: of the phase.
    """
    assert bench.model is not None
    model = bench.model

    def measure(tokens_BT: Tensor) -> Tensor:
        with bench.decoder.hidden_states() as states:
            model.run(tokens_BT)
        pairs = zip(states, states[span:], strict=False)
        return torch.stack([distance(a.float(), b.float()) for a, b in pairs], dim=1)

    blocks = evenly_spread(bench.blocks_NT, bench.config.prune.score_blocks)
    sharing = bench.engine.sharing(bench.config.eval.batch_size)
    return per_window(measure, blocks, **sharing, name=name).mean(dim=0).tolist()


def _block(bench: Bench, num_drop: int, distances: Sequence[float], method: str) -> Scores:
    """The scores of the best block without protected layers; a layer's value is the least of the blocks it is in."""
    allowed = [
        start
        for start in range(len(distances))
        if not set(range(start, start + num_drop)).intersection(bench.protected)
    ]
    if not allowed:
        raise ConfigError(
            f"prune.method {method} drops {num_drop} layers in a row; the protected layers "
            f"{','.join(map(str, sorted(bench.protected)))} leave no room for it; protect fewer or drop fewer"
        )
    start = min(allowed, key=lambda start: (distances[start], -start))
    values = [
        min(distances[first] for first in range(max(0, i - num_drop + 1), min(i, len(distances) - 1) + 1))
        for i in range(bench.decoder.num_layers)
    ]
    return Scores(method=method, values=tuple(values), order=tuple(range(start, start + num_drop)))
