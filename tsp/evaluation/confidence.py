"""How sure a perplexity is: bootstrap over the windows of a corpus.

Windows are drawn with replacement; two states of a model are drawn together (paired), since the same window is hard for
both, which makes the interval of their ratio far narrower than those of each alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_RESAMPLES = 2000


def perplexity_interval(losses: Sequence[float], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of exp(mean loss).

    Args:
        losses: mean cross-entropy of each window, nats per token.
        level: share of the resamples between the bounds, in (0, 1).
        seed: of the resampling.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    return _interval(torch.tensor(losses, dtype=torch.float64), level, seed)


def ratio_interval(
    losses: Sequence[float], against: Sequence[float], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the ratio of two perplexities on the same windows (`losses` over `against`)."""
    assert len(losses) == len(against), "two states of a model on the same windows"
    difference = torch.tensor(losses, dtype=torch.float64) - torch.tensor(against, dtype=torch.float64)
    return _interval(difference, level, seed)


def _interval(values_N: Tensor, level: float, seed: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values_N), (_RESAMPLES, len(values_N)), generator=generator)
    means = values_N[drawn].mean(dim=1)
    bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, bounds).exp().tolist()
    return low, high
