"""Bootstrap intervals against the normal approximation, and what they are for."""

import math

import pytest
import torch

from tsp.evaluation.confidence import perplexity_interval, ratio_interval


def windows(num=400, *, mean=3.0, spread=0.5, seed=0):
    return (mean + spread * torch.randn(num, generator=torch.Generator().manual_seed(seed))).tolist()


def test_on_many_windows_it_is_the_normal_interval_of_the_mean():
    losses = torch.tensor(windows(), dtype=torch.float64)
    half = 1.959964 * losses.std().item() / math.sqrt(len(losses))
    expected = math.exp(losses.mean() - half), math.exp(losses.mean() + half)
    assert perplexity_interval(losses.tolist()) == pytest.approx(expected, rel=0.005)


def test_it_covers_the_truth_about_as_often_as_it_says():
    inside = 0
    for seed in range(200):
        low, high = perplexity_interval(windows(60, seed=seed), level=0.9)
        inside += low <= math.exp(3.0) <= high
    assert 0.82 <= inside / 200 <= 0.96


def test_paired_it_sees_a_difference_that_each_alone_hides():
    dense = windows()
    pruned = [loss + 0.02 + 0.01 * noise for loss, noise in zip(dense, torch.randn(400).tolist(), strict=True)]
    (low_dense, high_dense), (low_pruned, _) = perplexity_interval(dense), perplexity_interval(pruned)
    assert low_dense < low_pruned < high_dense, "the two overlap"
    low, high = ratio_interval(pruned, dense)
    assert 1 < low < math.exp(0.02) * 1.002
    assert low < high < 1.03


def test_one_window_says_nothing_and_the_seed_decides():
    assert perplexity_interval([2.0]) == pytest.approx((math.exp(2.0), math.exp(2.0)))
    assert ratio_interval(windows(), windows()) == (1.0, 1.0)
    assert perplexity_interval(windows(20)) == perplexity_interval(windows(20))
    assert perplexity_interval(windows(20), seed=1) != perplexity_interval(windows(20))
