"""Greedy continuations against transformers' own, and what is read off them."""

import pytest
import torch

from tests.models import logits, tiny_model, tokens
from tsp.decoder import find_decoder
from tsp.evaluation.generation import agreement, greedy_continuations, prompts_of, repetition

SIZES = {"num_prompts": 3, "num_new": 12, "max_positions": 64}


def continued(model, blocks, **changes):
    options = SIZES | {"batch_size": 2, "name": None} | changes
    return greedy_continuations(lambda ids: logits(model, ids), blocks, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo"])
def test_it_is_what_transformers_generates(family):
    model, blocks = tiny_model(family, num_layers=2), tokens(6, 40)
    prompts = blocks[[0, 2, 4], :32]
    theirs = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=12, max_new_tokens=12,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert continued(model, blocks) == tuple(map(tuple, theirs[:, 32:].tolist()))


def test_it_is_right_where_the_first_layer_is_bypassed():
    """With a cache it would not be: the cache counts its tokens at layer 0."""
    from tests.models import without_layers

    model, blocks = tiny_model(num_layers=3), tokens(3, 40)
    smaller = without_layers(model, (0,), "model.layers")
    expected = continued(smaller, blocks)
    with find_decoder(model).bypassing((0,)):
        assert continued(model, blocks) == expected


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_share_the_prompts(world_size):
    model, blocks = tiny_model(num_layers=1), tokens(6, 40)
    parts = [continued(model, blocks, batch_size=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    total = sum(torch.tensor(part) for part in parts)
    assert tuple(map(tuple, total.tolist())) == continued(model, blocks)


def test_short_windows_and_short_models_get_what_there_is_room_for():
    model = tiny_model(num_layers=1)
    assert [len(new) for new in continued(model, tokens(2, 8))] == [12, 12]
    assert [len(new) for new in continued(model, tokens(2, 20), max_positions=16)] == [8, 8, 8]


def test_fewer_windows_than_prompts_are_cut_into_pieces():
    values = torch.arange(2 * 70).view(2, 70)
    assert prompts_of(values, 2, 64).tolist() == values[:, :32].tolist()
    assert prompts_of(values, 3, 64)[:, 0].tolist() == [0, 35, 70], "three of four pieces of 35"
    assert prompts_of(values, 9, 64)[:, 0].tolist() == [0, 35, 70, 105], "no piece is shorter than a prompt"
    assert prompts_of(values[:, :20], 9, 64).shape == (2, 20)
    assert prompts_of(values > 31, 2, 64)[:, -1].tolist() == [False, True]


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], 0),
        ([[1] * 7], 3 / 4),
        ([[1, 2, 1, 2, 1, 2, 1]], 2 / 4),
        ([[1] * 7, [1, 2, 3, 4, 5, 6, 7]], 3 / 8),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 0),
        ([[1, 2, 3]], 0),
    ],
    ids=["all-new", "one-word", "two-words", "mean", "not-across-texts", "too-short"],
)
def test_repetition_is_the_share_of_4_grams_seen_before(texts, share):
    assert repetition(texts) == pytest.approx(share)


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        ([[1, 2, 3, 4]], 1),
        ([[9, 2, 3, 4]], 0),
        ([[1, 2, 9, 4]], 0.5),
        ([[1, 2, 3, 4], [9, 9, 9, 9]], 0.5),
    ],
)
def test_agreement_ends_at_the_first_difference(texts, share):
    assert agreement(texts, [[1, 2, 3, 4]] * len(texts)) == pytest.approx(share)
