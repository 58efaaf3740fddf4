"""Hard gates, closed one by one: against a plain loop, and against SLEB on the same sequences."""

import functools

import pytest
import torch

from tests.models import bench, job, make_identity, sample, tiny_model
from tsp.decoder import find_decoder
from tsp.methods.leave_out import sleb
from tsp.methods.trsp.stage1 import score
from tsp.selection import successive_halving

LAYERS = 6


def model_of_seed_0():
    model = tiny_model(num_layers=LAYERS)
    make_identity(find_decoder(model), 1)
    return model


@functools.cache
def text() -> torch.Tensor:
    """Written by the model itself, so that closing a layer costs loss."""
    return sample(model_of_seed_0(), 64, 16)


def made_by(verb, num_drop=3, protected=(), **changed):
    made = bench(model_of_seed_0(), text(), job(stage1__schedule="search", **changed), protected=protected)
    with made.engine.mounted(made.decoder.model) as made.model:
        return verb(made, num_drop), made


def loss_without(layers):
    """Ten lines of plain PyTorch: mean cross-entropy with some layers taken out of the list."""
    model = model_of_seed_0()
    decoder = find_decoder(model)
    with decoder.bypassing(layers), torch.no_grad():
        logits = model(input_ids=text(), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text()[:, 1:].flatten()).item()


def test_the_identity_goes_first_and_the_order_begins_as_that_of_sleb():
    found, _ = made_by(score)
    expected, _ = made_by(sleb)
    assert found.order[0] == 1
    assert found.order[:3] == expected.order[:3]


def test_gates_and_losses_are_logged_round_by_round():
    scores, made = made_by(score)
    gates, losses = made.tracker.gates("stage1", LAYERS), made.tracker.series("stage1/loss/lm")
    closed = set()
    for number in range(3):
        closed.add(scores.order[number])
        assert gates[number].tolist() == [float(index not in closed) for index in range(LAYERS)]
        # The winner of a round has been measured on all sequences.
        assert losses[number] == pytest.approx(loss_without(closed), rel=1e-5)
    assert made.trained_tokens == 0
    assert made.decoder.bypassed == frozenset(), "nothing stays bypassed"


def test_the_order_for_more_layers_begins_with_that_for_fewer_and_no_seed_matters():
    assert made_by(score, 4, seed=7)[0].order[:2] == made_by(score, 2)[0].order[:2]


def test_protected_layers_stay_and_have_the_worst_value():
    scores, _ = made_by(score, 2, protected=(1, 5))
    assert {1, 5}.isdisjoint(scores.order[:2])
    assert scores.values[1] == scores.values[5] == max(scores.values)


@pytest.mark.parametrize("reuse", [True, False])
def test_prefix_reuse_changes_nothing(reuse):
    assert made_by(score, prune__reuse_prefix=reuse)[0].values == pytest.approx(made_by(score)[0].values, rel=1e-6)


def counted(table):
    """Losses of a table `[candidates, sequences]`, and a list of what was measured."""
    asked = []

    def losses(candidates, start, stop):
        asked.append((list(candidates), start, stop))
        return {index: table[index][start:stop].mean().item() for index in candidates}

    return losses, asked


def test_halving_measures_five_sixteenths_and_the_winner_on_all():
    table = torch.rand(16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table += torch.arange(16)[:, None]
    losses, asked = counted(table.flip(0))
    best, means = successive_halving(range(16), losses, 32)
    assert best == 15
    assert [(len(candidates), start, stop) for candidates, start, stop in asked] == [
        (16, 0, 4), (8, 4, 8), (4, 8, 16), (2, 16, 32),
    ]  # fmt: skip
    assert sum(len(candidates) * (stop - start) for candidates, start, stop in asked) == 16 * 32 * 5 / 16
    assert means[15] == pytest.approx(table[0].mean().item())
    assert means[0] == pytest.approx(table[15, :4].mean().item()), "on what it was measured on"


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("num_candidates", [1, 2, 3, 5])
def test_halving_of_few_of_anything_uses_all_sequences_once(num_sequences, num_candidates):
    losses, asked = counted(torch.ones(num_candidates, num_sequences))
    best, means = successive_halving(range(num_candidates), losses, num_sequences)
    assert best == num_candidates - 1, "of equals the later layer"
    assert set(means) == set(range(num_candidates))
    spans = [(start, stop) for _, start, stop in asked]
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == num_sequences
