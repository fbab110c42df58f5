"""Removed filters: the smaller network is the masked one to rounding, whatever the layers; counts, ties, what stays."""

import copy
import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from prunus.data.models import build_model
from prunus.shrink import filters as shrink
from prunus.shrink.filters import (
    Channels,
    choose_filters,
    filter_norms,
    filter_taylor,
    find_channels,
    remove_filters,
    resized,
)
from prunus.shrink.lowrank import decompose, ranks_by_share
from prunus.train.batchnorm import recalibrate_


class Parts(nn.Module):
    """Grouped, dilated, depthwise and ordinary convolutions, a concatenation, a flattening, two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.grouped_bn = nn.Conv2d(8, 16, 3, padding=1, groups=4), nn.BatchNorm2d(16)
        self.dilated = nn.Conv2d(16, 12, 3, padding=2, dilation=2, groups=2, bias=False)
        self.depthwise, self.depthwise_bn = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12, affine=False)
        self.left, self.right = nn.Conv2d(12, 5, 1), nn.Conv2d(12, 7, 3, stride=2, padding=1)
        self.down = nn.Conv2d(5, 6, 2, stride=2)
        self.joined_bn = nn.BatchNorm2d(13)
        self.hidden, self.head = nn.Linear(13 * 9, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = torch.relu(self.stem_bn(self.stem(x)))
        x = torch.relu(self.grouped_bn(self.grouped(x)))
        x = nn.functional.silu(self.depthwise_bn(self.depthwise(self.dilated(x))))
        x = torch.cat([self.down(torch.relu(self.left(x))), self.right(x)], 1)
        x = nn.functional.max_pool2d(torch.relu(self.joined_bn(x)), 1).flatten(1)
        return self.head(torch.tanh(self.hidden(x)))


def unsettled(model, seed=0):
    """The model with BatchNorms that are not at their start, in eval mode, float64."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                with torch.no_grad():
                    module.weight.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                    module.bias.copy_(torch.randn(module.num_features, generator=generator))
    return model.double().eval()


def made(name):
    torch.manual_seed(0)
    if name == "parts":
        return unsettled(Parts()), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    return unsettled(build_model(name, classes=10)), torch.randn(3, 3, 32, 32, dtype=torch.float64)


class Fused(nn.Module):
    """Attention as timm has it: one matrix makes queries, keys and values."""

    def __init__(self, dim=24, num_heads=3):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = num_heads, dim // num_heads, dim
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, self.attn_dim))


