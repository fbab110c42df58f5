"""One-shot pruning in memory: exact, nested, blind to storage, and nothing changes when it fails."""

import sys
import types
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from prunus import patterns
from prunus.adapt import adapt
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.patterns import NM, Block, Rows, Unstructured, kept_of
from prunus.prune import prune, prune_in_turn
from prunus.score import (
    Allocation,
    Tried,
    criterion,
    erk,
    evopress,
    global_,
    lamp,
    magnitude,
    owl,
    random,
    ria,
    uniform,
    uniform_plus,
    wanda,
)
from prunus.solve import admm, frank_wolfe, refit, sparsegpt
from prunus.stream import stream
from tests.conftest import tiny_llama

ALLOCATIONS = {"global": global_, "uniform": uniform, "uniform_plus": uniform_plus(), "erk": erk, "lamp": lamp}


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3, padding=1, stride=2),
            nn.Flatten(),
            nn.Linear(8 * 4, 16),
            nn.Linear(16, 10),
        )


def other() -> nn.Module:
    return nn.ModuleDict({"5": nn.Linear(8, 16)})


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_masks_are_applied_and_exact_and_leave_the_rest_alone():
    model = network()
    before = copy_of(model)
    masks = prune(model, sparsity=0.9)
    weights = {name: before[name].abs().flatten() for name in ("0.weight", "3.weight", "5.weight", "6.weight")}
    joined = torch.cat([*weights.values()])
    smallest = joined.topk(len(joined) - round(0.9 * len(joined))).values.min()
    assert set(masks) == set(weights)
    for name, value in model.state_dict().items():
        expected = before[name] * (before[name].abs() >= smallest) if name in masks else before[name]
        assert torch.equal(value, expected)
        assert not name.endswith("weight") or not (value[value == 0].signbit()).any()


@pytest.mark.parametrize("pattern", [Unstructured("layer"), Unstructured("row"), Block(2, 2), Rows()], ids=repr)
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_phases_are_nested_and_end_as_one_shot(name: str, pattern: patterns.Pattern):
    model = network()
    allocation = ALLOCATIONS[name]
    whole = prune(network(), pattern=pattern, sparsity=0.8, allocation=allocation)
    masks = None
    for sparsity in (0.3, 0.6, 0.8):
        chosen = prune(model, pattern=pattern, sparsity=sparsity, allocation=allocation, within=masks)
        chosen.check(model)
        assert masks is None or not any((chosen[each] & ~masks[each]).any() for each in masks)
        masks = chosen
    total = sum(mask.numel() for mask in whole.values())
    if name in ("global", "lamp", "erk") and pattern == Unstructured("layer"):
        assert round(masks.sparsity * total) == round(0.8 * total)
    # LAMP's scores are relative to what is left, and rows compared apart keep less than the best of all.
    if name != "lamp" and (name, pattern) != ("global", Unstructured("row")):
        assert masks == whole


@pytest.mark.parametrize("name", ["uniform", "global"])
def test_within_limits_what_another_allocation_may_keep(name: str):
    model = network()
    first = prune(model, sparsity=0.5)
    allocation = ALLOCATIONS[name]
    second = prune(model, sparsity=0.6, allocation=allocation, within=first)
    assert not any((second[each] & ~first[each]).any() for each in first)
    total = sum(mask.numel() for mask in second.values())
    assert abs(round(second.sparsity * total) - 0.6 * total) <= 2  # uniform rounds in every layer


@pytest.mark.parametrize("wrong", [{"module.6.weight": (10, 16)}, {"6.weight": (16, 10)}])
def test_earlier_masks_of_another_model_are_refused(wrong: dict):
    masks = Masks({name: torch.ones(shape, dtype=torch.bool) for name, shape in wrong.items()})
    with pytest.raises(ValueError, match=f"earlier masks have '{next(iter(wrong))}'"):
        prune(network(), sparsity=0.5, within=masks)
    with pytest.raises(ValueError, match=f"earlier masks have '{next(iter(wrong))}'"):
        stream(tiny_llama(), magnitude, sparsity=0.5, within=masks, tokens=torch.zeros(1, 2, dtype=torch.int64))


