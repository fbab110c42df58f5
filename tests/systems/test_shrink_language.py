"""Language models that are smaller: equal to the masked ones, fitted by least squares, saved as ordinary folders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from prunus.data import ASSETS
from prunus.language.single import compress
from prunus.layers import Inputs, Layer
from prunus.machine import hooked
from prunus.measure import perplexity
from prunus.patterns import Unstructured
from prunus.recipe import LanguageRecipe, parse
from prunus.save import save_model
from prunus.shrink import (
    check_shares,
    choose_blocks,
    columns,
    expert_saliency,
    narrowed,
    needed_words,
    remove_blocks,
    remove_experts,
    remove_heads,
    remove_neurons,
    remove_width,
    trim_tokenizer,
    trim_vocabulary,
)

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2, **SMALL}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, **SMALL}
GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GATED, head_dim=16, layer_types=["full_attention"] * 3)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GATED)),
    "phi3, a key for each head": lambda: Phi3ForCausalLM(
        Phi3Config(**{**GATED, "num_key_value_heads": 4}, pad_token_id=0)
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**GATED, pad_token_id=0)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**GATED, num_local_experts=6, num_experts_per_tok=2)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**GATED, head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48)
    ),
    "glm4_moe": lambda: Glm4MoeForCausalLM(Glm4MoeConfig(**GATED, head_dim=8, **GROUPS)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**GATED, num_experts=6, num_experts_per_tok=2, pad_token_id=0)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**GATED, head_dim=8, num_local_experts=6, num_experts_per_tok=2)),
}  # fmt: skip


def made(family: str):
    torch.manual_seed(0)
    model = MAKERS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 60, (6, 20), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, tokens: torch.Tensor):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "opt", "gpt2"])
def test_neurons_go_and_the_model_is_the_masked_one(family: str, tokens: torch.Tensor, tmp_path):
    model = made(family)
    size = model.config.to_dict().get("intermediate_size") or model.config.to_dict().get("ffn_dim") or 128
    before = sum(each.numel() for each in model.parameters())
    small = remove_neurons(model, tokens, 0.25)
    assert size * 3 // 4 in small.config.to_dict().values()
    assert sum(each.numel() for each in small.parameters()) < 0.93 * before
    assert torch.allclose(logits(small, tokens), logits(model, tokens), atol=1e-4, rtol=1e-4)  # used up: masked
    save_model(small, None, tmp_path / "out", masks=None, info={})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, tokens), logits(small, tokens))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_heads_go_by_the_groups_that_share_a_key(family: str, tokens: torch.Tensor, tmp_path):
    model = made(family)
    size = getattr(model.config, "head_dim", None) or 8
    small = remove_heads(model, tokens, 0.5)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (2, 1, size)
    assert torch.allclose(logits(small, tokens), logits(model, tokens), atol=1e-4, rtol=1e-4)
    small = remove_neurons(small, tokens, 0.5)
    save_model(small, None, tmp_path / "out", masks=None, info={})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens), logits(small, tokens))


def test_a_share_by_which_no_group_of_heads_goes_is_refused(tokens: torch.Tensor) -> None:
    model = made("llama")
    with pytest.raises(
        ValueError, match=r"shrink\.heads: of 2 groups .* a share of 0\.2 removes none; one of them is 0\.5"
    ):
        remove_heads(model, tokens, 0.2)
    with pytest.raises(ValueError, match=r"of 1 groups .* removes none; leave it out"):
        remove_heads(remove_heads(model, tokens, 0.5), tokens, 0.5)
    assert remove_heads(model, tokens, 0.0) is model


@pytest.mark.parametrize(
    ("family", "remove", "said"),
    [
        ("llama", remove_neurons, r"shrink\.neurons: of 48 neurons of an MLP, .* removes none; one of them is 0\.0208"),
        ("llama", remove_width, r"shrink\.width: of 32 entries of the hidden states, .* one of them is 0\.0312"),
        ("glm4_moe", remove_experts, r"shrink\.experts: of 8 experts of a block, .* one of them is 0\.125"),
    ],
)
def test_a_share_by_which_nothing_goes_is_refused(family: str, remove, said: str, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=said):
        remove(made(family), tokens, 1e-3)


def test_shares_by_which_nothing_goes_are_refused_by_sizes_alone() -> None:
    for shares in ({"width": 1e-3}, {"neurons": 1e-3}):
        with pytest.raises(ValueError, match=r"a share of 0\.001 removes none"):
            narrowed(made("llama"), **shares)
    for model, shares in ((made("llama"), {"width": 1e-3}), (made("glm4_moe"), {"experts": 1e-3})):
        with pytest.raises(ValueError, match=r"a share of 0\.001 removes none"):
            check_shares(model, **shares)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_heads_that_change_no_size_are_refused_by_the_config_alone(family: str) -> None:
    with pytest.raises(ValueError, match=r"shrink\.heads: .* has matrices of one size"):
        check_shares(made(family), heads=0.5)


def can(call, *args: Any, **options: Any) -> bool:
    try:
        call(*args, **options)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("key", ["heads", "neurons", "width"])
def test_what_cannot_go_is_refused_by_the_sizes_alone(family: str, key: str, tokens: torch.Tensor) -> None:
    """As the work itself would, but for what only the outputs show: norms over heads, sinks, MLPs of several sizes."""
    remove = {"heads": remove_heads, "neurons": remove_neurons, "width": remove_width}[key]
    asked = can(check_shares, made(family), **{key: 0.5})
    if (family, key) in {("olmoe", "heads"), ("gpt_oss", "heads"), ("glm4_moe", "neurons")}:
        assert asked
    else:
        assert asked == can(remove, made(family), tokens, 0.5)
    assert asked == can(narrowed, made(family), **{key: 0.5}) or not asked


def test_sizes_that_a_config_refuses_are_refused_before_anything_runs() -> None:
    """LlamaConfig wants a hidden size that is a multiple of its heads, those that are left."""
    model = LlamaForCausalLM(LlamaConfig(**{**GATED, "num_key_value_heads": 4}))
    with pytest.raises(ValueError, match=r"shrink.heads: 3 of 4 would be left, .*\(3\)\); a share of 0.5 leaves 2"):
        check_shares(model, heads=0.25)
    with pytest.raises(
        ValueError, match=r"shrink.width: 26 of 32 would be left, .*\(3\)\); a share of 0.1562 leaves 27"
    ):
        check_shares(model, heads=0.25, width=0.2)
    check_shares(model, heads=0.25, width=0.25)


@pytest.mark.parametrize("family", ["opt", "gpt2", "phi3", "olmoe"])
def test_heads_that_a_config_cannot_say_are_refused(family: str, tokens: torch.Tensor):
    with pytest.raises(ValueError, match=r"shrink"):
        remove_heads(made(family), tokens, 0.5)


def seen_by_experts(model: nn.Module, tokens: torch.Tensor):
    """Of each block: what its experts receive, which are chosen, by what gates."""
    found: list[tuple[torch.Tensor, ...]] = []
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    hooks = [each.register_forward_pre_hook(lambda _, args: found.append(args)) for each in experts]
    logits(model, tokens)
    for hook in hooks:
        hook.remove()
    return list(zip(experts, found, strict=True))


@torch.no_grad()
def test_experts_are_worth_what_they_add_to_their_tokens(tokens: torch.Tensor):
    model = made("mixtral")
    saliency = expert_saliency(model, tokens, batch_size=4)
    for (experts, (x, index, gates)), found in zip(seen_by_experts(model, tokens), saliency.values(), strict=True):
        for expert in range(6):
            gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
            norms = ((F.silu(gate) * up) @ experts.down_proj[expert].T).norm(dim=1)
            own = [gates[t, s] * norms[t] for t in range(len(x)) for s in range(2) if index[t, s] == expert]
            assert float(found[expert]) == pytest.approx(float(sum(own)) / max(1, len(own)), rel=1e-4, abs=1e-9)


class Never(TorchFunctionMode):
    """Routers give the experts that are gone no chance."""

    def __init__(self, gone: dict[int, list[int]]) -> None:
        super().__init__()
        self.gone = gone

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.linear and id(args[1]) in self.gone:
            out[..., self.gone[id(args[1])]] = -torch.inf
        return out


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_go_and_the_model_is_the_one_whose_router_never_chooses_them(family: str, tokens, tmp_path):
    model = made(family)
    small = remove_experts(model, tokens, 0.5)
    assert small.config.num_local_experts == 3
    routers = {
        id(module.get_parameter("weight")): saliency.topk(3, largest=False).indices.tolist()
        for (_, module), saliency in zip(
            ((n, m) for n, m in model.named_modules() if n.endswith((".gate", ".router"))),
            expert_saliency(model, tokens).values(),
            strict=True,
        )
    }
    with Never(routers):
        expected = logits(model, tokens)
    assert torch.allclose(logits(small, tokens), expected, atol=1e-4, rtol=1e-4)
    save_model(small, None, tmp_path / "out", masks=None, info={})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens), logits(small, tokens))
    with pytest.raises(ValueError, match="1 of 6 experts would be left, and a token goes to 2"):
        remove_experts(model, tokens, 0.8)


def test_as_many_experts_go_of_every_group_of_a_router(tokens: torch.Tensor):
    model = made("glm4_moe")
    routers: dict[int, list[int]] = {}
    for name, saliency in expert_saliency(model, tokens).items():
        router = model.get_submodule(name.replace("experts", "gate")).get_parameter("weight")
        routers[id(router)] = [4 * group + int(saliency[4 * group :][:4].argmin()) for group in range(2)]
    small = remove_experts(model, tokens, 0.25)
    with Never(routers):
        expected = logits(model, tokens)
    assert torch.allclose(logits(small, tokens), expected, atol=1e-4, rtol=1e-4)
    for share, left in ((0.375, 5), (0.75, 2)):  # neither alike nor two of each
        with pytest.raises(ValueError, match=rf"{left} of 8 experts .* 1 of 2 groups .* multiple of 2, 4 at least"):
            check_shares(model, experts=share)


def test_models_without_experts_lose_none(tokens: torch.Tensor):
    with pytest.raises(ValueError, match="no stacked experts"):
        remove_experts(made("llama"), tokens, 0.5)


def inputs_of(model: nn.Module, name: str, tokens: torch.Tensor):
    """What a module receives, (tokens, size) float64."""
    found: list[torch.Tensor] = []
    with hooked([(model.get_submodule(name), lambda _, args: found.append(args[0]))]):
        logits(model, tokens)
    return found[0].flatten(0, 1).double()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_hidden_states_lose_entries_everywhere_and_what_reads_them_is_fitted(family: str, tokens, tmp_path):
    model = made(family)
    small = remove_width(model, tokens, 0.25, batch_size=4)
    assert (small.config.hidden_size, small.get_input_embeddings().weight.shape[1]) == (24, 24)
    left = (small.get_input_embeddings().weight[5][:, None] == model.get_input_embeddings().weight[5]).any(0)
    assert torch.equal(small.get_input_embeddings().weight, model.get_input_embeddings().weight[:, left])
    for block, name in ((0, "self_attn.v_proj"), (2, "mlp.up_proj")):
        name = f"model.layers.{block}.{name}"
        entering = inputs_of(model, f"model.layers.{block}", tokens).view(6, 20, 32).float()[..., left]
        with hooked([(small.get_submodule(f"model.layers.{block}"), lambda _, args, x=entering: (x, *args[1:]))]):
            a, b = inputs_of(small, name, tokens), inputs_of(model, name, tokens)
        dense = model.get_submodule(name).weight.detach().double()
        ridge = (0.01 * a.square().sum(0).mean()).sqrt() * torch.eye(24, dtype=torch.float64)
        rows, targets = torch.cat([a, ridge]), torch.cat([b @ dense.T, ridge @ dense[:, left].T])
        expected = torch.linalg.lstsq(rows, targets).solution.T
        assert torch.allclose(small.get_submodule(name).weight.double(), expected, atol=1e-4)
        assert not torch.allclose(expected, dense[:, left], atol=1e-2)
    save_model(small, None, tmp_path / "out", masks=None, info={})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens), logits(small, tokens))


def test_entries_of_hidden_states_that_do_nothing_go_without_a_trace(tokens: torch.Tensor):
    model = made("llama")
    idle = [1, 5, 6, 17, 20, 21, 30, 31]
    with torch.no_grad():  # nothing reads them, and nobody makes them
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                module.weight[:, idle] = 0
            if name.endswith(("o_proj", "down_proj")):
                module.weight[idle] = 0
        model.get_input_embeddings().weight[:, idle] = 0
    expected = logits(model, tokens)
    assert torch.allclose(logits(remove_width(model, tokens, 0.25), tokens), expected, atol=1e-4, rtol=1e-4)


def test_hidden_states_that_are_counted_elsewhere_stay(tokens: torch.Tensor) -> None:
    """Gemma multiplies embeddings by the root of the hidden size; what is to be left out is the width."""
    model = Gemma3ForCausalLM(Gemma3TextConfig(**GATED, head_dim=8, sliding_window=16))
    with pytest.raises(ValueError, match=r"shrink.width: .* counted, elsewhere. Leave it out"):
        remove_width(model, tokens, 0.25)


@pytest.mark.parametrize("family", ["opt", "gpt2", "phi3"])
def test_hidden_states_behind_a_layer_norm_or_heads_of_no_size_stay(family: str, tokens: torch.Tensor):
    with pytest.raises(ValueError, match=r"shrink"):
        remove_width(made(family), tokens, 0.25)


def layer(rows: int, size: int, seen: int = 40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(seen, size, generator=generator) @ torch.randn(size, size, generator=generator)
    inputs = Inputs(size, gram=True)
    inputs.add_(x)
    return Layer("fc", torch.randn(rows, size, generator=generator), inputs), x.double()


@pytest.mark.parametrize("width", [1, 3])
def test_what_stays_solves_the_least_squares_problem(width: int):
    each, x = layer(5, 12)
    weight, mask = columns(width, damping=0.0).solve(each, Unstructured("layer"), 5 * 6)
    stays = mask.any(0)
    assert mask.all(0).equal(stays)
    assert stays.sum() == 6
    assert stays.view(-1, width).all(1).sum() * width == 6
    expected = torch.linalg.lstsq(x[:, stays], x @ each.weight.T.double()).solution.T
    assert torch.allclose(weight[:, stays].double(), expected, atol=1e-3)
    assert not weight[:, ~stays].any()


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_inputs_that_were_always_zero_leave_columns_as_they_are(scale: float):
    inputs = Inputs(4, gram=True)
    inputs.add_(scale * torch.ones(3, 4))
    weight, mask = columns().solve(Layer("fc", torch.ones(2, 4), inputs), Unstructured("layer"), 4)
    assert weight.equal(mask.float())


def test_columns_go_one_after_another_with_the_least_damage():
    """Against the errors of least squares problems, solved anew for every column that might go."""
    each, x = layer(4, 9)
    stays = columns(damping=0.0).solve(each, Unstructured("layer"), 4 * 5)[1].any(0)
    left = list(range(9))

    def error(kept: list[int]) -> float:
        target = x @ each.weight.T.double()
        found = torch.linalg.lstsq(x[:, kept], target).solution
        return float((x[:, kept] @ found - target).square().sum())

    for _ in range(4):
        left.remove(min(left, key=lambda gone: error([k for k in left if k != gone])))
    assert stays.nonzero()[:, 0].tolist() == left


def test_the_blocks_that_go_are_those_that_brute_force_finds(tokens: torch.Tensor):
    model = made("qwen3")
    dense = logits(model, tokens).log_softmax(-1)

    def divergence(gone: list[int]) -> float:
        found = logits(remove_blocks(copy.deepcopy(model), gone), tokens).log_softmax(-1)
        return float((dense.exp() * (dense - found)).sum())

    first = min(range(3), key=lambda index: divergence([index]))
    second = min(set(range(3)) - {first}, key=lambda index: divergence([first, index]))
    for batch_size in (2, 6):
        assert choose_blocks(model, tokens, 1, batch_size=batch_size) == [first]
        assert choose_blocks(model, tokens, 2, batch_size=batch_size) == sorted([first, second])
    assert torch.equal(logits(model, tokens).log_softmax(-1), dense)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt"])
def test_blocks_go_and_the_config_follows(family: str, tokens: torch.Tensor, tmp_path):
    model = made(family)
    small = remove_blocks(model, [1])
    assert small.config.num_hidden_layers == 2
    assert len(getattr(small.config, "layer_types", None) or [0, 0]) == 2
    save_model(small, None, tmp_path / "out", masks=None, info={})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, tokens), logits(small, tokens))
    with torch.no_grad():
        cached = again.generate(tokens[:1], max_new_tokens=4, do_sample=False)
    assert cached.shape == (1, 24)


def test_blocks_that_go_by_their_number_are_refused():
    """Moved up, they would divide by another number: not the model that was measured without the block."""
    sizes = {"vocab_size": 60, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True, bos_token_id=0, eos_token_id=1))
    for parameter in model.parameters():
        parameter.data.mul_(10)
    with pytest.raises(ValueError, match=r"shrink\.blocks: .* GPT2LMHeadModel .* another place"):
        remove_blocks(model, [0])
    assert remove_blocks(model, [2]).config.num_hidden_layers == 2


def test_counts_that_leave_nothing_are_refused(tokens: torch.Tensor):
    with pytest.raises(ValueError, match="at most 2"):
        choose_blocks(made("llama"), tokens, 3)
    with pytest.raises(ValueError, match="cannot go of 3 blocks"):
        remove_blocks(made("llama"), [3])


@pytest.fixture(scope="module")
def words():
    return AutoTokenizer.from_pretrained(ASSETS)


TEXT = "It was the best of times, it was the worst of times. Æsop said: nothing! 你好</s>"


def test_a_text_whose_words_stay_is_cut_and_understood_alike(words, tmp_path):
    """Special tokens, bytes and what words are merged of stay; ids in the config follow."""
    torch.manual_seed(0)
    config = OPTConfig(**{**OPT, "vocab_size": 4200}, pad_token_id=0, eos_token_id=1)  # some rows without a word
    model = OPTForCausalLM(config).eval()
    ids = torch.tensor(words(TEXT)["input_ids"])
    kept = needed_words(words, ids)
    assert len(ids.unique()) < len(kept) < 500
    tokenizer, small = trim_tokenizer(words, kept), trim_vocabulary(model, kept)
    new = torch.tensor(tokenizer(TEXT)["input_ids"])
    assert torch.equal(kept[new], ids)
    assert tokenizer.decode(new) == words.decode(ids)
    other = "Quixotic zebras vex 世界"
    assert tokenizer.decode(tokenizer(other)["input_ids"]) == other
    assert torch.allclose(logits(small, new[None]), logits(model, ids[None])[..., kept], atol=1e-5)
    assert (small.config.vocab_size, small.config.eos_token_id) == (len(kept), tokenizer.eos_token_id)
    save_model(small, tokenizer, tmp_path / "out", masks=None, info={})
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == new.tolist()
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), new[None]), logits(small, new[None])
    )


def test_tokenizers_of_likely_words_are_cut_too():
    pieces = [
        ("<unk>", 0.0),
        *((chr(97 + place), -9.0) for place in range(26)),
        ("▁", -3.0),
        ("▁ab", -1.0),
        ("cd", -2.0),
    ]
    model = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    ids = torch.tensor(tokenizer("ab cd x?")["input_ids"])
    kept = needed_words(tokenizer, ids[ids != 29])
    small = trim_tokenizer(tokenizer, kept)
    assert [int(kept[index]) for index in small("ab x?")["input_ids"]] == tokenizer("ab x?")["input_ids"]
    assert small.convert_ids_to_tokens(small("cd")["input_ids"]) == ["▁", "c", "d"]


def test_other_tokenizers_are_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="this is WordLevel"):
        needed_words(tokenizer, torch.tensor([0]))


RETRAIN = {"train": ["full"], "steps": 2, "batch_size": 2, "length": 32, "lr": 1e-3, "distill": {"weight": 0.5}}


def test_a_run_makes_the_model_smaller_and_retrains_it(tmp_path):
    """Heads, neurons, a block and words; taught by the dense model of the same words, in whose tokens texts count."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**GATED, "vocab_size": 4096})).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(ASSETS).save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT * 40)
    (tmp_path / "other.txt").write_text("She wondered whether the harbour was frozen. " * 40)
    text, other = (str(tmp_path / f"{name}.txt") for name in ("text", "other"))
    raw = {
        "model": str(tmp_path / "dense"),
        "device": "cpu",
        "shrink": {"blocks": 1, "heads": 0.5, "neurons": 0.25, "vocabulary": text},
        "calibrate": {"data": text, "samples": 4, "length": 32},
        "retrain": {**RETRAIN, "data": text},
        "evaluate": {"data": {"text": text, "other": other}, "window": 32},
        "out": str(tmp_path / "run"),
        "soup": {"members": 2, "baselines": []},
    }  # fmt: skip
    asked = parse(raw, LanguageRecipe, "test")
    assert asked.prune.sparsity == 0
    result = compress(asked)
    assert list(result["perplexity"])[:3] == ["dense", "shrunk", "pruned"]
    assert result["perplexity"]["pruned"] == result["perplexity"]["shrunk"]
    assert result["shrink"]["tokens"]["text"] == 1.0
    longer = result["shrink"]["tokens"]["other"]
    assert longer > 2
    left, dense = result["shrink"]["parameters"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")(
        (tmp_path / "other.txt").read_text(), return_tensors="pt"
    ).input_ids[0]
    own = perplexity(saved, ids, window=32, batch_size=8) ** longer
    assert result["perplexity"]["soup"]["other"] == pytest.approx(own, rel=1e-3)
    assert sum(each.numel() for each in saved.parameters()) == left < 0.7 * dense
    assert (saved.config.num_hidden_layers, saved.config.intermediate_size, saved.config.num_key_value_heads) == (
        2,
        36,
        1,
    )
    assert not (tmp_path / "run" / "model" / "masks.safetensors").exists()  # nothing is pruned
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "model")) == saved.config.vocab_size


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shrink": {}}, "say what goes"),
        ({"shrink": {"blocks": 1}, "streaming": True}, "leave out streaming"),
        ({"shrink": {"neurons": 1.0}}, "less than 1"),
    ],
)
def test_recipes_that_cannot_be_are_refused(changes, said: str):
    with pytest.raises(ValueError, match=said):
        parse(changes, LanguageRecipe, "test")
