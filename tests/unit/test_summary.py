"""States side by side: intervals, the worst slice, and the metric names of the contract."""

import math

import pytest

from tsp.evaluation.confidence import perplexity_interval, ratio_interval
from tsp.evaluation.summary import metrics, summarise
from tsp.records import Evaluation, Fidelity, Perplexity, SlicePerplexity


def perplexity(*losses):
    return Perplexity(
        ppl=math.exp(sum(losses) / len(losses)), num_windows=len(losses), block_tokens=8, window_losses=losses
    )


def part(ppl, kl=None, losses=(1.0, 2.0), weights=(3, 5)):
    fidelity = None if kl is None else Fidelity(kl=kl, top1=0.5, num_positions=4)
    return SlicePerplexity(
        ppl=ppl, num_tokens=sum(weights), fidelity=fidelity, window_losses=losses, window_tokens=weights
    )


def evaluation(shift, *, compared=True, continuation=(1, 2, 3, 4, 5)):
    kl = shift if compared else None
    return Evaluation(
        perplexity={"a": perplexity(1.0 + shift, 2.0 + shift), "b": perplexity(3.0)},
        prompt_tokens_per_s=100.0,
        fidelity={} if kl is None else {"a": Fidelity(kl=kl, top1=0.9, num_positions=4)},
        slices={"a": {"x": part(10 + shift, kl), "y": part(10 + 3 * shift)}, "b": {"y": part(7.0, kl)}},
        continuations=(continuation,),
        tasks={"quiz": {"acc": 0.5, "acc_stderr": 0.1}},
    )


@pytest.fixture
def states():
    return {
        "dense": evaluation(0.0, compared=False),
        "bare_drop": evaluation(2.0, continuation=(9, 9, 9, 9, 9)),
        "pruned": evaluation(1.0, continuation=(1, 2, 9, 4, 5)),
    }


def test_the_worst_slice_is_the_one_whose_perplexity_grew_most_of_all_corpora(states):
    assert summarise(states)["worst_slice"] == {"corpus": "a", "slice": "y", "ratio": pytest.approx(13 / 10)}
    alone = summarise({"model": states["pruned"]})
    assert alone["worst_slice"] is None
    assert alone["ppl_ratio_interval"] == {"a": {}, "b": {}}
    assert alone["generation"] == {"model": {"repetition": 0, "agreement": None}}


def test_intervals_are_those_of_the_windows(states):
    found = summarise(states)
    assert found["ppl_interval"]["a"]["pruned"] == perplexity_interval((2.0, 3.0))
    assert found["ppl_ratio_interval"]["a"]["pruned"] == ratio_interval((2.0, 3.0), (1.0, 2.0))
    assert found["slices"]["a"]["x"]["ratio_interval"]["pruned"] == (1, 1)


def test_a_slice_says_nothing_of_what_was_not_compared(states):
    row = summarise(states)["slices"]["a"]
    assert row["x"]["kl"] == {"bare_drop": 2.0, "pruned": 1.0}
    assert row["y"]["kl"] == row["y"]["top1"] == {}
    assert row["y"]["ppl"] == {"dense": 10, "bare_drop": 16, "pruned": 13}


def test_one_window_makes_no_interval():
    alone = {"losses": (1.0,), "weights": (8,)}
    states = {
        state: Evaluation(
            perplexity={"a": perplexity(1.0, 2.0)}, prompt_tokens_per_s=None, slices={"a": {"x": part(ppl, **alone)}}
        )
        for state, ppl in (("dense", 2.0), ("pruned", 3.0))
    }
    assert summarise(states)["slices"]["a"]["x"]["ratio_interval"] == {}
    assert summarise(states)["worst_slice"]["ratio"] == pytest.approx(1.5)


def test_metrics_have_the_names_of_the_contract(states):
    found = metrics(summarise(states))
    assert found["eval/a/ppl_pruned"] == pytest.approx(math.exp(2.5))
    assert found["ppl_ratio"] == found["ppl_ratio/a"] == pytest.approx(math.e)
    assert found["ppl_ratio/b"] == 1
    assert found["eval/a/kl_bare_drop"] == 2.0
    assert found["eval/a/top1_pruned"] == 0.9
    assert found["eval/a/slice/y/ppl_pruned"] == 13
    assert found["eval/b/slice/y/kl_pruned"] == 1.0
    assert found["worst_slice_ratio"] == pytest.approx(1.3)
    assert found["eval/generation/agreement_pruned"] == pytest.approx(2 / 5)
    assert found["eval/generation/repetition_bare_drop"] == pytest.approx(1 / 2)
    assert found["eval/quiz/acc_stderr_dense"] == 0.1
    assert found["eval/prompt_tokens_per_s_dense"] == 100
    assert {"eval/a/ppl_ratio_low", "eval/a/ppl_ratio_high"} < set(found)


def test_what_was_not_measured_is_empty_and_logs_nothing():
    bare = Evaluation(perplexity={"a": perplexity(1.0)}, prompt_tokens_per_s=None)
    found = summarise({"dense": bare, "bare_drop": bare, "pruned": bare})
    assert (found["slices"], found["worst_slice"], found["generation"], found["tasks"]) == ({}, None, {}, {})
    assert {name.split("/")[-1] for name in metrics(found)} == {
        "ppl_dense", "ppl_bare_drop", "ppl_pruned", "a", "ppl_ratio", "ppl_ratio_low", "ppl_ratio_high",
    }  # fmt: skip


def test_an_interval_weighted_by_tokens_is_the_plain_one_of_equal_weights_and_leans_to_the_heavy():
    losses, against = [1.0, 1.5, 2.0, 2.5], [1.0, 1.2, 1.4, 1.6]
    plain = ratio_interval(losses, against)
    assert ratio_interval(losses, against, weights=[7] * 4) == pytest.approx(plain)
    heavy = ratio_interval(losses, against, weights=[1, 1, 1, 1000])
    assert heavy[1] == pytest.approx(math.exp(0.9), rel=1e-3) and heavy[1] > 1.1 * plain[1]


def test_the_weighted_interval_is_the_ratio_estimators_own():
    """Against the delta method for a ratio of sums, on many windows."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 40, (600,), generator=generator).double()
    losses = 0.3 + 0.5 * torch.randn(600, generator=generator).double()
    mean = (weights * losses).sum() / weights.sum()
    half = 1.959964 * float((weights * (losses - mean)).square().sum().sqrt() / weights.sum())
    found = ratio_interval(losses.tolist(), [0.0] * 600, weights=weights.tolist())
    assert found == pytest.approx((math.exp(mean - half), math.exp(mean + half)), rel=0.006)
