"""Transfers that need neither gates nor a gap penalty, to show what those add: the layers are gone from the first step.

Same steps, tokens, learning rate and trainable set as stage 2, so that both can be compared at an equal budget
(method.md, section 3).
"""

from collections.abc import Collection

import torch

from tsp.methods.base import Bench
from tsp.methods.trsp import stage2
from tsp.settings import LossWeights


def finetune(bench: Bench, doomed: Collection[int], *, save_dtype: torch.dtype) -> None:
    """Drop, then train with the cross-entropy on the calibration text: what anybody would try first."""
    _train_without(bench, doomed, LossWeights(lm=1.0, distill=0.0), save_dtype)


def distill(bench: Bench, doomed: Collection[int], *, save_dtype: torch.dtype) -> None:
    """Drop, then train towards the dense model's outputs on the calibration text."""
    _train_without(bench, doomed, LossWeights(lm=0.0, distill=1.0), save_dtype)


def _train_without(bench: Bench, doomed: Collection[int], task: LossWeights, save_dtype: torch.dtype) -> None:
    given = bench.config
    closed = given.stage2.model_copy(update={"task": task, "hidden": 0.0, "lambda2": 0.0, "gates": "off"})
    bench.config = given.model_copy(update={"stage2": closed})
    try:
        stage2.transfer(bench, doomed, save_dtype=save_dtype)
    finally:
        bench.config = given
