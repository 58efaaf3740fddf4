"""Selections that bypass a layer and look at the loss: ppl (once) and sleb (again after each drop).

With `prune.reuse_prefix` a candidate costs only the layers behind it, on average half of them: those before it do what
they did in the pass without any candidate, which is made once per batch. Where a rank has fewer windows than
`eval.batch_size`, neighbours among the candidates share a pass, and under ZeRO-3 what it gathers. The plain loop stays
beside it, for models where later layers read more of earlier ones than the hidden state.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tsp.data import evenly_spread
from tsp.evaluation.perplexity import mean_losses
from tsp.evaluation.windows import per_window
from tsp.journal import digest_of
from tsp.methods.base import Bench
from tsp.progress import phase
from tsp.records import Scores
from tsp.selection import ascending


def ppl(bench: Bench, num_drop: int) -> Scores:
    """The loss with one layer bypassed; the lowest go, at once (arXiv 2402.02834, section 2.1).

    A protected layer is not tried; its value is the worst.
    """
    values = _values(bench, losses_without(bench, (), _free(bench), _score_blocks(bench), "ppl"))
    return Scores(method="ppl", values=values, order=tuple(ascending(values)))


def sleb(bench: Bench, num_drop: int) -> Scores:
    """Each round the layer whose absence gives the least loss is dropped (arXiv 2402.09025, algorithm 1).

    Departs from the paper: the first and the last layer are tried too; `prune.protect_first` and `protect_last` at 1
    restore it. The value of a layer is its loss in the last round that tried it; of a protected one, the worst.
    """
    blocks, dropped = _score_blocks(bench), list[int]()
    losses: dict[int, float] = {}
    for number in range(num_drop):
        free = [index for index in _free(bench) if index not in dropped]
        found = losses_without(bench, dropped, free, blocks, f"sleb, layer {number + 1} of {num_drop}")
        losses |= found
        dropped.append(min(free, key=lambda index: (found[index], -index)))
    values = _values(bench, losses)
    rest = [index for index in ascending(values) if index not in dropped]
    return Scores(method="sleb", values=values, order=(*dropped, *rest))


def _score_blocks(bench: Bench) -> Tensor:
    return evenly_spread(bench.blocks_NT, bench.config.prune.score_blocks)


def _free(bench: Bench) -> list[int]:
    return [index for index in range(bench.decoder.num_layers) if index not in bench.protected]


def _values(bench: Bench, losses: dict[int, float]) -> tuple[float, ...]:
    worst = max(losses.values())
    return tuple(losses.get(index, worst) for index in range(bench.decoder.num_layers))


def losses_without(
    bench: Bench, gone: Collection[int], candidates: Sequence[int], blocks_NT: Tensor, name: str | None = None
) -> dict[int, float]:
    """The loss on some blocks without the layers that are gone and one more, for each candidate; nats per token.

    Candidates are in ascending order. Without a name, no progress is shown: there is a phase around it that does.
    """
    if bench.config.prune.reuse_prefix and not bench.read_by_others:
        question = {"gone": sorted(gone), "candidates": list(candidates), "blocks": digest_of(blocks_NT)}
        found = bench.journal.once(question, lambda: _losses_reusing_prefix(bench, gone, candidates, blocks_NT, name))
        return dict(zip(candidates, found, strict=True))
    shown = phase(candidates, name, len(candidates), show=bench.engine.is_first) if name else candidates
    return {index: bench.loss_without({*gone, index}, blocks_NT) for index in shown}


def _losses_reusing_prefix(
    bench: Bench, gone: Collection[int], candidates: Sequence[int], blocks_NT: Tensor, name: str | None
) -> list[float]:
    """The same, batch by batch; on a rank, the hidden states of one batch are held at a time, `L x [b, T, D]`."""
    assert bench.model is not None
    model, decoder, size = bench.model, bench.decoder, bench.config.eval.batch_size
    windows = min(size, math.ceil(len(blocks_NT) / bench.engine.world_size))
    at_once = size // windows
    groups = [candidates[start : start + at_once] for start in range(0, len(candidates), at_once)]
    # The last group begins behind this layer: what comes then need not be known.
    unknown = range(groups[-1][0] + 1, decoder.num_layers)

    def losses(tokens_bT: Tensor) -> Tensor:
        with decoder.bypassing({*gone, *unknown}), decoder.hidden_states() as states:
            model.run(tokens_bT)
        columns = list[Tensor]()
        for some in groups:
            tokens_FbT = tokens_bT.repeat(len(some), 1)
            with decoder.leaving_out_each(some, states):
                columns += mean_losses(model(tokens_FbT), tokens_FbT).split(len(tokens_bT))
        return torch.cat(columns, dim=1)

    sharing = bench.engine.sharing(windows)
    with decoder.bypassing(gone):
        losses_KN = per_window(losses, blocks_NT, **sharing, name=name).T.contiguous()
    return [float(losses_N.mean()) for losses_N in losses_KN]