def test_within_may_name_few_parameters():
    model = network()
    earlier = Masks({"6.weight": torch.zeros(10, 16, dtype=torch.bool)})
    masks = prune(model, sparsity=0.5, within=earlier)
    assert masks.table()["6.weight"] == (0, 160)
    assert sum(kept for kept, _ in masks.table().values()) == round(0.5 * sum(n for _, n in masks.table().values()))


def test_random_masks_depend_on_their_seed():
    masks = prune(network(), random(0), sparsity=0.7)
    again = prune(network(), random(0), sparsity=0.7)
    assert masks == again
    assert masks != prune(network(), random(1), sparsity=0.7)


def test_storage_does_not_matter():
    plain, last = network(), network().to(memory_format=torch.channels_last)
    assert prune(plain, sparsity=0.8) == prune(last, sparsity=0.8)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), last.parameters(), strict=True))


def test_wanda_sees_the_inputs_of_linear_and_convolutions_in_eval_mode():
    model, generator = network(), torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 6, 6, generator=generator) * torch.tensor([1.0, 0.0])[:, None, None]
    statistics = copy_of(model)["1.running_mean"]
    batches = [x[:3], (x[3:], torch.zeros(3))]
    masks = prune(model, wanda, Unstructured("row"), 0.5, allocation=uniform, batches=batches)
    assert masks["0.weight"][:, 0].all()  # the second channel is zero: its inputs have norm 0
    assert not masks["0.weight"][:, 1].any()
    assert model.training
    assert torch.equal(model[1].running_mean, statistics)


def test_include_and_exclude_are_the_views():
    model = network()
    assert set(prune(model, sparsity=0.5, views=find_layers(model, exclude=["0", "6"]))) == {"3.weight", "5.weight"}


def test_allocations_read_the_shapes_of_the_parameters():
    model = network()
    spared = prune(model, sparsity=0.85, allocation=uniform_plus()).table()
    assert spared["0.weight"] == (72, 72)
    assert spared["6.weight"][0] == 32  # a fifth of the last linear layer
    kept = {name: kept for name, (kept, _) in prune(network(), sparsity=0.9, allocation=erk).table().items()}
    assert kept["3.weight"] / kept["5.weight"] == pytest.approx((4 + 8 + 3 + 3) / (32 + 16), abs=0.03)


@pytest.mark.parametrize("asked", [wanda, ria, sparsegpt(), frank_wolfe(5, 5)], ids=lambda each: each.name)
@pytest.mark.parametrize("allocation", [uniform, erk, owl(lam=0.05)], ids=lambda each: each.name)
def test_classifiers_are_pruned_by_what_their_layers_receive(asked, allocation):
    model, dense = network(), network()
    batches = [torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))]
    masks = prune(model, asked, sparsity=0.5, allocation=allocation, batches=batches)
    masks.check(model)
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
    moved = [
        name
        for name, mask in masks.items()
        if not torch.equal(model.get_parameter(name), dense.get_parameter(name) * mask)
    ]
    assert moved == ([*masks] if asked.name == "sparsegpt" else [])


@pytest.mark.parametrize("asked", [admm(), refit(wanda), refit(admm()), ria], ids=lambda each: each.name)
@pytest.mark.parametrize("pattern", [Unstructured("layer"), Block(2, 2)], ids=repr)
def test_solvers_stay_within_earlier_masks(asked, pattern):
    batches = [torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0)).cumsum(-1)]
    views = find_layers(network(), include=["3", "6"])
    model = network()
    first = prune(model, magnitude, pattern, 0.5, allocation=uniform, views=views)
    with torch.no_grad():
        for name, mask in first.items():  # retraining moves what stays
            model.get_parameter(name).add_(0.1 * mask)
    before = {name: model.get_parameter(name).detach().clone() for name in first}
    second = prune(model, asked, pattern, 0.75, allocation=uniform, views=views, within=first, batches=batches)
    second.check(model)
    for name, mask in second.items():
        assert int(mask.sum()) == mask.numel() // 4
        assert not bool((mask & ~first[name]).any())
        moved = not torch.equal(model.get_parameter(name)[mask], before[name][mask])
        assert moved == (asked.name != "ria")


