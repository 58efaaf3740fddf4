"""How sure a perplexity is: bootstrap over the windows of a corpus.

Windows are drawn with replacement; two states of a model are drawn together (paired), since the same window is hard for
both, which makes the interval of their ratio far narrower than those of each alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tsp.evaluation.perplexity import exp_loss

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
    losses: Sequence[float],
    against: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the ratio of two perplexities on the same windows (`losses` over `against`).

    Args:
        losses: mean cross-entropy of each window, nats per token.
        against: the same of the state to compare with.
        weights: tokens behind each of these means, where they differ.
        level: share of the resamples between the bounds, in (0, 1).
        seed: of the resampling.
    """
    assert len(losses) == len(against), "two states of a model on the same windows"
    difference = torch.tensor(losses, dtype=torch.float64) - torch.tensor(against, dtype=torch.float64)
    return _interval(difference, level, seed, None if weights is None else torch.tensor(weights, dtype=torch.float64))


def _interval(values_N: Tensor, level: float, seed: int, weights_N: Tensor | None = None) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values_N), (_RESAMPLES, len(values_N)), generator=generator)
    if weights_N is None:
        means = values_N[drawn].mean(dim=1)
    else:
        means = (values_N * weights_N)[drawn].sum(dim=1) / weights_N[drawn].sum(dim=1)
    bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (exp_loss(bound) for bound in torch.quantile(means, bounds).tolist())
    return low, high
