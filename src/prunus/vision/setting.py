"""Where a classifier recipe runs: device, precision, and the images or texts, which a process reads and moves once.

The split into training and validation parts is the same for every seed and every recipe of a source.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus.blocks import compile_blocks_, longest
from prunus.checkpoint import read_state, read_tokenizer
from prunus.data import (
    Augment,
    ImageBatches,
    Images,
    SentenceBatches,
    Sentences,
    build_encoder,
    build_model,
    classes_of,
    config_of,
    count_images,
    fresh_head,
    load_weights_,
    matched,
    plain_batches,
    read_images,
    read_sentences,
    sentence_batches,
    split_places,
)
from prunus.jobs import check_adapting, check_pruning, check_recordable, contents_of, device_name, device_of
from prunus.machine import Precision
from prunus.measure import CORRUPTIONS, corrupted_sets
from prunus.recipe import Augmentation, ClassifierRecipe, Corruptions, EncoderRecipe, ImageSource, member_of
from prunus.train import drawn_from

__all__ = ["Examples", "ImageSets", "Setting", "count_training", "steps_of"]

Examples = Images | Sentences
Batches = Callable[[int], tuple[Any, Tensor]]

SPLIT_SEED = 0
_EVALUATED = 1000  # images at a time
_EVALUATED_TEXTS = 64
_SETTLING = 1009  # the part of `Setting.batches` that BatchNorm statistics are counted on: no phase has its number
_lock = threading.RLock()  # reading is one thread's at a time
_read: dict[tuple[Any, ...], Images] = {}
_sets: dict[tuple[Any, ...], ImageSets] = {}
_contents: dict[str, str | None] = {}  # of sources, as the last call found them
_fits: set[tuple[Any, ...]] = set()  # networks, images and pruning that go together


@dataclass(frozen=True)
class ImageSets:
    """What is trained on and what is measured on, on the device; mean and std (C,) of the former's pixels / 255.

    held: training images that were held out, None when all are trained on. Texts have neither mean nor deviation.
    """

    train: Examples
    measured: Examples
    mean: Tensor
    std: Tensor
    held: Examples | None = None


@dataclass(frozen=True)
class Setting:
    """A recipe with its device, its precision and its images; order: a seed of the training images' order alone."""

    recipe: ClassifierRecipe
    device: torch.device
    precision: Precision
    capture: bool
    channels_last: bool
    sets: ImageSets
    order: int | None = None

    @classmethod
    def of(cls, recipe: ClassifierRecipe) -> Setting:
        """The setting of a recipe; "auto" is the first GPU with bf16, CUDA graphs and channels-last, else the CPU.

        Raises ValueError for a GPU that is not there, for pruning that the network does not take, for images that
        cannot be read or are fewer than a batch, for corrupted ones that are not there, for steps to record on a CPU;
        ImportError for a package that is missing.
        """
        device = device_of(recipe)
        cuda = device.type == "cuda"
        if cuda:
            torch.backends.cudnn.benchmark = True
        sets, keyed = _sets_of(recipe, device), recipe.keyed
        steps_of(recipe, len(sets.train))
        if recipe.aim == "classes" and sets.train.classes < 2:
            raise ValueError(
                f"{keyed}.source {recipe.data.source!r}: all are of 1 class; a classifier needs 2 at least"
            )
        if recipe.aim == "values" and bool((sets.measured.labels == sets.measured.labels[0]).all()):
            raise ValueError(
                f"texts.source {recipe.data.source!r}: the {len(sets.measured)} values that are measured on are all "
                f"{float(sets.measured.labels[0]):g}, which no correlation ranks; hold out more (texts.validation)"
            )
        precision: Precision = ("bf16" if cuda else "fp32") if recipe.precision == "auto" else recipe.precision
        images = recipe.keyed == "images"  # texts are of many lengths, which no recording has
        capture = cuda and images if recipe.capture == "auto" else recipe.capture
        if capture:
            check_recordable(device, scaled=False)
        channels_last = cuda and images if recipe.channels_last == "auto" else recipe.channels_last
        found = cls(recipe, device, precision, capture, channels_last, sets)
        found._check_model()
        found._check_untrained()
        found._check_trainings()
        if recipe.corruptions is not None:
            found.corrupted(recipe.corruptions)
        return found

    @classmethod
    def anew(cls, recipe: ClassifierRecipe) -> Setting:
        """As `of`, where a call begins: a source that was changed since the last one is read again."""
        source = recipe.data.source
        found = contents_of(source)
        with _lock:
            if _contents.setdefault(source, found) != found:
                _contents[source] = found
                for known in (_read, _sets):
                    for key in [key for key in known if key[0] == source]:
                        del known[key]
        return cls.of(recipe)

    @property
    def name(self) -> str:
        """The device in words."""
        return device_name(self.device)

    def example(self) -> Any:
        """One input of the network, on the CPU: an image of zeros, or a text as long as the longest."""
        if isinstance(self.sets.train, Images):
            return torch.zeros(1, *self.sets.train.pixels.shape[1:])
        return {key: each[:1].long().cpu() for key, each in self.sets.train.fields.items()}

    def corruptible(self, asked: Corruptions) -> Images:
        """The images of which corruptions are measured: the first ones of those that are measured on, or all."""
        images = self.sets.measured
        assert isinstance(images, Images)
        count = min(asked.images or len(images), len(images))
        return images if count == len(images) else images.take(torch.arange(count))

    def corrupted(self, asked: Corruptions) -> Iterator[tuple[str, int, Images]]:
        """Name, severity and images of each corrupted set; raises ValueError at once for what is not there."""
        folder = Path(asked.folder).expanduser()
        return corrupted_sets(self.corruptible(asked), folder, asked.names or CORRUPTIONS, asked.severities)

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch: the ragged rest of the images is left out."""
        return steps_of(self.recipe, len(self.sets.train))

    def steps(self, epochs: float) -> int:
        """How many steps that many epochs are, at least one."""
        return steps_of(self.recipe, len(self.sets.train), epochs)

    def new_model(self) -> nn.Module:
        """The untrained network of the recipe's seed, on the device.

        Raises ValueError for a name that is none, ImportError for one whose package is not installed.
        """
        with drawn_from(torch.Generator().manual_seed(self.recipe.seed)):  # another thread may use torch's own
            model = self._built()
        if self.recipe.weights is not None:
            load_weights_(model, Path(self.recipe.weights).expanduser(), other_head=True)
        model = self.laid_out(model)
        if self.recipe.compile:
            compile_blocks_(model)
        return model

    def laid_out(self, model: nn.Module) -> nn.Module:
        """The same model on the device, its weights in the order that is fast there."""
        model = model.to(self.device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stub lacks it
        return model

    def empty_model(self) -> nn.Module:
        """The network on the meta device, for what its shapes alone say."""
        with torch.device("meta"):
            return self._built()

    def _built(self) -> nn.Module:
        images, own = self.sets.train, {"arguments": self.recipe.arguments} if self.recipe.arguments else {}
        if isinstance(images, Sentences):
            values, labels = self.recipe.aim == "values", images.names or None
            return build_encoder(self.recipe.model, labels=labels, values=values, **own)
        return build_model(self.recipe.model, classes=images.classes, channels=images.pixels.shape[1], **own)

    def _check_model(self) -> None:
        """Raise ValueError for a network that takes no such images, and for pruning that it does not take.

        What went well once does so in every job of a process, but for a model in a folder, whose files may change.
        """
        recipe, data = self.recipe, self.sets.train
        shape = None if isinstance(data, Sentences) else (data.classes, data.pixels.shape[1:])
        sections = (each and each.model_dump_json() for each in (recipe.prune, recipe.retrain))
        asked = (recipe.model, repr(recipe.arguments), shape, *sections)
        if asked in _fits and config_of(recipe.model) is None:
            return
        model = self.empty_model()
        if shape is None:
            self._check_length(model)
        else:
            self._check_size(model)
        if recipe.prune is not None:
            views = check_pruning(model, recipe.prune)
            if recipe.retrain is not None:
                check_adapting("retrain", recipe.retrain, model, views)
        _fits.add(asked)

    def _check_untrained(self) -> None:
        """Raise ValueError where nothing is trained first, and the network does not know the classes."""
        recipe, data, retrain = self.recipe, self.sets.train, self.recipe.retrain
        if recipe.train.epochs or recipe.aim == "embeddings":
            return
        own = classes_of(recipe.model) if isinstance(data, Sentences) and recipe.aim == "classes" else ()
        said = data.names if own and data.names != tuple(map(str, range(len(own)))) else own
        if said != own and len(said) == len(own):
            raise ValueError(
                f"texts.source: the classes {', '.join(said)} are not the model's, {', '.join(own)}: call them alike, "
                "give their numbers, or train it on these (train.epochs)"
            )
        if retrain is not None and "full" in retrain.train and retrain.distill is None:
            return
        model = self.empty_model()
        if recipe.weights is None:
            fresh = fresh_head(recipe.model, model)
        else:
            known = read_state(Path(recipe.weights).expanduser(), model.state_dict(), other_head=True)
            fresh = [name for name in model.state_dict() if name not in known]
        if fresh:
            raise ValueError(
                f"train.epochs: 0 trains no {fresh[0]!r}, which {recipe.weights or recipe.model} has not for what the "
                f"{recipe.keyed} ask: give epochs, or retrain everything on labels (retrain.train: [full], no distill)"
            )

    def _check_trainings(self) -> None:
        """Raise ValueError for trainings, also of a soup's members, that leave a phase no step, or an image nothing."""
        prune, members = self.recipe.prune, range(self.recipe.soup.members) if self.recipe.soup is not None else ()
        for each in (self.recipe, *(member_of(self.recipe, place) for place in members)):
            if each.retrain is not None and prune is not None:
                each.retrain.budgets(prune.phases, self.steps(self.recipe.train.epochs), self.epoch_steps)
            if isinstance(self.sets.train, Images):
                _check_augment(each.train.augment, self.sets.train.pixels.shape[-2:])

    def _check_size(self, model: nn.Module) -> None:
        """Raise ValueError for a network that takes no images of this size, as far as an empty one can tell."""
        example = self.example().to("meta")
        try:
            with torch.no_grad():
                model.eval()(example)
        except (RuntimeError, ValueError, AssertionError) as error:
            if "meta" not in str(error).lower():
                shape = tuple(example.shape[1:])
                raise ValueError(
                    f"model: {self.recipe.model!r} takes no images of {shape} (channels, rows, columns: "
                    f"{' '.join(str(error).split())[:150]}); give another, images.size, or its arguments"
                ) from None

    def _check_length(self, model: nn.Module) -> None:
        """Raise ValueError for texts of more tokens than there are places, which RoBERTa counts from its padding on."""
        places = [each for name, each in model.named_modules() if name.endswith("position_embeddings")]
        padded = [each for each in places if isinstance(each, nn.Embedding) and each.padding_idx is not None]
        most = min((each.num_embeddings - 1 - (each.padding_idx or 0) for each in padded), default=None)
        long = max(each.length for each in (self.sets.train, self.sets.measured) if isinstance(each, Sentences))
        if most is not None and long > most:
            raise ValueError(
                f"texts.length: {long} tokens are more than {self.recipe.model!r} has places for; set {most}"
            )

    def batches(self, part: int) -> Batches:
        """Augmented training batches; part: 0 for the training, j for the retraining of phase j, each in its order."""
        asked, examples, seed = self.recipe.train, self.sets.train, self.recipe.seed + 1_000_003 * part
        order = None if self.order is None else self.order + 1_000_003 * part
        if isinstance(examples, Sentences):
            return SentenceBatches(examples, batch_size=asked.batch_size, seed=seed, order_seed=order)
        return ImageBatches(
            examples,
            batch_size=asked.batch_size,
            seed=seed,
            order_seed=order,
            augment=Augment(**asked.augment.model_dump()),
            mean=self.sets.mean,
            std=self.sets.std,
            channels_last=self.channels_last,
        )

    def measured(self) -> Iterator[tuple[Any, Tensor]]:
        """The batches that are measured on, in order and without augmentation."""
        return self._plain(self.sets.measured)

    def held(self) -> Iterator[tuple[Any, Tensor]]:
        """The batches of held-out images, by which soups are chosen, in order and without augmentation."""
        assert self.sets.held is not None, "the recipe holds no images out"
        return self._plain(self.sets.held)

    def training(self, share: float) -> Iterator[tuple[Any, Tensor]]:
        """That share of an epoch's batches, of the training's size and augmented as there, in an order of their own."""
        batches = self.batches(_SETTLING)
        return (batches(step) for step in range(self.steps(share)))

    def _plain(self, images: Examples) -> Iterator[tuple[Any, Tensor]]:
        if isinstance(images, Sentences):
            return sentence_batches(images, batch_size=_EVALUATED_TEXTS)
        return plain_batches(
            images,
            batch_size=_EVALUATED,
            mean=self.sets.mean,
            std=self.sets.std,
            channels_last=self.channels_last,
        )


