"""SparseGPT (Frantar & Alistarh 2023) against brute-force brain surgery, least squares, and hand-worked cases."""

import gc
import logging
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunus.layers import Inputs, Layer
from prunus.patterns import NM, Pattern, Unstructured
from prunus.score.criteria import magnitude, wanda
from prunus.solve.sweep import sparsegpt

DAMPING = 0.01


def correlated(columns: int, seed: int, tokens: int = 64) -> Tensor:
    """Inputs (tokens, columns) whose columns are mixed and unevenly scaled."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.4 * torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mixing * torch.linspace(0.3, 2, columns)


def make_layer(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Layer:
    inputs = Inputs(columns, gram=True)
    inputs.add_(correlated(columns, seed))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1000)).to(dtype)
    return Layer("fc1", weight, inputs)


def layer_with_gram(weight: list[list[float]], gram: list[list[float]], dtype: torch.dtype = torch.float32) -> Layer:
    inputs = Inputs(len(gram), gram=True)
    inputs.add_(torch.ones(1, len(gram)))
    inputs.gram = torch.tensor(gram)
    inputs.squares = inputs.gram.diagonal().clone()
    return Layer("fc1", torch.tensor(weight, dtype=dtype), inputs)


def damped(layer: Layer) -> Tensor:
    gram = layer.inputs.gram.double()
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def output_error(layer: Layer, weight: Tensor) -> Tensor:
    """Squared error of each output row in the metric of the damped Gram matrix."""
    change = weight.double() - layer.weight.double()
    return ((change @ damped(layer)) * change).sum(1)


def brain_surgeon(layer: Layer, pattern: Pattern, kept: int, blocksize: int) -> tuple[Tensor, Tensor]:
    """The sweep in float64 with an exact inverse Hessian of the columns still free, downdated column by column.

    Masks are chosen by stable sorts at the start of every block (of every group for N:M).
    """
    weight = layer.weight.double().clone()
    rows, columns = weight.shape
    inverses = [torch.linalg.inv(damped(layer))]  # of H[j:, j:], for every j
    for _ in range(columns - 1):
        last = inverses[-1]
        inverses.append(last[1:, 1:] - torch.outer(last[1:, 0], last[0, 1:]) / last[0, 0])
    width = pattern.width or blocksize
    edges = [*range(0, columns, width), columns]
    counts = pattern.split((rows, columns), kept, edges)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if j in edges:
            stop = edges[edges.index(j) + 1]
            score = torch.stack([weight[:, k] ** 2 / inverses[k][0, 0] for k in range(j, stop)], 1)
            mask[:, j:stop] = sorted_mask(pattern, score, counts[edges.index(j)])
        error = torch.where(mask[:, j], 0.0, weight[:, j]) / inverses[j][0, 0]
        weight[:, j:] -= torch.outer(error, inverses[j][0])
    return weight * mask, mask


def sorted_mask(pattern: Pattern, score: Tensor, kept: int) -> Tensor:
    flat = score.reshape(1 if pattern == Unstructured("layer") else len(score), -1)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    order = flat.argsort(dim=1, descending=True, stable=True)
    each, extra = divmod(kept, len(flat))
    for i in range(len(flat)):
        mask[i, order[i, : each + (i < extra)]] = True
    return mask.view(score.shape)


PATTERNS = [Unstructured("layer"), Unstructured("row"), NM(2, 4), NM(4, 8), NM(1, 4)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("blocksize", [4, 8, 10, 128])
@pytest.mark.parametrize("seed", range(3))
def test_the_sweep_is_brute_force_brain_surgery(pattern: Pattern, blocksize: int, seed: int):
    layer = make_layer(5, 16, seed)
    kept = pattern.counts((5, 16), pattern.sparsity or 0.6)
    weight, mask = sparsegpt(DAMPING, blocksize).solve(layer, pattern, kept)
    expected, expected_mask = brain_surgeon(layer, pattern, kept, blocksize)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(weight.double(), expected, rtol=2e-4, atol=2e-5)


def test_blocks_wider_than_the_inner_sweep_agree_too():
    layer = make_layer(3, 80)
    kept = Unstructured("layer").counts((3, 80), 0.5)
    weight, mask = sparsegpt(DAMPING, 70).solve(layer, Unstructured("layer"), kept)
    expected, expected_mask = brain_surgeon(layer, Unstructured("layer"), kept, 70)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(weight.double(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_the_error_lies_between_least_squares_and_plain_masking(pattern: Pattern, seed: int):
    layer = make_layer(6, 32, seed)
    weight, mask = sparsegpt(DAMPING, 16).solve(layer, pattern, pattern.counts((6, 32), pattern.sparsity or 0.5))
    hessian, best = damped(layer), torch.zeros(6, 32, dtype=torch.float64)
    for i, keep in enumerate(mask):  # w_S = H_SS^-1 H_S: w is the optimum for the row's mask
        best[i, keep] = torch.linalg.solve(hessian[keep][:, keep], hessian[keep] @ layer.weight[i].double())
    optimum, swept = output_error(layer, best), output_error(layer, weight)
    assert bool((optimum <= swept * (1 + 1e-5)).all())
    assert float(swept.sum()) < float(output_error(layer, layer.weight * mask).sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_correlated_inputs_are_served_better_than_by_wanda(pattern: Pattern):
    layer = make_layer(16, 64)
    kept = pattern.counts((16, 64), pattern.sparsity or 0.5)
    swept, plain = sparsegpt().solve(layer, pattern, kept)[0], wanda.solve(layer, pattern, kept)[0]
    assert float(output_error(layer, swept).sum()) < 0.8 * float(output_error(layer, plain).sum())


def test_two_columns_by_hand():
    # H = [2 1; 1 2]: H^-1_11 = 2/3, then 1/H_22 = 1/2. Scores of (1, 1): 1.5 < 2, so the first goes and the second
    # grows by H_12/H_22 = 1/2 of it. Scores of (2, 1): 6 > 2, so the second goes; nothing is left to make up for it.
    layer = layer_with_gram([[1.0, 1.0], [2.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]])
    weight, mask = sparsegpt(damping=0).solve(layer, Unstructured("row"), 2)
    assert mask.tolist() == [[False, True], [True, False]]
    torch.testing.assert_close(weight, torch.tensor([[0.0, 1.5], [2.0, 0.0]]))


def test_uncorrelated_inputs_are_pruned_as_wanda_does():
    layer = layer_with_gram(torch.randn(4, 8).tolist(), torch.diag(torch.linspace(1, 3, 8)).tolist())
    for pattern in (Unstructured("layer"), Unstructured("row"), NM(2, 4)):
        weight, mask = sparsegpt(damping=0).solve(layer, pattern, 16)
        expected, expected_mask = wanda.solve(layer, pattern, 16)
        assert torch.equal(mask, expected_mask)
        assert torch.equal(weight, expected)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 6),
    blocksize=st.integers(1, 30),
    share=st.floats(0, 1),
    pattern=st.sampled_from([Unstructured("layer"), Unstructured("row"), NM(2, 4), NM(1, 3)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    constant=st.booleans(),
)
def test_counts_are_exact(
    rows: int, groups: int, blocksize: int, share: float, pattern: Pattern, dtype: torch.dtype, constant: bool
):
    columns = groups * (pattern.width or 3)
    layer = make_layer(rows, columns, dtype=dtype)
    if constant:
        layer = layer_with_gram(torch.ones(rows, columns).tolist(), torch.eye(columns).tolist(), dtype)
    kept = pattern.counts((rows, columns)) if isinstance(pattern, NM) else round(share * rows * columns)
    before = layer.weight.clone()
    weight, mask = sparsegpt(DAMPING, blocksize).solve(layer, pattern, kept)
    assert weight.dtype == dtype
    assert int(mask.sum()) == kept
    assert bool((weight[~mask] == 0).all())
    assert torch.equal(layer.weight, before)
    if pattern == Unstructured("row"):
        each, extra = divmod(kept, rows)
        assert mask.sum(1).tolist() == [each + (i < extra) for i in range(rows)]
    if pattern.width:
        assert bool((mask.view(rows, groups, -1).sum(2) == pattern.n).all())  # type: ignore[attr-defined]
    if kept == rows * columns:
        assert torch.equal(weight, before)


def test_inputs_that_were_always_zero_give_their_weights_away(caplog: pytest.LogCaptureFixture):
    x = correlated(12, 0)
    x[:, [2, 7]] = 0
    inputs = Inputs(12, gram=True)
    inputs.add_(x)
    layer = Layer("fc1", torch.full((4, 12), 3.0), inputs)
    for pattern in (Unstructured("row"), NM(2, 4)):
        weight, mask = sparsegpt().solve(layer, pattern, 24)
        assert not bool(weight[:, [2, 7]].any())
        assert not bool(mask[:, [2, 7]].any())
    assert not bool(sparsegpt().solve(layer, Unstructured("row"), 48)[0][:, [2, 7]].any())
    sparsegpt(damping=0).solve(layer, Unstructured("row"), 24)
    assert not caplog.records  # they do not make the factorisation fail
    nothing = Inputs(4, gram=True)
    nothing.add_(torch.zeros(3, 4))
    assert not bool(sparsegpt().solve(Layer("fc1", torch.ones(2, 4), nothing), NM(2, 4), 4)[0].any())


def test_the_scale_of_the_inputs_cancels():
    layer = make_layer(4, 16)
    weight, mask = sparsegpt().solve(layer, NM(2, 4), 32)
    for scale in (2.0**-40, 2.0**40):
        scaled = layer_with_gram(layer.weight.tolist(), (layer.inputs.gram * scale).tolist())
        again, again_mask = sparsegpt().solve(scaled, NM(2, 4), 32)
        assert torch.equal(mask, again_mask)
        torch.testing.assert_close(weight, again)


def test_layers_with_the_same_inputs_share_one_factorisation(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    factorise = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: calls.append(1) or factorise(matrix))
    query = make_layer(4, 8)
    key = Layer("fc2", query.weight + 1, query.inputs)
    solver = sparsegpt().solve
    for layer in (query, key, query):
        solver(layer, NM(2, 4), 16)
    assert len(calls) == 1
    query.inputs.add_(correlated(8, 5))  # more tokens: another Gram matrix
    fresh = sparsegpt().solve(query, NM(2, 4), 16)[0]
    assert torch.equal(solver(query, NM(2, 4), 16)[0], fresh)
    assert len(calls) == 3
    for other in (make_layer(4, 8, 1), query, make_layer(4, 8, 2)):  # a third one's factor replaces the oldest
        solver(other, NM(2, 4), 16)
    assert len(calls) == 5
    solver(query, NM(2, 4), 16)
    assert len(calls) == 6
    gone = weakref.ref(query.inputs)
    del query, key, layer
    gc.collect()
    assert gone() is None


def test_damping_grows_until_the_factorisation_succeeds(caplog: pytest.LogCaptureFixture):
    layer = layer_with_gram([[1.0, 1.0]], [[1.0, 1.05], [1.05, 1.0]])  # lowest eigenvalue -0.05
    with caplog.at_level(logging.WARNING, "prunus"):
        weight, _ = sparsegpt(damping=0.01).solve(layer, Unstructured("row"), 1)
    assert [record.getMessage() for record in caplog.records] == [
        "'fc1': factorisation failed, damping raised to 0.1 of the mean diagonal"
    ]
    torch.testing.assert_close(weight, torch.tensor([[0.0, 1 + 1.05 / 1.1]]))  # compensated: not the identity's answer


def test_a_factorisation_that_never_succeeds_raises(caplog: pytest.LogCaptureFixture):
    layer = layer_with_gram([[1.0, 1.0]], [[1.0, 2.5], [2.5, 1.0]])
    with (
        caplog.at_level(logging.WARNING, "prunus"),
        pytest.raises(ValueError, match="'fc1' is not positive definite even with damping 1 "),
    ):
        sparsegpt(damping=0.01).solve(layer, Unstructured("row"), 1)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_not_damped(bad: float, caplog: pytest.LogCaptureFixture):
    layer = make_layer(2, 4)
    layer.inputs.add_(torch.tensor([[1.0, bad, 1.0, 1.0]]))
    with pytest.raises(ValueError, match="'fc1' received NaN, infinite"):
        sparsegpt().solve(layer, NM(2, 4), 4)
    layer = make_layer(2, 4)
    layer.inputs.gram[0, 1] = bad
    with pytest.raises(ValueError, match="Gram matrix of 'fc1' holds NaN or Inf"):
        sparsegpt().solve(layer, NM(2, 4), 4)
    layer = make_layer(2, 4)
    layer.weight[1, 1] = bad
    with pytest.raises(ValueError, match="weight of 'fc1' holds NaN or Inf"):
        sparsegpt().solve(layer, NM(2, 4), 4)
    assert not caplog.records


def test_an_update_that_overflows_the_weights_dtype_raises():
    layer = layer_with_gram([[50000.0, 60000.0]], [[2.0, 1.9], [1.9, 2.0]], torch.float16)
    with pytest.raises(ValueError, match=r"'fc1' overflows torch\.float16"):
        sparsegpt().solve(layer, Unstructured("row"), 1)


def test_what_it_cannot_use_is_named():
    with pytest.raises(ValueError, match="Gram matrix of 'fc1': calibrate with gram=True"):
        sparsegpt().solve(Layer("fc1", torch.ones(2, 4)), NM(2, 4), 4)
    norms = Inputs(4)
    norms.add_(torch.ones(1, 4))
    with pytest.raises(ValueError, match="Gram matrix of 'fc1': calibrate with gram=True"):
        sparsegpt().solve(Layer("fc1", torch.ones(2, 4), norms), NM(2, 4), 4)
    with pytest.raises(ValueError, match=r"2:4 needs columns divisible by 4; 'fc1' has 6"):
        sparsegpt().solve(make_layer(2, 6), NM(2, 4), 6)
    for damping, blocksize in ((-0.1, 128), (2.0, 128), (float("nan"), 128), (0.01, 0)):
        with pytest.raises(ValueError, match="sparsegpt needs 0 <= damping"):
            sparsegpt(damping, blocksize)


def test_autocast_and_gradients_change_nothing():
    layer = make_layer(4, 16)
    weight, mask = sparsegpt().solve(layer, NM(2, 4), 32)
    layer.weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, again_mask = sparsegpt().solve(layer, NM(2, 4), 32)
    assert torch.equal(again, weight)
    assert torch.equal(again_mask, mask)
    assert not again.requires_grad


def test_transposed_storage_changes_nothing():
    layer = make_layer(4, 16)
    stored = Layer("fc1", layer.weight.T.contiguous().T, layer.inputs)
    for pattern in (Unstructured("layer"), NM(2, 4)):
        for one, other in pairwise([sparsegpt().solve(layer, pattern, 32), sparsegpt().solve(stored, pattern, 32)]):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
    assert magnitude.solve(stored, NM(2, 4), 32)[1].sum() == 32
