"""Feasible sets: hand-worked values, published formulas, and what published code gets wrong."""

import math

import pytest
import torch
from torch import nn

from prunus.frankwolfe.sets import (
    Ball,
    Diameter,
    Entries,
    Initial,
    Lp,
    Radius,
    expected_norm,
    group_k_support,
    k_sparse,
    k_support,
    lp,
    nuclear,
    spectral_k_sparse,
    spectral_k_support,
)

X = torch.tensor([3.0, -4.0, 1.0, 0.5])


@pytest.mark.parametrize(("k", "norm"), [(1, 8.5), (2, 6.0104076), (3, 5.2201533), (4, 5.1234754)])
def test_k_support_norms(k, norm):
    """By hand for K = 2: rho = 0 needs a_1 = 4 > 3 + 1 + 0.5, which fails; rho = 1: (4 + 3 + 1.5)^2 / 2 = 36.125.

    For K = 1 published code takes the slice [-(k-1):], the whole vector, and returns 3.8013.
    """
    assert float(k_support(k).norm(X)) == pytest.approx(norm, rel=1e-7)


def test_k_support_norm_is_l1_at_one_and_l2_at_all():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert float(k_support(1).norm(x)) == pytest.approx(float(x.abs().sum()), rel=1e-6)
    assert float(k_support(50).norm(x)) == pytest.approx(float(x.norm()), rel=1e-6)


@pytest.mark.parametrize(
    ("ball", "vertex"),
    [
        (lp(1), [0, 2, 0, 0]),
        (lp(2), [-0.39036 * 3, 0.39036 * 4, -0.39036, -0.39036 * 0.5]),
        (lp(math.inf), [-2, 2, -2, -2]),
        (k_sparse(2), [-2, 2, 0, 0]),
        (k_support(2), [-1.2, 1.6, 0, 0]),
        (group_k_support(2), [-1.2, 1.6, 0, 0]),  # rows of one entry
    ],
)
def test_linear_minimisers(ball, vertex):
    ball = Radius(2.0).fit(ball, [(4,)], [1.0])
    assert torch.allclose(ball.lmo(X), torch.tensor(vertex, dtype=torch.float32), atol=1e-5)


def test_dual_values():
    """<m, LMO(m)> = -r times the dual norm, for every set of the paper."""
    m = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    top, rows, sigma = m.abs().flatten().sort(descending=True).values, m.norm(dim=1), torch.linalg.svdvals(m)
    expected = [
        (lp(1), top[0]),
        (lp(2), m.norm()),
        (lp(math.inf), top.sum()),
        (lp(3), top.pow(1.5).sum().pow(1 / 1.5)),
        (k_sparse(5), top[:5].sum()),
        (k_support(5), top[:5].norm()),
        (group_k_support(2), rows.sort(descending=True).values[:2].norm()),
        (nuclear(), sigma[0]),
        (spectral_k_sparse(3), sigma[:3].sum()),
        (spectral_k_support(3), sigma[:3].norm()),
    ]
    for ball, dual in expected:
        assert float((m * ball.lmo(m)).sum()) == pytest.approx(-float(dual), rel=1e-5)


def test_spectral_minimisers_are_those_of_the_singular_values():
    m = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    u, s, vt = torch.linalg.svd(m, full_matrices=False)
    assert torch.allclose(nuclear(2.0).lmo(m), -2 * torch.outer(u[:, 0], vt[0]), atol=1e-5)
    assert torch.allclose(spectral_k_sparse(3, 2.0).lmo(m), -2 * u[:, :3] @ vt[:3], atol=1e-5)
    expected = -2 * (u[:, :3] * s[:3]) @ vt[:3] / s[:3].norm()
    assert torch.allclose(spectral_k_support(3, 2.0).lmo(m), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("ball", "diameter"),
    [
        (lp(1), 2),
        (lp(2), 2),
        (lp(math.inf), 2 * math.sqrt(24)),
        (lp(4), 2 * 24**0.25),
        (k_sparse(9), 6),
        (k_support(9), 2),
        (group_k_support(2), 2),
        (nuclear(), 2),
        (spectral_k_sparse(4), 4),
        (spectral_k_support(3), 2),
    ],
)
def test_diameters(ball, diameter):
    assert ball.diameter((4, 6)) == pytest.approx(diameter)
    assert ball.of_diameter(10.0, (4, 6)).radius == pytest.approx(10 / diameter)
    assert ball.of_diameter(10.0, (4, 6)).diameter((4, 6)) == pytest.approx(10)


