"""What is trained for: cross-entropy and the distance to the dense model, a few positions at a time; hidden states.

    task_loss(logits, tokens, weights, teacher=dense).total.backward()

Beside the model's weights nothing is as large as `[B, T, V]`. Plain formulas hold it some eight times (fp32 copies,
log-softmaxes, their gradients); here only the logits and their gradient are whole, in the model's dtype, and the
gradient is made in the forward pass, as all that it depends on is there (as in Liger Kernel, arXiv 2410.10989).

Shapes: B sequences, T tokens, N = B * T positions, V vocabulary, D hidden size.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tsp.targets import IGNORED, targets

_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Of the fp32 work space: what a CPU's caches hold; what keeps a GPU busy."""


class TaskLoss(NamedTuple):
    """Means over tokens, `[]` fp32; only `total` has a gradient."""

    total: Tensor
    lm: Tensor
    distill: Tensor
    """0 without a teacher."""


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
    return task_loss(logits_BTV, tokens_BT, share, lm=1.0).total


def task_loss(
    logits_BTV: Tensor,
    tokens_BT: Tensor,
    share: float = 1.0,
    *,
    lm: float = 0.0,
    distill: float = 0.0,
    teacher_BTV: Tensor | None = None,
    temperature: float = 1.0,
) -> TaskLoss:
    """lm * cross-entropy + distill * KL(teacher || student), and both parts whatever their weights.

    The distance is taken at the temperature, times its square (Hinton et al. 2015), mean over tokens.

    Args:
        logits_BTV: `[B, T, V]`, the student's.
        tokens_BT: as in `lm_loss`.
        share: as in `lm_loss`; 1: the distance counts at all positions, the last too, though its next token is not
            here; else only at those whose next token does.
        lm: weight of the cross-entropy.
        distill: weight of the distance; without a teacher that is 0.
        teacher_BTV: the same shape; gets no gradient.
        temperature: of both softmaxes of the distance.
    """
    wanted_BT = F.pad(targets(tokens_BT), (0, 1), value=IGNORED)
    lm_scale = 1 / (share * (wanted_BT.numel() - len(wanted_BT))) if share else 0.0
    work = _Work(
        wanted_N=wanted_BT.flatten(),
        teacher_NV=None if teacher_BTV is None else teacher_BTV.detach().flatten(0, 1),
        lm_scale=lm_scale,
        distill_scale=1 / wanted_BT.numel() if share == 1 else lm_scale,
        all_positions=share == 1,
        temperature=temperature,
        weights=(lm, distill),
        learns=logits_BTV.requires_grad and torch.is_grad_enabled(),
    )
    return TaskLoss(*_InChunks.apply(logits_BTV.flatten(0, 1), work))


def hidden_loss(states: Sequence[Tensor], dense: list[Tensor], doomed: Collection[int]) -> Tensor:
    """Mean over tokens and places of |h - dense|^2 / |dense|^2, at what each kept layer and the final norm is given.

    Each token is measured by itself: the few on which models put hidden states of a hundred times the size count like
    any other, and the mean over the parts of a batch is the mean over the batch.

    Args:
        states: `[B, T, D]` each, `Decoder.hidden_states` of the model that learns.
        dense: the same of the dense model; taken from it, so that each is freed when its distance is known.
        doomed: layers that will be dropped.

    Returns:
        `[]` fp32.
    """
    distances = []
    for place in reversed(range(1, len(states))):
        dense_BTD = dense.pop()
        if place not in doomed:
            distances.append(_RelativeDistance.apply(states[place], dense_BTD))
    return torch.stack(distances).mean()


