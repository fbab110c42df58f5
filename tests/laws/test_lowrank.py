"""Laws of decomposition: two layers are the truncated layer, whatever its groups, stride, dilation and padding."""

import copy
import doctest
import itertools

import pytest
import torch
from torch import nn

from prunus.shrink import lowrank
from prunus.shrink.lowrank import decompose, ranks_by_budget, ranks_by_share


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


LAYERS = {
    "linear": (lambda: nn.Linear(24, 20), (5, 24)),
    "no bias": (lambda: nn.Linear(24, 20, bias=False), (5, 24)),
    "tokens": (lambda: nn.Linear(24, 20), (2, 5, 24)),
    "conv": (lambda: nn.Conv2d(8, 12, 3), (2, 8, 9, 9)),
    "oblong": (lambda: nn.Conv2d(8, 12, (3, 1), stride=(2, 1), padding=(1, 0)), (2, 8, 9, 9)),
    "dilated": (lambda: nn.Conv2d(8, 12, 3, dilation=2, padding=2), (2, 8, 9, 9)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1), (2, 8, 9, 9)),
    "grouped, dilated": (lambda: nn.Conv2d(8, 16, 3, groups=4, dilation=2, stride=2, bias=False), (2, 8, 9, 9)),
    "reflected": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (2, 8, 9, 9)),
    "same": (lambda: nn.Conv2d(8, 12, 3, padding="same"), (2, 8, 9, 9)),
    "1d": (lambda: nn.Conv1d(8, 12, 5, padding=2), (2, 8, 9)),
    "3d": (lambda: nn.Conv3d(4, 12, 3, groups=2), (2, 4, 5, 5, 5)),
}


def truncated(layer, rank):
    """The layer with its weight truncated, group by group, in float64."""
    found = copy.deepcopy(layer)
    with torch.no_grad():
        groups = getattr(layer, "groups", 1)
        for part, weight in zip(found.weight.chunk(groups), layer.weight.double().chunk(groups), strict=True):
            u, s, vt = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            part.copy_(((u[:, :rank] * s[:rank]) @ vt[:rank]).view(part.shape))
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_two_layers_are_the_truncated_one(name):
    make, shape = LAYERS[name]
    layer, x = seeded(make), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    state, before = torch.get_rng_state(), copy.deepcopy(layer.state_dict())
    small, (report,) = decompose(nn.Sequential(layer), {"0": 2})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert report.kept is None
    wanted = truncated(layer, 2)
    assert torch.allclose(small(x), wanted(x), atol=1e-5)
    assert report.before == layer.weight.numel()
    assert report.after == sum(module.weight.numel() for module in small[0]) < report.before
    difference = float((wanted.weight - layer.weight).detach().norm() / layer.weight.detach().norm())
    assert report.error == pytest.approx(difference, rel=1e-4)  # the tail of the singular values
    assert all(type(module) is type(layer) for module in small[0])
    one, two = small[0]
    assert float(one.weight.detach().norm()) == pytest.approx(float(two.weight.detach().norm()), rel=1e-4)


def test_full_rank_is_the_layer_itself_and_left_alone():
    layer = seeded(lambda: nn.Linear(24, 20))
    small, (report,) = decompose(nn.Sequential(layer), {"0": 20})
    assert type(small[0]) is nn.Linear
    assert "rank 20 would cost 880 weights for its 480" in report.kept
    assert (report.after, report.error) == (480, 0.0)
    # 20 * 24 / 44 = 10.9: rank 10 pays, 11 does not.
    reports = [decompose(nn.Sequential(layer), {"0": rank})[1][0] for rank in (10, 11)]
    assert [report.kept is None for report in reports] == [True, False]


def test_depthwise_layers_are_left_alone():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))
    assert decompose(model, ranks_by_share(model, 0.9))[1][0].kept
    assert ranks_by_budget(model, 0.0) == {}


