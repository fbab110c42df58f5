"""Laws of members trained together: each ends as it would have alone, up to rounding, and what cannot be is refused."""

import copy

import pytest
import torch
from torch import nn

from prunus.data.models import build_model
from prunus.masks import Masks
from prunus.train.stacked import Stacked, member_batches, together
from prunus.train.train import classification_loss, train


class Residual(nn.Module):
    """Convolutions, BatchNorm and a shortcut, as in a small ResNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.conv(x)).mean((2, 3)))


def make_member(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Residual()


def batches_of(seed):
    def batches(step):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        return torch.randn(8, 1, 5, 5, generator=generator), torch.randint(3, (8,), generator=generator)

    return batches


CLOSE = {"rtol": 1e-4, "atol": 2e-6}
SETTINGS = [{"lr": 0.1, "weight_decay": 1e-2}, {"lr": 0.02, "weight_decay": 0.0}, {"lr": 0.05, "weight_decay": 1e-1}]
MASKS = Masks({"conv.weight": torch.arange(144).view(4, 4, 3, 3) % 3 == 0})


def optimizer_of(kind, groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(groups, lr=0.1)


def states_alone(kind, seeds, **options):
    states = []
    for seed, setting in zip(seeds, SETTINGS, strict=False):
        model = make_member()
        optimizer = optimizer_of(kind, [{"params": list(model.parameters()), **setting}])
        trace = train(model, batches_of(seed), optimizer, decay, steps=6, loss=classification_loss(0.1), **options)
        states.append((model.state_dict(), trace.losses))
    return states


def states_together(kind, seeds, masks=None, **options):
    members = [make_member() for _ in seeds]
    stacked = Stacked(members)
    groups = [{"params": list(m.parameters()), **s} for m, s in zip(members, SETTINGS, strict=False)]
    trace = train(
        stacked,
        member_batches([batches_of(seed) for seed in seeds]),
        optimizer_of(kind, groups),
        decay,
        steps=6,
        loss=together(classification_loss(0.1)),
        masks=None if masks is None else stacked.masks(masks),
        **options,
    )
    return [member.state_dict() for member in members], trace.losses


def decay(step):
    return 1 - step / 6


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("masks", [None, MASKS], ids=["dense", "masked"])
def test_members_trained_together_are_members_trained_alone(kind, masks):
    alone = states_alone(kind, (1, 2, 3), masks=masks)
    found, losses = states_together(kind, (1, 2, 3), masks=masks)
    for state, (expected, _) in zip(found, alone, strict=True):
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, **CLOSE, msg=name)
        if masks is not None:
            assert (state["conv.weight"][~masks["conv.weight"]] == 0).all()
            assert not state["conv.weight"][~masks["conv.weight"]].signbit().any()
    torch.testing.assert_close(
        losses, [sum(each) / 3 for each in zip(*(trace for _, trace in alone), strict=True)], **CLOSE
    )
    assert found[0]["norm.num_batches_tracked"] == 6
    assert not torch.equal(found[0]["conv.weight"], found[1]["conv.weight"])


def test_one_member_is_that_member():
    found, _ = states_together("sgd", (4,))
    expected = states_alone("sgd", (4,))[0][0]
    torch.testing.assert_close(found[0], dict(expected), rtol=1e-5, atol=1e-6)


def test_accumulated_gradients_are_alone_too():
    found, _ = states_together("sgd", (1, 2), accumulate=2)
    for state, (expected, _) in zip(found, states_alone("sgd", (1, 2), accumulate=2), strict=True):
        torch.testing.assert_close(state, dict(expected), **CLOSE)


def test_sixteen_bits_are_used_when_asked_for():
    seen = []

    def loss(model, x):
        out = model(x)
        seen.append(out.dtype)
        return out.float().square().mean()

    members = [nn.Linear(2, 2, bias=False) for _ in range(2)]
    optimizer = torch.optim.SGD([p for m in members for p in m.parameters()], lr=0.1)
    train(
        Stacked(members),
        lambda _: torch.ones(2, 4, 2),
        optimizer,
        decay,
        steps=1,
        loss=together(loss),
        precision="bf16",
    )
    assert seen == [torch.bfloat16]


def test_evaluation_leaves_statistics_alone():
    members = [make_member(), make_member(1)]
    stacked = Stacked(members).eval()
    before = copy.deepcopy(stacked.state_dict())
    batch = member_batches([batches_of(1), batches_of(2)])(0)
    losses = stacked(classification_loss(), batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stacked.state_dict().items())
    for place, member in enumerate(members):
        alone = classification_loss()(member, (batch[0][place], batch[1][place]))
        torch.testing.assert_close(losses[place], alone)


def test_batches_are_stacked_and_made_once_for_members_that_share_them():
    calls = []

    def source(step):
        calls.append(step)
        return {"x": torch.full((2,), float(step)), "more": [torch.tensor([step])]}

    batch = member_batches([source, source, lambda step: {"x": torch.zeros(2), "more": [torch.tensor([7])]}])(5)
    assert calls == [5]
    assert batch["x"].tolist() == [[5, 5], [5, 5], [0, 0]]
    assert batch["more"][0].tolist() == [[5], [5], [7]]
    with pytest.raises(ValueError, match=r"one shape; got \[\(2,\), \(3,\)\]"):
        member_batches([lambda _: torch.zeros(2), lambda _: torch.zeros(3)])(0)


@pytest.fixture
def no_loops():
    """Makes an error of what vmap can only do member by member."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def vectorised(members):
    """Forward and backward of members on channels-last images, as on a GPU."""
    members = [member.to(memory_format=torch.channels_last) for member in members]
    images = [torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last) for _ in members]
    losses = Stacked(members)(classification_loss(), (torch.stack(images), torch.zeros(2, 2, dtype=torch.long)))
    losses.sum().backward()
    assert all(parameter.grad.isfinite().all() for member in members for parameter in member.parameters())


