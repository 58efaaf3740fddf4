"""The mathematics of both stages: hand-made cases, limits and identities."""

import math

import pytest
import torch

from tsp.penalties import gap_norm, project_capped_simplex, soft_threshold


def bisected_projection(values_L: torch.Tensor, budget: float) -> torch.Tensor:
    """Another way to the same point: the sum of clamp(g - tau, 0, 1) falls with tau, so halve the interval."""
    values = values_L.double()
    low, high = values.min() - 1, values.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (values - middle).clamp(0, 1).sum() > budget else (low, middle)
    return (values - (low + high) / 2).clamp(0, 1)


def test_soft_threshold_by_hand():
    shrunk = soft_threshold(torch.tensor([-2.0, -0.5, -0.1, 0.0, 0.3, 1.0]), 0.3)
    assert torch.allclose(shrunk, torch.tensor([-1.7, -0.2, 0.0, 0.0, 0.0, 0.7]))
    assert (shrunk[2:5] == 0).all(), "exact zeros, not small numbers"


def test_soft_threshold_zero_is_identity_and_takes_one_threshold_per_gate():
    values = torch.tensor([-1.0, 0.25, 3.0])
    assert torch.equal(soft_threshold(values, 0.0), values)
    assert torch.equal(soft_threshold(values, torch.tensor([0.5, 0.5, 1.0])), torch.tensor([-0.5, 0.0, 2.0]))


def test_soft_threshold_minimises_the_proximal_objective():
    value, threshold = torch.tensor([0.8]), 0.3
    best = soft_threshold(value, threshold).item()
    candidates = torch.linspace(-2, 2, 40_001, dtype=torch.float64)
    objective = 0.5 * (candidates - value) ** 2 + threshold * candidates.abs()
    assert best == pytest.approx(candidates[objective.argmin()].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("values", "budget", "expected"),
    [
        ([1.0, 1.0, 1.0], 3, [1, 1, 1]),
        ([0.2, 0.4, 0.9], 0, [0, 0, 0]),
        ([5.0, -5.0], 2, [1, 1]),
        ([5.0, -5.0], 1, [1, 0]),
        # A common shift of 0.2 makes the sum 1.
        ([0.7, 0.5, 0.4], 1, [0.5, 0.3, 0.2]),
        # Ties share alike.
        ([0.9, 0.9, 0.9, 0.9], 1, [0.25, 0.25, 0.25, 0.25]),
        ([1.0, 1.0, 0.0, 0.0], 1, [0.5, 0.5, 0, 0]),
        ([0.3], 0.3, [0.3]),
    ],
)
def test_projection_by_hand(values, budget, expected):
    projected = project_capped_simplex(torch.tensor(values), budget)
    assert torch.allclose(projected, torch.tensor(expected, dtype=torch.float32), atol=1e-6)
    assert projected.dtype == torch.float32


@pytest.mark.parametrize("seed", range(8))
def test_projection_equals_bisection_and_fulfils_the_conditions(seed):
    generator = torch.Generator().manual_seed(seed)
    num_layers = int(torch.randint(1, 40, (), generator=generator))
    values = torch.randn(num_layers, generator=generator) * 10 ** (seed % 3 - 1)
    if seed % 2:
        values = (values * 4).round() / 4  # many ties
    for share in (0, 0.1, 0.5, 0.77, 1):
        budget = share * num_layers
        projected = project_capped_simplex(values, budget)
        assert projected.double().sum().item() == pytest.approx(budget, abs=1e-5)
        assert projected.min() >= 0
        assert projected.max() <= 1
        assert torch.allclose(projected.double(), bisected_projection(values, budget), atol=1e-6)
        # Karush-Kuhn-Tucker: one shift tau for all that are inside; those at 0 lie below it, those at 1 above it.
        inside = (projected > 1e-5) & (projected < 1 - 1e-5)
        if inside.any():
            tau = (values - projected)[inside]
            assert tau.max() - tau.min() < 1e-5 * (1 + values.abs().max())
            assert (values[projected <= 1e-5] <= tau.mean() + 1e-4).all()
            assert (values[projected >= 1 - 1e-5] >= tau.mean() + 1 - 1e-4).all()


def test_projection_is_nearer_than_any_other_feasible_point():
    values, budget = torch.tensor([1.3, 0.2, 0.6, -0.4]), 1.5
    distance = (project_capped_simplex(values, budget) - values).norm()
    random = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0))
    feasible = random[(random.sum(dim=1) - budget).abs() < 0.02]
    assert len(feasible) > 100
    assert ((feasible - values).norm(dim=1) >= distance - 0.02).all()


def test_projection_leaves_a_feasible_point_alone():
    values = torch.tensor([0.1, 0.9, 0.5, 1.0, 0.0])
    assert torch.allclose(project_capped_simplex(values, 2.5), values, atol=1e-6)


def test_gap_norm_by_hand():
    gap = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[-6.0, 8.0], [5.0, 12.0]]])
    assert gap_norm(gap, "l2", "token-mean").item() == pytest.approx((5 + 0 + 10 + 13) / 4)
    assert gap_norm(gap, "l2", "token-sum").item() == pytest.approx(28)
    assert gap_norm(gap, "l2", "frobenius").item() == pytest.approx(math.sqrt(25 + 100 + 169))
    assert gap_norm(gap, "l1", "token-mean").item() == pytest.approx((7 + 0 + 14 + 17) / 4)
    assert gap_norm(gap, "l1", "token-sum").item() == pytest.approx(38)
    assert gap_norm(gap, "l1", "frobenius").item() == pytest.approx(38)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("reduction", ["token-mean", "token-sum", "frobenius"])
def test_the_mean_over_the_parts_of_a_step_is_the_size_of_its_gap(reduction, norm, parts):
    gap = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    whole = gap_norm(gap, norm, reduction).item()
    mean = sum(gap_norm(part, norm, reduction, parts) for part in gap.chunk(parts)).item() / parts
    if reduction == "frobenius" and norm == "l2":
        assert 0.97 * whole < mean <= whole * (1 + 1e-6), "no part knows the others' squares"
        assert gap_norm(gap[:1], norm, reduction, 4).item() == pytest.approx(
            gap_norm(gap[:1].repeat(4, 1, 1), norm, reduction).item()
        )
    else:
        assert mean == pytest.approx(whole, rel=1e-5)


def test_gap_norm_is_a_scalar_in_fp32_also_for_bf16():
    size = gap_norm(torch.ones(2, 3, 1024, dtype=torch.bfloat16))
    assert (size.shape, size.dtype) == (torch.Size([]), torch.float32)
    assert size.item() == pytest.approx(32)


@pytest.mark.parametrize("reduction", ["token-mean", "token-sum", "frobenius"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gap_norm_has_a_finite_gradient_at_zero(norm, reduction):
    gap = torch.zeros(1, 2, 3, requires_grad=True)
    gap_norm(gap, norm, reduction).backward()
    assert torch.isfinite(gap.grad).all()