class Shared(nn.Module):
    """One layer in two places, one weight in two layers, and an attention that reads its projection's weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.tied = nn.Linear(16, 16, bias=False)
        self.embedding = nn.Embedding(16, 16)
        self.tied.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = self.again(self.first(x).relu())
        return self.attention(x, x, x, need_weights=False)[0] + self.tied(x)


def test_shared_and_tied_layers():
    model = seeded(Shared).eval()
    assert set(ranks_by_share(model, 0.9)) == {"first", "tied"}  # not attention.out_proj, whose weight others read
    small, reports = decompose(model, {"first": 2, "tied": 2})
    assert small.first is small.again
    assert small.tied.weight is small.embedding.weight
    assert [report.kept for report in reports] == [None, "its weight is tied to another module's"]
    assert not small.first.training
    model.first = truncated(model.first, 2)
    model.again = model.first
    x = torch.randn(2, 3, 16)
    assert torch.allclose(small(x), model(x), atol=1e-5)


def test_a_layer_that_is_the_model_is_replaced_and_dtypes_stay():
    small, _ = decompose(seeded(lambda: nn.Linear(24, 20, dtype=torch.bfloat16)), {"": 3})
    assert [tuple(p.shape) for p in small.parameters()] == [(3, 24), (20, 3), (20,)]
    assert all(p.dtype == torch.bfloat16 for p in small.parameters())
    assert all(p.requires_grad for p in small.parameters())


# Choosing ranks.


def model():
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=2), nn.Flatten(), nn.Linear(32, 40)
        )
    )


def test_shares_are_those_of_the_paper():
    assert ranks_by_share(model(), 0.75) == {"0": 4, "2": 4, "4": 8}
    assert ranks_by_share(model(), 0.99) == {"0": 1, "2": 1, "4": 1}
    assert ranks_by_share(nn.Linear(10, 10), 0.3) == {"": 7}


def used(ranks, layers):
    """Weights and energy shares of a choice of ranks; layers without one are whole."""
    weights, energy = 0, 0.0
    for name, layer in layers.items():
        size, rank = layer.weight.numel(), ranks.get(name)
        groups = getattr(layer, "groups", 1)
        total = float(layer.weight.detach().square().sum())
        if rank is None:
            weights, energy = weights + size, energy + 1
        else:
            weights += rank * (layer.weight.shape[0] + groups * layer.weight[0].numel())
            energy += float(truncated(layer, rank).weight.detach().square().sum()) / total
    return weights, energy


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8])
def test_a_budget_is_kept_and_nearly_exhausted(sparsity):
    layers = {name: model().get_submodule(name) for name in ("0", "2", "4")}
    total = sum(layer.weight.numel() for layer in layers.values())
    ranks = ranks_by_budget(model(), sparsity)
    weights, _ = used(ranks, layers)
    assert weights <= (1 - sparsity) * total
    assert weights > (1 - sparsity) * total - 16 * 9 - 72  # less than one more rank of any layer is left
    small, reports = decompose(model(), ranks)
    assert all(report.kept is None for report in reports)
    found = sum(p.numel() for p in small.parameters() if p.ndim > 1)
    assert found == weights
    if sparsity == 0:
        assert ranks == {}


@pytest.mark.parametrize("tie", ["two layers", "an embedding"])
def test_a_budget_counts_tied_weights_once_and_whole(tie):
    """They stay as they are, so others must pay for them."""
    model = nn.Sequential(*(seeded(lambda: nn.Linear(40, 40)) for _ in range(4)), nn.Embedding(40, 40))
    (model[1] if tie == "two layers" else model[4]).weight = model[0].weight
    layers = {id(each.weight): each.weight.numel() for each in model[:4]}
    ranks = ranks_by_budget(model, 0.5)
    assert "0" not in ranks
    small, reports = decompose(model, ranks)
    assert all(report.kept is None for report in reports)
    left = sum(each.numel() for name, each in small.named_parameters() if each.ndim > 1 and not name.startswith("4"))
    assert left <= 0.5 * sum(layers.values())
    with pytest.raises(ValueError, match="than rank 1"):
        ranks_by_budget(model, 0.9)


def test_a_budget_is_spent_about_as_well_as_by_trying_everything():
    layers = {"0": seeded(lambda: nn.Linear(12, 12)), "1": seeded(lambda: nn.Linear(12, 20))}
    with torch.no_grad():
        layers["0"].weight.copy_(truncated(layers["0"], 2).weight * 100)  # of rank 2, and its scale means nothing
    whole = nn.Sequential(layers["0"], nn.Linear(1, 1), layers["1"])
    whole[1] = nn.Identity()
    layers = {"0": layers["0"], "2": layers["1"]}
    budget = 0.6 * (144 + 240)
    choices = itertools.product([*range(1, 6), None], [*range(1, 8), None])
    every = [{k: r for k, r in zip(layers, pair, strict=True) if r is not None} for pair in choices]
    best = max(used(ranks, layers)[1] for ranks in every if used(ranks, layers)[0] <= budget)
    ranks = ranks_by_budget(whole, 0.4)
    assert ranks["0"] == 2
    assert used(ranks, layers)[1] > 0.97 * best


def test_the_scale_of_a_layer_does_not_count():
    """Under normalisation it means nothing: equal layers get equal ranks, but for the odd one."""
    layers = [seeded(lambda: nn.Linear(30, 30)) for _ in range(2)]
    with torch.no_grad():
        layers[1].weight.mul_(100)
    ranks = ranks_by_budget(nn.Sequential(*layers), 0.5)
    assert sorted(ranks.values()) == [7, 8]


def test_small_layers_take_what_large_ones_cannot():
    """Left after rank 1 in both: less than a rank of the large layer, several of the small one, whose worth is less."""
    large, small = seeded(lambda: nn.Linear(100, 100)), seeded(lambda: nn.Linear(10, 10))
    with torch.no_grad():
        small.weight.copy_(torch.diag(torch.tensor([1e3] + [1.0] * 9)))
    ranks = ranks_by_budget(nn.Sequential(large, small), 1 - (200 + 20 + 150) / 10100)
    assert ranks == {"0": 1}  # the small one whole


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="'9' is no Linear or convolution layer"):
        decompose(model(), {"9": 1})
    with pytest.raises(ValueError, match="at least 1; got 0"):
        decompose(model(), {"0": 0})
    with pytest.raises(ValueError, match="less than rank 1 in all 3 layers costs"):
        ranks_by_budget(model(), 0.99)
    with pytest.raises(ValueError, match=r"in \[0, 1\); got 1"):
        ranks_by_share(model(), 1.0)
    with pytest.raises(ValueError, match="'fc' matches none of the 3"):
        ranks_by_share(model(), 0.5, exclude=["fc"])
    with pytest.raises(ValueError, match="no Linear or convolution layer to decompose"):
        ranks_by_share(nn.ReLU(), 0.5)
    assert set(ranks_by_share(model(), 0.5, include=["0", "4"], exclude=["4"])) == {"0"}


@pytest.mark.parametrize("name", ["decompose", "ranks_by_budget", "ranks_by_share"])
def test_examples_are_true(name):
    text = getattr(lowrank, name).__doc__
    example = doctest.DocTestParser().get_doctest(text, vars(lowrank) | {"torch": torch, "nn": nn}, name, None, 0)
    assert example.examples
    heard = []
    doctest.DocTestRunner(verbose=False).run(example, out=heard.append)
    assert not heard, "".join(heard)
