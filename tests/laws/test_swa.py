"""Laws of stochastic weight averaging: the uniform mean of the right snapshots, zeros kept, resumed bit for bit."""

import pytest
import torch
from torch import nn

from prunus.masks import Masks
from prunus.soup.average import average
from prunus.train import Ema, Swa
from prunus.train.hooks import During
from prunus.train.train import classification_loss, train


def make_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


class Snapshots(During):
    """Every state after a step."""

    def attach(self, model, optimizer, plan):
        self.model, self.states = [model], []

    def after_step(self, step):
        self.states.append({name: tensor.clone() for name, tensor in self.model[0].state_dict().items()})


def run(model, during, steps=8, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, batches, optimizer, lambda _: 1.0, steps=steps, loss=classification_loss(), during=during, **options)


@pytest.mark.parametrize(
    ("start", "every", "epoch", "taken"),
    [(0.5, 1, None, [3, 4, 5, 6, 7]), (0.5, 2, 4, [3, 5, 7]), (0.0, None, 3, [0, 3, 6]), (0.99, None, None, [7])],
)
def test_the_mean_is_that_of_the_snapshots(start, every, epoch, taken):
    model, swa, all_ = make_model(), Swa(start, every), Snapshots()
    run(model, [swa, all_], epoch_steps=epoch)
    last = model.state_dict()["0.weight"].clone()
    assert torch.equal(last, all_.states[-1]["0.weight"])  # the run itself is not touched
    swa.finish()
    mean = average([all_.states[step] for step in taken])
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, mean[name], rtol=1e-6, atol=1e-6)
    assert model.state_dict()["1.num_batches_tracked"] == 8
    assert int(swa.taken) == len(taken)


def test_zeros_under_masks_stay():
    model, swa = make_model(), Swa(0.25, 1)
    masks = Masks({"0.weight": torch.arange(48).view(8, 6) % 3 == 0})
    run(model, [swa], masks=masks)
    swa.finish()
    masks.check(model)
    assert not model[0].weight.detach()[~masks["0.weight"]].signbit().any()
    assert (model[0].weight.detach()[masks["0.weight"]] != 0).all()


def test_a_killed_run_resumes_with_the_same_mean(tmp_path):
    whole, swa = make_model(), Swa(0.25, 2)
    run(whole, [swa])
    swa.finish()

    class Killed(Exception):
        pass

    def dying(step):
        if step == 5:
            raise Killed
        return batches(step)

    model, file = make_model(), tmp_path / "c.pt"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(Killed):
        train(
            model,
            dying,
            optimizer,
            lambda _: 1.0,
            steps=8,
            loss=classification_loss(),
            during=[Swa(0.25, 2)],
            checkpoint=file,
            save_seconds=0,
        )
    again, fresh = make_model(), Swa(0.25, 2)
    run(again, [fresh], checkpoint=file, save_seconds=0)
    fresh.finish()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_sixteen_bit_weights_are_averaged_in_float32():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    swa = Swa(0.0, 1)
    swa.attach(model, torch.optim.SGD(model.parameters()), plan(4))
    for step, value in enumerate([256.0, 258.0, 256.0, 258.0]):
        model.weight.data.fill_(value)
        swa.after_step(step)
    assert float(swa.means.mean0) == 257  # which bfloat16 lacks


def test_a_moving_average_of_sixteen_bit_weights_moves():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    ema = Ema(0.999)
    ema.attach(model, torch.optim.SGD(model.parameters()), plan(100))
    ema.after_step(0)
    model.weight.data.fill_(0.0)
    for _ in range(100):
        ema.follow()
    ema.finish()
    assert model.weight.item() == pytest.approx(0.999**100, abs=2**-9)  # bfloat16 around 0.9


def plan(steps):
    from prunus.train.hooks import Plan

    return Plan(steps, steps, ())


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\); got 1.0"):
        Swa(1.0)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        Swa(0.5, 0)
