"""Each window's loss, and how far its predictions are from the dense model's, by slice, in one forward pass.

Legend: N windows, b of them at a time, T tokens, S slices and the whole text before them, V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tsp.data import Corpus
from tsp.evaluation.perplexity import exp_loss, perplexity
from tsp.evaluation.windows import per_window
from tsp.records import Fidelity, Perplexity, SlicePerplexity

_GOLDEN = (5**0.5 - 1) / 2


class Reference:
    """The dense model's logits at some positions of a corpus, to compare later states with.

    Each rank keeps those of the windows that it measures, in host memory and in the dtype the model gives them, so that
    nothing is lost: positions x V x bytes / ranks, which is 2.1 GB for 4096 positions of a vocabulary of 128,256 in
    fp32, half of that in bf16.
    """

    def __init__(self, blocks_NT: Tensor, num_positions: int) -> None:
        num_windows, num_tokens = blocks_NT.shape
        self.compared = spread_positions(num_windows * (num_tokens - 1), num_positions).view(num_windows, -1)
        """`[N, T - 1]` bool: where."""
        self.logits: dict[int, Tensor] = {}
        """By window, `[p, V]`."""

    def own(self) -> "Reference":
        """The same logits, with no position in the windows that other ranks have measured."""
        own = copy.copy(self)
        others = torch.ones(len(self.compared), dtype=torch.bool)
        others[list(self.logits)] = False
        own.compared = self.compared & ~others[:, None]
        return own


def spread_positions(total: int, wanted: int) -> Tensor:
    """`[total]` bool with `wanted` of them true (or all): one in each of as many equal parts of the whole.

    Its place in the part turns by the golden section, so that windows of equal length are met at every position.
    """
    wanted = min(wanted, total)
    chosen = torch.zeros(total, dtype=torch.bool)
    borders = torch.arange(wanted + 1, dtype=torch.int64) * total // max(1, wanted)
    place = torch.arange(wanted, dtype=torch.float64) * _GOLDEN % 1.0
    chosen[borders[:-1] + (place * borders.diff()).long()] = True
    return chosen


def measure_predictions(
    forward: Callable[[Tensor], Tensor], corpus: Corpus, reference: Reference, *, is_dense: bool, **sharing: Any
) -> tuple[Perplexity, Fidelity | None, dict[str, SlicePerplexity]]:
    """Measure one state on one corpus.

    Args:
        forward: tokens `[b, T]` -> logits `[b, T, V]`.
        corpus: windows and slices.
        reference: filled by the dense model, read by the others.
        is_dense: which of the two.
        **sharing: of `per_window`.

    Returns:
        Perplexity, comparison (None for the dense model), and both of each slice; the same on every rank.
    """
    masks_NST = _masks(corpus)

    def measure(windows_b: Tensor) -> Tensor:
        windows = windows_b.cpu()
        tokens_bT = corpus.blocks[windows].to(windows_b.device)
        logits = forward(tokens_bT)[:, :-1]
        # loss, KL and agreement of every token; the latter two are 0 where nothing is compared
        values_b3T = torch.zeros(len(windows), 3, logits.shape[1], dtype=torch.float64, device=logits.device)
        for row, window in enumerate(windows.tolist()):
            # Window by window: a copy of all logits in fp32 would be the largest tensor by far.
            values_b3T[row, 0] = F.cross_entropy(logits[row].float(), tokens_bT[row, 1:], reduction="none")
            compared = reference.compared[window].to(logits.device)
            if is_dense:
                reference.logits[window] = logits[row, compared].cpu()
            elif window in reference.logits:
                dense = reference.logits[window].to(logits.device)
                values_b3T[row, 1:, compared] = _difference(dense, logits[row, compared])
        return (masks_NST[windows].to(values_b3T) @ values_b3T.transpose(1, 2)).flatten(1)

    sums_NS3 = per_window(measure, torch.arange(len(corpus.blocks)), **sharing).view(len(corpus.blocks), -1, 3).cpu()
    tokens_NS = masks_NST.sum(dim=2)
    compared_S = (masks_NST & reference.compared[:, None]).sum(dim=(0, 2))
    if is_dense or not reference.logits:
        compared_S = torch.zeros_like(compared_S)
    fidelity = [_fidelity(sums, num) for sums, num in zip(sums_NS3[..., 1:].sum(dim=0), compared_S, strict=True)]
    slices = {
        name: _slice(sums_NS3[:, number, 0], tokens_NS[:, number], fidelity[number])
        for number, name in enumerate(corpus.slices, start=1)
    }
    return perplexity(sums_NS3[:, 0, 0] / tokens_NS[:, 0], corpus.blocks.shape[1]), fidelity[0], slices


def _masks(corpus: Corpus) -> Tensor:
    """`[N, 1 + S, T - 1]` bool: the predicted tokens of the whole and of each slice."""
    whole = torch.ones_like(corpus.blocks, dtype=torch.bool)
    return torch.stack([whole, *corpus.slices.values()], dim=1)[:, :, 1:]


def _difference(dense_pV: Tensor, state_pV: Tensor) -> Tensor:
    """KL(dense || state) and whether the likeliest token is the same: `[2, p]` fp64."""
    dense, state = dense_pV.float().log_softmax(-1), state_pV.float().log_softmax(-1)
    # A token that the dense model forbids (-inf) adds nothing.
    terms = torch.where(dense.isneginf(), 0.0, dense.exp() * (dense - state))
    same = dense_pV.argmax(-1) == state_pV.argmax(-1)
    return torch.stack([terms.double().sum(-1), same.double()])


def _fidelity(sums_2: Tensor, num: Tensor) -> Fidelity | None:
    if not num:
        return None
    kl, top1 = sums_2
    # Rounding can take a KL of 0 below it; what is no number stays none, as `max` gives its first where none is larger.
    return Fidelity(kl=max(float(kl / num), 0.0), top1=float(top1 / num), num_positions=int(num))


def _slice(sums_N: Tensor, tokens_N: Tensor, fidelity: Fidelity | None) -> SlicePerplexity:
    present = tokens_N > 0
    return SlicePerplexity(
        ppl=exp_loss(float(sums_N.sum() / tokens_N.sum())),
        num_tokens=int(tokens_N.sum()),
        fidelity=fidelity,
        window_losses=tuple((sums_N[present] / tokens_N[present]).tolist()),
        window_tokens=tuple(tokens_N[present].tolist()),
    )
