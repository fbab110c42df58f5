"""Allocations: integer counts, exact totals under every pattern, and OWL against its formula."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunus import magnitude, patterns, prune
from prunus.patterns import NM, Block, Pairs, Pattern, Rows, Unstructured, kept_of
from prunus.score import Allocation, Scores, allocations, counts_under
from prunus.score.allocations import erk, evopress, global_, lamp, owl, uniform, uniform_plus

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


def convex(counts: Mapping[str, int], share: float = 1.0) -> float:
    """Each layer by its name wants another count; the last one most."""
    return sum(place * (kept - 7 * place) ** 2 for place, kept in enumerate(counts.values(), 1))


def searched(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """EvoPress beside a loss, which a model would have to say."""
    inner = (
        scores if isinstance(scores, Scores) else Scores(scores, {name: tuple(scores[name].shape) for name in scores})
    )
    return evopress(generations=5, step=0.1)(replace(inner, loss=convex), sparsity)


FACTORIES: dict[str, Allocation] = {
    "evopress": Allocation(searched),
    "owl": owl(),
    "uniform_plus": uniform_plus("model.layers.1.experts.up[0]", "head"),
}
NAMES = allocations.__all__
PATTERNS: list[Pattern] = [
    Unstructured("layer"),
    Unstructured("row"),
    Block(2, 3),
    Block(1, 4),
    Rows(),
    NM(2, 4),
    Pairs(1, 2),
]


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


def test_every_pattern_is_here():
    classes = {name for name in patterns.__all__ if isinstance(getattr(patterns, name), type)} - {"Pattern"}
    assert {type(pattern).__name__ for pattern in PATTERNS} == classes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), sparsity=st.floats(0.1, 0.85))
def test_masks_have_exactly_the_sparsity_under_every_pattern(name: str, pattern: Pattern, seed: int, sparsity: float):
    shapes = {"a.0.fc": (8, 12), "a.1.fc": (4, 24), "a.2.fc": (6, 36), "a.3.fc": (2, 12), "a.4.fc": (12, 12)}
    made = {"uniform_plus": uniform_plus("a.3.fc", "a.4.fc"), "evopress": FACTORIES["evopress"]}
    generator = torch.Generator().manual_seed(seed)
    scores = {layer: torch.randn(shape, generator=generator).abs() for layer, shape in shapes.items()}
    fixed = pattern.sparsity is not None
    allocation = uniform if fixed else made.get(name) or make(name)
    counts = counts_under(pattern, scores, None if fixed else sparsity, allocation)
    total = sum(score.numel() for score in scores.values())
    units = [pattern.unit(shape) for shape in shapes.values()]
    if fixed:
        assert sum(counts.values()) == total // 2
    elif name == "uniform":
        exact = [kept_of(score.numel(), sparsity) for score in scores.values()]
        assert all(abs(count - k) < unit for count, k, unit in zip(counts.values(), exact, units, strict=True))
        assert abs(sum(counts.values()) - sum(exact)) <= max(units) / 2
    else:
        kept, aim = sum(counts.values()), kept_of(total, sparsity)
        room = max(units) / 2 if max(units) > 1 else 0
        assert abs(kept - aim) <= room, f"{name} keeps {kept} of {total} entries; kept_of(total, sparsity) is {aim}"
    for (layer, score), unit in zip(scores.items(), units, strict=True):
        assert counts[layer] % unit == 0
        assert int(pattern.mask(score, counts[layer]).sum()) == counts[layer]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", [Unstructured("layer"), Block(2, 3), Rows()], ids=repr)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99))
def test_what_was_pruned_before_stays_pruned(name: str, pattern: Pattern, seed: int):
    shapes = {"a.0.fc": (8, 12), "a.1.fc": (4, 24), "a.2.fc": (6, 36), "a.3.fc": (2, 12)}
    made = {"uniform_plus": uniform_plus("a.3.fc", "a.2.fc"), "evopress": FACTORIES["evopress"]}
    allocation = made.get(name) or make(name)
    generator = torch.Generator().manual_seed(seed)
    scores = {layer: torch.randn(shape, generator=generator).abs() for layer, shape in shapes.items()}
    before = counts_under(pattern, scores, 0.5, global_)  # not what the allocation would have left
    for layer, score in scores.items():
        score.masked_fill_(~pattern.mask(score, before[layer]), -torch.inf)
    counts = counts_under(pattern, scores, 0.7, allocation)
    assert all(counts[layer] <= before[layer] for layer in counts)
    total = sum(score.numel() for score in scores.values())
    aim = sum(kept_of(score.numel(), 0.7) for score in scores.values()) if name == "uniform" else kept_of(total, 0.7)
    units = [pattern.unit(shape) for shape in shapes.values()]
    assert abs(sum(counts.values()) - aim) <= (max(units) / 2 if max(units) > 1 else 0)


def test_global_counts_of_tiles_are_those_of_one_ranking_of_tiles():
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(shape, generator=generator) for name, shape in {"a": (4, 6), "b": (8, 3)}.items()}
    tiles = {name: score.unfold(0, 2, 2).unfold(1, 3, 3).mean((2, 3)).flatten() for name, score in scores.items()}
    best = torch.cat([*tiles.values()]).topk(3).values.min()
    counts = counts_under(Block(2, 3), scores, 0.625, global_)  # keeps 3 of 8 tiles
    assert counts == {name: 6 * int((tile >= best).sum()) for name, tile in tiles.items()}
    assert sum(counts.values()) == 18


def test_rows_of_several_lengths_fill_the_budget_of_entries():
    scores = {"long": torch.tensor([[5.0] * 6, [1.0] * 6]), "short": torch.tensor([[4.0, 4.0], [3.0, 3.0]])}
    assert counts_under(Rows(), scores, 0.5, global_) == {"long": 6, "short": 2}


def test_an_allocation_for_a_pattern_that_fixes_the_counts_is_refused():
    with pytest.raises(ValueError, match="2:4 fixes how many entries every layer keeps"):
        counts_under(NM(2, 4), {"a": torch.ones(2, 4)}, None, erk)


def test_a_sparsity_below_that_of_earlier_masks_is_refused():
    scores = {"a": torch.tensor([[1.0, -torch.inf, -torch.inf, -torch.inf]])}
    with pytest.raises(ValueError, match="2 entries should stay, but earlier masks left only 1"):
        counts_under(Unstructured("layer"), scores, 0.5, global_)


def test_missing_layers_are_named():
    for spared in (uniform_plus("b"), uniform_plus("a", "b")):
        with pytest.raises(ValueError, match="uniform_plus spares 'b', which is none of the 1 layers"):
            spared({"a": torch.ones(2, 2)}, 0.5)


@pytest.mark.parametrize("allocation", [global_, lamp, owl()], ids=["global_", "lamp", "owl"])
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


def test_owl_counts_earlier_zeros_as_zeros():
    zeroed, marked = draw_scores(0, heavy=3.0), draw_scores(0, heavy=3.0)
    for name in ("head", "model.layers.0.fc1"):
        zeroed[name][:2], marked[name][:2] = 0.0, -torch.inf
    assert owl()(marked, 0.6) == owl()(zeroed, 0.6)


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


# EvoPress.


def layers(*sizes: int) -> Scores:
    shapes = {f"h.{place}.fc": (1, size) for place, size in enumerate(sizes)}
    return Scores({name: torch.ones(shape) for name, shape in shapes.items()}, shapes)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 99),
    sparsity=st.floats(0.1, 0.9),
    step=st.floats(0.02, 0.4),
    levels=st.integers(1, 4),
    offspring=st.integers(1, 9),
)
def test_the_search_keeps_the_budget_and_never_loses_more_than_the_start(
    seed: int, sparsity: float, step: float, levels: int, offspring: int
):
    tried: list[tuple[dict[str, int], float, float]] = []

    def loss(counts: Mapping[str, int], share: float) -> float:
        tried.append((dict(counts), share, convex(counts)))
        return tried[-1][2] * (1 if share == 1 else 1 + hash(tuple(counts.values())) % 3)  # a poor first impression

    scores = replace(layers(30, 20, 10, 41), loss=loss)
    found = evopress(6, offspring, step, levels, seed)(scores, sparsity)
    start, least = tried[0][0], min(value for _, share, value in tried if share == 1)
    total = kept_of(101, sparsity)
    assert all(sum(counts.values()) == total for counts, *_ in tried)
    assert convex(found) == least <= convex(start)
    unit = max(1, round(step * 101 / 4))
    for counts, *_ in tried:
        assert all(abs(counts[name] - start[name]) in range(0, unit * levels + 1, unit) for name in counts)
        assert all(0 <= counts[name] <= size for name, size in zip(counts, (30, 20, 10, 41), strict=True))
    again = evopress(6, offspring, step, levels, seed)(replace(scores, loss=lambda c, _: convex(c)), sparsity)
    assert again == evopress(6, offspring, step, levels, seed)(replace(scores, loss=lambda c, _: convex(c)), sparsity)


def test_a_long_search_ends_at_the_best_of_all_levels():
    scores = replace(layers(20, 20, 20), loss=lambda counts, _: convex(counts))
    found = evopress(60, 8, 0.1, 3)(scores, 0.5)
    every = [
        (10 + 2 * a, 10 + 2 * b, 10 - 2 * a - 2 * b) for a, b in product(range(-3, 4), repeat=2) if abs(a + b) <= 3
    ]
    assert convex(found) == min(convex(dict(enumerate(each))) for each in every) < convex(dict(enumerate([10] * 3)))


def test_what_the_search_cannot_use_is_refused():
    with pytest.raises(ValueError, match="evopress runs the whole model: prune it in memory"):
        evopress()(draw_scores(0), 0.5)
    for wrong in ({"generations": 0}, {"offspring": 0}, {"levels": 0}, {"step": 0.0}, {"step": 1.0}):
        with pytest.raises(
            ValueError, match=r"evopress needs generations, offspring and levels >= 1 and step in \(0, 1\)"
        ):
            evopress(**wrong)


def test_a_search_stays_within_earlier_masks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    batches = [torch.randn(8, 16) for _ in range(4)]
    masks = prune(model, magnitude, None, 0.3, batches=batches)
    again = prune(model, magnitude, None, 0.5, batches=batches, within=masks, allocation=evopress(generations=5))
    assert again.sparsity == 0.5
    assert not any((again[name] & ~masks[name]).any() for name in masks)