def count_training(recipe: ClassifierRecipe) -> int:
    """How many images or texts a recipe trains on; images are not decoded for it. Raises as reading them does."""
    if isinstance(recipe, EncoderRecipe):
        return len(Setting.anew(recipe.model_copy(update={"device": "cpu", "capture": "auto"})).sets.train)
    asked, whole = recipe.images, count_images(recipe.images.source)
    return whole if asked.measure_on == "test" else len(split_places(whole, asked.validation, SPLIT_SEED)[0])


def steps_of(recipe: ClassifierRecipe, images: int, epochs: float = 1) -> int:
    """How many steps that many epochs are, at least one; the ragged rest of the images is left out of each.

    Raises ValueError for images that are fewer than a batch.
    """
    each = images // recipe.train.batch_size
    if not each:
        raise ValueError(
            f"train.batch_size: {recipe.train.batch_size} is more than the {images} training {recipe.keyed}"
        )
    return max(1, round(epochs * each))


def _sets_of(recipe: ClassifierRecipe, device: torch.device) -> ImageSets:
    data, named = recipe.data, recipe.data.source
    key = (named, data.model_dump_json(), recipe.model if isinstance(recipe, EncoderRecipe) else "", str(device))
    with _lock:
        if key not in _sets:
            if isinstance(recipe, EncoderRecipe):
                train, measured, held = _text_parts(recipe)
                mean = std = torch.zeros(0)
            else:
                train, measured, held = _parts(recipe.images)
                mean, std = _normal(recipe.images, train)
            moved = (train.to(device), measured.to(device), mean.to(device), std.to(device))
            _sets[key] = ImageSets(*moved, None if held is None else held.to(device))
            if device.type == "cuda":  # other threads read them on streams of their own
                torch.cuda.synchronize(device)
        return _sets[key]


