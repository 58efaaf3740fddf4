"""Perplexity by the field's protocol: disjoint windows, exp of the mean of the windows' mean cross-entropies."""

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tsp.evaluation.windows import per_window
from tsp.records import Perplexity
from tsp.targets import IGNORED, targets


def window_losses(forward: Callable[[Tensor], Tensor], blocks_NT: Tensor, **sharing: Any) -> Tensor:
    """Mean cross-entropy of each window.

    Args:
        forward: tokens `[b, T]` -> logits `[b, T, V]`.
        blocks_NT: windows `[N, T]` int64.
        **sharing: of `per_window`.

    Returns:
        `[N]` fp64, nats per token, the same on every rank.
    """
    return per_window(lambda tokens_bT: mean_losses(forward(tokens_bT), tokens_bT), blocks_NT, **sharing)[:, 0]


def mean_losses(logits_bTV: Tensor, tokens_bT: Tensor) -> Tensor:
    """Mean cross-entropy of each window of a batch over its tokens that count, `[b, 1]` fp64, nats per token."""
    wanted = targets(tokens_bT)
    each = F.cross_entropy(logits_bTV[:, :-1].flatten(0, 1).float(), wanted.flatten(), reduction="none")
    num_counted = (wanted != IGNORED).sum(dim=1, keepdim=True)
    return each.view(len(tokens_bT), -1).double().sum(dim=1, keepdim=True) / num_counted


def perplexity(losses_N: Tensor, block_tokens: int) -> Perplexity:
    """The record of one corpus from its windows' losses `[N]`."""
    losses = losses_N.tolist()
    return Perplexity(
        ppl=exp_loss(sum(losses) / len(losses)),
        num_windows=len(losses),
        block_tokens=block_tokens,
        window_losses=tuple(losses),
    )


def exp_loss(loss: float) -> float:
    """A perplexity from a mean cross-entropy; beyond e^700 a double is at its end, and so is such a model."""
    return math.exp(min(loss, 700.0))
