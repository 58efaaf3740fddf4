"""Perplexity by the field's protocol: disjoint windows, exp of the mean of the windows' mean cross-entropies."""

import math
from collections.abc import Callable
from typing import Any

import torch
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
    """Mean cross-entropy of each window of a batch over its tokens that count, `[b, 1]` fp64, nats per token.

    One window at a time: fp32 copies of all logits would be the largest tensors that there are.
    """
    wanted_bT = targets(tokens_bT)
    sums = [
        F.cross_entropy(logits_TV[:-1].float(), wanted_T, reduction="none").double().sum()
        for logits_TV, wanted_T in zip(logits_bTV, wanted_bT, strict=True)
    ]
    return torch.stack(sums).unsqueeze(1) / (wanted_bT != IGNORED).sum(dim=1, keepdim=True)


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
