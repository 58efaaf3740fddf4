"""Does it still write? Greedy continuations: do they repeat themselves, how long do they agree with the dense model's.

Perplexity and multiple choice can look well while a model writes the same four words for ever. The loop has no
key-value cache: a cache counts its tokens at the first layer, which may be bypassed.
"""

import math
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
        blocks_NT: windows `[N, T]` int64.
        num_prompts: see `prompts_of`.
        num_new: tokens by which each is continued; less where the model has no room for them.
        max_positions: of the model.
        **sharing: of `per_window`; ranks share the prompts.

    Returns:
        New tokens of each prompt, the same on every rank.
    """
    prompts = prompts_of(blocks_NT, num_prompts, max_positions)
    length = prompts.shape[1]
    num_new = min(num_new, max_positions - length)

    def go_on(tokens_bt: Tensor) -> Tensor:
        for _ in range(num_new):
            tokens_bt = torch.cat([tokens_bt, forward(tokens_bt)[:, -1:].argmax(-1)], dim=1)
        return tokens_bt[:, length:]

    return tuple(map(tuple, per_window(go_on, prompts, **sharing).long().tolist()))


def prompts_of(values_NT: Tensor, num_prompts: int, max_positions: int) -> Tensor:
    """What stands at the places of the prompts: the first tokens of windows at even distances.

    Args:
        values_NT: windows `[N, T]`, or what is said of each of their tokens.
        num_prompts: where there are fewer windows, each is cut into equal pieces, as many as it is long enough for.
        max_positions: of the model; prompts are half of them where 32 tokens are more.

    Returns:
        `[P, length]`, P at most `num_prompts`.
    """
    num_windows, num_tokens = values_NT.shape
    length = min(PROMPT_TOKENS, max_positions // 2, num_tokens)
    pieces = min(math.ceil(num_prompts / num_windows), num_tokens // length)
    whole = num_tokens // pieces * pieces
    return evenly_spread(values_NT[:, :whole].reshape(num_windows * pieces, -1), num_prompts)[:, :length]


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
