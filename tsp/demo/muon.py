"""Muon in fp32, matrices of one shape together: the optimizer of the demo model's hidden matrices.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the step size is that of Liu et
al. 2025 (arXiv 2502.16982), with which AdamW's learning rates fit. The same formulas as `torch.optim.Muon`, which
multiplies in bf16: a CPU without bf16 units spends 40 % of a training step on that.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, as the step of each matrix.

    Args:
        params: matrices.
        lr: multiplied by 0.2 * sqrt(longer side), the root mean square of AdamW's steps.
        momentum: Nesterov's.
        weight_decay: decoupled.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all matrices; those without a gradient stay."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                directions = orthogonal(torch.stack([self._nesterov(p, group["momentum"]) for p in parameters]))
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=size)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def orthogonal(matrices_NRC: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T `[N, R, C]`: singular values end between 0.5 and 1.5 (Newton-Schulz)."""
    wide = matrices_NRC.mT if matrices_NRC.shape[1] > matrices_NRC.shape[2] else matrices_NRC
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices_NRC.shape[1] > matrices_NRC.shape[2] else x
