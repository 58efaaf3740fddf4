"""The mathematics of both stages: pure functions on tensors, no state, no distributed calls.

Shapes: B sequences, T tokens, D hidden size, V vocabulary, L layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tsp.targets import IGNORED, targets


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


def gap_norm(gap_BTD: Tensor, norm: str = "l2", reduction: str = "token-mean") -> Tensor:
    """Size of a gap; the paper's ||x_out - x_in||, whose reduction it does not state.

    Args:
        gap_BTD: `[B, T, D]`.
        norm: `l1` or `l2` over D.
        reduction: `token-mean`, `token-sum`, or `frobenius` (the norm of all elements together).

    Returns:
        `[]` fp32.
    """
    order = {"l1": 1, "l2": 2}[norm]
    if reduction == "frobenius":
        return torch.linalg.vector_norm(gap_BTD, ord=order, dtype=torch.float32)
    norms_BT = torch.linalg.vector_norm(gap_BTD, ord=order, dim=-1, dtype=torch.float32)
    return {"token-mean": norms_BT.mean, "token-sum": norms_BT.sum}[reduction]()


def lm_loss(logits_BTV: Tensor, tokens_BT: Tensor, share: float = 1.0) -> Tensor:
    """Cross-entropy of the next token, mean over the T - 1 predictable positions, or over those that count.

    Args:
        logits_BTV: `[B, T, V]`.
        tokens_BT: int64; which of them count, see `targets.py`.
        share: the part that counts of all targets of a step (`targets.share`), of which these sequences may be a part
            with more or fewer: then the mean over such parts is the mean over the tokens of the step that count.

    Returns:
        `[]` fp32.
    """
    wanted = targets(tokens_BT)
    total = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), wanted.flatten(), reduction="sum")
    return total / (wanted.numel() * share)


def distillation_loss(
    student_BTV: Tensor,
    teacher_BTV: Tensor,
    temperature: float = 1.0,
    tokens_BT: Tensor | None = None,
    share: float = 1.0,
) -> Tensor:
    """KL(teacher || student) at the temperature, times its square (Hinton et al. 2015), mean over tokens.

    Args:
        student_BTV: `[B, T, V]`.
        teacher_BTV: the same shape; gets no gradient.
        temperature: of both softmaxes.
        tokens_BT: int64, where not all count; then only positions whose next token does.
        share: as in `lm_loss`; 1: all positions, the last too, though its next token is not here.

    Returns:
        `[]` fp32.
    """
    if tokens_BT is None or share == 1:
        student_NV, teacher_NV = student_BTV.flatten(0, 1), teacher_BTV.flatten(0, 1)
        num_positions: float = len(student_NV)
    else:
        counted = targets(tokens_BT) != IGNORED
        student_NV, teacher_NV = student_BTV[:, :-1][counted], teacher_BTV[:, :-1][counted]
        num_positions = counted.numel() * share
    student_NV = F.log_softmax(student_NV.float() / temperature, dim=-1)
    teacher_NV = F.log_softmax(teacher_NV.detach().float() / temperature, dim=-1)
    return F.kl_div(student_NV, teacher_NV, log_target=True, reduction="sum") / num_positions * temperature**2
