"""Selections that bypass a layer and look at the loss: ppl (once) and sleb (again after each drop)."""

from collections.abc import Collection, Sequence

from tsp.data import evenly_spread
from tsp.methods.base import Bench
from tsp.progress import phase
from tsp.records import Scores
from tsp.selection import ascending


def ppl(bench: Bench, num_drop: int) -> Scores:
    """The loss with one layer bypassed; the lowest go, at once (arXiv 2402.02834, section 2.1)."""
    losses = _losses(bench, (), range(bench.decoder.num_layers), "ppl")
    values = [losses[index] for index in range(bench.decoder.num_layers)]
    return Scores(method="ppl", values=tuple(values), order=tuple(ascending(values)))


def sleb(bench: Bench, num_drop: int) -> Scores:
    """Each round the layer whose absence gives the least loss is dropped (arXiv 2402.09025, algorithm 1).

    Departs from the paper: the first and the last layer are tried too; `prune.protect_first` and `protect_last` at 1
    restore it. The value of a layer is its loss in the last round that tried it.
    """
    dropped: list[int] = []
    losses: dict[int, float] = {}
    for number in range(num_drop):
        free = [i for i in range(bench.decoder.num_layers) if i not in dropped and i not in bench.protected]
        found = _losses(bench, dropped, free, f"sleb, layer {number + 1} of {num_drop}")
        losses |= found
        dropped.append(min(free, key=lambda index: (found[index], -index)))
    worst = max(losses.values())
    values = tuple(losses.get(index, worst) for index in range(bench.decoder.num_layers))
    rest = [index for index in ascending(values) if index not in dropped]
    return Scores(method="sleb", values=values, order=(*dropped, *rest))


def _losses(bench: Bench, gone: Collection[int], candidates: Sequence[int], name: str) -> dict[int, float]:
    blocks = evenly_spread(bench.blocks_NT, bench.config.prune.score_blocks)
    shown = phase(candidates, name, len(candidates), show=bench.engine.is_first)
    return {index: bench.loss_without({*gone, index}, blocks) for index in shown}
