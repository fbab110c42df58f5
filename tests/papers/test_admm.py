"""ADMM in one layer (Boza 2024; Meng et al. 2024) against loops in float64, and cases worked by hand."""

import sys

import pytest
import torch
from torch import Tensor

from prunus.layers import Inputs, Layer
from prunus.patterns import NM, Block, Pattern, Rows, Unstructured
from prunus.score import Criterion, wanda
from prunus.solve import admm, alps, quadratic, refit, sparsegpt

from .test_sparsegpt import layer_with_gram, make_layer, sorted_mask

PATTERNS = [Unstructured("row"), Unstructured("layer"), NM(2, 4), NM(1, 4)]


def kept_of(pattern: Pattern, rows: int, columns: int, sparsity: float = 0.5) -> int:
    return pattern.counts((rows, columns), pattern.sparsity or sparsity)


def textbook(layer: Layer, pattern: Pattern, kept: int, iterations: int, choosing: int) -> tuple[Tensor, Tensor]:
    """The loop in float64, masks by stable sorts, W by solving the linear system anew each time."""
    gram = layer.inputs.gram.double()
    scale = gram.diagonal().sqrt()
    unit = gram / torch.outer(scale, scale) + 0.1 * torch.eye(len(gram), dtype=torch.float64)
    dense = layer.weight.double() * scale
    weight, multipliers, mask = dense, torch.zeros_like(dense), torch.ones_like(dense, dtype=torch.bool)
    for t in range(iterations):
        if t < choosing:
            zeros = dense.numel() - kept
            now = zeros if pattern.sparsity or t + 1 == choosing else int(zeros * (1 - (1 - (t + 1) / choosing) ** 3))
            mask = of_groups(pattern, (weight + multipliers).abs(), dense.numel() - now)
        sparse = torch.where(mask, weight + multipliers, 0.0)
        multipliers = multipliers + weight - sparse
        right = dense @ unit + sparse - multipliers
        weight = torch.linalg.solve(unit + torch.eye(len(unit), dtype=torch.float64), right.T).T
    return sparse / scale, mask


def of_groups(pattern: Pattern, score: Tensor, kept: int) -> Tensor:
    if not isinstance(pattern, NM):
        return sorted_mask(pattern, score, kept)
    rows = score.reshape(-1, pattern.m)
    return sorted_mask(Unstructured("row"), rows, kept).view(score.shape)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize(("iterations", "choosing"), [(20, 15), (4, 4), (1, 1)])
def test_it_is_the_textbook_loop(pattern: Pattern, iterations: int, choosing: int):
    layer = make_layer(5, 16)
    kept = kept_of(pattern, 5, 16, 0.6)
    weight, mask = admm(iterations, choosing, damping=0.0).solve(layer, pattern, kept)
    expected, expected_mask = textbook(layer, pattern, kept, iterations, choosing)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-3, atol=1e-4)


def tightened(layer: Layer, pattern: Pattern, kept: int, rhos: list[float]) -> tuple[Tensor, Tensor]:
    """ALPS in float64 as its paper writes it, with unscaled multipliers V, a mask after each solution with a rho."""
    gram = layer.inputs.gram.double()
    scale = gram.diagonal().sqrt()
    unit, dense = gram / torch.outer(scale, scale), layer.weight.double() * scale
    mask = of_groups(pattern, dense.abs(), kept)
    sparse = torch.where(mask, dense, 0.0)
    multipliers = rhos[0] * (dense - sparse)
    for rho in rhos:
        right = dense @ unit - multipliers + rho * sparse
        weight = torch.linalg.solve(unit + rho * torch.eye(len(unit), dtype=torch.float64), right.T).T
        both = weight + multipliers / rho
        mask = of_groups(pattern, both.abs(), kept)
        sparse = torch.where(mask, both, 0.0)
        multipliers = multipliers + rho * (weight - sparse)
    return sparse / scale, mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize(
    ("iterations", "stages", "rhos"), [(7, 3, [0.1, 0.1, 1, 1, 10, 10]), (3, 1, [0.1, 0.1]), (2, 1, [0.1])]
)
def test_alps_is_the_textbook_loop(pattern: Pattern, iterations: int, stages: int, rhos: list[float]):
    layer = make_layer(5, 16)
    kept = kept_of(pattern, 5, 16, 0.6)
    weight, mask = alps(iterations, stages, damping=0.0, rho=(0.1, 10.0)).solve(layer, pattern, kept)
    expected, expected_mask = tightened(layer, pattern, kept, rhos)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("pattern", "sparsity"), [(Unstructured("layer"), 0.7), (NM(2, 4), 0.5)], ids=repr)
