"""The classifiers of the papers' tables, for small images, and any of timm's or torchvision's by name.

    resnet{6n+2}          He et al. 2016: 3x3 stem, 3 stages of n blocks, 16/32/64 channels, shortcuts without weights
    resnet{6n+2}x{k}      the same with k times the channels
    resnet18              the ImageNet network with a 3x3 stem and no pooling: 64/128/256/512 channels, 1x1 shortcuts
    vgg16_bn              Simonyan & Zisserman 2015, 13 convolutions with batch norm and one linear layer
    wrn{6n+4}_{k}         Zagoruyko & Komodakis 2016: activation before convolution, 16k/32k/64k channels, no dropout
    wrn20                 resnet20x8: a network of 20 layers is no wrn{6n+4}, so it is the ResNet, as wide as wrn*_8

How they are trained and pruned is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunus.checkpoint import read_state
from prunus.machine import import_extra

__all__ = ["BasicBlock", "build_model", "check_model", "load_weights_"]

_FORMS = "resnet{6n+2} (resnet8, resnet20, resnet56, ...), resnet{6n+2}x{k}, resnet18, vgg16_bn, wrn{6n+4}_{k}, wrn20"
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: 2x2 maximum


def build_model(name: str, *, classes: int, channels: int = 3, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The named classifier, x (B, channels, H, W) -> logits (B, classes), with fresh weights of the global generator.

    name: see the module's list; "timm:NAME" and "torchvision:NAME" are built by those packages, with `arguments`. Ours
    take images of any size from 8 x 8 (vgg16_bn: 32 x 32). Convolutions start as He et al. 2015 (normal, fan out); a
    caller seeds them with torch.manual_seed inside torch.random.fork_rng.
    Raises: ValueError for an unknown name or argument, or fewer than 1 class or channel; ImportError without timm or
    torchvision.

    >>> build_model("resnet20", classes=10)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if classes < 1 or channels < 1:
        raise ValueError(f"a classifier needs at least 1 class and 1 channel; got {classes=}, {channels=}")
    package, colon, foreign = name.partition(":")
    if colon:
        return _foreign(package, foreign, classes, channels, arguments or {})
    if arguments:
        raise ValueError(f"arguments {sorted(arguments)} are for networks of timm and torchvision; '{name}' has none")
    return _initialised(_own(name, classes, channels))


def check_model(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a name or arguments that make no model, as `build_model` does, without making its weights.

    >>> check_model("resnet20", {})
    """
    with torch.device("meta"):
        build_model(name, classes=10, arguments=arguments)