def _parts(asked: ImageSource) -> tuple[Images, Images, Images | None]:
    """The images that are trained on, measured on, held out. Raises ValueError for test images unlike the others."""
    whole = _images(asked, "train")
    train, held = (whole, None) if asked.measure_on == "test" else whole.split(asked.validation, SPLIT_SEED)
    if held is not None and asked.measure_on == "validation":
        return train, held, held
    test = _images(asked, "test")
    try:
        return train, matched(test, whole), held
    except ValueError as error:
        raise ValueError(f"images.source {asked.source!r}: {error}") from None


def _text_parts(recipe: EncoderRecipe) -> tuple[Sentences, Sentences, Sentences | None]:
    """The texts that are trained on, measured on, held out, as the folder's own tokenizer reads them."""
    from transformers import AutoConfig

    asked, folder = recipe.texts, Path(recipe.model).expanduser()
    tokenizer, config = read_tokenizer(folder), AutoConfig.from_pretrained(folder)
    most = min(tokenizer.model_max_length, longest(config) or asked.length)

    def read(split: str | None, names: Sequence[str]) -> Sentences:
        columns, length = asked.columns, min(asked.length, most)
        return read_sentences(
            asked.source, tokenizer, asked.aim, columns, label=asked.label, split=split, length=length, names=names
        )

    known = tuple(name for _, name in sorted((config.id2label or {}).items()))
    whole = read(None if Path(asked.source).expanduser().is_file() else "train", known)
    if asked.measure_on == "validation":
        train, held = whole.split(asked.validation, SPLIT_SEED)
        return train, held, held
    test = read("test", whole.names)
    if test.names != whole.names:
        alone = sorted(set(test.names) - set(whole.names)) or test.names
        raise ValueError(
            f"texts.source {asked.source!r}: class {alone[0]!r} is only among the test texts; leave it out"
        )
    return whole, test, None