def test_a_rising_rho_ends_lower(pattern: Pattern, sparsity: float):
    """The authors' own code left layer errors a tenth below those of `refit(admm())`."""
    tied = rising = 0.0
    for seed in range(4):
        layer = make_layer(16, 48, seed)
        kept = kept_of(pattern, 16, 48, sparsity)
        tied += error(layer, refit(admm()).solve(layer, pattern, kept)[0])
        rising += error(layer, refit(alps()).solve(layer, pattern, kept)[0])
    assert rising < 0.97 * tied


def error(layer: Layer, weight: Tensor) -> float:
    change = layer.weight.double() - weight.double()
    return float(((change @ layer.inputs.gram.double()) * change).sum())


@pytest.mark.parametrize("pattern", [*PATTERNS, Block(2, 2), Rows()], ids=repr)
@pytest.mark.parametrize("criterion", [admm(), alps()], ids=lambda each: each.name)
def test_counts_are_exact_and_zeros_are_zero(pattern: Pattern, criterion: Criterion):
    layer = make_layer(6, 16)
    kept = kept_of(pattern, 6, 16)
    weight, mask = criterion.solve(layer, pattern, kept)
    assert int(mask.sum()) == kept
    assert not weight[~mask].any()
    assert torch.equal(mask, pattern.mask(mask.float(), kept))  # it has the pattern


def test_correlated_inputs_are_served_better_than_by_anything_else():
    sums = dict.fromkeys(("wanda", "sparsegpt", "admm", "refitted"), 0.0)
    for seed in range(4):
        layer = make_layer(16, 48, seed)
        for name, each in zip(sums, (refit(wanda), refit(sparsegpt()), admm(), refit(admm())), strict=True):
            sums[name] += error(layer, each.solve(layer, Unstructured("row"), 16 * 19)[0])
    assert sums["refitted"] < 0.95 * min(sums["wanda"], sums["sparsegpt"])
    assert sums["refitted"] < sums["admm"] < sums["wanda"]


def test_one_iteration_by_hand():
    # G is diagonal, so nothing can be moved: the units are (1, 2), and B = (3, 4) keeps its larger entry as it is
    weight, mask = admm(1, 1).solve(layer_with_gram([[3.0, 2.0]], [[1.0, 0.0], [0.0, 4.0]]), Unstructured("row"), 1)
    assert weight.tolist() == [[0.0, 2.0]]
    assert mask.tolist() == [[False, True]]


def test_two_iterations_of_alps_by_hand():
    # B = (3, 4), Z = (0, 4), U = (3, 0); with rho = 1 W = B + (Z - U - B) / 2 = (0, 4) and W + U = (3, 4)
    layer = layer_with_gram([[3.0, 2.0]], [[1.0, 0.0], [0.0, 4.0]])
    weight, mask = alps(2, 1, damping=0.0, rho=(1.0, 1.0)).solve(layer, Unstructured("row"), 1)
    torch.testing.assert_close(weight, torch.tensor([[0.0, 2.0]]))
    assert mask.tolist() == [[False, True]]


def test_few_tokens_move_no_weight_far():
    """One input is hardly seen: undamped, its weight may go anywhere, and does."""
    inputs = Inputs(8, gram=True)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    x[:, 7] = torch.tensor([1e-4, 0, 0, 0, 0, 0])
    inputs.add_(x)
    layer = Layer("fc", torch.randn(32, 8, generator=torch.Generator().manual_seed(4)), inputs)
    far = float((refit(admm(damping=0.0), damping=0.0).solve(layer, NM(2, 4), 128)[0]).abs().max())
    near = float((refit(admm()).solve(layer, NM(2, 4), 128)[0]).abs().max())
    assert near < 8 < 100 < far


def test_inputs_that_were_always_zero_leave_finite_weights():
    inputs = Inputs(4, gram=True)
    inputs.add_(torch.tensor([[1.0, 2.0, 0.0, 3.0], [4.0, 1.0, 0.0, 1.0]]))
    for each in (admm(), alps()):
        weight, mask = each.solve(Layer("fc", torch.arange(1.0, 9.0).view(2, 4), inputs), NM(2, 4), 4)
        assert bool(weight.isfinite().all())
        assert int(mask.sum()) == 4


UNDAMPED = [admm(damping=0.0), alps(damping=0.0), refit(alps(damping=0.0))]


