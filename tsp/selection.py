"""From scores to doomed layers: cut, protect, swap. Pure Python; a loss is a function handed in."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from tsp.errors import ConfigError, ModelError


def protected_layers(num_layers: int, first: int, last: int) -> frozenset[int]:
    """The indices of the first and the last layers that are never dropped."""
    return frozenset(range(min(first, num_layers))) | frozenset(range(max(num_layers - last, 0), num_layers))


def cut(order: Sequence[int], num_drop: int, protected: Collection[int] = ()) -> tuple[int, ...]:
    """Doom the first `num_drop` layers of an order that are not protected.

    Args:
        order: layer indices, the first to drop first.
        num_drop: how many to doom.
        protected: indices that stay.

    Returns:
        Sorted indices.

    Raises:
        ConfigError: fewer than `num_drop` layers may be dropped.
    """
    candidates = [index for index in order if index not in protected]
    if len(candidates) < num_drop:
        raise ConfigError(
            f"prune.protect_first and prune.protect_last leave {len(candidates)} layers that may be dropped, "
            f"{num_drop} are to go; protect fewer or drop fewer"
        )
    return tuple(sorted(candidates[:num_drop]))


def spread(candidates: Sequence[int], num_drop: int) -> tuple[int, ...]:
    """`num_drop` of the candidates at even distances, where it is not known yet which will go."""
    return tuple(candidates[(2 * n + 1) * len(candidates) // (2 * num_drop)] for n in range(num_drop))


def ascending(scores: Sequence[float]) -> list[int]:
    """Indices by score, lowest first; of equal scores the later layer goes first (early layers matter more)."""
    return sorted(range(len(scores)), key=lambda index: (scores[index], -index))


def runs(indices: Collection[int]) -> list[range]:
    """Consecutive indices together: {3, 4, 7} -> [range(3, 5), range(7, 8)]."""
    found: list[range] = []
    for index in sorted(indices):
        if found and found[-1].stop == index:
            found[-1] = range(found[-1].start, index + 1)
        else:
            found.append(range(index, index + 1))
    return found


def runs_after_kept(doomed: Collection[int], transfer: str) -> list[range]:
    """`runs` for a transfer that puts each run of doomed layers into the layer before it.

    Raises:
        ModelError: a run begins at layer 0.
    """
    found = runs(doomed)
    if found and found[0].start == 0:
        raise ModelError(
            f"{transfer} folds dropped layers into the layer before them; layers {','.join(map(str, found[0]))} have "
            "none; protect the first layer (prune.protect_first=1) or use another transfer"
        )
    return found


def successive_halving(
    candidates: Sequence[int], losses: Callable[[list[int], int, int], Mapping[int, float]], num_sequences: int
) -> tuple[int, dict[int, float]]:
    """The candidate with the least loss, with most of the sequences spent on those that may be it.

    All are measured on an eighth of the sequences, the better half of them on another eighth, a quarter on a quarter
    more, an eighth on the rest (Jamieson and Talwalkar 2016, arXiv 1502.07943): 5/16 of measuring all on all.

    Args:
        candidates: layer indices, at least one.
        losses: mean loss for each of some candidates on the sequences from a start to a stop.
        num_sequences: that there are.

    Returns:
        The best, of equals the later layer; and for each candidate its mean loss on the sequences it was measured on.
    """
    sums, means = dict.fromkeys(candidates, 0.0), dict[int, float]()
    alive = sorted(candidates)
    for start, stop in rungs(num_sequences):
        if start:
            best_first = sorted(alive, key=lambda index: (means[index], -index))
            alive = sorted(best_first[: math.ceil(len(alive) / 2)])
        for index, loss in losses(alive, start, stop).items():
            sums[index] += loss * (stop - start)
            means[index] = sums[index] / stop
    return min(alive, key=lambda index: (means[index], -index)), means


def rungs(num_sequences: int) -> list[tuple[int, int]]:
    """The sequences on which each half of the candidates is measured, as start and stop; of few, fewer halves."""
    stops = sorted({max(1, num_sequences // share) for share in (8, 4, 2, 1)})
    return list(zip([0, *stops], stops, strict=False))


def swap_search(
    doomed: Collection[int],
    num_layers: int,
    losses: Callable[[Collection[int], Sequence[int]], Mapping[int, float]],
    *,
    loss: Callable[[Collection[int]], float],
    protected: Collection[int] = (),
    max_rounds: int = 1,
) -> tuple[tuple[int, ...], float]:
    """Exchange one doomed for one kept layer a round, while the loss falls.

    A round takes back the doomed layer that is missed most, and then dooms the one that is missed least without it. So
    it costs L losses and not `len(doomed) * kept`, as trying every exchange would.

    Args:
        doomed: the selection to start from.
        num_layers: L.
        losses: the calibration loss without some layers (first argument) and one more, for each of some candidates.
        loss: the same without some layers.
        protected: layers that stay kept.
        max_rounds: rounds at most.

    Returns:
        The sorted selection and its loss.
    """
    best, best_loss = frozenset(doomed), loss(doomed)
    for _ in range(max_rounds if best else 0):
        missed = min(sorted(best), key=lambda index: loss(best - {index}))
        rest = best - {missed}
        candidates = [index for index in range(num_layers) if index not in best and index not in protected]
        found = losses(rest, candidates) if candidates else {}
        new = min(found, key=lambda index: (found[index], -index), default=missed)
        if found.get(new, best_loss) >= best_loss:
            break
        best, best_loss = rest | {new}, found[new]
    return tuple(sorted(best)), best_loss
