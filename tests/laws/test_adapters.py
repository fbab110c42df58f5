"""Laws of every adapter kind: merging is exact, zeros stay, nothing of the weight's size is kept, any setting works."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunus.adapt.adapt import Adaptation, adapt
from prunus.adapt.adapters import EffectiveLinear, Factors, Init, new_factors
from prunus.adapt.effective import Terms, effective_weight
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.patterns import NM, Pattern, Unstructured

KINDS = ["lora", "lora_prune", "scale_lora", "mask_lora"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


class Stack(nn.Module):
    """Three experts (in, out) or (out, in), each read by its own index as eager experts are."""

    def __init__(self, out: int, in_: int, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.proj = nn.Parameter(torch.randn(3, in_, out) if transposed else torch.randn(3, out, in_))

    def forward(self, x: Tensor) -> Tensor:
        return sum(
            (x @ (W if self.is_transposed else W.t()) for W in (self.proj[i] for i in range(3))), x.new_zeros(())
        )


def _model(form: str, out: int, in_: int, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(seed)
    forms: Mapping[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(in_, out),
        "plain": lambda: nn.Linear(in_, out, bias=False),
        "conv1d": lambda: Conv1D(out, in_),
        "stack": lambda: Stack(out, in_, transposed=False),
        "stack-transposed": lambda: Stack(out, in_, transposed=True),
    }
    return nn.Sequential(forms[form]()).to(dtype)


def _pruned(model: nn.Module, pattern: Pattern, seed: int = 0) -> Masks:
    """Random masks of the pattern, half the weights kept, applied."""
    views, shapes = find_layers(model), {name: p.shape for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    scores = {view.name: torch.rand(view.shape, generator=generator) for view in views}
    matrices = {name: pattern.mask(score, score.numel() // 2) for name, score in scores.items()}
    masks = Masks.of(views, matrices, shapes)
    masks.apply_(model)
    return masks


def _factors(model: nn.Module) -> list[Factors]:
    return [module for module in model.modules() if isinstance(module, Factors)]


def _effective(model: nn.Module) -> Tensor | None:
    """What forward computes with instead of the one stored weight, as it is stored; None for "lora", which has none."""
    (module,) = model.children()
    if isinstance(module, Stack):
        return module.proj.detach().clone()
    if not isinstance(module, EffectiveLinear):
        return None
    f = module.factors
    built = effective_weight(f.terms(module.matrix())).detach()
    return built.t() if module.transposed else built


def _train(model: nn.Module, adaptation: Adaptation, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(adaptation.param_groups(0.05), weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    form=st.sampled_from(["linear", "plain", "conv1d", "stack", "stack-transposed"]),
    dtype=st.sampled_from(DTYPES),
    rank=st.integers(1, 4),
    out=st.integers(2, 9),
    groups=st.integers(1, 4),
    pattern=st.sampled_from([Unstructured(per="layer"), NM(2, 4)]),
    seed=st.integers(0, 99),
)
def test_merging_keeps_zeros_pattern_and_outputs(
    kind: str, form: str, dtype: torch.dtype, rank: int, out: int, groups: int, pattern: Pattern, seed: int
) -> None:
    model = _model(form, out, 4 * groups, dtype, seed)
    masks = None if kind == "lora" else _pruned(model, pattern, seed)
    before = {name: (p.dtype, p.requires_grad, p) for name, p in model.named_parameters()}
    modules = list(model.modules())
    x = torch.randn(3, 2, 4 * groups, dtype=dtype)
    start = model(x)
    adaptation = adapt(model, [kind], masks=masks, views=find_layers(model), rank=rank, alpha=3.0)
    if kind != "scale_lora":  # where r^-1/2 squared r times is one only to rounding
        assert torch.equal(model(x), start)
    _train(model, adaptation, x)
    trained = model(x)
    assert not torch.equal(trained, start)
    report = adaptation.merge_()
    merged = model(x)
    assert {name: (p.dtype, p.requires_grad, p) for name, p in model.named_parameters()} == before
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    if kind in ("mask_lora", "scale_lora"):
        assert torch.equal(merged, trained)  # the merged weight is the effective weight, bit for bit
    elif kind == "lora":
        scale = trained.detach().abs().max().clamp_min(1).item()
        torch.testing.assert_close(merged, trained, rtol=0, atol=EPS[dtype] * scale)
    assert set(report.lost) == (set(report.difference) if kind == "lora_prune" else set())
    for name, mask in (masks or {}).items():
        zeros = model.get_parameter(name)[~mask]
        assert not zeros.any()
        assert not zeros.signbit().any()
    if masks is not None and isinstance(pattern, NM):
        for view in find_layers(model):
            W = view.matrix(model.get_parameter(view.parameter)).reshape(view.shape[0], -1, 4)  # (out, groups, 4)
            assert (W != 0).sum(-1).max() <= 2


@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora"])
@pytest.mark.parametrize("form", ["linear", "conv1d"])
def test_nothing_of_the_weights_size_is_saved(kind: str, form: str) -> None:
    model = _model(form, 64, 64, torch.float32)
    masks = _pruned(model, NM(2, 4))
    adapt(model, [kind], masks=masks, views=find_layers(model), rank=2)
    live = {p.untyped_storage().data_ptr() for p in model.parameters()}
    live |= {factors.mask.untyped_storage().data_ptr() for factors in _factors(model) if factors.mask is not None}
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in live:
            saved.append(tensor.untyped_storage().nbytes())
        return tensor

    x = torch.randn(4, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    y.sum().backward()
    assert sum(saved) == x.numel() * 4


def test_a_stack_saves_no_more_than_its_effective_weight() -> None:
    model = _model("stack", 32, 32, torch.float32)
    adapt(model, ["mask_lora"], masks=_pruned(model, NM(2, 4)), views=find_layers(model), rank=2)
    stored = model[0].parametrizations.proj.original  # type: ignore[index, union-attr]
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(2, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    weights = [size for size in saved.values() if size >= stored.numel() * 4]
    assert len(weights) == 2  # the stored parameter, and one effective one for all three experts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    """Under autocast layers compute in its dtype, also float32 ones, and factors get float32 gradients."""
    low = torch.bfloat16 if dtype == torch.float32 else dtype
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).to(dtype)
    masks = None if kind == "lora" else _pruned(model, NM(2, 4))
    adaptation = adapt(model, [kind, "norms", "biases"], masks=masks, views=find_layers(model), rank=2)
    with torch.autocast("cpu", dtype=low):
        y = model(torch.randn(3, 8))
        y.float().sum().backward()  # backward inside autocast must not round the sums either
    assert y.dtype == low
    for group in adaptation.groups.values():
        assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 for p in group)
    before = model(torch.ones(2, 8, dtype=dtype))  # and without autocast in the model's own
    assert before.dtype == dtype


@pytest.mark.parametrize("kind", ["scale_lora", "mask_lora"])
@pytest.mark.parametrize("form", ["linear", "stack"])
def test_autocast_rounds_neither_the_effective_weight_nor_the_sums(kind: str, form: str) -> None:
    """BA, dA and dB are float32 products also where autocast would round them, inside backward too."""
    results: list[list[Tensor]] = []
    x = torch.randn(64, 16)
    for inside in (False, True):
        model = _model(form, 8, 16, torch.float32)
        adaptation = adapt(model, [kind], masks=_pruned(model, NM(2, 4)), views=find_layers(model), rank=3)
        A, B = adaptation.groups[kind]
        B.data.normal_(generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
            if inside:
                y.float().square().sum().backward()
        if not inside:
            y.float().square().sum().backward()
            adaptation.merge_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(model(x), y)
        results.append([y, *(p.grad for p in (A, B) if p.grad is not None)])
    assert len(results[0]) == 3
    assert all(torch.equal(outside, inside) for outside, inside in zip(*results, strict=True))


def test_the_effective_weight_is_rounded_as_it_will_be_stored() -> None:
    """First to the weight's dtype, then to autocast's: float16 under bfloat16 autocast is the same when merged."""
    W, A, B = torch.randn(64, 64).half(), torch.randn(3, 64), torch.randn(64, 3)
    once = effective_weight(Terms(W, A, B, None, 1.0))
    assert torch.equal(effective_weight(Terms(W, A, B, None, 1.0), torch.bfloat16), once.bfloat16())
    assert not torch.equal(once.bfloat16(), (W + B @ A).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["linear", "stack"])
def test_a_module_used_twice_gets_both_gradients(kind: str, form: str) -> None:
    grads: list[list[Tensor]] = []
    x = torch.randn(3, 4)
    for twice in (True, False):
        model = _model(form, 4, 4, torch.float32)
        adaptation = adapt(model, [kind], masks=None, views=find_layers(model), rank=2)
        if twice:
            model(model(x)).sum().backward()
        else:  # the same sum of two uses, by hand
            h = model(x)
            (inner,) = torch.autograd.grad(model(h.detach().requires_grad_()).sum(), h, allow_unused=True)
            assert inner is None
            leaf = h.detach().requires_grad_()
            model(leaf).sum().backward()
            h.backward(leaf.grad)
        grads.append([p.grad for p in adaptation.groups[kind] if p.grad is not None])
    assert len(grads[0]) == 2
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["linear", "stack"])
def test_gradient_checkpointing_changes_nothing(kind: str, form: str) -> None:
    grads: list[list[Tensor | None]] = []
    x = torch.randn(3, 4)
    for again in (False, True):
        model = _model(form, 4, 4, torch.float32)
        adaptation = adapt(model, [kind], masks=None, views=find_layers(model), rank=2)
        y = checkpoint(model, x, use_reentrant=False) if again else model(x)
        y.square().sum().backward()  # type: ignore[union-attr]
        grads.append([p.grad for p in adaptation.groups[kind]])
        assert not any(getattr(module, "_open", 0) for module in model.modules())
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))  # type: ignore[arg-type]


def test_outputs_can_be_changed_in_place() -> None:
    """Falcon adds to what its layers return; a view made inside an autograd function refuses that."""
    model = _model("linear", 4, 4, torch.float32)
    adaptation = adapt(model, ["mask_lora"], masks=None, views=find_layers(model), rank=2)
    y = model(torch.ones(2, 3, 4))
    y += 1
    y.sum().backward()
    assert all(p.grad is not None for p in adaptation.groups["mask_lora"])


def test_an_input_without_gradient_and_frozen_factors() -> None:
    model = _model("linear", 4, 4, torch.float32)
    adaptation = adapt(model, ["mask_lora"], masks=None, views=find_layers(model), rank=2)
    x = torch.ones(2, 4, requires_grad=True)
    model(x.detach()).sum().backward()
    assert x.grad is None
    for p in adaptation.groups["mask_lora"]:
        assert p.grad is not None
        p.requires_grad_(False)
        p.grad = None
    model(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in adaptation.groups["mask_lora"])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora"])
def test_dynamo_traces_the_function(kind: str) -> None:
    model = _model("linear", 4, 8, torch.float32)
    adaptation = adapt(model, [kind], masks=_pruned(model, NM(2, 4)), views=find_layers(model), rank=2)
    x, grads = torch.randn(3, 8), []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        call(x).square().sum().backward()
        grads.append([p.grad for p in adaptation.groups[kind]])
        for p in adaptation.groups[kind]:
            p.grad = None
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)


def test_a_weight_trained_through_zero_is_still_trained_after() -> None:
    """The mask is the stored one: a kept weight that is exactly zero for a while is no pruned weight."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    weight = model.get_parameter("0.weight")
    weight.data.copy_(torch.tensor([[1.0, 2.0, 0.0, 4.0]]))
    masks = Masks({"0.weight": torch.tensor([[True, True, False, True]])})
    for target in (0.0, 5.0):  # through zero in the first round, away from it in the second
        adaptation = adapt(model, ["mask_lora"], masks=masks, views=find_layers(model), rank=1, alpha=1.0)
        A, B = adaptation.groups["mask_lora"]
        with torch.no_grad():
            A.copy_(torch.tensor([[target - weight[0, 0].item(), 0.0, 7.0, 0.0]]))
            B.fill_(1.0)
        adaptation.merge_()
        assert weight.tolist() == [[target, 2.0, 0.0, 4.0]]


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8)])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_fresh_factors_change_nothing(shape: tuple[int, ...], rank: int, init: Init) -> None:
    A, B = new_factors(shape, rank, product=False, init=init, generator=torch.Generator().manual_seed(0))
    assert not (B @ A).any()
    assert (A != 0).all()
    if init == "kaiming":
        assert A.abs().max() <= 8**-0.5
    A, B = new_factors(shape, rank, product=True, init=init, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(B @ A, torch.ones(shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("init", "expected"), [("kaiming", 1), ("gaussian", 3)])
def test_published_scale_lora_stays_at_rank_one(init: Init, expected: int) -> None:
    """Equal components get equal gradients; the other start parts them."""
    model = _model("linear", 8, 8, torch.float32)
    adaptation = adapt(model, ["scale_lora"], masks=None, views=find_layers(model), rank=3, init=init)
    _train(model, adaptation, torch.randn(16, 8), steps=5)
    A, B = adaptation.groups["scale_lora"]
    assert int(torch.linalg.matrix_rank(B.detach() @ A.detach(), rtol=1e-4)) == expected


def test_the_mask_moves_with_the_module_but_is_no_buffer() -> None:
    model = _model("linear", 4, 8, torch.float32)
    adapt(model, ["mask_lora"], masks=_pruned(model, NM(2, 4)), views=find_layers(model), rank=2)
    assert not list(model.buffers())
    assert model.to("meta")[0].factors.mask.device.type == "meta"  # type: ignore[union-attr, operator]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["linear", "conv1d", "stack"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapted_on_the_cpu_trained_and_merged_on_a_gpu(kind: str, form: str, dtype: torch.dtype) -> None:
    model = _model(form, 16, 32, dtype)
    masks = None if kind == "lora" else _pruned(model, NM(2, 4))
    adaptation = adapt(model, [kind], masks=masks, views=find_layers(model), rank=2)
    model.cuda()
    x = torch.randn(3, 5, 32, dtype=dtype, device="cuda")
    _train(model, adaptation, x)
    trained, effective = model(x).detach(), _effective(model)
    adaptation.merge_()
    if masks is not None:
        masks.check(model)
    if kind in ("mask_lora", "scale_lora"):
        (merged,) = (p for p in model.parameters() if p.dim() > 1)
        assert torch.equal(merged, effective)
        torch.testing.assert_close(model(x), trained)  # a product of another layout may be summed in another order


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_the_low_rank_path_is_the_plain_sum_with_its_gradients(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5)).double()
    weight = model[0].weight
    adaptation = adapt(model, ["lora", "biases"], masks=None, views=find_layers(model), rank=2, alpha=6.0)
    A, B = adaptation.groups["lora"]
    B.data.normal_()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = x @ (weight + 3.0 * (B @ A).double()).T + model[0].bias
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    one, other = (torch.autograd.grad(y.square().sum(), (x, A, B)) for y in (found, expected))
    for grad, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)
