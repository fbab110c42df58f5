"""Every public score: float32 (out, in), finite, read-only, blind to storage; and exact when turned into a solver."""

import pytest
import torch
from torch import Tensor

from prunus import solve
from prunus.layers import Inputs, Layer
from prunus.patterns import NM, Pattern, Unstructured
from prunus.score import Criterion, Score, criteria, criterion, criterion_of
from prunus.score.criteria import magnitude, ria, wanda
from prunus.solve import sparsegpt

FACTORIES = {"random"}
NAMES = criteria.__all__
PATTERNS = [Unstructured("layer"), Unstructured("row"), NM(2, 4), NM(4, 8)]


def make(name: str) -> Criterion:
    found = getattr(criteria, name)
    return criterion_of(found() if name in FACTORIES else found)


def make_layer(dtype: torch.dtype = torch.float32, *, tokens: int = 20, gram: bool = False) -> Layer:
    generator = torch.Generator().manual_seed(0)
    inputs = Inputs(16, gram=gram)
    inputs.add_(torch.randn(tokens, 16, generator=generator) * torch.linspace(0.1, 3, 16))
    return Layer("blocks.0.fc1", torch.randn(6, 16, generator=generator).to(dtype), inputs)


def kept_at_half(pattern: Pattern, layer: Layer) -> int:
    return pattern.counts((layer.weight.shape[0], layer.weight.shape[1]), 0.5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_are_finite_float32_and_leave_the_layer_alone(name: str, dtype: torch.dtype):
    layer = make_layer(dtype)
    before, norms = layer.weight.clone(), layer.inputs.norms.clone()
    layer.weight.requires_grad_()
    score = make(name)(layer)
    assert score.dtype == torch.float32
    assert score.shape == (6, 16)
    assert bool(score.isfinite().all())
    assert bool((score >= 0).all())
    assert not score.requires_grad
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.inputs.norms, norms)


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_zero_weights_and_silent_inputs_are_finite(name: str):
    """What a model pruned before has, and what stands behind a dead ReLU: 0 / 0 in a score that normalises."""
    inputs = Inputs(4)
    inputs.add_(torch.tensor([[1.0, 2.0, 0.0, 3.0], [4.0, 1.0, 0.0, 1.0]]))
    weight = torch.arange(1.0, 17.0).view(4, 4)
    weight[1], weight[:, 3] = 0, 0
    assert bool(make(name)(Layer("fc", weight, inputs)).isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_storage(name: str):
    layer = make_layer()
    turned = Layer(layer.name, layer.weight.T.contiguous().T, layer.inputs)
    assert torch.equal(make(name)(layer), make(name)(turned))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_by_score_keeps_exactly_what_was_asked(name: str, pattern: Pattern, dtype: torch.dtype):
    layer = make_layer(dtype)
    kept = kept_at_half(pattern, layer)
    weight, mask = make(name).solve(layer, pattern, kept)
    assert weight.dtype == dtype
    assert int(mask.sum()) == kept
    assert torch.equal(weight[mask], layer.weight[mask])
    assert bool((weight[~mask] == 0).all())
    assert not bool(weight[~mask].signbit().any())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FACTORIES])
def test_pruning_again_changes_nothing(name: str):
    layer = make_layer()
    for pattern in (Unstructured("layer"), NM(2, 4)):
        weight, mask = make(name).solve(layer, pattern, kept_at_half(pattern, layer))
        again = make(name).solve(Layer("fc", weight, layer.inputs), NM(4, 8), 48)[1] if pattern.width else None
        assert again is None or bool((again == mask).all())
        same = magnitude.solve(Layer("fc", weight, layer.inputs), pattern, int(mask.sum()))
        assert torch.equal(same[1], mask)


def test_magnitude_by_hand():
    assert magnitude(Layer("fc", torch.tensor([[-3.0, 0.5], [0.0, -0.0]]))).tolist() == [[3.0, 0.5], [0.0, 0.0]]


def test_random_scores_come_from_their_seed_and_the_name_of_the_layer():
    layer = make_layer()
    state = torch.get_rng_state()
    assert torch.equal(criteria.random(1)(layer), criteria.random(1)(layer))
    assert not torch.equal(criteria.random(1)(layer), criteria.random(2)(layer))
    assert not torch.equal(criteria.random(1)(layer), criteria.random(1)(Layer("other", layer.weight)))
    assert torch.equal(torch.get_rng_state(), state)


