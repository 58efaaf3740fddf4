"""Layer collapse (arXiv 2402.11187): layers are merged into the layer before them instead of being thrown away.

The transfer `merge` does that for any doomed layers. The selection `laco` looks from the top downwards for layers that
can be merged while the last hidden state stays like the dense model's.

Departs from the paper:
- A run of doomed layers is always merged with the original weights. The paper's second merge takes in what the first
  one made; here the result depends on which layers are doomed, and not on the order in which they were found.
- The number of layers that go is given. Where a pass from top to bottom leaves more than that, the threshold falls by
  `laco.step` and the next pass begins at the top of what is left; the last merge takes no more layers than are to go.
- The last hidden state is taken before the final norm, and its cosine token by token; the authors' code flattens a
  sequence of normed states into one vector.
- All weights of a layer are merged, as the paper has it; the authors' code leaves the norms alone.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsp.checkpoint import round_weights
from tsp.data import evenly_spread
from tsp.decoder import hidden_out
from tsp.errors import ConfigError, ModelError
from tsp.evaluation.windows import per_window
from tsp.methods.base import Bench
from tsp.records import Scores
from tsp.selection import runs_after_kept

# The doomed layers -> mean cosine of the last hidden state to the dense model's.
Similarity = Callable[[frozenset[int]], float]


def merge(bench: Bench, doomed: Collection[int], *, save_dtype: torch.dtype) -> None:
    """theta_l += sum_k (theta_{l+k} - theta_l) over the doomed layers l+1 ... l+m after each kept layer l (equation 1).

    Raises:
        ModelError: a run begins at layer 0, or holds a layer built otherwise than the one before it.
    """
    check(bench, doomed)
    round_weights(_merge(bench, doomed), save_dtype, bench.engine.gathered)


def check(bench: Bench, doomed: Collection[int] | None) -> None:
    """What can be known before the transfer; `doomed` None: not chosen yet.

    Raises:
        ModelError: as `merge`.
    """
    for run in runs_after_kept(doomed or (), "merge"):
        unlike = [index for index in run if not _alike(bench, run.start - 1, index)]
        if unlike:
            raise ModelError(
                f"merge cannot add layer {unlike[0]} to layer {run.start - 1}: their weights differ in name or shape; "
                "use another transfer"
            )


@contextmanager
def merged(bench: Bench, doomed: Collection[int]) -> Iterator[None]:
    """The merged model without the doomed layers, for the length of a block; then the weights are what they were."""
    bases = nn.ModuleList(bench.decoder.layers[run.start - 1] for run in runs_after_kept(doomed, "merge"))
    with bench.engine.restored(bases), bench.decoder.bypassing(doomed):
        _merge(bench, doomed)
        yield


def laco(bench: Bench, num_drop: int) -> Scores:
    """Algorithm 1 of the paper, with the threshold lowered until `num_drop` layers are merged away.

    Costs a pass over `laco.blocks` sequences for each merge that is tried, and one for the dense model, whose last
    hidden states are kept in host memory: on a rank, its sequences x T x D. The order is that of the merges, in each
    from the top. The value of a layer is 1 - cosine when it was merged; of a kept one, the worst that was seen.

    Raises:
        ConfigError: protected layers, or layers of different structure, leave no room.
    """
    tried: dict[frozenset[int], float] = {}
    measured = _similarity(bench)

    def similarity(doomed: frozenset[int]) -> float:
        if doomed not in tried:
            tried[doomed] = measured(doomed)
        return tried[doomed]

    order: list[int] = []
    values: dict[int, float] = {}
    threshold = bench.config.laco.threshold
    while len(order) < num_drop:
        before = len(order)
        for run in _collapsed(bench, num_drop, threshold, similarity, order):
            order += reversed(run)
            values |= dict.fromkeys(run, 1 - tried[frozenset(order)])
        # No cosine is below -1: there was nothing to try.
        if len(order) == before and threshold < -1:
            raise ConfigError(
                f"prune.method laco can merge {len(order)} layers into the one before, {num_drop} are to go; layer 0, "
                "protected layers and layers built otherwise than the one before stay; protect fewer or drop fewer"
            )
        threshold -= bench.config.laco.step
    worst = 1 - min(tried.values(), default=1.0)
    return Scores(
        method="laco",
        values=tuple(values.get(index, worst) for index in range(bench.decoder.num_layers)),
        order=tuple(order),
    )


def _collapsed(
    bench: Bench, num_drop: int, threshold: float, similarity: Similarity, gone: Sequence[int]
) -> Iterator[list[int]]:
    """One pass from the top to the bottom: yields the layers of each merge that is accepted."""
    config, doomed = bench.config.laco, list(gone)
    kept = [index for index in range(bench.decoder.num_layers) if index not in doomed]
    at = max(len(kept) - config.max_layers, 0)
    while at >= 0 and len(doomed) < num_drop:
        room = min(config.max_layers - 1, num_drop - len(doomed))
        run = _mergeable(bench, kept[at], kept[at + 1 : at + 1 + room])
        if run and similarity(frozenset([*doomed, *run])) > threshold:
            yield run
            doomed += run
            kept = [index for index in kept if index not in run]
            at = min(at - config.interval, max(len(kept) - config.max_layers, 0))
        else:
            at -= 1


def _mergeable(bench: Bench, base: int, following: Sequence[int]) -> list[int]:
    """The layers that may go, up to the first that may not."""
    run: list[int] = []
    for index in following:
        if index in bench.protected or not _alike(bench, base, index):
            break
        run.append(index)
    return run


def _alike(bench: Bench, base: int, other: int) -> bool:
    one, two = (bench.decoder.layers[index].named_parameters() for index in (base, other))
    return _shapes(one) == _shapes(two)


def _shapes(parameters: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters}


def _merge(bench: Bench, doomed: Collection[int]) -> list[nn.Parameter]:
    """The weights that changed; one tensor of a run at a time is whole."""
    changed = []
    for run in runs_after_kept(doomed, "merge"):
        for name, parameter in bench.decoder.layers[run.start - 1].named_parameters():
            others = [bench.decoder.layers[index].get_parameter(name) for index in run]
            with bench.engine.gathered([parameter], modify=True), bench.engine.gathered(others):
                base = parameter.detach().float()
                parameter.data.copy_(base + sum(other.detach().float() - base for other in others))
            changed.append(parameter)
    return changed


def _similarity(bench: Bench) -> Similarity:
    assert bench.model is not None
    model, dense = bench.model, list[Tensor]()
    blocks = evenly_spread(bench.blocks_NT, bench.config.laco.blocks)
    sharing = bench.engine.sharing(bench.config.eval.batch_size)

    def last_state(tokens_BT: Tensor) -> Tensor:
        states: list[Tensor] = []
        last = bench.decoder.layers[-1]
        hook = last.register_forward_hook(lambda layer, args, output: states.append(hidden_out(output)))
        try:
            model.run(tokens_BT)
        finally:
            hook.remove()
        return states[0]

    def keep(tokens_BT: Tensor) -> Tensor:
        dense.append(last_state(tokens_BT).cpu())
        return torch.zeros(len(tokens_BT), 1, device=tokens_BT.device)

    per_window(keep, blocks, **sharing, name="laco, dense")

    def similarity(doomed: frozenset[int]) -> float:
        # Batches come in the same order each time.
        wanted = iter(dense)

        def compare(tokens_BT: Tensor) -> Tensor:
            state_BTD = last_state(tokens_BT)
            dense_BTD = next(wanted).to(state_BTD.device)
            return F.cosine_similarity(state_BTD.float(), dense_BTD.float(), dim=-1).mean(dim=1, keepdim=True)

        with merged(bench, doomed):
            cosine = float(per_window(compare, blocks, **sharing, name=None).mean())
        # Weights that add up to more than the dtype holds give no number: as unlike as can be.
        return cosine if math.isfinite(cosine) else -1.0

    return similarity