class Patches(nn.Module):
    """A vision transformer of one block, in timm's manner."""

    def __init__(self):
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 24, 4, stride=4), Fused()
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.fc1, self.fc2, self.head = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm1(x))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def transformer(kind):
    torch.manual_seed(0)
    words = {"vocab_size": 50, "max_position_embeddings": 32, **TRANSFORMER}
    makers = {
        "timm": Patches,
        "vit": lambda: ViTForImageClassification(
            ViTConfig(intermediate_size=40, image_size=16, patch_size=4, **TRANSFORMER)
        ),
        "bert": lambda: BertForSequenceClassification(BertConfig(intermediate_size=40, **words)),
        "opt": lambda: OPTForCausalLM(OPTConfig(ffn_dim=40, word_embed_proj_dim=32, **words)),
    }
    model = makers[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    ids = kind in ("bert", "opt")
    return model, torch.randint(0, 50, (2, 9)) if ids else torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("kind", ["timm", "vit", "bert", "opt"])
def test_heads_and_neurons_of_transformers_go_whole(kind):
    model, x = transformer(kind)
    channels = find_channels(model, x)
    heads = [each for each in channels if each.heads]
    assert [(each.heads, each.parts) for each in heads] == [(3, 3) if kind == "timm" else (4, 1)]
    gone = choose_filters(filter_norms(model, channels), channels, 0.5)
    assert any(len(each) == 20 for each in gone.values())  # neurons
    size, stays = 8, 1 if kind == "timm" else 2
    head = gone[heads[0].name].view(heads[0].parts, -1, size)
    assert head.shape[1] == heads[0].heads - stays
    assert torch.equal(head, head[:, :, :1] + torch.arange(size))
    small = remove_filters(model, x, gone)

    def masked():  # by hand: every output of a head that is gone is zero
        copied = copy.deepcopy(model)
        for each in channels:
            for layer in each.layers if each.name in gone else ():
                copied.get_submodule(layer).weight.data[gone[each.name]] = 0
                copied.get_submodule(layer).bias.data[gone[each.name]] = 0
        return copied

    outputs = [each(x) for each in (small, masked(), resized(model, small.state_dict()))]
    one, other, again = [each if isinstance(each, torch.Tensor) else each.logits for each in outputs]
    assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
    assert torch.equal(again, one)
    with pytest.raises(ValueError, match="by whole heads"):
        remove_filters(model, x, {heads[0].name: torch.tensor([0])})


def test_taylor_scores_are_what_the_loss_loses_to_first_order():
    model, x = transformer("timm")
    model = model.double()
    channels = [each for each in find_channels(model, x) if each.name == "fc1"]

    def loss(network, batch):
        return network(batch).square().mean()

    found = filter_taylor(model, channels, [x[:1].double(), x[1:].double()], loss)["fc1"]
    expected = torch.zeros(40)
    for batch in (x[:1].double(), x[1:].double()):
        for row in range(40):  # a central difference along the channel's own weights
            both = []
            for step in (1e-4, -1e-4):
                moved = copy.deepcopy(model)
                moved.fc1.weight.data[row] *= 1 + step
                moved.fc1.bias.data[row] *= 1 + step
                both.append(loss(moved, batch).detach())
            expected[row] += ((both[0] - both[1]) / 2e-4).abs() / 2
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="no batch"):
        filter_taylor(model, channels, [], loss)


def test_taylor_scores_change_no_statistics():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = copy.deepcopy(model.state_dict())
    channels = find_channels(model, torch.ones(1, 3))
    filter_taylor(model, channels, [torch.arange(6.0).view(2, 3)], lambda network, x: network(x).square().mean())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def random_choice(model, x, sparsity, seed=0):
    channels = find_channels(model, x[:1])
    generator = torch.Generator().manual_seed(seed)
    scores = {each.name: torch.rand(each.size, generator=generator) for each in channels}
    return choose_filters(scores, channels, sparsity)


def apart(one, other):
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def masked_filters(model, x, gone):
    """A copy of the model's own size, in which the channels that `gone` names are zero."""
    with torch.no_grad():
        return shrink._masked(model, shrink._Graph(model, x).cuts(gone))


