"""From an order of the layers to doomed layers: cut, protect, swap."""

import itertools
import random

import pytest

from tsp.errors import ConfigError
from tsp.selection import ascending, cut, protected_layers, swap_search


def test_ascending_drops_the_later_of_equal_layers_first():
    assert ascending([0.5, 0.1, 0.5, 0.1, 0.9]) == [3, 1, 2, 0, 4]
    assert ascending([0.0] * 4) == [3, 2, 1, 0]


def test_protected_layers():
    assert protected_layers(6, 2, 1) == {0, 1, 5}
    assert protected_layers(6, 0, 0) == frozenset()
    assert protected_layers(3, 5, 5) == {0, 1, 2}


def test_cut_takes_the_first_that_are_not_protected_and_sorts():
    assert cut([5, 0, 3, 2, 1, 4], 3) == (0, 3, 5)
    assert cut([5, 0, 3, 2, 1, 4], 3, protected={0, 5}) == (1, 2, 3)
    assert cut([1, 0], 0) == ()


def test_cut_refuses_when_protection_leaves_too_few():
    with pytest.raises(ConfigError, match=r"protect_first.*leave 2 layers.*3 are to go"):
        cut(range(4), 3, protected={0, 3})


def additive(weights):
    return lambda doomed: sum(weights[index] for index in doomed)


def search(doomed, num_layers, loss, **options):
    def losses(gone, candidates):
        return {index: loss((*gone, index)) for index in candidates}

    return swap_search(doomed, num_layers, losses, loss=loss, **options)


def test_swap_search_finds_the_best_exchange():
    assert search((0, 1), 5, additive([9, 1, 4, 2, 3]), max_rounds=1) == ((1, 3), 3)


def test_swap_search_stops_when_nothing_is_better():
    calls = []

    def loss(doomed):
        calls.append(tuple(doomed))
        return additive([0, 0, 1, 1])(doomed)

    assert search((0, 1), 4, loss, max_rounds=10) == ((0, 1), 0)
    assert len(calls) == 1 + 4, "one round of L losses, then the end"


def test_swap_search_reaches_the_optimum_of_an_additive_loss_in_enough_rounds():
    weights = [5, 1, 7, 3, 2, 8]
    doomed, loss = search((0, 2, 5), 6, additive(weights), max_rounds=6)
    best = min(itertools.combinations(range(6), 3), key=additive(weights))
    assert (doomed, loss) == (best, additive(weights)(best))


def test_swap_search_keeps_protected_layers():
    assert search((0,), 4, additive([5, 0, 3, 4]), protected={1}, max_rounds=3)[0] == (2,)
    assert search((0,), 2, additive([5, 0]), protected={1}, max_rounds=3)[0] == (0,), "nothing to exchange it for"


@pytest.mark.parametrize("seed", range(20))
def test_swap_search_never_raises_the_loss(seed):
    generator = random.Random(seed)
    table = {pair: generator.random() for pair in itertools.combinations(range(7), 2)}
    table |= {(index,): generator.random() for index in range(7)}

    def loss(doomed):
        return table[tuple(sorted(doomed))]

    found, end = search((1, 4), 7, loss, max_rounds=5)
    assert end == loss(found) <= loss((1, 4))


def test_zero_rounds_only_measure():
    assert search((3, 1), 4, additive([0, 1, 2, 3]), max_rounds=0) == ((1, 3), 4)
    assert search((), 4, additive([0, 1, 2, 3]), max_rounds=2) == ((), 0)
