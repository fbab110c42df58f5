"""The classifiers of the papers' tables, for small images, and any of timm's, torchvision's or transformers' by name.

    resnet{6n+2}          He et al. 2016: 3x3 stem, 3 stages of n blocks, 16/32/64 channels, shortcuts without weights
    resnet{6n+2}x{k}      the same with k times the channels
    resnet18              the ImageNet network with a 3x3 stem and no pooling: 64/128/256/512 channels, 1x1 shortcuts
    vgg16_bn              Simonyan & Zisserman 2015, 13 convolutions with batch norm and one linear layer
    wrn{6n+4}_{k}         Zagoruyko & Komodakis 2016: activation before convolution, 16k/32k/64k channels, no dropout
    vit{depth}_{width}    a vision transformer (Dosovitskiy et al. 2021): two 3x3 convolutions of stride 2 make tokens
                          (Xiao et al. 2021), sines say where they are, their mean meets the classes (Beyer et al.
                          2022); heads of 64, MLPs of twice the width
    wrn20                 resnet20x8: a network of 20 layers is no wrn{6n+4}, so it is the ResNet, as wide as wrn*_8

How they are trained and pruned is not known here.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunus.checkpoint import read_checkpoint, read_state
from prunus.machine import import_extra, quiet, read_json

__all__ = [
    "BasicBlock",
    "TransformerBlock",
    "build_encoder",
    "build_model",
    "check_model",
    "classes_of",
    "config_of",
    "fresh_head",
    "load_weights_",
    "pooling_of",
]

_FORMS = (
    "resnet{6n+2} (resnet8, resnet20, resnet56, ...), resnet{6n+2}x{k}, resnet18, vgg16_bn, wrn{6n+4}_{k}, wrn20, "
    "vit{depth}_{width}"
)
_PACKAGES = "timm:NAME, torchvision:NAME, transformers:KIND (such as vit) and folders of transformers' classifiers"
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: 2x2 maximum
_making = threading.Lock()  # transformers changes functions of torch and of its own meanwhile, for all threads
_MADE: set[tuple[str, str]] = set()  # what was found to make a model: grids ask for one of them in every recipe


def build_model(name: str, *, classes: int, channels: int = 3, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The named classifier, x (B, channels, H, W) -> logits (B, classes), with fresh weights of the global generator.

    name: see the module's list; "timm:NAME" and "torchvision:NAME" are built by those packages, with `arguments`;
    "transformers:KIND" (vit, beit, swin, ...) from a config of these arguments, and a folder with the config.json of an
    image classifier likewise, its weights loaded, but a head for other classes; both return an object that has logits.
    Ours take images of any size from 8 x 8 (vgg16_bn: 32 x 32). Convolutions start as He et al. 2015 (normal, fan out);
    a caller seeds them with torch.manual_seed inside torch.random.fork_rng.
    Raises: ValueError for an unknown name or argument, or fewer than 1 class or channel; ImportError without timm or
    torchvision.

    >>> build_model("resnet20", classes=10)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if classes < 1 or channels < 1:
        raise ValueError(f"a classifier needs at least 1 class and 1 channel; got {classes=}, {channels=}")
    package, colon, foreign = name.partition(":")
    if package == "transformers" or config_of(name) is not None:
        return _pretrained(name, foreign, classes, arguments or {}, {"num_channels": channels})
    if colon:
        return _foreign(package, foreign, classes, channels, arguments or {})
    if arguments:
        raise ValueError(f"arguments {sorted(arguments)} are for networks of timm and torchvision; '{name}' has none")
    return _initialised(_own(name, classes, channels))


def build_encoder(
    name: str, *, labels: Sequence[str] | None = None, values: bool = False, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """The encoder of texts in a folder of transformers, float32: keywords of its tokenizer -> an object.

    It has logits (B, labels), of `values` (B, 1), and without either last_hidden_state (B, length, d), for embeddings.
    arguments: keys of its config that are to be others. A head that the folder has not, or for other labels, starts
    anew; a pooler behind embeddings that it has not is left out.
    Raises ValueError for a name that is no such folder, embeddings of an encoder-decoder, and unknown arguments.

    >>> build_encoder("all-MiniLM-L6-v2")(**tokenizer(["a text"], return_tensors="pt")).last_hidden_state.shape
    torch.Size([1, 4, 384])
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    found = config_of(name)
    if found is None:
        raise ValueError(f"{name!r} is no folder of an encoder of transformers: it holds no config.json; download it")
    with _naming(f"transformers makes no encoder of texts of {name!r} and {dict(arguments or {})}"):
        config: Any = AutoConfig.from_pretrained(found.parent)
        _check_arguments(config, arguments or {})
        config.update(dict(arguments or {}))
        if values:
            config.num_labels, config.problem_type = 1, "regression"
        elif labels is not None and [name for _, name in sorted(config.id2label.items())] != list(labels):
            config.num_labels = len(labels)
            if not all(label.isdecimal() for label in labels):
                config.id2label, config.label2id = dict(enumerate(labels)), {n: i for i, n in enumerate(labels)}
        if values or labels is not None:
            return _encoder(AutoModelForSequenceClassification, found.parent, config)
        if config.is_encoder_decoder:
            raise ValueError("it is an encoder-decoder, whose decoder asks for texts of its own: take an encoder alone")
        pooled = any("pooler." in name for name in read_checkpoint(found.parent).tensors)
        try:
            return _complete(
                *_loaded(AutoModel, found.parent, config, **({} if pooled else {"add_pooling_layer": False}))
            )
        except TypeError as error:  # it knows no pooler
            if "add_pooling_layer" not in str(error):
                raise
            return _complete(*_loaded(AutoModel, found.parent, config))