def test_below_two_the_diameter_of_an_lp_ball_is_that_of_an_axis():
    """p = 1.5, n = 100: 2 r, the distance of e_1 and -e_1; published code's 2 r n^(1/2 - 1/p) gives .928."""
    axis = torch.eye(100)[0]
    assert float(lp(1.5).norm(axis)) == 1
    assert lp(1.5).diameter((100,)) == 2.0


def test_projections_by_hand():
    assert lp(1, 3.0).project(X).tolist() == pytest.approx([1.0, -2.0, 0, 0])
    far = lp(1, 0.001).project(torch.tensor([1e4, -1.0]))  # float32 has no number within 0.0009 of 10,000
    assert far.tolist() == pytest.approx([0.001, 0.0], rel=1e-6)
    assert lp(math.inf, 2.0).project(X).tolist() == [2.0, -2.0, 1.0, 0.5]
    assert torch.allclose(lp(2, 1.0).project(X), X / X.norm())
    # r = 1.5, K = 2: clip(|x| - t, 0, 1.5) sums to 3 for every t from 1 to 1.5, where it is (1.5, 1.5, 0, 0).
    assert k_sparse(2, 1.5).project(X).tolist() == pytest.approx([1.5, -1.5, 0, 0])
    # K = 1 is the L1 ball, K = 4 the L2 ball.
    assert torch.allclose(k_support(1, 3.0).project(X), lp(1, 3.0).project(X), atol=1e-5)
    assert torch.allclose(k_support(4, 3.0).project(X), lp(2, 3.0).project(X), atol=1e-5)
    assert torch.allclose(k_sparse(1, 3.0).project(X), lp(1, 3.0).project(X), atol=1e-5)


# Radii.


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        (nn.Conv2d(64, 128, 3), "weight", 6.5320),
        (nn.Conv2d(64, 128, 3, groups=4), "weight", 6.5320),
        (nn.Conv2d(64, 128, 3), "bias", math.sqrt(128 / (3 * 576))),
        (nn.Linear(30, 48), "weight", 4.0),
        (nn.BatchNorm2d(128), "weight", math.sqrt(128)),
        (nn.BatchNorm2d(128), "bias", 0.0),
        (nn.LayerNorm((4, 4)), "weight", 4.0),
        (nn.Embedding(20, 5), "weight", 10.0),
    ],
)
def test_expected_norms(module, name, expected):
    """The closed form, and the mean over fresh initialisations."""
    assert expected_norm(module, name) == pytest.approx(expected, rel=1e-4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norms = []
        for _ in range(20):
            module.reset_parameters()
            norms.append(float(module.get_parameter(name).detach().norm()))
    assert sum(norms) / 20 == pytest.approx(expected, rel=0.03)


def test_an_expected_norm_draws_nothing_and_changes_nothing():
    module = nn.Conv2d(3, 4, 3)
    before, state = module.weight.clone(), torch.get_rng_state()
    expected_norm(module, "weight")
    assert torch.equal(module.weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="no closed form here: measure it"):
        expected_norm(nn.PReLU(), "weight")


def test_sizes():
    """D = 2 c E||W||: r = c E||W|| for a ball of diameter 2 r, c E||W|| / sqrt(K) for the K-sparse polytope."""
    assert Radius(3.0).fit(k_sparse(4), [(9,)], [7.0]).radius == 3
    assert Diameter(8.0).fit(k_sparse(4), [(9,)], [7.0]).radius == 2
    assert Initial(2.0).fit(k_sparse(4), [(9,)], [7.0]).radius == 7
    assert Initial(2.0).fit(lp(2), [(9,), (9,)], [3.0, 4.0]).radius == 10  # jointly: root of the sum of squares
    assert Initial(2.0).fit(lp(2), [(9,)], [0.0]).radius == 2  # what starts at zero counts as 1
    assert Initial(1.0).fit(Ball(Lp(math.inf), Entries()), [(16,)], [4.0]).radius == 1
