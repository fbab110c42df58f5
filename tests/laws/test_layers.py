"""Laws of views, of finding prunable layers, and of the sums over inputs."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import prunus.layers
from prunus.layers import Inputs, View, find_layers, matches

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Experts(nn.Module):
    """Three experts of (4, 6) matrices, stored (in, out) if transposed."""

    def __init__(self, transposed: bool | None = False) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4) if transposed else torch.randn(3, 4, 6))
        self.up_bias = nn.Parameter(torch.zeros(3, 4))
        if transposed is not None:
            self.is_transposed = transposed


class Moe(nn.Module):
    def __init__(self, transposed: bool | None = False) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.shared_gate = nn.Linear(6, 1)
        self.shared = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 6))
        self.experts = Experts(transposed)


def names(root: nn.Module, **arguments: object) -> list[str]:
    return [view.name for view in find_layers(root, **arguments)]  # type: ignore[arg-type]


def fill(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


MODULES = {
    "linear": (nn.Linear(6, 4), (4, 6)),
    "conv1d": (nn.Conv1d(3, 4, 2), (4, 6)),
    "conv2d": (nn.Conv2d(3, 4, (2, 5)), (4, 30)),
    "conv2d-grouped": (nn.Conv2d(6, 4, 2, groups=2), (4, 12)),
    "conv2d-channels-last": (nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last), (4, 12)),
    "transposed-conv1d": (Conv1D(4, 6), (4, 6)),
    "experts": (Experts(False), (4, 6)),
    "transposed-experts": (Experts(True), (4, 6)),
}


@pytest.mark.parametrize("kind", MODULES)
def test_write_then_matrix_returns_what_was_written(kind: str) -> None:
    module, shape = MODULES[kind]
    root = nn.ModuleDict({"part": module})
    for view in find_layers(root):
        parameter = dict(root.named_parameters())[view.parameter]
        assert view.shape == shape
        new = fill(*shape)
        others = parameter.detach().clone()
        view.write_(parameter, new)
        assert torch.equal(view.matrix(parameter), new)
        if view.index is not None:
            others[view.index] = parameter[view.index].detach()
            assert torch.equal(others, parameter)


@pytest.mark.parametrize("kind", sorted(set(MODULES) - {"conv2d-channels-last"}))
def test_matrix_shares_storage(kind: str) -> None:
    root = nn.ModuleDict({"part": MODULES[kind][0]})
    for view in find_layers(root):
        parameter = dict(root.named_parameters())[view.parameter].detach()
        view.matrix(parameter)[1, 2] = 7.5
        assert (parameter == 7.5).sum() == 1 + (view.index or 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_matrix_is_the_map_that_the_module_computes(dtype: torch.dtype) -> None:
    for module in (nn.Linear(6, 4, bias=False), Conv1D(4, 6), nn.Conv1d(6, 4, 1, bias=False)):
        module = module.to(dtype)
        (view,) = find_layers(module)
        x = fill(5, 6, dtype=dtype)
        y = module(x.T).T if isinstance(module, nn.Conv1d) else module(x)
        torch.testing.assert_close(x @ view.matrix(module.weight).T, y, rtol=1e-2, atol=1e-2)


def test_write_converts_dtype_and_refuses_another_shape() -> None:
    view = View("up", "up.weight", None, True, (4, 6))
    parameter = torch.zeros(6, 4, dtype=torch.bfloat16)
    view.write_(parameter, torch.full((4, 6), 0.5, dtype=torch.float64))
    assert (parameter == 0.5).all()
    with pytest.raises(ValueError, match=r"'up' is \(4, 6\) as \(out, in\); the matrix given is \(6, 4\)"):
        view.write_(parameter, torch.zeros(6, 4))


def test_names_have_the_prefix_and_keys_are_those_of_the_whole_model() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Moe(), Moe()])})
    whole = [view for view in find_layers(model) if view.name.startswith("layers.1.")]
    assert find_layers(model["layers"][1], prefix="layers.1") == whole  # type: ignore[index]
    assert whole[-1] == View("layers.1.experts.up[2]", "layers.1.experts.up", 2, False, (4, 6))
    assert {view.parameter for view in whole} <= set(dict(model.named_parameters()))


def test_routers_beside_stacked_experts_are_left_dense_unless_named() -> None:
    usual = ["shared.0", "shared.1", "experts.up[0]", "experts.up[1]", "experts.up[2]"]
    assert names(Moe()) == usual
    assert names(Moe(), include=["router", "shared_gate"]) == ["router", "shared_gate"]
    assert sorted(names(Moe(), include=["*"])) == sorted([*usual, "router", "shared_gate"])


def test_a_stack_that_nothing_multiplies_stays_dense_unless_named(caplog: pytest.LogCaptureFixture) -> None:
    assert names(Moe(None)) == ["shared.0", "shared.1"]
    assert "experts.up stay dense" in caplog.text
    with pytest.raises(ValueError, match=r"'experts.up\[0\]' is one of 3 .* shape \(4, 6\).*is_transposed.*exclude"):
        names(Moe(None), include=["up"])
    assert names(Moe(None), exclude=["experts.*"]) == ["shared.0", "shared.1"]


def test_weights_that_are_made_of_others_stay_dense_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    made = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    assert names(nn.Sequential(nn.Linear(4, 4), *made, nn.MultiheadAttention(4, 2))) == ["0", "3.out_proj"]
    assert "1 and 2 other layers stay dense: their weights are made of other parameters" in caplog.text


def test_layers_that_are_not_pruned_are_named(caplog: pytest.LogCaptureFixture) -> None:
    assert names(nn.Sequential(nn.Conv1d(4, 4, 2), nn.ConvTranspose1d(4, 4, 2), nn.Linear(3, 4), nn.GRU(4, 4))) == [
        "0",
        "2",
    ]
    assert "1 and 1 other layers stay dense: transposed convolutions and recurrent layers" in caplog.text


class Told(nn.Module):
    """Experts that say how many tokens each takes, called by a module around them that takes tokens alone."""

    def __init__(self, stored: str, width: int) -> None:
        super().__init__()
        self.stored, self.experts = stored, nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(*((2, 6, width) if stored == "out, in" else (2, width, 6))))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.flatten(0, -2).tensor_split(2)
        if self.stored == "out, in":
            return torch.cat([nn.functional.linear(parts[i], self.experts.weight[i]) for i in range(2)])
        return torch.bmm(torch.stack(parts), self.experts.weight)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("stored", ["out, in", "in, out"])
def test_a_run_on_probes_tells_how_experts_are_stored(stored: str, width: int, device: str, monkeypatch) -> None:
    monkeypatch.setattr(prunus.layers, "_PROBED", {})
    root = nn.ModuleDict({"moe": Told(stored, width).to(device)})
    views = find_layers(root)
    assert [view.name for view in views] == ["moe.experts.weight[0]", "moe.experts.weight[1]"]
    assert {(view.shape, view.transposed) for view in views} == {((6, width), stored == "in, out")}


def test_depthwise_convolutions_stay_dense_unless_named() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(6, 6, 4, groups=6), "one": nn.Conv2d(1, 6, 3), "fc": nn.Linear(6, 6)})
    assert names(model) == ["one", "fc"]
    assert names(model, include=["conv"]) == ["conv"]


def test_gates_of_one_value_a_head_stay_dense_unless_named() -> None:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    model.model.layers[0].self_attn.gate = nn.Linear(8, 4)
    assert len(names(model)) == 7
    assert names(model, include=["gate"]) == ["model.layers.0.self_attn.gate"]


@pytest.mark.parametrize("out", [4, 6])
def test_experts_of_one_class_may_be_stored_either_way(out: int) -> None:
    class Either(nn.Module):
        def __init__(self, flipped: bool) -> None:
            super().__init__()
            self.flipped = flipped
            self.up = nn.Parameter(torch.randn(3, 4, out) if flipped else torch.randn(3, out, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x @ (each if self.flipped else each.T) for each in self.up]).sum(0)

    for flipped in (True, False, True):
        found = find_layers(nn.Sequential(nn.Linear(4, 4), Either(flipped)))
        assert [(each.transposed, each.shape) for each in found[1:]] == [(flipped, (out, 4))] * 3
        told = find_layers(nn.ModuleDict({"moe": Told("in, out" if flipped else "out, in", 6)}))
        assert {each.transposed for each in told} == {flipped}


def test_position_embeddings_are_no_stack() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    model.register_parameter("position", nn.Parameter(torch.zeros(1, 7, 4)))
    assert names(model) == ["fc"]


def test_transposed_convolutions_are_left_alone() -> None:
    assert names(nn.Sequential(nn.ConvTranspose1d(3, 4, 5), nn.ConvTranspose2d(3, 4, 5), nn.Linear(4, 4))) == ["2"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_weights_of_eight_bits_are_refused(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    model["fc"].weight = nn.Parameter(torch.zeros(8, 2).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=rf"'fc' is stored as {dtype}: load the model without quantisation"):
        find_layers(model)


def test_tied_weights_are_one_layer() -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4), "three": nn.Linear(4, 4)})
    model["three"].weight = model["one"].weight
    assert names(model) == ["one", "two"]


@pytest.mark.parametrize("tied", [False, True])
def test_head_and_embedding_are_dense_unless_named(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    assert len(names(model)) == 7
    assert all(name.startswith("model.layers.0.") for name in names(model))
    (head,) = find_layers(model, include=["lm_head"])
    assert head.parameter == ("model.embed_tokens.weight" if tied else "lm_head.weight")
    assert names(model, include=["*"]) == [*names(model), "lm_head"]


def test_exclude_excludes_and_include_restricts() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})])})
    assert names(model, exclude=["fc1"]) == ["layers.0.fc2"]
    assert names(model, include=["layers.0.fc1"]) == ["layers.0.fc1"]
    assert names(model, include=["fc?"], exclude=["0.fc2"]) == ["layers.0.fc1"]
    assert names(Moe(), exclude=["up[1]", "shared.*"]) == ["experts.up[0]", "experts.up[2]"]
    assert names(Moe(), exclude=["experts.up"]) == ["shared.0", "shared.1"]


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_glob_that_matches_nothing_raises_with_close_names(key: str) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"down_proj": nn.Linear(4, 4)})])})
    with pytest.raises(ValueError, match=r"'down_prj' matches none of the 1 .*Close names: 'layers.0.down_proj'"):
        find_layers(model, **{key: ["down_proj", "down_prj"]})  # type: ignore[arg-type]


def test_a_glob_that_names_a_module_is_told_of_the_layers_in_it() -> None:
    model = nn.ModuleDict({"decoder": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(4, 4)})])})
    with pytest.raises(ValueError, match=r"'decoder' matches none .* 'decoder\.\*' names the layers in it"):
        find_layers(model, include=["decoder"])


def test_globs_match_whole_parts_only() -> None:
    assert matches("a.b.fc1", "b.fc1")
    assert not matches("a.bb.fc1", "b.fc1")
    assert not matches("a.fc1.gate", "fc1")
    assert matches("a.fc1", "fc[12]")
    assert not matches("a.experts.up[12]", "up[2]")


def test_find_layers_on_meta_equals_find_layers() -> None:
    with torch.device("meta"):
        meta = Moe()
    assert find_layers(meta) == find_layers(Moe())


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_equal_float64_products(dtype: torch.dtype) -> None:
    x = fill(2, 7, 5, dtype=dtype)
    inputs, norms = Inputs(5, gram=True), Inputs(5)
    for part in x:
        inputs.add_(part)
        norms.add_(part)
    exact = x.reshape(-1, 5).double()
    assert inputs.tokens == norms.tokens == 14
    assert inputs.gram is not None
    assert norms.gram is None
    assert inputs.gram.dtype == inputs.squares.dtype == torch.float32
    torch.testing.assert_close(inputs.gram.double(), exact.T @ exact, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(norms.squares.double(), exact.square().sum(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norms.norms.double(), exact.norm(dim=0), rtol=1e-6, atol=1e-6)
    assert torch.equal(inputs.squares, inputs.gram.diagonal())


def test_sums_in_pieces_equal_sums_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = fill(50, 3)
    whole, pieces = Inputs(3, gram=True), Inputs(3, gram=True)
    whole.add_(x)
    monkeypatch.setattr(prunus.layers, "_CHUNK", 12)
    pieces.add_(x)
    torch.testing.assert_close(whole.gram, pieces.gram)
    assert whole.tokens == pieces.tokens == 50


@pytest.mark.parametrize("in_place", [True, False])
def test_half_of_the_products_completed_when_read(monkeypatch: pytest.MonkeyPatch, in_place: bool) -> None:
    """What a GPU does with 16-bit inputs, its two products done here in float32: panels of the lower triangle."""
    addmm, mm, seen = torch.addmm, torch.mm, []

    def wide_addmm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out_dtype: object, out: torch.Tensor):
        seen.append(a.shape[0] * b.shape[1])
        return addmm(total, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "addmm", wide_addmm)
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out_dtype: seen.append(a.shape[0] * b.shape[1]) or mm(a.float(), b.float())
    )
    monkeypatch.setattr(prunus.layers, "_multiplies_to_float32", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(prunus.layers, "_adds_in_place", lambda device: in_place)
    x = fill(2, 4, 2500, dtype=torch.bfloat16)
    inputs = Inputs(2500, gram=True)
    for part in x:
        inputs.add_(part)
    rows = x.flatten(0, 1).double()
    assert sum(seen) < 2 * 0.75 * 2500**2
    torch.testing.assert_close(inputs.squares.double(), rows.square().sum(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs.gram.double(), rows.T @ rows, rtol=1e-6, atol=1e-5)
    inputs.add_(x[0])  # goes on after being read, and with other dtypes in between
    inputs.add_(x[1].float())
    torch.testing.assert_close(inputs.gram.double(), 2 * rows.T @ rows, rtol=1e-6, atol=1e-5)
    assert torch.equal(inputs.gram, inputs.gram.T)


def test_small_sixteen_bit_inputs_do_not_vanish() -> None:
    inputs = Inputs(1)
    for _ in range(100):
        inputs.add_(torch.full((1000, 1), 2.0**-10, dtype=torch.float16))  # squares 2^-20, below float16's resolution
    assert inputs.squares.item() == pytest.approx(1e5 * 2.0**-20, rel=1e-5)


def test_sums_record_no_gradient() -> None:
    inputs = Inputs(3, gram=True)
    inputs.add_(fill(4, 3).requires_grad_())
    assert inputs.gram is not None
    assert not inputs.gram.requires_grad


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 4\) do not end in the layer's 3 columns"):
        Inputs(3).add_(torch.zeros(2, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_check_names_layer_and_column(bad: float) -> None:
    inputs = Inputs(3, gram=True)
    inputs.add_(torch.ones(2, 3))
    inputs.check("fc1")
    inputs.add_(torch.tensor([[1.0, bad, 1.0]]))
    with pytest.raises(ValueError, match=r"'fc1' received NaN.* in 1 of 3 columns \(first: column 1\)"):
        inputs.check("fc1")


def test_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(prunus.layers, extraglobs={"torch": torch, "nn": nn}).failed == 0
