"""The recipe of a classifier, and which of its keys go together."""

# A task's section may be narrower than that of all, because sections are frozen, which pyright does not see:
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from prunus.data import Aim, check_model, config_of
from prunus.recipe.images import Corruptions, ImageSource, Labelled
from prunus.recipe.pruning import ClassifierPrune, MethodName, Prune, check_during
from prunus.recipe.retraining import ClassifierRetrain
from prunus.recipe.shared import Recipe, check_members
from prunus.recipe.soups import ClassifierSoup, Soup
from prunus.recipe.training import Training
from prunus.recipe.values import Seed, Share

__all__ = ["FORKING", "ClassifierRecipe"]

FORKING = ("gmp", "dpf")  # methods whose mask is final some time before the training ends


class ClassifierRecipe(Recipe):
    """A run of a classifier: train, (during a method), prune, retrain, (average), measure; lengths are in epochs.

    images ─▶ train (dense, or during a method) ─▶ prune ─▶ retrain, `prune.phases` times ─▶ measure

    model: a name of `data.build_model`, such as resnet18, resnet20, wrn28_10, "timm:NAME", "torchvision:NAME", with
    arguments of theirs. weights: a file of pretrained ones, with which training begins.
    during: one method that prunes while training, by name, with its options; it reaches prune.sparsity.
    recalibrate: share of an epoch's augmented batches on which BatchNorm statistics are counted anew, after pruning and
    at the end of every run; 0: never.
    """

    images: ImageSource
    model: str = "resnet18"
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    seed: Seed = 0
    """Of classifiers: seed of weights, order and augmentation."""
    train: Training = Training()
    during: MethodName = None
    prune: ClassifierPrune | None = None
    retrain: ClassifierRetrain | None = None
    soup: ClassifierSoup | None = None
    recalibrate: Share = 1.0
    """Of classifiers: share of the images that count BatchNorm anew."""
    corruptions: Corruptions | None = None
    channels_last: Literal["auto"] | bool = "auto"

    keyed: ClassVar[str] = "images"
    apart: ClassVar[int] = 15_485_863  # so that the members of one run are not those of the next seed's

    @property
    def drawn(self) -> int:
        """That of the whole run."""
        return self.seed

    @model_validator(mode="after")
    def _check(self) -> ClassifierRecipe:
        if self.packed:
            raise ValueError("save.packed is for language models; leave it out")
        if self.precision == "fp16":
            raise ValueError("precision: classifiers are trained in fp32 or bf16; leave out fp16")
        if self.prune is None and (self.during is not None or self.retrain is not None):
            raise ValueError(f"{'during' if self.during else 'retrain'} needs prune.sparsity: give a section prune")
        if self.during is not None and self.prune is not None:
            self._check_during(self.during, self.prune)
        rewind = self.retrain.rewind if self.retrain is not None else None
        if rewind is not None and rewind not in self.train.snapshots:
            raise ValueError(f"retrain.rewind: epoch {rewind} is not kept; set train.snapshots: [{rewind}]")
        if rewind is not None and self.prune is not None and self.prune.kind != "zeros":
            raise ValueError("retrain.rewind: a network that became smaller has no earlier weights; leave it out")
        if self.soup is not None:
            self._check_soup(self.soup)
        self._check_network()
        if not self.train.epochs:
            self._check_untrained()
        if self.retrain is not None and self.retrain.train != ("full",):
            self._check_subset(self.retrain)
        if self.weights is not None and not Path(self.weights).expanduser().is_file():
            raise ValueError(f"weights: no file {self.weights!r} (seen from {os.getcwd()}); check the path")
        return self

    @property
    def data(self) -> Labelled:
        """What it is trained and measured on, the section `keyed`."""
        return getattr(self, self.keyed)

    @property
    def aim(self) -> Aim:
        """What the network is to say of its inputs."""
        return "classes"

    def _check_network(self) -> None:
        check_model(self.model, self.arguments)

    def _check_untrained(self) -> None:
        """Refuse what goes by a training, where there is none."""
        if self.weights is None and config_of(self.model) is None:
            raise ValueError("train.epochs: 0 leaves the network as it came, and this one comes without weights")
        if self.during is not None or self.train.ema is not None:
            raise ValueError(f"{'during' if self.during else 'train.ema'}: nothing is trained: give train.epochs")
        if self.retrain is not None and (self.retrain.lr is None or self.retrain.share is not None):
            key = "lr" if self.retrain.share is None else "epochs (in place of share)"
            raise ValueError(f"retrain: there is no training to go by (train.epochs: 0): give retrain.{key}")

    def _check_subset(self, retrain: ClassifierRetrain) -> None:
        if self.soup is not None:
            raise ValueError("retrain.train: members of a classifier's soup are retrained whole: leave it out")
        if self.prune is not None and self.prune.kind != "zeros":
            raise ValueError("retrain.train: a network that became smaller is trained whole: leave it out")
        if not self.train.chosen.partly:
            name = type(self.train.chosen).__name__.lower()
            raise ValueError(f"retrain.train: {name} is of whole networks: take another train.optimizer, or [full]")

    def _check_during(self, during: Mapping[str, Mapping[str, Any]], prune: Prune) -> None:
        if self.retrain is not None and self.retrain.rewind is not None:
            raise ValueError("retrain.rewind goes with pruning after training; leave it out beside during")
        if self.retrain is not None and self.retrain.distill is not None:
            raise ValueError("retrain.distill: beside during there is no dense network to teach; leave out one")
        fixed = prune.where().sparsity is not None  # by a pattern, beside which an allocation is refused anyway
        own = ("kind", "phases", "criterion", "scope", *([] if fixed else ["allocation"]))
        check_during(during, prune, own, decay=self.train.weight_decay)

    def _check_soup(self, soup: Soup) -> None:
        if self.prune is None:
            raise ValueError("soup needs prune.sparsity: members are copies of one pruned network")
        if self.prune.kind != "zeros":
            raise ValueError("soup: members share zeros; leave out prune.kind")
        if self.retrain is None and (self.during is None or next(iter(self.during)) not in FORKING):
            raise ValueError(
                "soup: members are retrainings: give a section retrain (without it, during: gmp or dpf fork members "
                "when their mask is final)"
            )
        if self.retrain is not None and self.retrain.rewind is not None:
            raise ValueError("retrain.rewind would throw the average of every phase away; leave it out")
        if soup.choosing and self.images.measure_on == "test":
            raise ValueError(
                f"soup: {soup.choosing[0]} averages are chosen by held-out images: set images.measure_on: both (the "
                "test images measure), or validation"
            )
        if self.retrain is None and self.train.ema is not None:
            raise ValueError(
                "train.ema: members forked within a training cannot go on with its running mean; leave it out"
            )
        vary = soup.vary
        if self.retrain is None and (vary.epochs or vary.steps or vary.schedule or vary.warmup or vary.lr):
            raise ValueError(
                "soup.vary: members forked within a training end it: leave out lr, schedule, warmup, steps and epochs"
            )
        check_members(self)