@pytest.mark.parametrize("criterion", UNDAMPED, ids=lambda each: each.name)
@pytest.mark.parametrize("pattern", [Unstructured("row"), Unstructured("layer"), Block(2, 2)], ids=repr)
def test_weights_of_inputs_that_were_always_zero_go_first(criterion: Criterion, pattern: Pattern):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    x[:, 8:] = 0
    inputs = Inputs(16, gram=True)
    inputs.add_(x)
    layer = Layer("fc", torch.randn(6, 16, generator=generator) * (1 + 99 * (torch.arange(16) > 7)), inputs)
    weight, mask = criterion.solve(layer, pattern, 48)
    assert mask[:, :8].all()
    torch.testing.assert_close(weight[:, :8], layer.weight[:, :8], rtol=1e-4, atol=1e-4)


def test_layers_that_share_inputs_share_one_inverse(monkeypatch: pytest.MonkeyPatch):
    layer, solver, calls = make_layer(4, 8), admm(), []
    monkeypatch.setattr(torch.linalg, "cholesky", lambda G, plain=torch.linalg.cholesky: calls.append(1) or plain(G))
    for weight in (layer.weight, layer.weight * 2):
        solver.solve(Layer("q", weight, layer.inputs), NM(2, 4), 16)
    assert len(calls) == 1


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_products_of_halves_end_as_near(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    """What a GPU does, here on the CPU."""
    layer = make_layer(48, 64)
    kept = kept_of(pattern, 48, 64)
    every = (admm(), refit(admm()), alps())
    expected = [error(layer, each.solve(layer, pattern, kept)[0]) for each in every]
    for module in ("admm", "refit"):
        monkeypatch.setattr(sys.modules[f"prunus.solve.{module}"], "halved", quadratic._thrice)
    for each, wanted in zip(every, expected, strict=True):
        weight, mask = each.solve(layer, pattern, kept)
        assert int(mask.sum()) == kept
        assert error(layer, weight) == pytest.approx(wanted, rel=2e-3)


def test_a_product_of_halves_is_nearly_that_of_float32():
    x, matrix = torch.randn(8, 300), torch.randn(300, 40)
    gap = quadratic.times(x, quadratic._thrice(matrix)) - x.double() @ matrix.double()
    assert 0 < float(gap.abs().max() / (x.abs().double() @ matrix.abs().double()).max()) < 1e-5


def test_what_is_refused():
    with pytest.raises(ValueError, match="admm needs 1 <= choosing <= iterations; got choosing=15, iterations=10"):
        admm(10)
    for wrong in ({"rho": 0.0}, {"damping": -1.0}, {"pull": float("nan")}, {"rho": float("inf")}):
        with pytest.raises(ValueError, match="admm needs damping and pull >= 0 and rho > 0"):
            admm(**wrong)
    with pytest.raises(ValueError, match="admm needs the Gram matrix of 'fc1'"):
        admm().solve(Layer("fc1", torch.ones(2, 4)), NM(2, 4), 4)
    with pytest.raises(ValueError, match="alps needs 1 <= stages < iterations; got stages=12, iterations=12"):
        alps(12)
    for wrong in ({"rho": (0.0, 1.0)}, {"rho": (2.0, 1.0)}, {"damping": -1.0}):
        with pytest.raises(ValueError, match="alps needs damping >= 0 and a rho that rises from above 0"):
            alps(**wrong)
    with pytest.raises(ValueError, match="alps needs the Gram matrix of 'fc1'"):
        alps().solve(Layer("fc1", torch.ones(2, 4)), NM(2, 4), 4)
    layer = layer_with_gram([[6e4, 6e4]], [[1.0, 0.999], [0.999, 1.0]], torch.float16)
    with pytest.raises(ValueError, match=r"admm's weights of 'fc1' overflow torch\.float16: raise rho"):
        admm().solve(layer, Unstructured("row"), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", [*PATTERNS, Block(2, 2)], ids=repr)
def test_a_gpu_ends_as_near(pattern: Pattern):
    layer = make_layer(64, 96)
    kept = kept_of(pattern, 64, 96)
    there = Layer("fc1", layer.weight.cuda(), layer.inputs)  # the Gram matrix may lie elsewhere
    for each in (admm(), refit(admm()), alps()):
        weight, mask = each.solve(there, pattern, kept)
        assert weight.is_cuda
        assert int(mask.sum()) == kept
        expected = error(layer, each.solve(layer, pattern, kept)[0])
        assert error(layer, weight.cpu()) == pytest.approx(expected, rel=0.02)
