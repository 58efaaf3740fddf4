"""Where numbers stop being finite: the first place of a forward pass, and results that are no success."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tsp.data import Corpus
from tsp.decoder import Decoder, hidden_in, hidden_out
from tsp.engine import Engine
from tsp.errors import ModelError
from tsp.mounted import Mounted
from tsp.records import Perplexity, Scores

EXPLODED = 10.0
"""So many times the dense model's perplexity is no pruned model any more."""
SEPARABLE = 1e-3
"""Learned gates whose sizes differ by less than this share of the largest choose nothing."""


def finite_everywhere(engine: Engine, value: Tensor) -> bool:
    """Whether a number is finite on every rank; the same answer on all."""
    return float(engine.sum((~torch.isfinite(value.detach())).float())) == 0


def first_not_finite(engine: Engine, decoder: Decoder, model: Mounted, tokens_BT: Tensor) -> str:
    """The first place in a forward pass whose output is not finite on some rank, in words.

    Args:
        engine: compares the ranks.
        decoder: the layers.
        model: mounted.
        tokens_BT: int64, each rank's own.
    """
    num_layers = decoder.num_layers
    found = [num_layers + 1]

    def look(place: int, hidden_BTD: Tensor) -> None:
        if place < found[0] and not torch.isfinite(hidden_BTD).all():
            found[0] = place

    def watch(index: int) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            look(index, hidden_in(args, kwargs))
            look(index + 1, hidden_out(output))

        return hook

    handles = [
        layer.register_forward_hook(watch(index), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
        if index not in decoder.bypassed
    ]
    try:
        with torch.no_grad():
            model(tokens_BT)
    finally:
        for handle in handles:
            handle.remove()
    first = int(min(engine.every_rank(found[0])))
    if first > num_layers:
        return "all layers give finite numbers, so it is the head or the loss"
    return "the embeddings are not finite" if first == 0 else f"layer {first - 1} is the first that gives such numbers"


def require_finite(
    engine: Engine,
    decoder: Decoder,
    model: Mounted,
    perplexity: Mapping[str, Perplexity],
    corpora: Iterable[Corpus],
) -> None:
    """Refuse a dense model that is broken already.

    Args:
        engine: compares the ranks.
        decoder: the layers.
        model: mounted.
        perplexity: of the dense model, by corpus.
        corpora: that it was measured on; the place is looked for with the first window that is not finite.

    Raises:
        ModelError: a perplexity is not finite.
    """
    for corpus in corpora:
        found = perplexity[corpus.name]
        if not math.isfinite(found.ppl):
            window = next((n for n, loss in enumerate(found.window_losses) if not math.isfinite(loss)), 0)
            tokens_BT = corpus.blocks[window : window + 1].to(engine.device)
            place = first_not_finite(engine, decoder, model, tokens_BT)
            raise ModelError(
                f"the dense model's perplexity on {corpus.name} is {found.ppl}: {place}; "
                "look at its weights, or give model.dtype=fp32"
            )


def collapses(scores: Scores, protected: Collection[int], perplexity: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Why a result is no success, in words; empty: it is one.

    Args:
        scores: of the layers.
        protected: layers that could not go.
        perplexity: `{corpus: {state: ...}}` with `dense` and `pruned`.
    """
    found = []
    sizes = [abs(value) for index, value in enumerate(scores.values) if index not in protected]
    if scores.method.startswith("gates-") and scores.method != "gates-search":
        if max(sizes) < SEPARABLE:
            found.append(f"all gates collapsed, the largest is {max(sizes):.2g}")
        elif max(sizes) - min(sizes) < SEPARABLE * max(sizes):
            found.append(f"the gates are alike, {min(sizes):.4g} to {max(sizes):.4g}, and choose no layer")
    for corpus, states in perplexity.items():
        if not states["pruned"] <= EXPLODED * states["dense"] or not math.isfinite(states["pruned"]):
            found.append(
                f"the perplexity on {corpus} went from {states['dense']:.4g} to {states['pruned']:.4g}, more than "
                f"{EXPLODED:g} times as high"
            )
    return found
