"""Arithmetic of iterative pruning: sparsities and budgets of phases, ALLR's distance in closed form."""

import itertools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.masks import Masks
from prunus.patterns import Unstructured
from prunus.soup.imp import Distance, Phase, bimp_budget, distance, phase_sparsities, split_steps
from prunus.train.lr import Original, allr


def test_sparsities_by_hand():
    """s = 0.9, J = 3: each phase prunes 0.5358411 of what is left."""
    assert phase_sparsities(0.9, 3) == pytest.approx([0.5358411, 0.7845565, 0.9], abs=1e-7)
    assert phase_sparsities(0.5, 1) == phase_sparsities(0.5, 1, "cubic") == [0.5]
    # 0.8 - 0.8 (3/4)^3 = 0.4625, 0.8 - 0.8 / 8 = 0.7, 0.8 - 0.8 / 64 = 0.7875
    assert phase_sparsities(0.8, 4, "cubic") == pytest.approx([0.4625, 0.7, 0.7875, 0.8])


@settings(deadline=None)
@given(sparsity=st.floats(0, 0.999), phases=st.integers(1, 20))
def test_each_phase_prunes_the_same_share_of_what_is_left(sparsity: float, phases: int):
    targets = phase_sparsities(sparsity, phases)
    left = [1.0] + [1 - target for target in targets]
    assert targets[-1] == sparsity
    assert [b / a for a, b in itertools.pairwise(left)] == pytest.approx([(1 - sparsity) ** (1 / phases)] * phases)


def test_twenty_percent_an_iteration_reaches_renda_s_densities():
    """Renda et al. 2020 prune 20 % of what is left: 0.8^10 = 0.107, 0.8^17 = 0.0225."""
    for phases, density in ((10, 0.107), (17, 0.0225)):
        first = phase_sparsities(1 - 0.8**phases, phases)[0]
        assert first == pytest.approx(0.2)
        assert 0.8**phases == pytest.approx(density, abs=5e-4)


def test_budgets_give_the_remainder_to_the_last_phase():
    assert split_steps(10, 4) == [2, 2, 2, 4]
    assert split_steps(0, 3) == [0, 0, 0]
    assert bimp_budget(100, 60, 3) == [13, 13, 14]
    with pytest.raises(ValueError, match="2 steps cannot be split over 3 phases"):
        split_steps(2, 3)
    for dense in (0, 100, 120):
        with pytest.raises(ValueError, match=f"0 < dense steps < total steps; got {dense} of 100"):
            bimp_budget(100, dense, 3)
    for call in (lambda: split_steps(1, 0), lambda: phase_sparsities(0.5, 0)):
        with pytest.raises(ValueError, match="at least 1 phase; got 0"):
            call()
    with pytest.raises(ValueError, match=r"in \[0, 1\); got 1"):
        phase_sparsities(1.0, 2)


def smallest_pruned(weight: torch.Tensor, share: float) -> Masks:
    score = weight.abs()[None]
    return Masks({"w": Unstructured("layer").mask(score, weight.numel() - round(share * weight.numel()))[0]})


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_equal_magnitudes_have_distance_one(share: float):
    weight = torch.tensor([1.0, -1.0]).repeat(500) * 0.3
    assert distance({"w": weight}, smallest_pruned(weight, share)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
def test_uniform_magnitudes_have_distance_p(share: float):
    """|w| uniform on (0, 1): the removed share of the energy is p^3, so d1 = p."""
    weight = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    weight = weight.float() * torch.tensor([1.0, -1.0]).repeat(50_000)
    assert distance({"w": weight}, smallest_pruned(weight, share)) == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_gaussian_weights_follow_their_formula(share: float):
    """Removed share of the energy p - 2 z phi(z), z = Phi^-1((1 + p) / 2): d1 = sqrt((p - 2 z phi(z)) / p)."""
    normal = NormalDist()
    z = normal.inv_cdf((1 + share) / 2)
    weight = torch.tensor([normal.inv_cdf((i + 0.5) / 20_000) for i in range(20_000)])
    expected = math.sqrt((share - 2 * z * normal.pdf(z)) / share)
    assert distance({"w": weight}, smallest_pruned(weight, share)) == pytest.approx(expected, rel=2e-3)


def test_distance_counts_what_a_phase_removes_of_what_was_left():
    """Left: 3, 4, 12 (energy 169), not the 7 and 8; the phase removes 3: (3 / 13) / sqrt(1 / 3)."""
    before = {"a": torch.tensor([3.0, 4.0, 7.0]), "b": torch.tensor([12.0, 8.0]), "bias": torch.tensor([100.0])}
    within = Masks({"a": torch.tensor([True, True, False]), "b": torch.tensor([True, False])})
    masks = Masks({"a": torch.tensor([False, True, False]), "b": torch.tensor([True, False])})
    assert distance(before, masks, within) == pytest.approx(3 / 13 * math.sqrt(3))
    assert distance(before, within, within) == 0.0


def test_distance_survives_a_tiny_removal_in_float32():
    """||W||^2 - ||W^p||^2 in float32 would be 0 here."""
    weight = torch.ones(1000)
    weight[0] = 1e-5
    found = distance({"w": weight}, smallest_pruned(weight, 0.001))
    assert found == pytest.approx(1e-5 / math.sqrt(999) / math.sqrt(0.001), rel=1e-6)


def test_other_criteria_can_exceed_one_and_are_clipped():
    weight = torch.tensor([3.0, 1.0])
    found = distance({"w": weight}, Masks({"w": torch.tensor([False, True])}))
    assert found == pytest.approx(3 / math.sqrt(5))
    assert Distance(found, 0.1).start == 1.0


def test_signals_of_a_phase_set_where_allr_starts():
    original = Original.of([0.1] * 100)
    phase = Phase(0, 2, 0.5, Masks({}), distance=0.2)
    assert [phase.signals(steps, original) for steps in (5, 30, 500)] == [
        Distance(0.2, 0.05),
        Distance(0.2, 0.3),
        Distance(0.2, 1.0),
    ]
    signals = phase.signals(30, original)
    schedule = allr(original, 30, distance=signals.distance, share=signals.share, warmup=0)
    assert schedule(0) == signals.start == 0.3