def _normal(asked: ImageSource, train: Images) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of pixels / 255: the recipe's, or the training images' own."""
    mean, std = train.statistics()
    for key, given, own in (("mean", asked.mean, mean), ("std", asked.std, std)):
        if given is not None and len(given) != len(own):
            raise ValueError(f"images.{key}: give one number a channel, {len(own)}; got {list(given)}")
    mean = mean if asked.mean is None else torch.tensor(asked.mean)
    std = std if asked.std is None else torch.tensor(asked.std)
    if bool((std <= 0).any()):
        raise ValueError(f"images: a channel has the same value everywhere (deviations {std.tolist()}); set images.std")
    return mean, std


def _images(asked: ImageSource, split: str) -> Images:
    key = (asked.source, split) if asked.size is None else (asked.source, split, asked.size)
    if key not in _read:
        _read[key] = read_images(asked.source, split, size=asked.size)
    return _read[key]


def _check_augment(asked: Augmentation, size: Sequence[int]) -> None:
    """Raise ValueError for what leaves some images without a pixel of their own."""
    for key in ("crop", "cutout"):
        if getattr(asked, key) > min(size):
            raise ValueError(
                f"train.augment.{key}: {getattr(asked, key)} pixels leave nothing of many images, which are "
                f"{size[0]} x {size[1]}; set it to {min(size)} at most"
            )