@pytest.mark.parametrize("name", ["parts", "resnet8", "resnet20", "resnet18", "vgg16_bn", "wrn10_1"])
def test_the_smaller_network_is_the_masked_one(name):
    model, x = made(name)
    before = copy.deepcopy(model.state_dict())
    gone = random_choice(model, x, 0.5)
    small, masked = remove_filters(model, x[:1], gone), masked_filters(model, x[:1], gone)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    assert apart(small(x), masked(x)) < 1e-12
    assert apart(masked(x), model(x)) > 1e-3
    assert {key: value.shape for key, value in masked.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert list(small.state_dict()) == list(before)
    assert [type(module) for module in small.modules()] == [type(module) for module in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for each in (small, masked):  # also by the statistics of a batch, and when these are counted anew
        recalibrate_(each, [x])
    assert apart(small(x), masked(x)) < 1e-6
    assert not small.training
    assert next(small.parameters()).requires_grad


@pytest.mark.parametrize("name", ["parts", "resnet8"])
def test_gradients_of_what_is_left_are_those_of_the_masked_network(name):
    model, x = made(name)
    gone = random_choice(model, x, 0.5)
    small, masked = remove_filters(model, x[:1], gone), masked_filters(model, x[:1], gone)
    for each in (small, masked):
        each(x).square().sum().backward()
    last = [
        dict(each.named_parameters())["head.bias" if name == "parts" else "linear.bias"] for each in (small, masked)
    ]
    assert torch.allclose(last[0].grad, last[1].grad, rtol=1e-10)


def test_a_chain_by_hand():
    """Independent of the graph: the filters of one layer, its BatchNorm's entries, the next layer's inputs."""
    torch.manual_seed(0)
    model = unsettled(
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(45, 2))
    )
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small = remove_filters(model, x, {"0": torch.tensor([1, 3])})
    stays = [0, 2, 4]
    assert torch.equal(small[0].weight, model[0].weight[stays])
    assert torch.equal(small[0].bias, model[0].bias[stays])
    assert torch.equal(small[1].running_var, model[1].running_var[stays])
    columns = model[5].weight.view(2, 5, 9)[:, stays].flatten(1)
    assert torch.equal(small[5].weight, columns)
    assert (small[0].out_channels, small[1].num_features, small[5].in_features) == (3, 3, 27)


def test_groups_stay_equally_wide_with_inputs_of_their_own():
    """Each group of a grouped convolution loses other places; cutting all by the first group's would be wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 1, 1)).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    first = find_channels(model, x)[0]
    assert (first.size, first.blocks) == (6, 2)
    gone = choose_filters({"0": torch.tensor([5.0, 1, 2, 3, 4, 0])}, [first], 1 / 3)
    assert gone["0"].tolist() == [1, 5]  # place 1 of the first group, place 2 of the second
    small = remove_filters(model, x, gone)
    assert torch.equal(small[1].weight[:2, :, 0, 0], model[1].weight[:2][:, [0, 2], 0, 0])
    assert torch.equal(small[1].weight[2:, :, 0, 0], model[1].weight[2:][:, [0, 1], 0, 0])
    assert apart(small(x), masked_filters(model, x, gone)(x)) < 1e-12


class Mixing(nn.Module):
    """A LayerNorm over channels, a parameter beside the layers, a layer that is never used."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5)
        self.scale, self.three = nn.Parameter(torch.ones(5)), nn.Linear(5, 3)
        self.four, self.head, self.unused = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(torch.relu(self.four(self.three(self.two(self.norm(self.one(x))) * self.scale))))


def test_what_cannot_go_is_left_alone_and_says_why():
    found = {each.name: each.kept for each in find_channels(Mixing(), torch.zeros(1, 4), exclude=["four"])}
    assert found == {
        "one": "its channels pass through 'norm', a LayerNorm",
        "two": "its channels meet a parameter that is in no layer",
        "three": None,
        "four": "it is excluded",
        "head": "its outputs are the network's",
    }
    only = find_channels(Mixing(), torch.zeros(1, 4), include=["three"])
    assert [each.name for each in only if each.kept is None] == ["three"]
    padded = {each.name: each for each in find_channels(build_model("resnet8", classes=3), torch.zeros(1, 3, 8, 8))}
    assert padded["stem"].kept == "its channels meet those of 'stage2_1.conv2', which has 32"
    assert padded["stage2_1.conv1"].kept is None
    joined = {each.name: each for each in find_channels(build_model("resnet18", classes=3), torch.zeros(1, 3, 8, 8))}
    assert joined["stem"].layers == ("stem", "stage1_1.conv2", "stage1_2.conv2")


class Shuffled(nn.Module):
    """Channels in another order, which no graph of operations can see."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.two(self.one(x).flip(1))


def test_a_graph_that_is_wrong_is_noticed():
    with pytest.raises(ValueError, match="exclude layers around unusual shortcuts"):
        remove_filters(Shuffled(), torch.zeros(1, 3), {"one": torch.tensor([0])})


def test_what_does_not_fit_is_refused():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3)
    for gone, message in [
        ({"1": [0]}, "cannot go: its outputs are the network's"),
        ({"0": [0, 1, 2, 3]}, "none would be left"),
        ({"2": [0]}, "is no Linear or convolution"),
    ]:
        with pytest.raises(ValueError, match=message):
            remove_filters(model, x, {name: torch.tensor(places) for name, places in gone.items()})
    with pytest.raises(ValueError, match="'conv' matches none of the 2"):
        find_channels(model, x, exclude=["conv"])
    with pytest.raises(ValueError, match="in \\[0, 1\\)"):
        choose_filters({}, [Channels("a", ("a",), 3)], 1.0)
    same = remove_filters(model, x, {"0": torch.tensor([], dtype=torch.int64)})
    assert torch.equal(same[0].weight, model[0].weight)


def test_norms_are_over_all_layers_that_make_the_channel():
    model, x = made("resnet18")
    channels = find_channels(model, x[:1])
    norms = filter_norms(model, channels)
    assert norms.keys() == {each.name for each in channels if each.kept is None}
    modules = dict(model.named_modules())
    squares = sum(
        modules[name].weight.flatten(1).square().sum(1) for name in ("stem", "stage1_1.conv2", "stage1_2.conv2")
    )
    assert torch.allclose(norms["stem"].double(), squares.sqrt(), rtol=1e-5)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    sparsity=st.floats(0, 0.99),
    allocation=st.sampled_from(["uniform", "global"]),
    seed=st.integers(0, 100),
)
@settings(max_examples=100, deadline=None)
def test_counts_and_choices(sizes, sparsity, allocation, seed):
    generator = torch.Generator().manual_seed(seed)
    channels = [Channels(str(i), (str(i),), size) for i, size in enumerate(sizes)]
    scores = {each.name: torch.randint(1, 4, (each.size,), generator=generator).float() for each in channels}
    gone = choose_filters(scores, channels, sparsity, allocation=allocation)
    for each in channels:
        lost = gone[each.name].tolist()
        assert lost == sorted(set(lost))
        assert len(lost) < each.size
        left = [place for place in range(each.size) if place not in lost]
        ranked = sorted(range(each.size), key=lambda place: (-float(scores[each.name][place]), place))
        assert sorted(ranked[: len(left)]) == left  # the best stay, of equal ones the first
        if allocation == "uniform":
            assert len(left) == max(1, each.size - round(sparsity * each.size))
    if allocation == "global":
        total = sum(sizes)
        assert total - sum(map(len, gone.values())) == max(len(sizes), total - round(sparsity * total))


def test_global_choices_do_not_depend_on_a_layers_scale():
    channels = [Channels("a", ("a",), 4), Channels("b", ("b",), 4)]
    scores = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([3.0, 3, 3, 3.1])}
    scaled = {"a": scores["a"] * 100, "b": scores["b"]}
    found = [choose_filters(each, channels, 0.25, allocation="global") for each in (scores, scaled)]
    assert [{name: places.tolist() for name, places in each.items()} for each in found] == [{"a": [0, 1], "b": []}] * 2


@pytest.mark.parametrize("name", ["parts", "resnet8", "vgg16_bn"])
def test_a_smaller_network_is_made_again_from_its_state(name):
    model, x = made(name)
    small = remove_filters(model, x[:1], random_choice(model, x, 0.5))
    again = resized(model, small.state_dict())
    assert torch.equal(again(x), small(x))
    assert str(again) == str(small)  # every size that a layer knows of itself
    thin, _ = decompose(model, ranks_by_share(model, 0.6))
    assert torch.equal(resized(model, thin.state_dict())(x), thin(x))
    with pytest.raises(ValueError, match="is not of a smaller"):
        resized(model, {"nothing.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", ["find_channels", "filter_norms", "choose_filters", "remove_filters", "resized"])
def test_examples_are_true(name):
    names = {"nn": nn, **vars(shrink)}
    for test in doctest.DocTestFinder().find(getattr(shrink, name), name, globs=names):
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0
