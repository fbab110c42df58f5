"""Every model family, tiny and random: blocks, block-by-block running, and observed inputs against the model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from prunus.blocks.chain import capture, find_blocks, run_block
from prunus.layers import View, find_layers
from prunus.score import observable, observe, wanda
from prunus.stream import stream
from tests.families import try_

VOCAB, WIDTH, LENGTH = 64, 32, 24
NORMAL = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}


def _normal(name: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**{**NORMAL, **more}))


def _own(name: str, model: str = "", **arguments: Any) -> Callable[[], nn.Module]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return lambda: getattr(tf, model or f"{name}ForCausalLM")(
        getattr(tf, f"{name}Config")(**{"vocab_size": VOCAB, **ids, **arguments})
    )


_OPT = {
    "hidden_size": WIDTH,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_WINDOWS = {"head_dim": 8, "sliding_window": 4, "num_hidden_layers": 3}

# name -> (model, name of what follows the last block, groups of layers that share one input)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, list[set[str]]]] = {
    "opt": (_own("OPT", **_OPT), "model.decoder.final_layer_norm", [{"q_proj", "k_proj", "v_proj"}]),
    "opt-post-norm": (
        _own("OPT", **_OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
        "model.decoder.project_out",
        [{"q_proj", "k_proj", "v_proj"}],
    ),
    "llama": (_normal("Llama"), "model.norm", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]),
    "llama-tied": (_normal("Llama", tie_word_embeddings=True), "model.norm", [{"gate_proj", "up_proj"}]),
    "mistral": (_normal("Mistral", sliding_window=4), "model.norm", [{"q_proj", "k_proj", "v_proj"}]),
    "qwen2": (_normal("Qwen2"), "model.norm", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]),
    "qwen3": (_normal("Qwen3", head_dim=8), "model.norm", [{"q_proj", "k_proj", "v_proj"}]),
    "gemma": (_normal("Gemma", head_dim=8), "model.norm", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]),
    "gemma2": (_normal("Gemma2", **_WINDOWS), "model.norm", [{"q_proj", "k_proj", "v_proj"}]),
    "gemma3": (
        _own(
            "Gemma3Text",
            "Gemma3ForCausalLM",
            **{**NORMAL, **_WINDOWS, "query_pre_attn_scalar": 8},
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "model.norm",
        [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    ),
    "phi": (_normal("Phi"), "model.final_layernorm", [{"q_proj", "k_proj", "v_proj", "fc1"}]),
    "gpt2": (
        _own("GPT2", "GPT2LMHeadModel", n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64),
        "transformer.ln_f",
        [],
    ),
    "gpt-neox": (
        _own(
            "GPTNeoX",
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        "gpt_neox.final_layer_norm",
        [],
    ),
    "bloom": (_own("Bloom", hidden_size=WIDTH, n_layer=2, n_head=4), "transformer.ln_f", []),
    "falcon": (
        _own("Falcon", hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4),
        "transformer.ln_f",
        [{"query_key_value", "dense_h_to_4h"}],
    ),
    "falcon-alibi": (
        _own("Falcon", hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, alibi=True, parallel_attn=False),
        "transformer.ln_f",
        [],
    ),
    "mixtral": (
        _normal("Mixtral", num_local_experts=8, num_experts_per_tok=2),
        "model.norm",
        [{"q_proj", "k_proj", "v_proj"}],
    ),
    "qwen2-moe": (
        _normal("Qwen2Moe", **MOE, shared_expert_intermediate_size=40),
        "model.norm",
        [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    ),
    "qwen3-moe": (_normal("Qwen3Moe", **MOE, head_dim=8), "model.norm", [{"q_proj", "k_proj", "v_proj"}]),
    "gpt-oss": (
        _normal("GptOss", head_dim=8, num_local_experts=8, num_experts_per_tok=2, sliding_window=4),
        "model.norm",
        [{"q_proj", "k_proj", "v_proj"}],
    ),
    "bamba": (
        _normal("Bamba", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8),
        "model.final_layernorm",
        [],
    ),
    "recurrent-gemma": (
        _normal("RecurrentGemma", num_hidden_layers=3, lru_width=WIDTH, attention_window_size=8, head_dim=8),
        "model.final_norm",
        [{"gate_proj", "up_proj"}],
    ),
    "rwkv": (
        _own("Rwkv", hidden_size=WIDTH, attention_hidden_size=WIDTH, num_hidden_layers=2, context_length=64),
        "rwkv.ln_out",
        [],
    ),
}
EXPERTS = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"]

_built: dict[str, nn.Module] = {}


def build(family: str) -> nn.Module:
    """The tiny random model of a family in evaluation mode, with weights that make layers and experts differ."""
    if family not in _built:
        torch.manual_seed(0)
        model = FAMILIES[family][0]().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
        _built[family] = model
    return _built[family]


def tokens(seed: int = 1, batch: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's own hidden state after the last block: what its next module receives."""
    return model(ids, use_cache=False).logits


