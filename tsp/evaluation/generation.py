"""Does it still write? Greedy continuations: do they repeat themselves, how long do they agree with the dense model's.

Perplexity and multiple choice can look well while a model writes the same four words for ever. The loop has no
key-value cache: a cache counts its tokens at the first layer, which may be bypassed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tsp.data import evenly_spread
from tsp.evaluation.windows import per_window

PROMPT_TOKENS = 32
_GRAM = 4


def greedy_continuations(
    forward: Callable[[Tensor], Tensor],
    blocks_NT: Tensor,
    *,
    num_prompts: int,
    num_new: int,
    max_positions: int,
    **sharing: Any,
) -> tuple[tuple[int, ...], ...]:
    """Continue the first tokens of some windows.

    Args:
        forward: tokens `[b, t]` -> logits `[b, t, V]`.
        blocks_NT: windows `[N, T]` int64, of which `num_prompts` are taken at even distances.
        num_prompts: at most N.
        num_new: tokens by which each is continued.
        max_positions: of the model; prompts are half of them where 32 tokens are more, continuations what is left.
        **sharing: of `per_window`; ranks share the prompts.

    Returns:
        New tokens of each prompt, the same on every rank.
    """
    length = min(PROMPT_TOKENS, max_positions // 2, blocks_NT.shape[1])
    prompts = evenly_spread(blocks_NT, num_prompts)[:, :length]
    num_new = min(num_new, max_positions - length)

    def go_on(tokens_bt: Tensor) -> Tensor:
        for _ in range(num_new):
            tokens_bt = torch.cat([tokens_bt, forward(tokens_bt)[:, -1:].argmax(-1)], dim=1)
        return tokens_bt[:, length:]

    return tuple(map(tuple, per_window(go_on, prompts, **sharing).long().tolist()))


def repetition(continuations: Sequence[Sequence[int]]) -> float:
    """Share of 4-grams that stood in the same continuation before: 1 - distinct / all; 0: none, near 1: a loop."""
    grams = [
        [tuple(tokens[start : start + _GRAM]) for start in range(len(tokens) - _GRAM + 1)] for tokens in continuations
    ]
    total = sum(map(len, grams))
    return 1 - sum(len(set(one)) for one in grams) / total if total else 0.0


def agreement(continuations: Sequence[Sequence[int]], dense: Sequence[Sequence[int]]) -> float:
    """Mean share of a continuation before it first differs from the dense model's."""
    shares = []
    for tokens, wanted in zip(continuations, dense, strict=True):
        same = next((place for place, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1]), None)
        shares.append(1.0 if same is None else same / len(wanted))
    return sum(shares) / len(shares)
