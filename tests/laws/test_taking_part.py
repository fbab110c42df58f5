"""Laws of methods that take part in training: when each hook is called, what it may change, and that runs resume."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from prunus.during import DNW, DPF, GMP, SET, RigL
from prunus.masks import Masks
from prunus.train import Ema
from prunus.train.hooks import During
from prunus.train.train import classification_loss, train


def make_model(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


def run(model: nn.Module, during: list[During], steps: int = 6, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    return train(
        model, batches, optimizer, lambda _: 1.0, steps=steps, loss=classification_loss(), during=during, **options
    )


class Watch(During):
    """Writes down its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def attach(self, model, optimizer, plan):
        self.plan = plan
        self.model = [model]
        self.calls.append("attach")

    def weights(self):
        self.calls.append("weights")
        return {}

    def penalty(self):
        self.calls.append("penalty")

    def gradients(self):
        assert all(parameter.grad is not None for parameter in self.model[0].parameters())
        self.calls.append("gradients")

    def follow(self):
        self.calls.append("follow")

    def before_step(self, step):
        self.calls.append(f"before {step}")

    def after_step(self, step):
        self.calls.append(f"after {step}")


def test_hooks_are_called_in_their_order():
    watch = Watch()
    run(make_model(), [watch], steps=2, epoch_steps=5)
    inside = ["weights", "penalty", "gradients", "follow"]
    assert watch.calls == ["attach", "before 0", *inside, "after 0", "before 1", *inside, "after 1"]
    assert (watch.plan.steps, watch.plan.epoch_steps, [v.name for v in watch.plan.views]) == (2, 5, ["0", "3"])


def test_accumulated_batches_are_one_step():
    watch = Watch()
    run(make_model(), [watch], steps=1, accumulate=3)
    assert watch.calls.count("weights") == 3
    assert (watch.calls.count("gradients"), watch.calls.count("follow"), watch.calls.count("after 0")) == (1, 1, 1)


class HalfGradient(During):
    def attach(self, model, optimizer, plan):
        self.parameters_ = list(model.parameters())

    def gradients(self):
        torch._foreach_mul_([parameter.grad for parameter in self.parameters_], 0.5)


class Halved(During):
    """Forward at half the weights."""

    def attach(self, model, optimizer, plan):
        self.weight = model.get_parameter("3.weight")
        self.names = [name for name, _ in model.named_parameters()]

    def weights(self):
        return {"3.weight": self.weight * 0.5}


class Decay(During):
    """Weight decay as a penalty."""

    def attach(self, model, optimizer, plan):
        self.parameters_ = list(model.parameters())

    def penalty(self):
        return 0.5e-2 * sum(parameter.square().sum() for parameter in self.parameters_)