def check_model(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a name or arguments that make no model, as `build_model` does, without making its weights.

    >>> check_model("resnet20", {})
    """
    asked = name, repr(sorted(arguments.items()))
    if asked in _MADE and config_of(name) is None:  # what is in a folder may change
        return
    with torch.device("meta"):
        build_model(name, classes=10, arguments=arguments)
    _MADE.add(asked)


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


def config_of(name: str) -> Path | None:
    """The config.json of a model that is a folder of transformers, None for any other name.

    >>> config_of("resnet18")
    """
    found = Path(name).expanduser() / "config.json"
    return found if name and found.is_file() else None


def classes_of(name: str) -> tuple[str, ...]:
    """What a folder of transformers calls its classes, in the order of their numbers; () where it gives numbers alone.

    >>> classes_of("distilbert-sst2")
    ('NEGATIVE', 'POSITIVE')
    """
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(Path(name).expanduser()).id2label or {}
    names = tuple(label for _, label in sorted(found.items()))
    return () if all(re.fullmatch(r"LABEL_\d+", label) for label in names) else names


def fresh_head(name: str, model: nn.Module) -> list[str]:
    """The tensors of a model of transformers, behind its inner one, that the folder has not, or in another shape.

    >>> fresh_head("bert-base-uncased", build_encoder("bert-base-uncased", labels=["no", "yes"]))
    ['bert.pooler.dense.weight', 'classifier.weight', 'classifier.bias']
    """
    inner = f"{getattr(model, 'base_model_prefix', '')}."
    stored = read_checkpoint(Path(name).expanduser()).tensors
    held = {key.removeprefix(inner): tuple(each.shape) for key, each in stored.items()}  # inner ones go without it
    head = {k: each for k, each in model.state_dict().items() if not k.startswith(inner) or ".pooler." in k}
    return [key for key, each in head.items() if held.get(key.removeprefix(inner)) != tuple(each.shape)]


def pooling_of(name: str) -> Literal["mean", "first"]:
    """How an encoder's folder says that its embeddings are made; the mean where it says nothing.

    Raises ValueError for another way.

    >>> pooling_of("all-MiniLM-L6-v2")
    'mean'
    """
    found = sorted(Path(name).expanduser().glob("[0-9]_Pooling/config.json"))
    said = read_json(found[0]) if found else {}
    asked = {key for key, value in said.items() if key.startswith("pooling_mode") and value}
    if found and asked not in ({"pooling_mode_mean_tokens"}, {"pooling_mode_cls_token"}):
        raise ValueError(f"{found[0]}: {', '.join(sorted(asked)) or 'no way'}; embeddings are known as mean or first")
    return "first" if "pooling_mode_cls_token" in asked else "mean"


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
    found = re.fullmatch(r"vit(\d+)_(\d+)", name)
    if found and int(found[1]) and int(found[2]) and int(found[2]) % 64 == 0:
        return _vit(int(found[1]), int(found[2]), classes, channels)
    raise ValueError(f"no model '{name}'; known are {_FORMS}, {_PACKAGES}")


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


class TransformerBlock(nn.Module):
    """Attention between all tokens and a layer on each, (B, T, width) -> the same, norms before both.

    x <- x + attention(norm(x));   x <- x + down(gelu(up(norm(x))))

    >>> TransformerBlock(64)(torch.zeros(2, 4, 64)).shape
    torch.Size([2, 4, 64])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).view(count, tokens, 3, width // 64, 64)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # (B, heads, T, 64) each
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, tokens, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Tokens(nn.Module):
    """Pixels as tokens with their places, (B, width, H, W) -> (B, H * W, width).

    A quarter of the width each: sin(y w), cos(y w), sin(x w), cos(x w), w falling from 1 to 1e-4.
    """

    def forward(self, x: Tensor) -> Tensor:
        _, width, rows, columns = x.shape
        rates = torch.logspace(0, -4, width // 4, device=x.device)
        y, z = (torch.arange(side, device=x.device)[:, None] * rates for side in (rows, columns))  # (side, width / 4)
        down, right = (torch.cat([each.sin(), each.cos()], 1) for each in (y, z))
        places = torch.cat(
            [down[:, None].expand(-1, columns, -1), right[None].expand(rows, -1, -1)], 2
        )  # (H, W, width)
        return x.flatten(2).mT + places.flatten(0, 1)


class _MeanToken(nn.Module):
    """The mean over tokens, (B, T, width) -> (B, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _vit(depth: int, width: int, classes: int, channels: int) -> nn.Module:
    parts: list[tuple[str, nn.Module]] = []
    for place, (in_, out) in enumerate([(channels, width // 2), (width // 2, width)], 1):
        parts += [
            (f"stem{place}", nn.Conv2d(in_, out, 3, 2, 1, bias=False)),
            (f"stem{place}_bn", nn.BatchNorm2d(out)),
            (f"stem{place}_relu", nn.ReLU()),
        ]
    parts.append(("tokens", _Tokens()))
    parts += [(f"block{place}", TransformerBlock(width)) for place in range(1, depth + 1)]
    return _named(
        [*parts, ("norm", nn.LayerNorm(width)), ("mean", _MeanToken()), ("linear", nn.Linear(width, classes))]
    )


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
        if isinstance(module, TransformerBlock):
            for each in (module.qkv, module.out, module.up, module.down):
                nn.init.trunc_normal_(each.weight, std=0.02)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def _foreign(package: str, name: str, classes: int, channels: int, arguments: Mapping[str, Any]) -> nn.Module:
    if package not in ("timm", "torchvision"):
        raise ValueError(f"'{package}:{name}': models are one of {_FORMS}, {_PACKAGES}")
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


def _pretrained(name: str, kind: str, classes: int, arguments: Mapping[str, Any], own: Mapping[str, Any]) -> nn.Module:
    """An image classifier of transformers: of a kind, with fresh weights, or of a folder, with its own."""
    from transformers import AutoConfig, AutoModelForImageClassification  # seconds, which other models need not wait

    with _naming(f"transformers makes no image classifier of {name!r} and {dict(arguments)}"):
        folder = config_of(name)
        known = AutoConfig.for_model(kind) if folder is None else AutoConfig.from_pretrained(folder.parent)
        _check_arguments(known, arguments)
        config = AutoConfig.for_model(kind, **own, **arguments) if folder is None else known
        if folder is not None:
            config.update(dict(arguments))
        if config.num_labels != classes:
            config.num_labels = classes
        if folder is None:
            with _making:
                return AutoModelForImageClassification.from_config(config)
        model, missing = _loaded(AutoModelForImageClassification, folder.parent, config)
        return _complete(model, missing)


def _encoder(auto: Any, folder: Path, config: Any) -> nn.Module:
    """An encoder of a folder; a head that its files lack begins anew."""
    model, missing = _loaded(auto, folder, config)
    inner = f"{model.base_model_prefix}."
    return _complete(model, [name for name in missing if name.startswith(inner) and ".pooler." not in name])


def _loaded(auto: Any, folder: Path, config: Any, **options: Any) -> tuple[Any, Sequence[str]]:
    """A model of transformers and what its files lack; on the meta device without weights, and nothing is missing.

    In float32 there, too: for another dtype transformers changes the default of all threads meanwhile.
    """
    if torch.get_default_device().type == "meta":
        with _making:
            return auto.from_config(config, dtype=torch.float32, **options), ()
    options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with _making, quiet(logging.ERROR):
        model, loaded = auto.from_pretrained(folder, config=config, **options)
    return model, sorted(loaded["missing_keys"])


def _complete(model: nn.Module, missing: Sequence[str]) -> nn.Module:
    if missing:
        raise ValueError(f"its files lack {missing[0]!r}")
    return model


def _check_arguments(config: Any, arguments: Mapping[str, Any]) -> None:
    strange = [key for key in arguments if key not in config.to_dict()]
    if strange:
        raise ValueError(f"{strange[0]!r} is no key of its config")


@contextmanager
def _naming(what: str) -> Generator[None]:
    """What transformers says of a config or folder that makes no model, in one line."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (OSError, TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())[:200]}") from None