def leaving(model: nn.Module, after: str, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(after).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    run(model, ids)
    hook.remove()
    assert len(seen) == 1
    return seen[0]


def block_views(model: nn.Module, name: str) -> list[View]:
    return [view for view in find_layers(model) if view.name.startswith(f"{name}.")]


def seen_views(model: nn.Module, name: str) -> list[View]:
    return observable(model, block_views(model, name))


def watch_chain(model: nn.Module, ids: Tensor, *, gram: bool = True) -> tuple[Tensor, dict[str, Any]]:
    names = find_blocks(model)
    hidden, arguments = capture(model, names, ids)
    inputs: dict[str, Any] = {}
    for name in names:
        block = model.get_submodule(name)
        with observe(block, seen_views(model, name), gram=gram) as seen:
            hidden = run_block(block, hidden, arguments[name])
        inputs.update(seen)
    return hidden, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_reproduce_the_model(family: str) -> None:
    model, after = build(family), FAMILIES[family][1]
    names = find_blocks(model)
    assert len(names) == model.config.num_hidden_layers
    assert [name.rpartition(".")[2] for name in names] == [str(i) for i in range(len(names))]
    hidden, arguments = capture(model, names, tokens())
    for name in names:
        given = (*arguments[name].args, *arguments[name].kwargs.values())
        assert not any(isinstance(each, tf.Cache) for each in given)
        hidden = run_block(model.get_submodule(name), hidden, arguments[name])
    torch.testing.assert_close(hidden, leaving(model, after, tokens()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_needs_no_block_weights(family: str) -> None:
    model = build(family)
    names = find_blocks(model)
    meta = copy.deepcopy(model)
    for name in names:
        meta.get_submodule(name).to("meta")
    hidden, arguments = capture(meta, find_blocks(meta), tokens())
    for name in names:
        hidden = run_block(model.get_submodule(name), hidden, arguments[name])
    torch.testing.assert_close(hidden, leaving(model, FAMILIES[family][1], tokens()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_a_block_leave_embeddings_head_and_routers(family: str) -> None:
    model = build(family)
    name = find_blocks(model)[0]
    block = model.get_submodule(name)
    views = find_layers(block, prefix=name)
    assert views == block_views(model, name)
    parameters = dict(model.named_parameters())
    pruned = {view.parameter for view in views}
    matrices = {f"{name}.{key}" for key, parameter in block.named_parameters() if parameter.ndim > 1}
    left = {key.removeprefix(f"{name}.") for key in matrices - pruned}
    routers = {"mlp.gate.weight", "mlp.router.weight", "mlp.shared_expert_gate.weight"}
    biases = {"mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"}
    gates = {
        f"temporal_block.rg_lru.{each}_gate_{part}" for each in ("input", "recurrent") for part in ("weight", "bias")
    }
    gates |= {key for key in left if key.endswith(("conv1d.weight", "conv_1d.weight"))}  # depthwise
    mixes = {key for key in left if ".time_mix_" in key}  # (1, 1, width) of RWKV
    assert left <= routers | biases | gates | mixes, left
    assert not any(view.name.startswith(("lm_head", "model.embed")) for view in find_layers(model))
    for view in views:
        matrix = view.matrix(parameters[view.parameter])
        assert tuple(matrix.shape) == view.shape
        assert matrix.untyped_storage().data_ptr() == parameters[view.parameter].untyped_storage().data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_observed_inputs_of_modules(family: str) -> None:
    model = build(family)
    expected: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: expected.setdefault(name, []).append(args[0].clone())

    views = [view for name in find_blocks(model) for view in seen_views(model, name)]
    hooks = [
        model.get_submodule(view.name).register_forward_pre_hook(keep(view.name))
        for view in views
        if view.index is None
    ]
    run(model, tokens())
    for hook in hooks:
        hook.remove()
    _, inputs = watch_chain(model, tokens())
    assert set(inputs) == {view.name for view in views}
    assert len(expected) == len(hooks) > 0
    for name, seen in expected.items():
        x = torch.cat([each.flatten(0, -2) for each in seen]).double()
        gram = x.T @ x
        assert inputs[name].tokens == len(x) == 2 * LENGTH
        torch.testing.assert_close(inputs[name].squares.double(), gram.diagonal(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            inputs[name].gram.double(), gram, rtol=1e-5, atol=1e-5 * gram.diagonal().max().item()
        )


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row[2]])
def test_layers_of_one_input_share_its_sums(family: str) -> None:
    model = build(family)
    _, inputs = watch_chain(model, tokens(), gram=False)
    first = find_blocks(model)[0]
    by_sums: dict[int, set[str]] = {}
    for name, each in inputs.items():
        if name.startswith(f"{first}."):
            by_sums.setdefault(id(each), set()).add(name.rpartition(".")[2])
    groups = [group for group in by_sums.values() if len(group) > 1]
    for group in FAMILIES[family][2]:
        assert group in groups


def expert_rows(family: str, experts: nn.Module, args: tuple[Tensor, ...]) -> dict[str, list[Tensor]]:
    """What each expert receives, computed from the routing: rows of the hidden state, and its gated products."""
    hidden, chosen = args[0], args[1]
    rows: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
    for expert in range(experts.gate_up_proj.shape[0]):
        x = hidden[(chosen == expert).any(-1)].double()
        weight = experts.gate_up_proj[expert].double()
        if family == "gpt-oss":
            inner = experts._apply_gate(x @ weight + experts.gate_up_proj_bias[expert].double())
        else:
            gate, up = (x @ weight.T).chunk(2, -1)
            inner = nn.functional.silu(gate) * up
        rows["gate_up_proj"].append(x)
        rows["down_proj"].append(inner)
    return rows


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", EXPERTS)
def test_observed_inputs_of_experts(family: str, implementation: str) -> None:
    model = build(family)
    model.set_experts_implementation(implementation)
    calls: dict[str, tuple[Tensor, ...]] = {}
    modules = {name: module for name, module in model.named_modules() if name.endswith(".experts")}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: calls.update({name: (*args, *kwargs.values())})

    ids = tokens(batch=1)[:, :3]  # three tokens of two experts each: some of the eight see none
    hooks = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    run(model, ids)
    for hook in hooks:
        hook.remove()
    _, inputs = watch_chain(model, ids)
    assert model.config._experts_implementation == implementation
    unseen = 0
    for name, module in modules.items():
        for parameter, rows in expert_rows(family, module, calls[name]).items():
            for expert, x in enumerate(rows):
                got = inputs[f"{name}.{parameter}[{expert}]"]
                assert got.tokens == len(x)
                torch.testing.assert_close(
                    got.gram.double(), x.T @ x, rtol=1e-4, atol=1e-5 * (1 + x.abs().max().item() ** 2 if len(x) else 1)
                )
                unseen += got.tokens == 0
    assert 0 < unseen < len(inputs)


@pytest.mark.parametrize("family", EXPERTS)
def test_every_expert_is_a_matrix_of_its_own(family: str) -> None:
    model = build(family)
    names = {view.name: view for view in find_layers(model)}
    stacks = [name for name in names if ".experts." in name]
    assert len(stacks) == 2 * 2 * 8
    up = names["model.layers.0.mlp.experts.gate_up_proj[5]"]
    down = names["model.layers.0.mlp.experts.down_proj[5]"]
    assert up.shape[1] == down.shape[0] == WIDTH
    assert up.shape[0] == 2 * down.shape[1]
    assert up.transposed == (family == "gpt-oss")


def test_windows_give_blocks_different_arguments() -> None:
    model = build("gemma3")
    _, arguments = capture(model, find_blocks(model), tokens())
    first, second, third = arguments.values()
    assert not same(first.kwargs, second.kwargs)
    assert same(first.kwargs, third.kwargs)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two blocks were given equal tensors under every keyword, rotary pairs included."""

    def flat(value: Any) -> list[Tensor]:
        return (
            [value]
            if isinstance(value, Tensor)
            else [y for x in value for y in flat(x)]
            if isinstance(value, tuple)
            else []
        )

    pairs = [(flat(one[key]), flat(other[key])) for key in one]
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in pairs)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_observing_adds_over_forwards(family: str) -> None:
    model = build(family)
    name = find_blocks(model)[0]
    block, views = model.get_submodule(name), block_views(model, name)

    def watched(*batches: Tensor) -> dict[str, Any]:
        with observe(block, views, gram=True) as inputs:
            for ids in batches:
                hidden, arguments = capture(model, [name], ids)
                run_block(block, hidden, arguments[name])
        return inputs

    one, two = tokens(1, 1)[:, :4], tokens(2, 3)
    both, first, second = watched(one, two), watched(one), watched(two)
    for key, total in both.items():
        assert total.tokens == first[key].tokens + second[key].tokens
        torch.testing.assert_close(total.gram, first[key].gram + second[key].gram, rtol=1e-4, atol=1e-3)
    assert both[f"{name}.self_attn.q_proj"] is both[f"{name}.self_attn.v_proj"]


def test_a_head_larger_than_the_blocks_does_not_hide_them() -> None:
    model = _normal("Llama", vocab_size=1024)()
    assert find_blocks(model) == ["model.layers.0", "model.layers.1"]


def test_an_encoder_decoder_is_refused() -> None:
    config = tf.T5Config(vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match=r"looked for one nn.ModuleList.*encoder.block.*Found: 'decoder.block'"):
        find_blocks(tf.T5ForConditionalGeneration(config))


def test_a_plain_sequential_is_refused() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    with pytest.raises(ValueError, match=r"blocks of Sequential: looked for one nn.ModuleList.*Found: no such list"):
        find_blocks(model)


def test_a_report_says_how_many_tokens_each_expert_saw() -> None:
    model = copy.deepcopy(build("qwen3-moe"))
    (first, *_) = stream(model, wanda, None, 0.5, tokens=tokens()).reports
    assert set(first.routed) == {f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")}
    assert all(len(seen) == 8 and sum(seen) == 2 * tokens().numel() for seen in first.routed.values())
    assert len(first.fallback) == sum(seen.count(0) for seen in first.routed.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["JetMoeConfig", "Gemma3nTextConfig"])
def test_a_family_goes_the_whole_way(name: str) -> None:
    """Of `python -m tests.families`, which tries all: experts told by probes, shared keys."""
    row = try_(name)
    assert (row.get("result"), row.get("streamed")) == ("works", "works"), row
