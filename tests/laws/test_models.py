"""Classifiers by name: logits for the images at hand, weights from the global seed, clear errors."""

import copy
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prunus.data.models import BasicBlock, build_model

SMALL = ["resnet8", "resnet8x2", "resnet14", "wrn10_2", "vit2_64"]


@pytest.mark.parametrize("name", SMALL)
def test_small_images_of_any_channels_become_logits(name):
    model = build_model(name, classes=7, channels=1)
    for side in (8, 12):
        logits = model(torch.randn(3, 1, side, side))
        assert logits.shape == (3, 7)
        assert logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn"])
def test_large_networks_halve_the_image_to_the_end(name):
    with torch.device("meta"):
        model = build_model(name, classes=10)
        sizes = []
        last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
        last.register_forward_hook(lambda *call: sizes.append(tuple(call[2].shape[1:])))
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(512, 2, 2) if name == "vgg16_bn" else (512, 4, 4)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["resnet8", "wrn10_2"])
def test_the_mean_over_pixels_is_adaptive_pooling(name, memory_format):
    model = build_model(name, classes=7).to(memory_format=memory_format)
    other = copy.deepcopy(model)
    other.pool = nn.AdaptiveAvgPool2d(1)
    images = torch.randn(6, 3, 12, 12).to(memory_format=memory_format)
    for each in (model, other):
        each(images).square().sum().backward()
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(model(images), other(images))


def test_weights_come_from_the_global_generator():
    def make(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_model("resnet8", classes=3).state_dict()

    one, same, other = make(0), make(0), make(1)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not torch.equal(one["stem.weight"], other["stem.weight"])


def test_convolutions_start_with_the_variance_of_he_et_al():
    torch.manual_seed(0)
    weight = build_model("resnet8x4", classes=3).get_submodule("stage3_1").conv1.weight  # 128 -> 256
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        "resnet2",
        "resnet21",
        "resnet20x0",
        "resnet34",
        "wrn28",
        "wrn20_8",
        "wrn4_1",
        "wrn28_0",
        "vgg11_bn",
        "",
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"no model '{name}'; known are resnet.*wrn20, vit.*, timm:NAME"):
        build_model(name, classes=10)


def test_other_mistakes_are_refused():
    with pytest.raises(ValueError, match="at least 1 class"):
        build_model("resnet8", classes=0)
    with pytest.raises(ValueError, match="'hub:x': models are one of resnet"):
        build_model("hub:x", classes=2)
    with pytest.raises(ValueError, match="take 3 channels, the images have 1"):
        build_model("torchvision:resnet18", classes=2, channels=1)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_packages_that_are_not_installed_are_named_with_their_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"'{package}:resnet18' needs the extra: pip install 'prunus\[models\]'"):
        build_model(f"{package}:resnet18", classes=2)


def test_packages_are_asked_for_an_untrained_model_of_these_classes(monkeypatch):
    asked = []
    home = SimpleNamespace(
        list_models=lambda: ["net_a", "net_b"],
        get_model=lambda name, **options: asked.append((name, options)) or nn.Identity(),
        create_model=lambda name, **options: asked.append((name, options)) or nn.Identity(),
    )
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=home))
    monkeypatch.setitem(sys.modules, "timm", home)
    build_model("torchvision:net_a", classes=5)
    build_model("timm:net_b", classes=5, channels=1)
    assert asked == [
        ("net_a", {"weights": None, "num_classes": 5}),
        ("net_b", {"pretrained": False, "num_classes": 5, "in_chans": 1}),
    ]
    for package in ("timm", "torchvision"):
        with pytest.raises(ValueError, match=f"{package} has no model 'net_c'; close names: net_"):
            build_model(f"{package}:net_c", classes=5)


def test_transformers_build_their_image_classifiers_and_folders_bring_their_weights(tmp_path):
    small = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = build_model("transformers:vit", classes=5, channels=1, arguments=small | {"num_hidden_layers": 1})
    x = torch.randn(2, 1, 8, 8)
    assert model(x).logits.shape == (2, 5)
    model.save_pretrained(tmp_path)
    assert torch.equal(build_model(str(tmp_path), classes=5).eval()(x).logits, model.eval()(x).logits)
    other = build_model(str(tmp_path), classes=3).eval()
    assert other(x).logits.shape == (2, 3)
    assert torch.equal(other.vit.layernorm.weight, model.vit.layernorm.weight)
    with pytest.raises(ValueError, match="'hidden_sizes' is no key of its config"):
        build_model("transformers:vit", classes=5, arguments={"hidden_sizes": 16})
    with pytest.raises(ValueError, match=r"no image classifier of 'transformers:llama'"):
        build_model("transformers:llama", classes=5)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_installed_packages_build_their_models(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    model = build_model(f"{package}:resnet18", classes=5).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_a_block_of_equal_shape_has_no_shortcut():
    assert {name.split(".")[0] for name, _ in BasicBlock(4, 4, project=True).named_parameters()} == {
        "conv1", "bn1", "conv2", "bn2",
    }  # fmt: skip
