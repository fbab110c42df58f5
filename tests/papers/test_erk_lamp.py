"""ERK, LAMP and uniform+ against direct solutions of their definitions on tiny nets, and cases worked by hand."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.score import Scores
from prunus.score.allocations import erk, global_, lamp, uniform_plus

NET = {"conv": (4, 3, 3, 3), "wide": (16, 4, 1, 1), "fc": (10, 16), "tiny": (2, 2)}


def ones(shapes):
    return {name: torch.ones(shape).flatten(1) for name, shape in shapes.items()}


def erk_by_bisection(shapes, total):
    """kept_l = min(n_l, c * sum of dimensions), c found by halving an interval: no layer is made dense by hand."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    low, high = 0.0, float(max(sizes))
    for _ in range(200):
        c = (low + high) / 2
        kept = [min(size, c * sum(shape)) for size, shape in zip(sizes, shapes.values(), strict=True)]
        low, high = (c, high) if sum(kept) < total else (low, c)
    return kept


@settings(deadline=None, max_examples=100)
@given(
    sparsity=st.floats(0, 0.99),
    shapes=st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=4), min_size=1, max_size=5),
)
def test_erk_equals_bisection(sparsity: float, shapes: list[list[int]]):
    named = {str(i): tuple(shape) for i, shape in enumerate(shapes)}
    counts = erk(Scores(ones(named), named), sparsity)
    total = sum(torch.Size(shape).numel() for shape in shapes)
    assert sum(counts.values()) == total - round(sparsity * total)
    exact = erk_by_bisection(named, sum(counts.values()))
    assert all(abs(count - value) < 1 + 1e-6 for count, value in zip(counts.values(), exact, strict=True))


def test_erk_by_hand():
    """Sums of dimensions 13, 22, 26, 4; sizes 108, 64, 160, 4. At 50 %, 168 stay: 168/65 = 2.58 would keep 10.3 of the
    4 of 'tiny'; dense, it leaves 164 / 61 = 2.689 for the others: 34.95, 59.15, 69.90."""
    assert erk(Scores(ones(NET), NET), 0.5) == {"conv": 35, "wide": 59, "fc": 70, "tiny": 4}


def test_erk_makes_layers_dense_that_only_the_second_solution_overfills():
    """At 30 %, 235 stay: first 'tiny' and 'wide' are full (c = 3.6), then conv 56, fc 111 (c = 167 / 39 = 4.28)."""
    assert erk(Scores(ones(NET), NET), 0.3) == {"conv": 56, "wide": 64, "fc": 111, "tiny": 4}


def test_lamp_by_hand():
    """The scores of (1, 2, 3) are 1/14, 4/13, 1; those of (2, 2, 2) are 1/3, 1/2, 1 in the order of ties."""
    scores = {"a": torch.tensor([[1.0, 2.0, 3.0]]), "b": torch.tensor([[2.0, 2.0, 2.0]])}
    kept = [lamp(scores, pruned / 6 - 1e-9) for pruned in range(1, 5)]
    assert [tuple(counts.values()) for counts in kept] == [(2, 3), (1, 3), (1, 2), (1, 1)]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), sparsity=st.floats(0, 0.99))
def test_lamp_equals_the_sort_of_its_definition(seed: int, sparsity: float):
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(shape, generator=generator).flatten(1).abs() for name, shape in NET.items()}
    relative = []
    for layer, score in enumerate(scores.values()):
        w = score.flatten().double()
        relative += [(float(u**2 / (w[w >= u] ** 2).sum()), layer) for u in w]
    total = len(relative)
    best = sorted(relative, key=lambda pair: -pair[0])[
        : total - round(sparsity * total)
    ]  # stable: earlier layers first
    expected = {name: sum(place == layer for _, place in best) for layer, name in enumerate(scores)}
    assert lamp(scores, sparsity) == expected


def test_lamp_keeps_something_of_every_layer_where_global_does_not():
    scores = {"small": torch.full((2, 5), 0.01), "large": torch.full((2, 5), 9.0)}
    assert global_(scores, 0.5)["small"] == 0
    assert lamp(scores, 0.5) == {"small": 5, "large": 5}


def test_lamp_leaves_earlier_zeros_and_zero_layers_alone():
    scores = {"a": torch.tensor([[3.0, -torch.inf, -torch.inf]]), "b": torch.zeros(1, 3)}
    assert lamp(scores, 0.5) == {"a": 1, "b": 2}


SIZES = {"first": (10, 10), "middle": (20, 20), "other": (20, 10), "last": (10, 10)}


def test_uniform_plus_below_its_limit():
    """800 entries, 50 %: 400 to prune of 700, so 4/7 each: 171.4 of 400, 85.7 of 200, 42.9 of 100 stay."""
    counts = uniform_plus("first", "last")(ones(SIZES), 0.5)
    assert counts == {"first": 100, "middle": 171, "other": 86, "last": 43}


def test_uniform_plus_above_its_limit():
    """75 %: 600 of 700 would be 0.857 > 0.8; the last loses 80, the others (600 - 80) / 600 = 13/15."""
    counts = uniform_plus("first", "last")(ones(SIZES), 0.75)
    assert counts == {"first": 100, "middle": 53, "other": 27, "last": 20}
    assert uniform_plus("first", "first")(ones(SIZES), 0.75) == {"first": 100, "middle": 57, "other": 29, "last": 14}


def test_uniform_plus_refuses_what_it_cannot_reach():
    with pytest.raises(
        ValueError, match=r"sparsity 0.86 cannot be reached by uniform_plus: .* have 600 entries, and 608"
    ):
        uniform_plus("first", "last")(ones(SIZES), 0.86)
    with pytest.raises(ValueError, match="cannot be reached"):
        uniform_plus("first", "first")(ones(SIZES), 0.9)


def test_global_is_the_best_of_all_choices():
    """Brute force over every choice of 4 of 8 entries: the kept sum is largest."""
    scores = {"a": torch.tensor([[0.3, 0.9, 0.1, 0.5]]), "b": torch.tensor([[0.2, 0.8, 0.7, 0.4]])}
    joined = torch.cat([score.flatten() for score in scores.values()]).tolist()
    best = max(itertools.combinations(range(8), 4), key=lambda chosen: sum(joined[i] for i in chosen))
    assert list(global_(scores, 0.5).values()) == [sum(i < 4 for i in best), sum(i >= 4 for i in best)]
