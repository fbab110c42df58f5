"""Allocations: integer counts, exact totals, and OWL against its formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunus import allocations
from prunus.allocations import Allocation, global_, owl, uniform
from prunus.patterns import Unstructured, kept_of

FACTORIES: dict[str, Allocation] = {"owl": owl()}
NAMES = [name for name in allocations.__all__ if name != "Allocation"]
SHAPES = {
    "model.layers.0.fc1": (6, 8),
    "model.layers.0.fc2": (8, 7),
    "model.layers.1.fc1": (5, 9),
    "model.layers.1.experts.up[0]": (3, 5),
    "model.layers.1.experts.up[1]": (3, 5),
    "model.layers.1.mlp.3.down": (4, 5),
    "model.layers.10.fc1": (4, 4),
    "head": (3, 11),
}


def make(name: str) -> Allocation:
    return FACTORIES[name] if name in FACTORIES else getattr(allocations, name)


def draw_scores(seed: int, heavy: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).abs() ** heavy for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), sparsity=st.floats(0.1, 0.9))
def test_counts_fit_the_layers_and_repeat(name: str, seed: int, sparsity: float):
    scores = draw_scores(seed)
    counts = make(name)(scores, sparsity)
    assert list(counts) == list(scores)
    assert counts == make(name)(scores, sparsity)
    for layer, kept in counts.items():
        assert type(kept) is int
        assert 0 <= kept <= scores[layer].numel()
        assert int(Unstructured("layer").mask(scores[layer], kept).sum()) == kept


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparsity", [1.5, 1.0, -0.5, float("nan")])
def test_a_sparsity_outside_zero_to_one_is_refused(name: str, sparsity: float):
    with pytest.raises(ValueError, match="sparsity"):
        make(name)(draw_scores(0), sparsity)


@pytest.mark.parametrize("allocation", [global_, owl()], ids=["global_", "owl"])
def test_scores_with_nan_are_refused_by_name(allocation: Allocation):
    scores = draw_scores(0)
    scores["head"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="score of 'head' has 1 NaN"):
        allocation(scores, 0.5)


def test_uniform_gives_every_layer_the_same_sparsity():
    assert uniform(draw_scores(0), 0.7) == {n: kept_of(s[0] * s[1], 0.7) for n, s in SHAPES.items()}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), sparsity=st.floats(0, 0.99), levels=st.sampled_from([1, 2, 5, 1000]))
def test_global_equals_one_sort_of_everything(seed: int, sparsity: float, levels: int):
    scores = {name: (score * levels).round().clamp(max=levels) for name, score in draw_scores(seed).items()}
    joined = torch.cat([score.flatten() for score in scores.values()])
    kept = kept_of(len(joined), sparsity)
    direct = torch.zeros(len(joined), dtype=torch.bool)
    direct[joined.argsort(descending=True, stable=True)[:kept]] = True
    counts = global_(scores, sparsity)
    masks = [Unstructured("layer").mask(score, counts[name]).flatten() for name, score in scores.items()]
    assert sum(counts.values()) == kept
    assert torch.equal(torch.cat(masks), direct)


@pytest.mark.parametrize(("c", "lam", "sparsity"), [(5.0, 0.08, 0.7), (3.0, 0.2, 0.5), (2.0, 0.1, 0.123)])
@pytest.mark.parametrize("seed", range(3))
def test_owl_follows_its_formula(c: float, lam: float, sparsity: float, seed: int):
    scores = draw_scores(seed, heavy=3.0)
    blocks = {"model.layers.0": [0, 1], "model.layers.1": [2, 3, 4, 5], "model.layers.10": [6], "head": [7]}
    names = list(scores)
    joined = {b: torch.cat([scores[names[i]].double().flatten() for i in members]) for b, members in blocks.items()}
    share = {b: float((a > c * a.mean()).double().mean()) for b, a in joined.items()}
    total = sum(len(a) for a in joined.values())
    mean = sum(share[b] * len(joined[b]) for b in blocks) / total
    reach = max(abs(share[b] - mean) for b in blocks)
    target = {b: sparsity - lam * (share[b] - mean) / reach for b in blocks}
    counts = owl(c, lam)(scores, sparsity)
    assert sum(counts.values()) == kept_of(total, sparsity)
    up: list[float] = []
    down: list[float] = []
    for block, members in blocks.items():
        for i in members:
            size = scores[names[i]].numel()
            exact = (1 - target[block]) * size
            assert abs(counts[names[i]] - exact) < 1
            (up if counts[names[i]] > exact else down).append(exact % 1)
            assert size * (1 - sparsity - lam) - 1 < counts[names[i]] < size * (1 - sparsity + lam) + 1
    assert min(up, default=1) >= max(down, default=0)  # the largest remainders were rounded up
    assert len(set(target.values())) > 2  # the case is not degenerate


def test_owl_spares_the_block_with_outliers():
    calm, wild = torch.ones(10, 10), torch.ones(10, 10)
    wild[0, :5] = 100.0
    assert owl(c=5, lam=0.1)({"h.0.fc": calm, "h.1.fc": wild}, 0.5) == {"h.0.fc": 40, "h.1.fc": 60}


def test_owl_without_outliers_is_uniform():
    scores = {"h.0.fc": torch.ones(5, 4), "h.1.fc": torch.ones(3, 4), "h.2.fc": torch.ones(1, 3)}
    assert owl()(scores, 0.5) == {"h.0.fc": 10, "h.1.fc": 6, "h.2.fc": 1}


@pytest.mark.parametrize("sparsity", [0.05, 0.95])
def test_owl_refuses_a_range_that_leaves_zero_to_one(sparsity: float):
    with pytest.raises(ValueError, match=r"which leaves \[0, 1\): use lam <= 0\.05"):
        owl(lam=0.08)(draw_scores(0), sparsity)


def test_owl_refuses_impossible_settings():
    for c, lam in ((0.0, 0.1), (5.0, -0.1), (float("nan"), 0.1)):
        with pytest.raises(ValueError, match="owl needs c > 0"):
            owl(c, lam)
