"""Refitted weights: least squares on any mask, against float64 normal equations; never worse than what they refit."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunus.layers import Inputs, Layer
from prunus.patterns import NM, Pattern, Unstructured
from prunus.score import Criterion, magnitude, wanda
from prunus.solve import frank_wolfe, refit, sparsegpt
from prunus.solve.quadratic import row_errors

CRITERIA = [wanda, magnitude, sparsegpt(), frank_wolfe(5, 5)]
PATTERNS = [Unstructured("row"), Unstructured("layer"), NM(2, 4)]


def make_layer(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32, tokens: int = 60) -> Layer:
    """Inputs whose columns are mixed and very unevenly scaled."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    inputs = Inputs(columns, gram=True)
    inputs.add_(torch.randn(tokens, columns, generator=generator) @ mixing * torch.logspace(-2, 1, columns))
    return Layer("fc1", torch.randn(rows, columns, generator=generator).to(dtype), inputs)


def kept_at_half(pattern: Pattern, layer: Layer) -> int:
    return pattern.counts((layer.weight.shape[0], layer.weight.shape[1]), 0.5)


def errors(layer: Layer, weight: Tensor) -> Tensor:
    """||X (w - w0)||^2 of every row, in float64."""
    change = layer.weight.double() - weight.double()
    return ((change @ layer.inputs.gram.double()) * change).sum(1)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda each: each.name)
def test_it_ends_at_the_normal_equations_on_the_same_mask(criterion: Criterion, pattern: Pattern):
    layer = make_layer(6, 24)
    kept = kept_at_half(pattern, layer)
    _, chosen = criterion.solve(layer, pattern, kept)
    weight, mask = refit(criterion, iterations=60, damping=0.0).solve(layer, pattern, kept)
    assert torch.equal(mask, chosen)
    gram, best = layer.inputs.gram.double(), torch.zeros(6, 24, dtype=torch.float64)
    for i, keep in enumerate(mask):
        best[i, keep] = torch.linalg.solve(gram[keep][:, keep], gram[keep] @ layer.weight[i].double())
    assert bool((errors(layer, best) <= errors(layer, weight) * (1 + 1e-9)).all())
    torch.testing.assert_close(errors(layer, weight), errors(layer, best), rtol=1e-4, atol=0)
    assert not weight[~mask].any()


@settings(max_examples=40)
@example(seed=0, iterations=7, tokens=1, dtype=torch.float32, pattern=PATTERNS[0])
@given(
    seed=st.integers(0, 1000),
    iterations=st.integers(1, 8),
    tokens=st.sampled_from([1, 3, 50]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    pattern=st.sampled_from(PATTERNS),
)
def test_no_row_is_worse_than_it_was(seed: int, iterations: int, tokens: int, dtype: torch.dtype, pattern: Pattern):
    layer = make_layer(5, 12, seed, dtype, tokens)
    kept = kept_at_half(pattern, layer)
    before, _ = wanda.solve(layer, pattern, kept)
    weight, mask = refit(wanda, iterations, damping=0.0).solve(layer, pattern, kept)
    assert bool((errors(layer, weight) <= errors(layer, before)).all())
    assert weight.dtype == dtype
    assert bool(weight.isfinite().all())
    assert int((weight != 0).sum()) <= int(mask.sum()) == kept


@pytest.mark.parametrize("chunk", [1, 30, 1 << 20])
def test_rows_may_be_worked_on_in_any_parts(chunk: int, monkeypatch: pytest.MonkeyPatch):
    from importlib import import_module

    layer = make_layer(6, 24)
    whole, _ = refit().solve(layer, NM(2, 4), 72)
    monkeypatch.setattr(import_module("prunus.solve.refit"), "_CHUNK", chunk)  # the name is the function
    parts, _ = refit().solve(layer, NM(2, 4), 72)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_damping_is_a_pull_to_the_dense_weights():
    layer = make_layer(6, 24)
    weight, mask = refit(wanda, iterations=60, damping=0.3).solve(layer, NM(2, 4), 72)
    assert layer.inputs is not None
    gram = layer.inputs.gram.double()
    gram = gram + 0.3 * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    for i, keep in enumerate(mask):
        best = torch.linalg.solve(gram[keep][:, keep], gram[keep] @ layer.weight[i].double())
        torch.testing.assert_close(weight[i, keep].double(), best, rtol=1e-3, atol=1e-4)


def test_it_needs_what_least_squares_need_and_compares_as_the_other_does():
    assert refit(magnitude).needs == "gram"
    assert (refit(magnitude).compare, refit(wanda).compare) == ("layer", "row")
    assert refit(sparsegpt()).name == "sparsegpt with refit"


def test_nothing_is_left_to_fit_where_inputs_do_not_mix():
    inputs = Inputs(3, gram=True)
    inputs.add_(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    layer = Layer("fc1", torch.tensor([[3.0, 2.0, 1.0]]), inputs)
    assert refit().solve(layer, Unstructured("row"), 2)[0].tolist() == [[3.0, 2.0, 0.0]]
    assert torch.equal(refit().solve(layer, Unstructured("row"), 2)[0], wanda.solve(layer, Unstructured("row"), 2)[0])


def test_a_layer_that_saw_nothing_is_left_as_the_criterion_left_it():
    layer = Layer("fc1", torch.tensor([[3.0, 1.0]]), Inputs(2, gram=True))
    with pytest.warns(UserWarning, match="saw no calibration token"):
        weight, _ = refit(magnitude).solve(layer, Unstructured("row"), 1)
    assert weight.tolist() == [[3.0, 0.0]]


def test_what_is_refused():
    with pytest.raises(ValueError, match="refit needs iterations >= 1; got 0"):
        refit(iterations=0)
    with pytest.raises(ValueError, match="refit needs damping >= 0; got -1"):
        refit(damping=-1.0)
    with pytest.raises(ValueError, match="sparsegpt is no criterion; it makes one: call it"):
        refit(sparsegpt)
    with pytest.raises(ValueError, match="refit needs the Gram matrix of 'fc1'"):
        refit(magnitude).solve(Layer("fc1", torch.ones(2, 4)), NM(2, 4), 4)


def test_errors_of_rows_are_those_written_out():
    layer = make_layer(7, 12)
    change = torch.randn(7, 12)
    expected = torch.stack([row @ layer.inputs.gram.double() @ row for row in change.double()])
    torch.testing.assert_close(row_errors(change, layer.inputs.gram), expected)
