"""KL and top-1 agreement with the dense model, against a ten-line reference; losses and slices of the same pass."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.models import VOCABULARY, logits, tiny_model, tokens
from tsp.data import Corpus
from tsp.evaluation.perplexity import window_losses
from tsp.evaluation.predictions import Reference, measure_predictions, spread_positions
from tsp.live import LiveBytes


def corpus(num_windows=7, **slices):
    return Corpus("text", "text", tokens(num_windows, 12), slices)


def forward_of(model):
    return lambda ids: logits(model, ids)


def compare(text, dense, state, *, positions=4096, **sharing):
    """Perplexity, comparison and slices of a state after the dense model."""
    reference = Reference(text.blocks, positions)
    options = {"batch_size": 2} | sharing
    measure_predictions(forward_of(dense), text, reference, is_dense=True, **options)
    return measure_predictions(forward_of(state), text, reference, is_dense=False, **options)


def by_hand(text, dense, state, where):
    """Mean KL and agreement over the predicted positions that `where` `[N, T - 1]` marks."""
    kls, same = [], []
    for window, marked in zip(text.blocks, where, strict=True):
        p, q = (logits(model, window[None])[0, :-1].double().softmax(-1) for model in (dense, state))
        for place in marked.nonzero()[:, 0].tolist():
            kls.append(sum(float(a * math.log(a / b)) for a, b in zip(p[place], q[place], strict=True)))
            same.append(float(p[place].argmax() == q[place].argmax()))
    return sum(kls) / len(kls), sum(same) / len(same)


@pytest.mark.parametrize("positions", [4096, 20])
def test_it_is_the_mean_over_the_compared_positions(positions):
    text, dense, state = corpus(), tiny_model(num_layers=2), tiny_model(num_layers=2, seed=1)
    _, found, _ = compare(text, dense, state, positions=positions)
    kl, top1 = by_hand(text, dense, state, Reference(text.blocks, positions).compared)
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.top1 == pytest.approx(top1)
    assert found.num_positions == min(positions, 7 * 11)


def test_the_dense_model_is_itself():
    dense = tiny_model(num_layers=2)
    _, found, _ = compare(corpus(), dense, dense)
    assert (found.kl, found.top1) == (0, 1)


def test_kl_is_that_of_the_dense_model_to_the_state_and_not_the_reverse():
    text = corpus()
    uniform, peaked = torch.zeros(VOCABULARY), torch.zeros(VOCABULARY)
    peaked[5] = 3.0
    reference = Reference(text.blocks, 50)
    for is_dense, row in ((True, peaked), (False, uniform)):
        _, found, _ = measure_predictions(
            lambda ids, row=row: row.expand(*ids.shape, -1), text, reference, is_dense=is_dense, batch_size=3
        )
    p = peaked.softmax(0)
    assert found.kl == pytest.approx(float((p * (p * VOCABULARY).log()).sum()), rel=1e-6)


def test_a_token_that_the_dense_model_forbids_adds_nothing():
    text, reference = corpus(), Reference(corpus().blocks, 50)
    row = torch.zeros(VOCABULARY)
    row[3:] = -math.inf
    for is_dense in (True, False):
        _, found, _ = measure_predictions(
            lambda ids: row.expand(*ids.shape, -1), text, reference, is_dense=is_dense, batch_size=3
        )
    assert found.kl == 0


def test_nothing_is_compared_without_positions_or_without_a_dense_model():
    text, dense = corpus(), tiny_model(num_layers=1)
    assert compare(text, dense, dense, positions=0)[1] is None
    reference = Reference(text.blocks, 9)
    assert measure_predictions(forward_of(dense), text, reference, is_dense=False, batch_size=2)[1] is None


def test_bf16_logits_are_kept_as_they_are():
    text, reference = corpus(), Reference(corpus().blocks, 30)
    rough = torch.randn(12, VOCABULARY, generator=torch.Generator().manual_seed(0)).bfloat16()
    for is_dense in (True, False):
        _, found, _ = measure_predictions(
            lambda ids: rough.expand(len(ids), -1, -1), text, reference, is_dense=is_dense, batch_size=3
        )
    assert {kept.dtype for kept in reference.logits.values()} == {torch.bfloat16}
    assert (found.kl, found.top1) == (0, 1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_share_the_windows_and_keep_only_theirs(world_size):
    """One rank after the other; their sums are what all would hold."""
    dense, state = tiny_model(num_layers=1), tiny_model(num_layers=1, seed=1)
    text = corpus(6, some=torch.arange(72).view(6, 12) % 3 == 0)
    _, one, slices = compare(text, dense, state)
    parts, kept = [], []
    for rank in range(world_size):
        sharing = {"batch_size": 1, "rank": rank, "world_size": world_size}
        reference = Reference(text.blocks, 4096)
        measure_predictions(forward_of(dense), text, reference, is_dense=True, **sharing)
        parts.append(measure_predictions(forward_of(state), text, reference, is_dense=False, **sharing))
        kept += reference.logits
    assert sorted(kept) == list(range(6)), "no rank keeps what another has"
    # A rank alone divides its own sum by the number of all positions.
    assert sum(part[1].kl for part in parts) == pytest.approx(one.kl, rel=1e-9)
    assert sum(part[1].top1 for part in parts) == pytest.approx(one.top1, rel=1e-9)
    assert sum(part[2]["some"].fidelity.kl for part in parts) == pytest.approx(slices["some"].fidelity.kl, rel=1e-9)


def test_the_losses_are_those_of_the_plain_perplexity():
    text, model = corpus(), tiny_model(num_layers=2)
    perplexity, fidelity, _ = measure_predictions(
        forward_of(model), text, Reference(text.blocks, 9), is_dense=True, batch_size=3
    )
    assert fidelity is None
    plain = window_losses(forward_of(model), text.blocks, batch_size=3)
    assert perplexity.window_losses == pytest.approx(plain.tolist(), rel=1e-7)
    assert perplexity.ppl == pytest.approx(float(plain.mean().exp()), rel=1e-7)


@pytest.mark.parametrize("is_dense", [True, False])
def test_no_copy_of_all_logits_is_made(is_dense):
    text = corpus(8)
    logits_bTV = torch.randn(8, 12, 20_000, dtype=torch.bfloat16)
    live = LiveBytes()
    with live:
        measure_predictions(lambda ids: logits_bTV, text, Reference(text.blocks, 8), is_dense=is_dense, batch_size=8)
    one_in_fp32 = logits_bTV[0].numel() * 4
    assert live.peak < 3 * one_in_fp32


def test_a_slice_is_measured_on_its_own_tokens_alone():
    mask = torch.rand(7, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[2] = False
    text, dense, state = corpus(mine=mask), tiny_model(num_layers=2), tiny_model(num_layers=2, seed=1)
    _, _, slices = compare(text, dense, state, positions=40)
    each = F.cross_entropy(
        logits(state, text.blocks)[:, :-1].flatten(0, 1), text.blocks[:, 1:].flatten(), reduction="none"
    ).view(7, 11)
    found, inside = slices["mine"], mask[:, 1:]
    assert found.ppl == pytest.approx(float(each[inside].mean().exp()), rel=1e-5)
    assert found.num_tokens == int(inside.sum()) == sum(found.window_tokens)
    assert len(found.window_losses) == int(inside.any(1).sum()) < 7
    where = inside & Reference(text.blocks, 40).compared
    kl, top1 = by_hand(text, dense, state, where)
    assert found.fidelity.num_positions == int(where.sum())
    assert (found.fidelity.kl, found.fidelity.top1) == pytest.approx((kl, top1), rel=1e-5)


def test_a_slice_of_everything_is_the_whole():
    text, dense, state = corpus(all=torch.ones(7, 12, dtype=bool)), tiny_model(num_layers=1), tiny_model(seed=1)
    perplexity, fidelity, slices = compare(text, dense, state)
    assert slices["all"].ppl == pytest.approx(perplexity.ppl, rel=1e-9)
    assert slices["all"].fidelity == fidelity
    assert slices["all"].window_losses == pytest.approx(perplexity.window_losses)


@pytest.mark.parametrize(("total", "wanted"), [(10, 10), (10, 25), (77, 20), (4000, 40), (100, 1), (5, 0)])
def test_positions_are_as_many_as_asked_for_and_one_in_each_part(total, wanted):
    chosen = spread_positions(total, wanted).nonzero()[:, 0].tolist()
    assert len(chosen) == min(total, wanted)
    num = min(total, wanted)
    assert all(part * total // num <= place < (part + 1) * total // num for part, place in enumerate(chosen))


def test_one_position_a_window_is_not_always_the_same_one():
    places = spread_positions(40 * 511, 40).view(40, 511).nonzero()[:, 1]
    assert len(set(places.tolist())) > 35
    assert (places < 256).sum() in range(17, 24)
