"""Perplexity by the field's protocol: disjoint windows, exp of the mean of the windows' mean cross-entropies."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tsp.progress import phase
from tsp.records import Perplexity


def window_losses(
    forward: Callable[[Tensor], Tensor],
    blocks_NT: Tensor,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    total: Callable[[Tensor], Tensor] = lambda values: values,
    device: torch.device | str = "cpu",
    name: str = "evaluate",
) -> Tensor:
    """Mean cross-entropy of each window, the windows shared among the ranks.

    Args:
        forward: tokens `[b, T]` -> logits `[b, T, V]`.
        blocks_NT: windows `[N, T]` int64.
        batch_size: windows per forward pass and rank.
        rank: of this process.
        world_size: ranks. Every rank makes the same number of forward passes, as sharded weights demand.
        total: sum of a tensor over the ranks.
        device: of the model.
        name: of the phase, for the progress bar.

    Returns:
        `[N]` fp64, nats per token, the same on every rank.
    """
    losses_N = torch.zeros(len(blocks_NT), dtype=torch.float64, device=device)
    starts = range(0, len(blocks_NT), batch_size * world_size)
    with torch.no_grad():
        for start in phase(starts, name, len(starts), show=rank == 0):
            first = start + rank * batch_size
            # A rank without windows of its own goes along with the first ones and counts nothing.
            batch = blocks_NT[first : first + batch_size]
            tokens = (batch if len(batch) else blocks_NT[:1]).to(device)
            logits = forward(tokens)[:, :-1]
            losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
            if len(batch):
                losses_N[first : first + batch_size] = losses.view(len(tokens), -1).double().mean(dim=1)
    return total(losses_N)


def perplexity(losses_N: Tensor, block_tokens: int) -> Perplexity:
    """The record of one corpus from its windows' losses `[N]`."""
    losses = losses_N.tolist()
    mean = sum(losses) / len(losses)
    return Perplexity(
        # Beyond e^700 a double is at its end; such a model is broken all the same.
        ppl=math.exp(min(mean, 700.0)),
        num_windows=len(losses),
        block_tokens=block_tokens,
        window_losses=tuple(losses),
    )
