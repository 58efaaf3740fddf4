"""Transfer `replaceme`: a linear map that makes up for the dropped layers, folded into the layer before (2505.02819).

Each run of consecutive doomed layers s..e goes into the kept layer p = s - 1. With M the output of p's last linear map,
which p adds to its hidden state as it is, X = h_s what p hands on, and Y = h_{e+1} what the run makes of it, the map

    T = argmin ||X + M (T - I) - Y||^2 + a ||T - I||^2 = I + (M'M + a I)^-1 M'(Y - X)

turns M into M T, which is the linear map with weight T' W and bias T' b: a stock architecture, and nothing is trained.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsp.checkpoint import round_weights
from tsp.data import evenly_spread
from tsp.decoder import hidden_out
from tsp.errors import ModelError
from tsp.evaluation.windows import batches
from tsp.linear import linear_maps, num_outputs, outputs_first
from tsp.methods.base import Bench
from tsp.mounted import Mounted
from tsp.selection import runs_after_kept

_PROBE_TOKENS = 8
# Of the perturbation's size: rounding of the residual sum stays below it in bf16, a norm or a scale does not.
_PROBE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Fold:
    """A run of doomed layers, and the linear map that is to make up for it."""

    run: range
    map: nn.Module
    products: Tensor
    """`[D, 2 D]` fp64: M'M beside M'(Y - X)."""


def replaceme(bench: Bench, doomed: Collection[int], *, save_dtype: torch.dtype) -> None:
    """Fold each run of doomed layers into the layer before it; nothing is trained.

    Holds 16 D^2 bytes a run on the device, for the products of the hidden states.

    Raises:
        ModelError: a run begins at layer 0, or the layer before it adds no linear map's output as it is.
    """
    with bench.engine.mounted(bench.decoder.model) as model, torch.no_grad():
        folds = [_fold(bench, model, run) for run in runs_after_kept(doomed, "replaceme")]
        _measure(bench, model, folds)
    for fold in folds:
        _write(bench, fold)
    weights = [parameter for fold in folds for parameter in fold.map.parameters()]
    round_weights(weights, save_dtype, bench.engine.gathered)


def check(bench: Bench, doomed: Collection[int] | None) -> None:
    """What can be known before the transfer; the model is mounted.

    Args:
        bench: with the dense model.
        doomed: None: not chosen yet. Then some layer at least has to be one that others can be folded into.

    Raises:
        ModelError: as `replaceme`.
    """
    assert bench.model is not None
    with torch.no_grad():
        if doomed is not None:
            for run in runs_after_kept(doomed, "replaceme"):
                _map_before(bench, bench.model, run)
            return
        found: list[nn.Module] = []
        for index in range(bench.decoder.num_layers - 1):
            found = _added_maps(bench, bench.model, index)
            if len(found) == 1:
                return
    raise ModelError(f"replaceme can fold nothing into any layer of this model: {_why(found)}; use another transfer")


def _fold(bench: Bench, model: Mounted, run: range) -> Fold:
    linear = _map_before(bench, model, run)
    hidden_size = num_outputs(linear)
    products = torch.zeros(hidden_size, 2 * hidden_size, dtype=torch.float64, device=bench.engine.device)
    return Fold(run, linear, products)


def _map_before(bench: Bench, model: Mounted, run: range) -> nn.Module:
    found = _added_maps(bench, model, run.start - 1)
    if len(found) != 1:
        raise ModelError(
            f"replaceme cannot fold layers {','.join(map(str, run))} into layer {run.start - 1}: {_why(found)}; "
            "use another transfer"
        )
    return found[0]


def _why(found: Sequence[nn.Module]) -> str:
    if found:
        return f"it adds the outputs of {len(found)} linear maps side by side (a parallel block)"
    return "it adds no linear map's output as it is (a norm or a scale follows, or it is a mixture of experts)"


def _added_maps(bench: Bench, model: Mounted, index: int) -> list[nn.Module]:
    """The linear maps of a layer whose output it adds to the hidden state as it is: disturb each, and look."""
    layer = bench.decoder.layers[index]
    tokens_BT = bench.blocks_NT[:1, :_PROBE_TOKENS].to(bench.engine.device)
    others = set(range(bench.decoder.num_layers)) - {index} - set(bench.protected)

    def emitted() -> Tensor:
        with bench.decoder.bypassing(others), _outputs_of([layer]) as outputs:
            model.run(tokens_BT)
        return hidden_out(outputs[0]).float()

    plain_BTD = emitted()
    generator = torch.Generator().manual_seed(0)
    noise_BTD = torch.randn(plain_BTD.shape, generator=generator).to(plain_BTD) * plain_BTD.std()
    found = []
    for _, module in linear_maps(layer):
        if num_outputs(module) == plain_BTD.shape[-1]:
            with _disturbed(module, noise_BTD):
                change_BTD = emitted() - plain_BTD
            if (change_BTD - noise_BTD).norm() < _PROBE_TOLERANCE * noise_BTD.norm():
                found.append(module)
    return found


def _measure(bench: Bench, model: Mounted, folds: list[Fold]) -> None:
    """Sum up the products over the calibration text, on the dense model."""
    blocks = evenly_spread(bench.blocks_NT, bench.config.prune.score_blocks)
    sharing = bench.engine.sharing(bench.config.eval.batch_size)
    total = sharing.pop("total")
    for tokens_bT, counted in batches(blocks, **sharing, name="replaceme"):
        with bench.decoder.hidden_states() as states, _outputs_of([fold.map for fold in folds]) as outputs:
            model.run(tokens_bT)
        mine = slice(0, counted.stop - counted.start)
        for fold, output in zip(folds, outputs, strict=True):
            x_BTD, y_BTD = states[fold.run.start][mine], states[fold.run.stop][mine]
            m_ND = output.reshape(len(tokens_bT), *x_BTD.shape[1:])[mine].flatten(0, 1).double()
            gap_ND = (y_BTD.double() - x_BTD.double()).flatten(0, 1)
            fold.products.add_(m_ND.T @ torch.cat([m_ND, gap_ND], dim=1))
    for fold in folds:
        fold.products.copy_(total(fold.products))


def correction(products: Tensor, ridge: float) -> Tensor:
    """T - I.

    Args:
        products: `[D, 2 D]` fp64: M'M beside M'(Y - X).
        ridge: a, as a share of the mean of M'M's diagonal.

    Returns:
        `[D, D]` fp64.

    Raises:
        ModelError: without a ridge, fewer tokens than D.

    Source: arXiv 2505.02819, equation 4.
    """
    gram, cross = products.chunk(2, dim=1)
    diagonal = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * gram.diagonal().mean() * ridge
    try:
        return torch.linalg.solve(gram + diagonal, cross)
    except torch.linalg.LinAlgError:
        raise ModelError(
            f"replaceme.ridge {ridge:g} leaves the least squares without a solution, for there is too little "
            "calibration text; give more (prune.score_blocks), or a larger ridge"
        ) from None


def _write(bench: Bench, fold: Fold) -> None:
    correction_DD = correction(fold.products, bench.config.replaceme.ridge)
    turned = outputs_first(fold.map)
    with bench.engine.gathered(list(fold.map.parameters()), modify=True):
        for name, parameter in fold.map.named_parameters():
            before = parameter.data.double()
            by_output = before.T if turned and name == "weight" else before
            after = by_output + by_output @ correction_DD
            parameter.data.copy_(after.T if turned and name == "weight" else after)


@contextmanager
def _outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What each module returns in the one forward pass inside the block, in their order."""
    outputs: list[Any] = [None] * len(modules)
    hooks = [
        module.register_forward_hook(lambda module, args, output, place=place: outputs.__setitem__(place, output))
        for place, module in enumerate(modules)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _disturbed(module: nn.Module, noise_BTD: Tensor) -> Iterator[None]:
    """Add noise to what the module returns; not at all where it is not one value for each token."""

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return output + noise_BTD.view_as(output).to(output) if output.numel() == noise_BTD.numel() else None

    hook = module.register_forward_hook(disturb)
    try:
        yield
    finally:
        hook.remove()