@pytest.mark.usefixtures("no_loops")
@pytest.mark.parametrize("name", ["resnet8", "resnet18", "wrn10_2", "vgg16_bn"])
def test_our_networks_are_vectorised_whole(name):
    vectorised([build_model(name, classes=3) for _ in range(2)])


@pytest.mark.usefixtures("no_loops")
def test_a_loop_over_members_would_be_seen():
    members = [build_model("resnet8", classes=3) for _ in range(2)]
    for member in members:
        member.pool = nn.AdaptiveAvgPool2d(1)
    with pytest.raises(RuntimeError, match="vmap fallback"):
        vectorised(members)


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="member 1 is another architecture"):
        Stacked([nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3, stride=2)])
    one, other = nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()
    with pytest.raises(ValueError, match=r"member 1 has 'bias' as .*bfloat16"):
        Stacked([one, other])
    with pytest.raises(ValueError, match="share parameters"):
        Stacked([one, one])
    with pytest.raises(ValueError, match="at least one"):
        Stacked([])


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LSTM(2, 2), "is recurrent"),
        (nn.BatchNorm1d(2, momentum=None), "averages its statistics by a counter"),
        (nn.SyncBatchNorm(2), "gathers statistics"),
    ],
)
def test_modules_that_cannot_be_vectorised_are_named(module, reason):
    with pytest.raises(ValueError, match=rf"'1' \({type(module).__name__}\) {reason}.*: train its members apart"):
        Stacked([nn.Sequential(nn.Linear(2, 2), copy.deepcopy(module)) for _ in range(2)])


def test_the_refused_would_fail():
    """Why BatchNorm with momentum None is refused: the moment torch can, the refusal may go."""
    members = [nn.BatchNorm1d(2) for _ in range(2)]
    stacked = Stacked(members)
    for member in members:
        member.momentum = None
    with pytest.raises(RuntimeError, match=r"item\(\)"):
        stacked(lambda model, x: model(x).sum(), torch.zeros(2, 4, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("capture", [False, True])
def test_members_trained_together_on_a_gpu_are_members_trained_alone(capture):
    def run(seeds):
        members = [make_member().cuda() for _ in seeds]
        groups = [{"params": list(member.parameters()), **SETTINGS[0]} for member in members]
        optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
        source = member_batches([batches_of(seed) for seed in seeds])
        loss = together(classification_loss())
        train(Stacked(members), source, optimizer, decay, steps=8, loss=loss, capture=capture)
        return [{name: tensor.cpu() for name, tensor in member.state_dict().items()} for member in members]

    pair = run((1, 2))
    for state, alone in zip(pair, (run((1,))[0], run((2,))[0]), strict=True):
        torch.testing.assert_close(state, alone, rtol=1e-2, atol=1e-3)
    assert not torch.equal(pair[0]["conv.weight"], pair[1]["conv.weight"])