def test_sparsegpt_serves_a_convolution_better_than_magnitude():
    x = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0)).cumsum(-1)  # correlated
    views = find_layers(network(), include=["0"])
    errors = []
    for asked in (sparsegpt(), magnitude):
        model = network()
        prune(model, asked, sparsity=0.5, views=views, batches=[x])
        errors.append(float((model[0](x) - network()[0](x)).detach().square().sum()))
    assert errors[0] < 0.8 * errors[1]


def relative(layer):
    """The how-to's score: Wanda's, as a share of its row."""
    score = wanda(layer)
    return score / score.sum(1, keepdim=True)


def test_a_plain_score_of_inputs_is_compared_within_rows_as_wanda_is():
    batches = [torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0)).exp()]
    plain = prune(network(), relative, sparsity=0.5, batches=batches)
    assert plain == prune(network(), wanda, sparsity=0.5, batches=batches)  # a row's order is Wanda's
    assert all(set(mask.flatten(1).sum(1).tolist()) <= {mask[0].numel() // 2} for mask in plain.values())
    told = prune(network(), criterion(needs="norms", compare="layer")(relative), sparsity=0.5, batches=batches)
    assert told == prune(network(), relative, Unstructured("layer"), 0.5, allocation=global_, batches=batches) != plain


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(prune, sparsity=1.0), r"in \[0, 1\); got 1.0"),
        (prune, "unstructured needs a sparsity"),
        (partial(prune, pattern=NM(2, 4)), r"2:4 needs columns divisible by 4; '0' has 18.*exclude"),
        (partial(prune, pattern=Block(4, 4), sparsity=0.5), "block 4x4 needs rows divisible by 4"),
        (partial(prune, criterion=wanda, sparsity=0.5), "pass calibration batches"),
        (partial(prune, criterion=wanda, sparsity=0.5, batches=iter([])), "no calibration batch"),
        (partial(prune_in_turn, criterion=wanda, sparsity=0.5, batches=[]), "no calibration batch"),
        (partial(prune, criterion=sparsegpt, sparsity=0.5), "sparsegpt is no criterion; it makes one: call it"),
        (partial(prune, criterion=sparsegpt(), sparsity=0.5, allocation=lamp), "sparsegpt .* no scores for lamp"),
        (partial(prune, criterion=sparsegpt(), sparsity=0.5, within=Masks({})), "sparsegpt cannot stay within earlier"),
        (partial(prune, sparsity=0.5, allocation=owl), "owl is no allocation; it makes one: call it"),
        (partial(prune, sparsity=0.5, allocation=owl()), "pass calibration batches"),
        (partial(prune, sparsity=0.5, views=[]), "nothing to prune"),
        (
            partial(prune, sparsity=0.5, views=find_layers(nn.Linear(3, 2))),
            "'weight'.*; the model has none of that name",
        ),
        (
            partial(prune_in_turn, criterion=wanda, sparsity=0.5, batches=[], views=find_layers(other())),
            r"views name '5\.weight', with a matrix \(16, 8\); the model has \(16, 32\) there",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(call, message: str):
    model = network()
    before = copy_of(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Conditioned(nn.Module):
    """A network that is called with more than its images, as those of diffusion are."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.moments = nn.Linear(4, 8), nn.Embedding(10, 4)

    def forward(self, x: torch.Tensor, moment: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.body(scale * x + self.moments(moment))


def test_a_model_of_several_inputs_is_called_by_their_names_and_asks_for_them():
    x, moment = torch.randn(6, 4), torch.arange(6)
    with pytest.raises(ValueError, match=r"Conditioned is called with a batch's first item alone .*'moment'.*mapping"):
        prune(Conditioned(), wanda, sparsity=0.5, batches=[(x, moment)])
    named = {"x": x, "moment": moment, "scale": 2.0}  # what is no tensor is handed on as it is
    assert prune(Conditioned(), wanda, sparsity=0.5, batches=[named]).sparsity == 0.5


def test_blocks_in_turn_take_a_loader():
    batches = [torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    one, other = network(), network()
    assert prune_in_turn(one, wanda, sparsity=0.5, batches=iter(batches)) == prune_in_turn(
        other, wanda, sparsity=0.5, batches=batches
    )


def test_ways_to_prune_keep_as_many_tiles_and_ask_every_allocation():
    """Each tile that rounding leaves over is one of the whole model, whatever is pruned at a time."""
    batches = torch.randint(260, (2, 8), generator=torch.Generator().manual_seed(0)).split(1)
    quarter = Allocation(lambda scores, _: {name: each.numel() // 4 for name, each in scores.items()}, reads="")
    for pattern, allocation in ((Block(2, 2), uniform), (Rows(), uniform), (Unstructured("layer"), quarter)):
        one, other, third = (tiny_llama() for _ in range(3))
        masks = prune(one, magnitude, pattern, 0.58, allocation=allocation)
        assert stream(other, magnitude, pattern, 0.58, allocation=allocation, tokens=torch.cat(batches)).masks == masks
        if allocation is uniform:
            assert prune_in_turn(third, magnitude, pattern, 0.58, batches=batches) == masks


def test_earlier_masks_that_the_pattern_cannot_keep_within_are_refused():
    model = network()
    views = find_layers(model, include=["5", "6"])
    first = prune(model, sparsity=0.9, views=views)
    with pytest.raises(ValueError, match="2:4 cannot keep 256 entries of '5' within the earlier masks"):
        prune(model, pattern=NM(2, 4), views=views, within=first)
    with pytest.raises(ValueError, match="earlier masks left only"):
        prune(model, sparsity=0.5, views=views, within=first)


def test_nm_prunes_without_a_sparsity():
    model = network()
    masks = prune(model, pattern=NM(2, 4), views=find_layers(model, include=["5", "6"]))
    assert masks.sparsity == 0.5


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what peft calls in transformers
def test_a_model_that_peft_wraps_is_pruned_when_it_is_merged():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for verb in (prune, partial(stream, tokens=torch.zeros(1, 2, dtype=torch.int64))):
        with pytest.raises(ValueError, match=r"q_proj' holds an adapter of peft: merge it first"):
            verb(wrapped, magnitude, sparsity=0.5)
    assert prune(wrapped.merge_and_unload(), magnitude, sparsity=0.5).sparsity == 0.5


@pytest.mark.parametrize("train", ["lora", "norms"])
def test_a_model_that_is_adapted_is_pruned_when_it_is_merged(train: str):
    model = tiny_llama().bfloat16()
    adaptation = adapt(model, [train], masks=None, views=find_layers(model), rank=2)
    for verb in (prune, partial(stream, tokens=torch.zeros(1, 2, dtype=torch.int64))):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM is adapted .*: call merge_"):
            verb(model, magnitude, sparsity=0.5)
    adaptation.merge_()
    assert prune(model, magnitude, sparsity=0.5).sparsity == 0.5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_of_torchscript_is_refused_and_masked():
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(ValueError, match=r"of TorchScript.*prune it before torch\.jit"):
        prune(model, magnitude, sparsity=0.5)
    Masks({"0.weight": torch.zeros(4, 4, dtype=torch.bool)}).apply_(model)
    assert not model[0].weight.any()


@pytest.mark.parametrize("asked", [magnitude, wanda])
def test_a_model_without_weights_is_refused(asked):
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'weight' is on the meta device: load its weights"):
        prune(model, asked, sparsity=0.5, batches=[torch.ones(1, 4)])
    with pytest.raises(ValueError, match="'1' is lazy and has no weights yet: run the model on a batch first"):
        prune(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), asked, sparsity=0.5, batches=[torch.ones(1, 4)])


@pytest.mark.parametrize("asked", [random(), sparsegpt()], ids=["random", "sparsegpt"])
def test_the_dtype_of_new_tensors_changes_nothing(asked):
    x = torch.rand(9, 6)
    one, other = nn.Linear(6, 5), nn.Linear(6, 5)
    other.load_state_dict(one.state_dict())
    expected = prune(one, asked, sparsity=0.5, batches=[x])
    torch.set_default_dtype(torch.float64)
    try:
        assert prune(other, asked, sparsity=0.5, batches=[x]) == expected
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(one.weight, other.weight)


def test_a_wrapped_model_is_pruned_as_the_plain_one():
    x = torch.randint(100, (2, 8))
    expected = prune(tiny_llama(), wanda, sparsity=0.5, batches=[x])
    compiled = torch.compile(tiny_llama(), backend="eager")
    for wrapped in (compiled, nn.DataParallel(tiny_llama()), AveragedModel(tiny_llama())):
        masks = prune(wrapped, wanda, sparsity=0.5, batches=[x])
        masks.check(wrapped)
        assert masks == expected  # under the ordinary names
        assert prune(wrapped, wanda, sparsity=0.75, batches=[x], within=masks).keys() == expected.keys()


def test_adapters_of_peft_are_refused_before_their_matrices_are_taken_for_layers(monkeypatch):
    class Adapter(nn.Module):  # as peft's layers: the model's own weight inside, two small matrices beside it
        def __init__(self):
            super().__init__()
            self.base_layer, self.lora_A, self.lora_B = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 4)

    module = types.ModuleType("peft.tuners.tuners_utils")
    module.BaseTunerLayer = Adapter
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", module)
    model = nn.Sequential(nn.Linear(4, 4), Adapter())
    for verb in (prune, partial(stream, tokens=torch.zeros(1, 2, dtype=torch.int64))):
        with pytest.raises(ValueError, match=r"'1' holds an adapter of peft: merge it first, .*merge_and_unload"):
            verb(model, magnitude, sparsity=0.5)


def classifier() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))


@torch.no_grad()
def divergence(model: nn.Module, dense: nn.Module, x: torch.Tensor) -> float:
    p, q = (each(x).log_softmax(-1) for each in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("asked", [magnitude, refit(wanda)], ids=lambda each: each.name)
def test_an_allocation_that_tries_the_model_lowers_its_loss(asked):
    batches = [torch.randn(16, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    dense, found = classifier(), {}
    for allocation in (uniform, evopress(12, 6, step=0.1)):
        model = classifier()
        masks = prune(model, asked, Unstructured("layer"), 0.6, allocation=allocation, batches=iter(batches))
        masks.check(model)
        assert sum(kept for kept, _ in masks.table().values()) == kept_of(144 + 576 + 120, 0.6)
        if asked is magnitude:  # nothing that was tried is left in the weights
            for name, mask in masks.items():
                assert torch.equal(model.get_parameter(name)[mask], dense.get_parameter(name)[mask])
        found[allocation.name] = divergence(model, dense, torch.cat(batches))
    assert found["evopress"] < 0.95 * found["uniform"]


@torch.no_grad()
def test_a_class_that_the_dense_model_hides_loses_nothing():
    """Some models return -inf for words that are none."""
    model, dense = classifier(), classifier()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    views, parameters = find_layers(model), {name: each.detach() for name, each in model.named_parameters()}
    hidden = torch.zeros(model(x).shape[1]).index_fill(0, torch.tensor([0]), -torch.inf)
    tried = Tried(parameters, views, {}, (magnitude, Unstructured("layer")), (lambda _: model(x) + hidden, 1))
    counts = {view.name: kept_of(view.shape[0] * view.shape[1], 0.5) for view in views}
    found = tried(counts)
    p, q = ((each(x)[:, 1:]).log_softmax(-1) for each in (dense, model))
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_a_loss_is_the_divergence_of_what_was_solved_and_leaves_no_trace():
    model, dense = classifier(), classifier()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    views, parameters = find_layers(model), {name: each.detach() for name, each in model.named_parameters()}
    tried = Tried(parameters, views, {}, (magnitude, Unstructured("layer")), (lambda _: model(x), 1))
    sizes = {view.name: view.shape[0] * view.shape[1] for view in views}
    assert tried(sizes) == pytest.approx(0, abs=1e-7)
    for share in (0.5, 0.25, 0.5):
        counts = {name: kept_of(size, share) for name, size in sizes.items()}
        pruned = classifier()
        prune(pruned, magnitude, Unstructured("layer"), share, allocation=uniform)
        assert tried(counts) == pytest.approx(divergence(pruned, dense, x), rel=1e-4)
    tried.restore_()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), dense.parameters(), strict=True))
