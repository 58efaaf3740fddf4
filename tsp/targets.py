"""Which tokens the loss counts, held in the tokens themselves: one that is not to be learned stands as its complement.

`~id` is negative, so blocks say both what the model reads and what it is to learn, and whatever cuts, shuffles or
shares them keeps the two together. Where every token counts, as in plain text, blocks are just ids.

Shapes: B sequences, T tokens.
"""

import torch
from torch import Tensor

IGNORED = -100
"""The target that torch's cross-entropy and transformers' labels leave out."""


def marked(ids: Tensor, counts: Tensor) -> Tensor:
    """Tokens of which some do not count.

    Args:
        ids: int64, any shape.
        counts: bool, the same shape; False: the model reads it, and is not to learn it.
    """
    return torch.where(counts, ids, ~ids)


def token_ids(tokens: Tensor) -> Tensor:
    """What the model reads, int64, the same shape."""
    return torch.where(tokens < 0, ~tokens, tokens)


def targets(tokens_BT: Tensor) -> Tensor:
    """What each position but the last is to predict, `[B, T - 1]` int64; `IGNORED` where that does not count."""
    following = tokens_BT[:, 1:]
    return torch.where(following < 0, IGNORED, following)


def share(tokens_BT: Tensor) -> float:
    """The part of the B * (T - 1) targets that count, in [0, 1]."""
    return float((tokens_BT[:, 1:] >= 0).double().mean())
