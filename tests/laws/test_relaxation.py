"""Masks by Frank-Wolfe: against all masks of tiny layers, a textbook loop in float64, and Wanda's masks."""

import itertools
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunus.layers import Inputs, Layer
from prunus.patterns import NM, Block, Pattern, Rows, Unstructured
from prunus.score.criteria import wanda
from prunus.solve.frank_wolfe import frank_wolfe, swap_

PATTERNS = [Unstructured("row"), Unstructured("layer"), NM(2, 4), NM(1, 4), NM(2, 3), Block(2, 2), Rows()]
FREE = (Unstructured("row"), Unstructured("layer"), Block(2, 2), Rows())


def make_layer(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32, tokens: int = 40) -> Layer:
    """Inputs whose columns are mixed and unevenly scaled."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator)
    inputs = Inputs(columns, gram=True)
    inputs.add_(torch.randn(tokens, columns, generator=generator) @ mixing * torch.linspace(0.3, 2, columns))
    return Layer("fc1", torch.randn(rows, columns, generator=generator).to(dtype), inputs)


def kept_of(pattern: Pattern, rows: int, columns: int, sparsity: float = 0.5) -> int:
    return pattern.counts((rows, columns), pattern.sparsity or sparsity)


def errors(layer: Layer, mask: Tensor) -> Tensor:
    """||(w - m * w) X^T||^2 of every row, in float64."""
    lost = layer.weight.double() * ~mask
    return ((lost @ layer.inputs.gram.double()) * lost).sum(1)


def start(layer: Layer, pattern: Pattern, kept: int) -> Tensor:
    return wanda.solve(layer, pattern, kept)[1]


def all_masks_of_row(pattern: Pattern, columns: int, kept: int) -> Tensor:
    """Every mask of one row with `kept` entries in each group, (masks, columns)."""
    width = pattern.width or columns
    each = [
        torch.zeros(width, dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)
        for chosen in itertools.combinations(range(width), kept * width // columns)
    ]
    return torch.stack([torch.cat(parts) for parts in itertools.product(each, repeat=columns // width)])


@pytest.mark.parametrize("pattern", [Unstructured("row"), NM(2, 4), NM(1, 4), NM(2, 3)], ids=repr)
def test_rows_are_near_the_best_of_all_masks_and_often_there(pattern: Pattern):
    rows, columns = 40, 9 if pattern == NM(2, 3) else 8
    layer = make_layer(rows, columns)
    kept = kept_of(pattern, rows, columns)
    masks = all_masks_of_row(pattern, columns, kept // rows)
    best = torch.stack([errors(layer, mask.expand(rows, columns)) for mask in masks]).amin(0)
    found = errors(layer, frank_wolfe().solve(layer, pattern, kept)[1])
    wandas = errors(layer, start(layer, pattern, kept))
    assert bool((found >= best * (1 - 1e-9)).all())
    exact = (found <= best * (1 + 1e-6)).float().mean()
    assert float(exact) > 0.75
    assert float(exact) > float((wandas <= best * (1 + 1e-6)).float().mean()) + 0.1
    assert float(found.sum() / best.sum()) < 1.05 < float(wandas.sum() / best.sum())


@pytest.mark.parametrize("seed", range(4))
def test_a_layer_whose_rows_compete_is_near_the_best_of_all_masks(seed: int):
    layer = make_layer(3, 4, seed)
    flat = all_masks_of_row(Unstructured("layer"), 12, 6)
    best = min(float(errors(layer, mask.view(3, 4)).sum()) for mask in flat)
    found = float(errors(layer, frank_wolfe().solve(layer, Unstructured("layer"), 6)[1]).sum())
    assert best * (1 - 1e-9) <= found <= 1.35 * best


@pytest.mark.parametrize("pattern", [Unstructured("row"), NM(2, 4), NM(2, 3)], ids=repr)
def test_what_is_fixed_stays_and_the_rest_is_near_the_best_of_all_masks_around_it(pattern: Pattern):
    rows, columns = 40, 9 if pattern == NM(2, 3) else 8
    layer = make_layer(rows, columns)
    kept = kept_of(pattern, rows, columns)
    score = wanda(layer).masked_fill(~start(layer, pattern, kept), -1)
    held = score.argsort(1, descending=True).argsort(1) < kept // rows - 1
    masks = all_masks_of_row(pattern, columns, kept // rows)
    each = torch.stack([errors(layer, mask.expand(rows, columns)) for mask in masks])  # (masks, rows)
    around = (masks[:, None] | ~held).all(2)
    best = each.masked_fill(~around, torch.inf).amin(0)
    mask = frank_wolfe(fixed=1 - rows / kept).solve(layer, pattern, kept)[1]
    found, freely = errors(layer, mask), errors(layer, frank_wolfe().solve(layer, pattern, kept)[1])
    assert bool(mask[held].all())
    assert bool((found >= best * (1 - 1e-9)).all())
    assert float((found <= best * (1 + 1e-6)).float().mean()) > 0.75
    assert float(found.sum() / best.sum()) < 1.05
    assert float(found.sum()) > 1.01 * float(freely.sum())
    assert torch.equal(frank_wolfe(fixed=1).solve(layer, pattern, kept)[1], start(layer, pattern, kept))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_every_pattern_holds_the_share_that_is_fixed(pattern: Pattern):
    layer = make_layer(12, 12, 1)
    kept = kept_of(pattern, 12, 12)
    before, mask = start(layer, pattern, kept), frank_wolfe(fixed=0.8).solve(layer, pattern, kept)[1]
    stayed = int((mask & before).sum())
    whole = pattern.unit((12, 12))
    assert round(0.8 * kept) // whole * whole <= stayed < kept
    assert float(errors(layer, mask).sum()) < float(errors(layer, before).sum())


def textbook(layer: Layer, pattern: Pattern, kept: int, iterations: int, concave: tuple[float, float]) -> Tensor:
    """Frank-Wolfe in float64 by automatic gradients; the line search fits a parabola through three values."""
    weight = layer.weight.double()
    gram = layer.inputs.gram.double() / layer.inputs.gram.double().diagonal().mean()

    def objective(m: Tensor, c: float) -> Tensor:
        expected = (weight * (1 - m)) @ gram * (weight * (1 - m)) + c * weight**2 * gram.diagonal() * (m - m * m)
        return expected.sum(1, keepdim=True) if pattern.by_row else expected.sum()

    m = start(layer, pattern, kept).double()
    for t in range(iterations):
        c = concave[0] + (concave[1] - concave[0]) * t / max(1, iterations - 1)
        (gradient,) = torch.autograd.grad(objective(m.requires_grad_(), c).sum(), m)
        m = m.detach()
        way = pattern.choose(-gradient, kept).double() - m
        here, middle, there = (objective(m + share * way, c) for share in (0.0, 0.5, 1.0))
        bend = 2 * (here - 2 * middle + there)
        slope = there - here - bend
        m = m + torch.where(bend > 1e-12, (-slope / (2 * bend)).clamp(0, 1), (there < here).double()) * way
    return m


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("concave", [(0.0, 0.0), (0.5, 1.0), (1.0, 1.0)])
def test_the_iterations_are_the_textbook_loop(pattern: Pattern, concave: tuple[float, float]):
    layer = make_layer(12, 12, 1)
    kept = kept_of(pattern, 12, 12)
    rounded = pattern.choose(textbook(layer, pattern, kept, 7, concave), kept)
    by = errors(layer, start(layer, pattern, kept)) - errors(layer, rounded)
    better = by > 0 if pattern.by_row else (by.sum() > 0).expand(12)
    expected = torch.where(better[:, None], rounded, start(layer, pattern, kept))
    assert torch.equal(frank_wolfe(7, 0, concave).solve(layer, pattern, kept)[1], expected)


def test_the_concave_term_makes_an_expected_error():
    layer, generator = make_layer(1, 6), torch.Generator().manual_seed(0)
    m = torch.rand(6, generator=generator).double()
    gram, weight = layer.inputs.gram.double(), layer.weight[0].double()
    lost = weight * (1 - m)
    formula = lost @ gram @ lost + (weight**2 * gram.diagonal() * (m - m * m)).sum()
    expected = 0.0
    for mask in itertools.product([0.0, 1.0], repeat=6):
        drawn = torch.tensor(mask, dtype=torch.float64)
        chance = (m * drawn + (1 - m) * (1 - drawn)).prod()
        expected += float(chance * ((weight * (1 - drawn)) @ gram @ (weight * (1 - drawn))))
    assert float(formula) == pytest.approx(expected)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    sparsity=st.floats(0, 0.99),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    iterations=st.integers(0, 12),
    swaps=st.integers(0, 12),
    concave=st.tuples(st.floats(0, 2), st.floats(0, 2)),
    seed=st.integers(0, 1000),
    dead=st.booleans(),
    equal=st.booleans(),
    fixed=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_counts_are_exact_and_the_error_is_never_above_wandas(
    rows: int,
    groups: int,
    sparsity: float,
    pattern: Pattern,
    dtype: torch.dtype,
    iterations: int,
    swaps: int,
    concave: tuple[float, float],
    seed: int,
    dead: bool,
    equal: bool,
    fixed: float,
):
    rows, columns = 2 * rows, groups * (pattern.width or 4)
    layer = make_layer(rows, columns, seed, dtype)
    if dead:
        layer.inputs.gram[0] = layer.inputs.gram[:, 0] = layer.inputs.squares[0] = 0
    if equal:
        layer.weight.fill_(0.5)
    before = layer.weight.clone()
    kept = pattern.counts((rows, columns), pattern.sparsity or sparsity)
    weight, mask = frank_wolfe(iterations, swaps, concave, fixed).solve(layer, pattern, kept)
    assert int(mask.sum()) == kept
    assert torch.equal(pattern.choose(mask.float(), kept), mask)  # within the pattern
    assert weight.dtype == dtype
    assert torch.equal(weight, torch.where(mask, before, 0))
    assert not bool(weight[~mask].signbit().any())
    assert torch.equal(layer.weight, before)
    found, wandas = errors(layer, mask), errors(layer, start(layer, pattern, kept))
    if not pattern.by_row:
        found, wandas = found.sum(), wandas.sum()
    assert bool((found <= wandas + 1e-12 * wandas.abs()).all())


@pytest.mark.parametrize("pattern", [Unstructured("row"), NM(2, 4)], ids=repr)
def test_the_bound_holds_where_float32_sees_only_rounding(pattern: Pattern):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        inputs = Inputs(16, gram=True)  # one token, nearly constant: an error is the square of a sum that cancels
        inputs.add_(1.2 + 1e-4 * torch.randn(1, 16, generator=generator))
        sizes = 1 + 1e-3 * torch.randn(20, 16, generator=generator)
        layer = Layer("fc1", 1e3 * torch.randn(20, 16, generator=generator).sign() * sizes, inputs)
        found = errors(layer, frank_wolfe().solve(layer, pattern, 160)[1])
        wandas = errors(layer, start(layer, pattern, 160))
        assert bool((found <= wandas + 1e-12 * wandas.abs()).all())  # a rounded Gram matrix can be indefinite


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_correlated_inputs_are_served_better_than_by_wanda(pattern: Pattern):
    layer = make_layer(24, 48)
    kept = kept_of(pattern, 24, 48)
    found = float(errors(layer, frank_wolfe().solve(layer, pattern, kept)[1]).sum())
    share = 0.9 if pattern in FREE[2:] else 0.75
    assert found < share * float(errors(layer, start(layer, pattern, kept)).sum())


def test_the_concave_term_helps_what_is_rounded():
    layer = make_layer(24, 48)
    for pattern in (Unstructured("row"), NM(2, 4)):
        kept = kept_of(pattern, 24, 48)
        ours, convex = (
            float(errors(layer, frank_wolfe(20, 0, concave).solve(layer, pattern, kept)[1]).sum())
            for concave in ((0.5, 1.0), (0.0, 0.0))
        )
        assert ours < 0.95 * convex


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_uncorrelated_inputs_are_pruned_as_wanda_does(pattern: Pattern):
    layer = make_layer(6, 12)
    layer.inputs.gram = torch.diag(layer.inputs.gram.diagonal())
    if pattern in FREE[2:]:  # a tile's score is a sum of norms, its error one of squares
        layer.weight.fill_(1)
        layer.inputs.gram = torch.eye(12)
        layer.inputs.squares.fill_(1)
    kept = kept_of(pattern, 6, 12)
    assert torch.equal(frank_wolfe().solve(layer, pattern, kept)[1], start(layer, pattern, kept))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_inputs_that_were_always_zero(pattern: Pattern):
    layer = make_layer(6, 12)
    layer.inputs.gram[[2, 7]] = layer.inputs.gram[:, [2, 7]] = 0
    layer.inputs.squares[[2, 7]] = 0
    if pattern in FREE[:2]:  # elsewhere a group or tile must take them
        assert not bool(frank_wolfe().solve(layer, pattern, 24)[1][:, [2, 7]].any())
    layer.inputs.gram.zero_()
    layer.inputs.squares.zero_()
    kept = kept_of(pattern, 6, 12)
    assert torch.equal(frank_wolfe().solve(layer, pattern, kept)[1], start(layer, pattern, kept))


def test_the_scale_of_the_inputs_and_the_storage_change_nothing():
    layer = make_layer(6, 16)
    mask = frank_wolfe().solve(layer, NM(2, 4), 48)[1]
    turned = Layer("fc1", layer.weight.T.contiguous().T.requires_grad_(), layer.inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        again, same = frank_wolfe().solve(turned, NM(2, 4), 48)
    assert torch.equal(same, mask)
    assert not again.requires_grad
    layer.inputs.gram *= 2.0**30
    layer.inputs.squares *= 2.0**30
    assert torch.equal(frank_wolfe().solve(layer, NM(2, 4), 48)[1], mask)


def test_what_it_cannot_use_is_named():
    norms = Inputs(4)
    norms.add_(torch.ones(1, 4))
    for inputs in (None, norms):
        with pytest.raises(ValueError, match="frank_wolfe needs the Gram matrix of 'fc1': calibrate with gram=True"):
            frank_wolfe().solve(Layer("fc1", torch.ones(2, 4), inputs), NM(2, 4), 4)
    with pytest.raises(ValueError, match=r"2:4 needs columns divisible by 4; 'fc1' has 6"):
        frank_wolfe().solve(make_layer(2, 6), NM(2, 4), 6)
    layer = make_layer(2, 4)
    layer.inputs.gram[0, 1] = float("nan")
    with pytest.raises(ValueError, match="Gram matrix of 'fc1' holds NaN or Inf"):
        frank_wolfe().solve(layer, NM(2, 4), 4)
    layer = make_layer(2, 4)
    for bad in (float("nan"), float("inf")):
        layer.weight[1, 1] = bad
        with pytest.raises(ValueError, match="weight of 'fc1' holds NaN or Inf"):
            frank_wolfe().solve(layer, NM(2, 4), 4)
    for arguments in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="frank_wolfe needs iterations >= 0"):
            frank_wolfe(*arguments)
    with pytest.raises(ValueError, match=r"a share of Wanda's mask, in \[0, 1\]; got fixed=90"):
        frank_wolfe(fixed=90)
    with pytest.raises(ValueError, match=r"concave is \(first, last\)"):
        frank_wolfe(concave=(0.5, 3.0))


# Swaps.


def swap_by_hand(layer: Layer, mask: Tensor, width: int) -> Tensor:
    """The best of all exchanges within groups of `width` columns of one row, by trying each."""
    best, found = mask, float(errors(layer, mask)[0])
    for out, back in itertools.product(range(mask.shape[1]), repeat=2):
        if out // width == back // width and mask[0, out] and not mask[0, back]:
            trial = mask.clone()
            trial[0, out], trial[0, back] = False, True
            if float(errors(layer, trial)[0]) < found * (1 - 1e-5):
                best, found = trial, float(errors(layer, trial)[0])
    return best


@pytest.mark.parametrize("seed", range(8))
def test_an_exchange_in_groups_is_the_best_of_all(seed: int):
    layer = make_layer(1, 12, seed)
    mask = start(layer, NM(2, 4), 6)
    for _ in range(5):
        expected = swap_by_hand(layer, mask, 4)
        swap_(mask, layer.weight, layer.inputs.gram, most=1, width=4)
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("width", [None, 4])
def test_exchanges_lower_every_error_and_keep_every_count(width: int | None):
    layer = make_layer(30, 24)
    mask = torch.rand(30, 6, 4, generator=torch.Generator().manual_seed(1)).argsort(2).lt(2).view(30, 24)
    last = errors(layer, mask)
    for _ in range(30):
        swap_(mask, layer.weight, layer.inputs.gram, most=1, width=width)
        now = errors(layer, mask)
        assert bool((now <= last).all())
        assert bool((mask.sum(1) == 12).all())
        if width:
            assert bool((mask.view(30, 6, 4).sum(2) == 2).all())
        last = now
    settled = mask.clone()
    swap_(mask, layer.weight, layer.inputs.gram, most=50, width=width)
    assert torch.equal(mask, settled)  # 30 were enough, and then nothing moves


def test_many_exchanges_at_once_are_those_one_at_a_time(monkeypatch: pytest.MonkeyPatch):
    layer = make_layer(30, 24)
    for width in (None, 4):
        one = start(layer, NM(2, 4), 360)
        many, chunked = one.clone(), one.clone()
        for _ in range(20):
            swap_(one, layer.weight, layer.inputs.gram, most=1, width=width)
        swap_(many, layer.weight, layer.inputs.gram, most=20, width=width)
        monkeypatch.setattr(import_module("prunus.solve.frank_wolfe"), "_CHUNK", 24 * 7)  # the name is the function
        swap_(chunked, layer.weight, layer.inputs.gram, most=20, width=width)
        monkeypatch.undo()
        assert torch.equal(one, many)
        assert torch.equal(one, chunked)


def test_full_and_empty_rows_have_nothing_to_exchange():
    layer = make_layer(2, 4)
    for full in (True, False):
        for width in (None, 2):
            mask = torch.full((2, 4), full)
            swap_(mask, layer.weight, layer.inputs.gram, most=3, width=width)
            assert bool((mask == full).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_a_gpu_finds_masks_as_good(pattern: Pattern):
    layer = make_layer(64, 96)
    kept = kept_of(pattern, 64, 96)
    there = Layer("fc1", layer.weight.cuda(), layer.inputs)  # the Gram matrix may lie elsewhere
    mask = frank_wolfe().solve(there, pattern, kept)[1]
    assert mask.is_cuda
    assert int(mask.sum()) == kept
    expected = errors(layer, frank_wolfe().solve(layer, pattern, kept)[1]).sum()
    torch.testing.assert_close(errors(layer, mask.cpu()).sum(), expected, rtol=0.02, atol=0)
