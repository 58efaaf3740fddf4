"""Perplexity by the field's protocol."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.models import VOCABULARY, logits, tiny_model, tokens
from tsp.evaluation.perplexity import perplexity, window_losses


def test_window_losses_are_each_windows_own_mean():
    model, blocks = tiny_model(num_layers=2), tokens(5, 12)
    losses = window_losses(lambda ids: logits(model, ids), blocks, batch_size=2)
    assert losses.dtype == torch.float64
    for loss, block in zip(losses, blocks, strict=True):
        theirs = model(input_ids=block[None], labels=block[None], use_cache=False).loss
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_the_batch_size_changes_nothing(batch_size):
    model, blocks = tiny_model(num_layers=1), tokens(5, 8)
    one, many = (window_losses(lambda ids: logits(model, ids), blocks, batch_size=b) for b in (1, batch_size))
    assert torch.allclose(one, many, rtol=1e-6)


@pytest.mark.parametrize(("num_windows", "world_size"), [(1, 2), (3, 2), (7, 3), (8, 4), (5, 1)])
def test_the_ranks_share_the_windows_and_make_equally_many_passes(num_windows, world_size):
    model, blocks = tiny_model(num_layers=1), tokens(num_windows, 8)
    passes = []

    def of_rank(rank):
        calls = []

        def forward(ids):
            calls.append(len(ids))
            return logits(model, ids)

        losses = window_losses(forward, blocks, batch_size=2, rank=rank, world_size=world_size)
        passes.append(len(calls))
        return losses

    total = sum(of_rank(rank) for rank in range(world_size))
    assert torch.allclose(total, window_losses(lambda ids: logits(model, ids), blocks, batch_size=2), rtol=1e-6)
    assert len(set(passes)) == 1, "else the ranks of a sharded model wait for each other for ever"


def test_a_uniform_model_has_the_size_of_the_vocabulary_as_perplexity():
    losses = window_losses(lambda ids: torch.zeros(*ids.shape, VOCABULARY), tokens(4, 9), batch_size=3)
    record = perplexity(losses, 9)
    assert record.ppl == pytest.approx(VOCABULARY)
    assert (record.num_windows, record.block_tokens, len(record.window_losses)) == (4, 9, 4)


def test_perplexity_is_the_exponential_of_the_mean_not_the_mean_of_the_exponentials():
    assert perplexity(torch.tensor([1.0, 3.0]), 8).ppl == pytest.approx(math.exp(2))


def test_a_broken_model_has_a_huge_perplexity_and_no_overflow():
    assert perplexity(torch.tensor([5000.0]), 8).ppl == pytest.approx(math.exp(700))


def test_bf16_logits_are_summed_in_fp32():
    ids = tokens(1, 20)
    rough = torch.randn(1, 20, VOCABULARY, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.cross_entropy(rough[0, :-1].float(), ids[0, 1:]).item()
    assert window_losses(lambda _: rough, ids, batch_size=1).item() == pytest.approx(expected, rel=1e-6)