@dataclass
class _Work:
    wanted_N: Tensor
    teacher_NV: Tensor | None
    lm_scale: float
    distill_scale: float
    all_positions: bool
    """The distance counts at all of them, else where the next token does."""
    temperature: float
    weights: tuple[float, float]
    learns: bool


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, work: _Work) -> tuple[Tensor, Tensor, Tensor]:
        gradient_NV = torch.empty_like(logits_NV) if work.learns else None
        sums = logits_NV.new_zeros(2).float()
        elements = _CHUNK_ELEMENTS.get(logits_NV.device.type, 2**26)
        num_rows = max(1, elements // logits_NV.shape[1])
        for start in range(0, len(logits_NV), num_rows):
            rows = slice(start, start + num_rows)
            _chunk(logits_NV, rows, work, sums, gradient_NV)
        lm, distill = sums[0] * work.lm_scale, sums[1] * work.distill_scale
        if gradient_NV is not None:
            ctx.save_for_backward(gradient_NV)
        ctx.mark_non_differentiable(lm, distill)
        return work.weights[0] * lm + work.weights[1] * distill, lm, distill

    @staticmethod
    def backward(ctx: Any, outer: Tensor, *_: Any) -> tuple[Tensor, None]:
        (gradient_NV,) = ctx.saved_tensors
        # In place: another copy of the largest tensor there is only for a second backward pass.
        return gradient_NV.mul_(outer), None


class _RelativeDistance(torch.autograd.Function):
    """Of one place; keeps its gradient, in the dtype of the hidden states, and no fp32 copies."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
        dense = dense_BTD.float()
        gap = hidden_BTD.float() - dense
        scale_BT1 = 1 / (dense.square().sum(dim=-1, keepdim=True).clamp(min=1e-12) * dense[..., 0].numel())
        distance = (gap.square() * scale_BT1).sum()
        ctx.save_for_backward(gap.mul_(2 * scale_BT1).to(hidden_BTD.dtype))
        return distance

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient_BTD,) = ctx.saved_tensors
        return gradient_BTD * outer, None


def _chunk(logits_NV: Tensor, rows: slice, work: _Work, sums: Tensor, gradient_NV: Tensor | None) -> None:
    """Add the losses of some rows to `sums`, and write the rows of the gradient."""
    lm_weight, _ = work.weights
    log_student = F.log_softmax(logits_NV[rows].float(), dim=-1)
    wanted_n1 = work.wanted_N[rows].unsqueeze(1)
    counts_n1 = (wanted_n1 != IGNORED).float()
    index_n1 = wanted_n1.clamp(min=0)
    sums[0] -= (log_student.gather(1, index_n1) * counts_n1).sum()
    gradient: Tensor | None = None
    if work.teacher_NV is not None:
        gradient = _distance(logits_NV, log_student, rows, work, counts_n1, sums, learns=gradient_NV is not None)
    if gradient_NV is None:
        return
    if lm_weight:
        slope_n1 = counts_n1 * (lm_weight * work.lm_scale)
        of_lm = log_student.exp_().mul_(slope_n1)
        of_lm.scatter_(1, index_n1, of_lm.gather(1, index_n1) - slope_n1)
        gradient = of_lm if gradient is None else gradient.add_(of_lm)
    if gradient is None:
        gradient = torch.zeros_like(log_student)
    gradient_NV[rows] = gradient


def _distance(
    logits_NV: Tensor,
    log_student: Tensor,
    rows: slice,
    work: _Work,
    counts_n1: Tensor,
    sums: Tensor,
    *,
    learns: bool,
) -> Tensor | None:
    """Add KL(teacher || student) of some rows to `sums`; its weighted gradient, or None."""
    assert work.teacher_NV is not None
    temperature, weight = work.temperature, work.weights[1]
    if temperature != 1:
        log_student = F.log_softmax(logits_NV[rows].float() / temperature, dim=-1)
    log_teacher = F.log_softmax(work.teacher_NV[rows].float() / temperature, dim=-1)
    teacher = log_teacher.exp()
    kl_n1 = log_teacher.sub_(log_student).mul_(teacher).sum(dim=1, keepdim=True)
    if not work.all_positions:
        kl_n1 = kl_n1 * counts_n1
    sums[1] += kl_n1.sum() * temperature**2
    if not learns or not weight:
        return None
    gradient = log_student.exp().sub_(teacher).mul_(weight * work.distill_scale * temperature)
    return gradient if work.all_positions else gradient.mul_(counts_n1)
