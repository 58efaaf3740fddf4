"""Hard gates under the budget: each round closes the gate without which the calibration loss is least.

The budget of stage 1 with gates that are 0 or 1: a coordinate at a time, from sum(g) = L down to L - num_drop. What
closes is decided by SLEB's rule (arXiv 2402.09025, algorithm 1) on a part of its work: a round is a successive halving
(`selection.successive_halving`, 5/16 of the measurements), and `prune.reuse_prefix` halves each, for one pass without
any candidate: 0.26 of all layer computations with 12 layers, 0.23 with 16, a sixth with many. The order for n layers
begins with those for fewer, and there is neither a learning rate nor a seed.
"""

import torch

from tsp.data import evenly_spread
from tsp.methods.base import Bench
from tsp.methods.leave_out import losses_without
from tsp.progress import phase
from tsp.records import Scores
from tsp.selection import ascending, successive_halving


def score(bench: Bench, num_drop: int) -> Scores:
    """Order the layers by when their gate closes; those left open by the last loss without them.

    The value of a layer is the loss without it when it was measured last, on however many sequences that was; of a
    protected one, the worst.
    """
    num_layers = bench.decoder.num_layers
    blocks = evenly_spread(bench.blocks_NT, bench.config.prune.score_blocks)
    # Neighbours stand in one document: each part of the sequences is to be like all of them.
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]
    closed: list[int] = []
    found: dict[int, float] = {}

    def losses(candidates: list[int], start: int, stop: int) -> dict[int, float]:
        return losses_without(bench, closed, candidates, blocks[start:stop])

    for _ in phase(range(num_drop), "stage 1", num_drop, show=bench.engine.is_first):
        open_ones = [index for index in range(num_layers) if index not in closed and index not in bench.protected]
        best, measured = successive_halving(open_ones, losses, len(blocks))
        found |= measured
        closed.append(best)
        gates = [float(index not in closed) for index in range(num_layers)]
        bench.log_gates("stage1", gates, {"stage1/loss/lm": measured[best]})
    values = [found.get(index, max(found.values())) for index in range(num_layers)]
    rest = [index for index in ascending(values) if index not in closed]
    return Scores(method="gates-search", values=tuple(values), order=(*closed, *rest))