# A plain function is a criterion: what it reads says what it needs, and within what its scores compete.


@pytest.mark.parametrize(
    ("score", "needs", "compare"),
    [
        (lambda layer: layer.weight.abs().float(), "", "layer"),
        (lambda layer: layer.weight.abs().float() * layer.inputs.norms, "norms", "row"),
        (lambda layer: wanda(layer) / layer.weight.norm(dim=1, keepdim=True), "norms", "row"),
        (lambda layer: layer.weight.abs() if layer.inputs.tokens == 0 else wanda(layer), "norms", "row"),
        (lambda layer: layer.weight.square() * layer.inputs.gram.diagonal(), "gram", "row"),
    ],
)
def test_what_a_plain_score_reads_says_what_it_needs(score, needs, compare):
    found = criterion_of(score)
    assert (found.needs, found.compare) == (needs, compare)
    layer = make_layer(gram=True)
    assert torch.equal(found(layer), score(layer))


def test_what_is_no_criterion_is_refused_before_work():
    def fails(layer):
        return layer.weight / {"blocks.0.fc1": 1.0}[layer.name]

    with pytest.raises(ValueError, match=r"fails on a layer of 4 x 4 .* say it, criterion\(needs=\.\.\., compare"):
        criterion_of(fails)
    assert criterion(needs="norms")(fails)(make_layer()).shape == (6, 16)
    for wrong in ("wanda", sparsegpt, lambda layer, pattern, kept: None):
        with pytest.raises(ValueError, match="is no criterion"):
            criterion_of(wrong)
    with pytest.raises(ValueError, match="sparsegpt chooses inside one layer and has no score"):
        sparsegpt()(make_layer())


def test_of_scales_and_scores_written_out_the_bits_are_the_same():
    layer = make_layer(torch.bfloat16)
    for pattern in PATTERNS:
        one, other = (each.solve(layer, pattern, 48) for each in (wanda, criterion()(wanda.score)))
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("score", [wanda, ria])
def test_scores_that_need_inputs_say_so(score: Score):
    with pytest.raises(ValueError, match=r"needs the inputs of 'fc7'"):
        score(Layer("fc7", torch.ones(2, 4)))
    broken = Inputs(4)
    broken.add_(torch.tensor([[1.0, float("inf"), 1.0, 1.0]]))
    with pytest.raises(ValueError, match="'fc7' received NaN, infinite"):
        score(Layer("fc7", torch.ones(2, 4), broken))


SOLVERS = {"wanda": wanda, "ria": ria} | {name: getattr(solve, name)() for name in solve.__all__}


@pytest.mark.parametrize("name", solve.__all__)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_criteria_that_choose_inside_a_layer_keep_exactly_what_was_asked(
    name: str, pattern: Pattern, dtype: torch.dtype
):
    layer = make_layer(dtype, gram=True)
    before, kept = layer.weight.clone(), kept_at_half(pattern, layer)
    weight, mask = SOLVERS[name].solve(layer, pattern, kept)
    assert weight.dtype == dtype
    assert int(mask.sum()) == kept
    assert bool(weight.isfinite().all())
    assert bool((weight[~mask] == 0).all())
    assert not bool(weight[~mask].signbit().any())
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("gram", [False, True])
def test_a_layer_that_saw_no_token_falls_back_to_magnitude(solver: Criterion, gram: bool):
    layer = make_layer(tokens=0, gram=gram)
    assert layer.inputs.tokens == 0
    with pytest.warns(UserWarning, match=r"'blocks\.0\.fc1' saw no calibration token.*falls back to magnitude"):
        weight, mask = solver.solve(layer, NM(2, 4), 48)
    expected: tuple[Tensor, Tensor] = magnitude.solve(layer, NM(2, 4), 48)
    assert torch.equal(mask, expected[1])
    assert torch.equal(weight, expected[0])


def test_nan_weights_are_refused_by_name():
    weight = torch.ones(2, 4)
    weight[0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"the score of 'fc1' has 1 NaN of 8"):
        magnitude.solve(Layer("fc1", weight), Unstructured("row"), 4)
