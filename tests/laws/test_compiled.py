"""Blocks compiled in place: the same numbers, one program for all blocks of a form, and hooks that are heard again."""

import copy

import pytest
import torch
from torch import nn

from prunus.blocks.compiled import compile_blocks_, uncompiled
from prunus.data.models import build_model
from prunus.measure.accuracy import accuracy
from prunus.train.batchnorm import recalibrate_
from prunus.train.train import classification_loss, train

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at that of inputs


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def programs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def batches(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(10, (4,), generator=generator)


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model("resnet14", classes=10)


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return train(model, batches, optimizer, lambda _: 1.0, steps=3, loss=classification_loss()).losses


def test_a_network_with_compiled_blocks_trains_as_the_plain_one_under_its_own_names():
    plain, compiled = network(), network()
    assert compile_blocks_(compiled, backend="eager") == 6
    assert trained(compiled) == pytest.approx(trained(plain), abs=1e-5)
    assert programs() > 0
    for (name, one), (other_name, other) in zip(plain.state_dict().items(), compiled.state_dict().items(), strict=True):
        assert name == other_name
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_blocks_of_one_form_and_later_networks_share_programs():
    first, second = network(0), network(1)
    for model in (first, second):
        compile_blocks_(model, backend="eager")
    trained(first)
    made = programs()
    assert made == 5  # three stages, and the first block of the second and of the third
    trained(second)
    assert programs() == made


def test_what_has_no_repeated_block_is_refused():
    with pytest.raises(ValueError, match="Sequential has no blocks of one class that repeat"):
        compile_blocks_(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))


def test_recalibration_and_evaluation_run_plain():
    """Hooks that are set after the first compiled call are not heard by its program."""
    model = network()
    compile_blocks_(model, backend="eager")
    trained(model)
    made, expected = programs(), copy.deepcopy(network())
    expected.load_state_dict(model.state_dict())
    for each in (model, expected):
        recalibrate_(each, [batches(7)[0]])
    for one, other in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert accuracy(model, [batches(8)]) == accuracy(expected, [batches(8)])
    assert programs() == made
    trained(model)  # compiled again afterwards, by the programs that there are
    assert programs() == made


@pytest.mark.parametrize("wrapped", [False, True])
def test_uncompiled_puts_back_what_it_took_away(wrapped):
    inner = network().eval()
    if wrapped:
        model = torch.compile(inner, backend="eager")
    else:
        model = inner
        compile_blocks_(model, backend="eager")
    with uncompiled(model) as plain:
        assert plain is inner
        plain(batches(0)[0])
        assert programs() == 0
    model(batches(0)[0])
    assert programs() > 0
