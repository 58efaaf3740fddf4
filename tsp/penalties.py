"""Penalties and projections of both stages: pure functions on tensors, no state, no distributed calls.

Shapes: B sequences, T tokens, D hidden size, L layers.
"""

import torch
from torch import Tensor


def soft_threshold(values_L: Tensor, threshold: float | Tensor) -> Tensor:
    """Proximal step of the l1 penalty: sign(g) * max(|g| - threshold, 0); reaches exact zeros.

    Args:
        values_L: `[L]` fp32.
        threshold: lr * lambda1 for plain gradient descent; under Adam divided by the same preconditioner, `[L]`.
    """
    return values_L.sign() * (values_L.abs() - threshold).clamp(min=0)


def project_capped_simplex(values_L: Tensor, budget: float) -> Tensor:
    """The nearest point (l2) of `{g : sum(g) = budget, 0 <= g <= 1}`.

    The solution is clamp(g - tau, 0, 1) (Wang and Lu, 2015, arXiv 1503.01002); its sum falls piecewise linearly with
    tau, with kinks at g and g - 1, so the right tau lies between two neighbouring kinks and is found exactly.

    Args:
        values_L: `[L]` fp32.
        budget: in [0, L].
    """
    assert 0 <= budget <= len(values_L), (budget, len(values_L))
    values = values_L.double()
    kinks = torch.cat([values, values - 1]).sort().values
    sums = (values[None, :] - kinks[:, None]).clamp(0, 1).sum(dim=1)
    right = int((sums <= budget).nonzero()[0])
    if right == 0 or sums[right] == budget:
        tau = kinks[right]
    else:
        low, high = kinks[right - 1], kinks[right]
        tau = low + (sums[right - 1] - budget) / (sums[right - 1] - sums[right]) * (high - low)
    return (values - tau).clamp(0, 1).to(values_L.dtype)


def gap_norm(gap_BTD: Tensor, norm: str = "l2", reduction: str = "token-mean", parts: int = 1) -> Tensor:
    """Size of a gap; the paper's ||x_out - x_in||, whose reduction it does not state.

    Args:
        gap_BTD: `[B, T, D]`.
        norm: `l1` or `l2` over D.
        reduction: `token-mean`, `token-sum`, or `frobenius` (the norm of all elements together).
        parts: how many equal parts a step has, of which this is one. The mean over them is then the size of the whole
            step's gap. Of `frobenius` with `l2` it is that where the parts' norms are alike, else a little less: no
            part knows the others' squares.

    Returns:
        `[]` fp32.
    """
    order = {"l1": 1, "l2": 2}[norm]
    if reduction == "frobenius":
        return torch.linalg.vector_norm(gap_BTD, ord=order, dtype=torch.float32) * parts ** (1 / order)
    norms_BT = torch.linalg.vector_norm(gap_BTD, ord=order, dim=-1, dtype=torch.float32)
    return norms_BT.mean() if reduction == "token-mean" else norms_BT.sum() * parts