def load_weights_(model: nn.Module, path: Path, *, other_head: bool = False) -> list[str]:
    """Load a file of weights into the model, and return the names of the tensors that stay as they are.

    path: .safetensors, or what torch.save made of a state dict. other_head: whether a last layer for another number of
    classes is left out.
    Raises ValueError, with the mend, as `checkpoint.read_state`.

    >>> load_weights_(build_model("resnet8", classes=3), Path("resnet8.safetensors"), other_head=True)
    ['linear.weight', 'linear.bias']
    """
    own = model.state_dict()
    state = read_state(path, own, other_head=other_head)
    model.load_state_dict(own | state)
    return [name for name in own if name not in state]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, (B, in_, H, W) -> (B, out, H/stride, W/stride).

    project: where the shape changes, the shortcut is a 1x1 convolution with batch norm (He et al. 2016, option B);
    without, it takes every stride-th pixel and appends zero channels (option A, no weights).
    early: batch norm and activation come before each convolution (Zagoruyko & Komodakis 2016); the shortcut is then a
    1x1 convolution of the activated input.

    >>> BasicBlock(4, 8, stride=2)(torch.zeros(1, 4, 6, 6)).shape
    torch.Size([1, 8, 3, 3])
    """

    def __init__(self, in_: int, out: int, *, stride: int = 1, project: bool = False, early: bool = False) -> None:
        super().__init__()
        self.early, self.stride, self.more = early, stride, out - in_
        self.conv1 = nn.Conv2d(in_, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_ if early else out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        changes = stride > 1 or self.more > 0
        self.shortcut = nn.Conv2d(in_, out, 1, stride, bias=False) if changes and (project or early) else None
        self.shortcut_bn = nn.BatchNorm2d(out) if self.shortcut is not None and not early else None

    def forward(self, x: Tensor) -> Tensor:
        if self.early:
            active = F.relu(self.bn1(x))
            y = self.conv2(F.relu(self.bn2(self.conv1(active))))
            return y + (x if self.shortcut is None else self.shortcut(active))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self._beside(x))

    def _beside(self, x: Tensor) -> Tensor:
        if self.shortcut is not None and self.shortcut_bn is not None:
            return self.shortcut_bn(self.shortcut(x))
        if self.stride == 1 and self.more == 0:
            return x
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))


def _own(name: str, classes: int, channels: int) -> nn.Module:
    if name == "vgg16_bn":
        return _vgg(classes, channels)
    if name == "resnet18":
        return _residual((64, 128, 256, 512), 64, 2, classes, channels, project=True)
    found = re.fullmatch(r"resnet(\d+)(?:x(\d+))?", "resnet20x8" if name == "wrn20" else name)
    if found and int(found[1]) >= 8 and (int(found[1]) - 2) % 6 == 0 and found[2] != "0":
        width = 16 * int(found[2] or 1)
        return _residual((width, 2 * width, 4 * width), width, (int(found[1]) - 2) // 6, classes, channels)
    found = re.fullmatch(r"wrn(\d+)_(\d+)", name)
    if found and int(found[1]) >= 10 and (int(found[1]) - 4) % 6 == 0 and found[2] != "0":
        width = 16 * int(found[2])
        return _residual((width, 2 * width, 4 * width), 16, (int(found[1]) - 4) // 6, classes, channels, early=True)
    raise ValueError(f"no model '{name}'; known are {_FORMS}, timm:NAME and torchvision:NAME")


def _residual(
    widths: tuple[int, ...],
    stem: int,
    blocks: int,
    classes: int,
    channels: int,
    *,
    project: bool = False,
    early: bool = False,
) -> nn.Module:
    """A 3x3 stem, a stage of `blocks` for each width (all but the first halve the image), mean over pixels, linear."""
    parts: list[tuple[str, nn.Module]] = [("stem", nn.Conv2d(channels, stem, 3, 1, 1, bias=False))]
    if not early:
        parts += [("stem_bn", nn.BatchNorm2d(stem)), ("stem_relu", nn.ReLU())]
    in_ = stem
    for stage, width in enumerate(widths):
        for place in range(blocks):
            stride = 2 if stage and not place else 1
            block = BasicBlock(in_, width, stride=stride, project=project, early=early)
            parts.append((f"stage{stage + 1}_{place + 1}", block))
            in_ = width
    if early:
        parts += [("last_bn", nn.BatchNorm2d(in_)), ("last_relu", nn.ReLU())]
    return _named([*parts, *_head(in_, classes)])


def _vgg(classes: int, channels: int) -> nn.Module:
    parts: list[tuple[str, nn.Module]] = []
    in_, stage, place = channels, 1, 1
    for width in _VGG16:
        if not width:
            parts.append((f"pool{stage}", nn.MaxPool2d(2)))
            stage, place = stage + 1, 1
            continue
        parts += [
            (f"conv{stage}_{place}", nn.Conv2d(in_, width, 3, 1, 1)),
            (f"bn{stage}_{place}", nn.BatchNorm2d(width)),
            (f"relu{stage}_{place}", nn.ReLU()),
        ]
        in_, place = width, place + 1
    return _named([*parts, *_head(in_, classes)])


class _Mean(nn.Module):
    """The mean over all pixels, (B, C, H, W) -> (B, C, 1, 1), as nn.AdaptiveAvgPool2d(1) gives it.

    That one, given channels-last, changes strides in place, which torch.func.vmap can only do member by member. Windows
    have a batching rule, and their gradient lies in memory as the image does.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, x.shape[-2:])


def _head(in_: int, classes: int) -> list[tuple[str, nn.Module]]:
    return [("pool", _Mean()), ("flatten", nn.Flatten()), ("linear", nn.Linear(in_, classes))]


def _named(parts: list[tuple[str, nn.Module]]) -> nn.Sequential:
    model = nn.Sequential()
    for name, module in parts:
        model.add_module(name, module)
    return model


@torch.no_grad()
def _initialised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def _foreign(package: str, name: str, classes: int, channels: int, arguments: Mapping[str, Any]) -> nn.Module:
    if package not in ("timm", "torchvision"):
        raise ValueError(f"'{package}:{name}': models come from timm: or torchvision:, or are one of {_FORMS}")
    if package == "torchvision" and channels != 3:
        raise ValueError(f"torchvision's models take 3 channels, the images have {channels}; use a timm: or own model")
    library = import_extra(package, "models", f"'{package}:{name}' needs the extra")
    home = library.models if package == "torchvision" else library
    if name not in (known := list(home.list_models())):
        close = ", ".join(get_close_matches(name, known, n=3)) or "none"
        raise ValueError(f"{package} has no model '{name}'; close names: {close}")
    own: dict[str, Any] = {"pretrained": False, "num_classes": classes, "in_chans": channels}
    if package == "torchvision":
        own = {"weights": None, "num_classes": classes}
    try:
        return (home.get_model if package == "torchvision" else home.create_model)(name, **own, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"'{package}:{name}' does not take {dict(arguments)} ({error}); leave out what it lacks"
        ) from None
