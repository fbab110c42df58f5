"""The papers' networks have the parameters that counting by hand gives, and the layers that their figures show."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from prunus.data.models import build_model


def conv(in_, out, side=3):
    return in_ * out * side * side


def basic(in_, out, *, shortcut=0):
    """Two 3x3 convolutions, each with a batch norm of the block's width."""
    return conv(in_, out) + conv(out, out) + 4 * out + shortcut


def resnet(blocks, width=16):
    total = conv(3, width) + 2 * width
    for in_, out in [(width, width), (width, 2 * width), (2 * width, 4 * width)]:
        total += basic(in_, out) + (blocks - 1) * basic(out, out)
    return total + 4 * width * 10 + 10


def resnet18():
    total = conv(3, 64) + 128 + 2 * basic(64, 64)
    for in_, out in [(64, 128), (128, 256), (256, 512)]:
        total += basic(in_, out, shortcut=conv(in_, out, 1) + 2 * out) + basic(out, out)
    return total + 512 * 10 + 10


def vgg16():
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    return sum(conv(in_, out) + 3 * out for in_, out in pairwise(widths)) + 512 * 10 + 10  # 3: bias, batch norm's two


def wide(blocks, k):
    widths = [16, 16 * k, 32 * k, 64 * k]
    total = conv(3, 16)
    for in_, out in pairwise(widths):
        total += 2 * in_ + conv(in_, out) + 2 * out + conv(out, out)  # norms come before
        total += conv(in_, out, 1) if in_ != out else 0
        total += (blocks - 1) * (2 * conv(out, out) + 4 * out)
    return total + 2 * widths[3] + widths[3] * 10 + 10


@pytest.mark.parametrize(
    ("name", "by_hand", "published"),
    [
        ("resnet8", resnet(1), None),
        ("resnet20", resnet(3), 269_722),
        ("resnet56", resnet(9), 853_018),
        ("resnet110", resnet(18), 1_727_962),
        ("resnet20x2", resnet(3, 32), None),
        ("wrn20", resnet(3, 128), None),
        ("resnet18", resnet18(), 11_173_962),
        ("vgg16_bn", vgg16(), 14_728_266),
        ("wrn28_10", wide(4, 10), 36_479_194),
        ("wrn10_1", wide(1, 1), None),
    ],
)
def test_parameters_are_counted_by_hand(name, by_hand, published):
    with torch.device("meta"):
        model = build_model(name, classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand
    assert published in (None, by_hand)


@pytest.mark.parametrize(
    ("name", "layers"), [("resnet20", 20), ("resnet56", 56), ("resnet18", 18), ("vgg16_bn", 14), ("wrn28_10", 28)]
)
def test_depth_counts_layers_as_the_papers_do(name, layers):
    """Convolutions of the main path and the linear layer; for wrn all convolutions, those of shortcuts too."""
    with torch.device("meta"):
        model = build_model(name, classes=10)
    convolutions = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    main = [key for key in convolutions if not key.endswith("shortcut")]
    assert (len(convolutions) if name.startswith("wrn") else len(main) + 1) == layers


def test_a_shortcut_without_weights_takes_every_second_pixel_and_appends_zeros():
    """He et al. 2016, option A: with the convolutions silent, the block is its shortcut."""
    block = build_model("resnet8", classes=2).get_submodule("stage2_1").eval()
    with torch.no_grad():
        block.conv2.weight.zero_()
    x = torch.rand(2, 16, 4, 4)
    y = block(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert y.shape == (2, 32, 2, 2)
    assert not y[:, 16:].any()


def test_a_wide_block_activates_before_it_convolves():
    """Zagoruyko & Komodakis 2016: y = x + conv2(relu(bn2(conv1(relu(bn1(x)))))), nothing after the sum."""
    block = build_model("wrn10_1", classes=2).get_submodule("stage1_1").eval()
    x = torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        inner = block.conv1((x / (1 + block.bn1.eps) ** 0.5).relu())
        expected = x + block.conv2((inner / (1 + block.bn2.eps) ** 0.5).relu())
        torch.testing.assert_close(block(x), expected)
        assert (block(x) < 0).any()