def test_edited_gradients_reach_the_optimizer():
    halved, slower = make_model(), make_model()
    run(halved, [HalfGradient()], steps=1)
    optimizer = torch.optim.SGD(slower.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-2)
    train(slower, batches, optimizer, lambda _: 0.5, steps=1, loss=classification_loss())
    for one, other in zip(halved.parameters(), slower.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_penalty_is_differentiated_but_not_reported():
    plain, penalised = make_model(), make_model()
    traces = [run(plain, [], steps=4)]
    optimizer = torch.optim.SGD(penalised.parameters(), lr=0.1, momentum=0.9)
    options = {"steps": 4, "loss": classification_loss(), "during": [Decay()]}
    traces.append(train(penalised, batches, optimizer, lambda _: 1.0, **options))
    assert traces[0].losses == pytest.approx(traces[1].losses, abs=1e-5)
    for one, other in zip(plain.parameters(), penalised.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_forward_sees_other_weights_and_the_model_stays_what_it_was():
    model, half = make_model(), make_model()
    with torch.no_grad():
        half[3].weight.mul_(0.5)
    names, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    before = model[3].weight.detach().clone()
    found = run(model, [Halved()], steps=1).losses
    assert found == pytest.approx(run(half, [], steps=1).losses)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    assert isinstance(model[3].weight, nn.Parameter)
    # dL/dw = 0.5 dL/dw_eff, so the two runs' steps differ by the factor (apart from weight decay)
    step, other = before - model[3].weight - 1e-3 * before, before / 2 - half[3].weight - 1e-3 * before / 2
    assert torch.allclose(step, 0.5 * other, atol=1e-6)


def test_ema_is_the_mean_of_the_weights_after_each_step():
    model, ema, seen = make_model(), Ema(0.8), []

    class Keep(During):
        def after_step(self, step):
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    run(model, [ema, Keep()], steps=5)
    ema.finish()
    for name in ("0.weight", "1.running_var", "3.bias"):
        mean = seen[0][name].double()
        for state in seen[1:]:
            mean = 0.8 * mean + 0.2 * state[name].double()
        assert torch.allclose(model.state_dict()[name], mean.float(), atol=1e-6)


def test_ema_keeps_zeros():
    model, ema = make_model(), Ema(0.5)
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    masks = Masks({"0.weight": mask})
    run(model, [ema], masks=masks)
    ema.finish()
    masks.check(model)
    assert int((model[0].weight != 0).sum()) == int(mask.sum())


class Killed(Exception):
    pass


def test_a_method_resumes_with_its_state(tmp_path):
    class Kill(During):
        def after_step(self, step):
            if step == 4:
                raise Killed

    whole, ema = make_model(), Ema(0.8)
    run(whole, [ema])
    ema.finish()
    broken, options = make_model(), {"checkpoint": tmp_path / "run.pt", "save_seconds": 0}
    with pytest.raises(Killed):
        run(broken, [Ema(0.8), Kill()], **options)
    again, resumed = make_model(seed=5), Ema(0.8)
    run(again, [resumed, During()], **options)
    resumed.finish()
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("method", [GMP(0.7, every=0.25, stop=0.5), SET(0.7, delta=2), RigL(0.7, delta=2)])
def test_frozen_weights_that_a_method_pruned_are_zero_when_a_run_goes_on(tmp_path, method):
    """A checkpoint holds what is trained, and masks."""

    def losses(served=batches, **options):
        model, own = make_model().requires_grad_(False), copy.deepcopy(method)
        model[1].requires_grad_(True)
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
        asked = {"loss": classification_loss(), "during": [own], "steps": 6, **options}
        return train(model, served, optimizer, lambda _: 1.0, **asked).losses

    def killed(step):
        if step == 4:
            raise Killed
        return batches(step)

    options = {"checkpoint": tmp_path / "run.pt", "save_seconds": 0}
    with pytest.raises(Killed):
        losses(killed, **options)
    assert losses(**options) == losses()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at that of substituted weights
@pytest.mark.parametrize("during", [Halved, Decay, None])
def test_a_compiled_model_trains_as_the_plain_one(during):
    plain, inner = make_model(), make_model()
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    for model in (plain, torch.compile(inner, backend="eager")):
        run(model, [during()] if during else [], masks=Masks({"0.weight": mask}))
    for (name, one), other in zip(plain.state_dict().items(), inner.state_dict().values(), strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-6), name
    assert bool((inner[0].weight[~mask] == 0).all())


def test_what_cannot_take_part_is_refused():
    with pytest.raises(ValueError, match=r"decay lies in \(0, 1\); got 1"):
        Ema(1.0)
    with pytest.raises(ValueError, match="fp16"):
        run(make_model(), [During()], precision="fp16")
    with pytest.raises(ValueError, match="capture=True records a CUDA graph"):
        run(make_model(), [], capture=True)
    with pytest.raises(ValueError, match=r"smoothing lies in \[0, 1\); got 1.5"):
        classification_loss(1.5)
    with pytest.raises(ValueError, match=r"DNW and DPF both put other weights in place of '0\.weight'"):
        run(make_model(), [DNW(0.5), DPF(0.5)])
    with pytest.raises(ValueError, match="found no prunable layer"):
        During().hold_masks(make_model(), torch.optim.SGD([torch.zeros(1)]), ())


gpu = pytest.mark.gpu


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [None, HalfGradient, Halved, Decay])
def test_a_captured_run_equals_the_plain_one(method):
    states = []
    for capture in (False, True):
        model = make_model().cuda()
        mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) > 0.5
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True)
        trace = train(
            model,
            batches,
            optimizer,
            lambda step: 1 / (1 + step),
            steps=20,
            loss=classification_loss(),
            masks=Masks({"0.weight": mask.cuda()}),
            during=[method()] if method else [],
            capture=capture,
        )
        assert int((model[0].weight != 0).sum()) == int(mask.sum())
        states.append((trace.losses, list(model.state_dict().values())))
    assert states[0][0] == pytest.approx(states[1][0], abs=1e-5)
    for one, other in zip(states[0][1], states[1][1], strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-5)


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_capture_refuses_what_it_would_get_wrong():
    model = make_model().cuda()
    with pytest.raises(ValueError, match="fused=True"):
        run(model, [], capture=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    ragged = lambda step: tuple(part[: 16 if step < 5 else 7] for part in batches(step))  # noqa: E731
    with pytest.raises(ValueError, match="ragged last batch"):
        train(model, ragged, optimizer, lambda _: 1.0, steps=8, loss=classification_loss(), capture=True)


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_runs_in_threads_do_not_disturb_each_other():
    begin = [make_model(seed).state_dict() for seed in range(12)]  # the global generator is no thread's own

    def work(seed: int) -> list[float]:
        losses: list[float] = []
        with torch.cuda.stream(torch.cuda.Stream()):
            for again in range(6):  # recordings of some threads fall into the replays of others
                model = copy.deepcopy(plain).cuda()
                model.load_state_dict(begin[seed + again])
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
                loss, steps = classification_loss(), 40 + 7 * seed
                trace = train(model, batches, optimizer, lambda _: 1.0, steps=steps, loss=loss, capture=True)
                losses += trace.losses[:40]
        return losses

    plain = make_model()
    alone = [work(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        at_once = list(pool.map(work, range(6)))
    for one, other in zip(alone, at_once, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
