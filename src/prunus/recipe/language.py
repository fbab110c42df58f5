"""The recipe of a language model, and which of its keys go together."""

# A task's section may be narrower than that of all, because sections are frozen, which pyright does not see:
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from prunus.masks import Masks
from prunus.recipe.adapting import LanguageRetrain, LanguageTraining, Reconstruct
from prunus.recipe.hashed import given
from prunus.recipe.names import methods
from prunus.recipe.pruning import MethodName, Prune, check_during
from prunus.recipe.shared import Recipe, check_members
from prunus.recipe.soups import Soup
from prunus.recipe.texts import Calibrate, Evaluate, Shrink
from prunus.recipe.values import check_there, looks_local
from prunus.report import TRACKERS
from prunus.soup import phase_sparsities
from prunus.train import During

__all__ = ["LanguageRecipe"]


def _trackers(value: Any) -> Any:
    names = value.split(",") if isinstance(value, str) else value
    strange = next((name for name in names if name not in TRACKERS), None) if isinstance(names, (list, tuple)) else None
    if strange is not None:
        raise ValueError(f"there is no tracker {strange!r}; there are {', '.join(TRACKERS)}")
    return names


Trackers = Annotated[tuple[str, ...], BeforeValidator(_trackers)]


class LanguageRecipe(Recipe):
    """A run of a language model: load, prune, (reconstruct), (retrain, merge, (average)), evaluate, save.

    during: a method that prunes while everything is trained as `train` says, in place of a criterion.
    model: a Hugging Face name or folder, a .gguf file, or "embedded". dtype: "auto" is the checkpoint's own.
    precision: autocast while retraining; trained parameters are float32 throughout.
    """

    model: str = "embedded"
    """Name, folder or file; 'embedded'; or a network such as resnet18."""
    trust_remote_code: bool = False
    """Run code that lies beside the model's weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory and on disk."""
    log_with: Trackers = ()
    """Trackers besides metrics.jsonl: tensorboard, wandb, mlflow."""
    streaming: bool = False
    """Read blocks from the checkpoint one at a time, for models larger than memory."""
    train: LanguageTraining | None = None
    during: MethodName = None
    prune: Prune = Prune()
    calibrate: Calibrate = Calibrate()
    shrink: Shrink | None = None
    reconstruct: Reconstruct | None = None
    retrain: LanguageRetrain | None = None
    soup: Soup | None = None
    evaluate: Evaluate = Evaluate()

    apart: ClassVar[int] = 1000

    @model_validator(mode="before")
    @classmethod
    def _smaller(cls, value: Any) -> Any:
        """Of a model that becomes smaller nothing else goes unless that is said."""
        if isinstance(value, dict) and value.get("shrink") is not None and "prune" not in value:
            return {**value, "prune": {"criterion": "magnitude", "sparsity": 0.0}}
        return value

    @property
    def drawn(self) -> int:
        """That of retraining."""
        return 0 if self.retrain is None else self.retrain.seed

    @model_validator(mode="after")
    def _check(self) -> LanguageRecipe:
        if looks_local(self.model):
            check_there(self.model, "give a path that exists", key="model: ")
        for key, adapting in (("reconstruct", self.reconstruct), ("retrain", self.retrain)):
            if adapting is not None and "lora" in adapting.train and self.prune.sparsity > 0:
                raise ValueError(
                    f"{key}.train: merging 'lora' would fill pruned weights; train 'mask_lora' or 'scale_lora', which "
                    "keep them zero, or 'lora_prune', which drops that part"
                )
        if self.soup is not None:
            self._check_soup(self.soup)
        if self.prune.phases > 1:
            self._check_phases()
        if self.retrain is not None and self.retrain.keep_adapter and (self.soup or self.prune.phases > 1):
            raise ValueError("retrain.keep_adapter: of one retraining, not of phases or members; leave it out")
        for section in (self.train, self.retrain):
            if section is not None:
                self._check_retrain(section)
        if self.during is not None or self.train is not None:
            self._check_during()
        if self.shrink is not None and (self.streaming or self.trust_remote_code):
            strange = "streaming" if self.streaming else "trust_remote_code"
            raise ValueError(f"shrink: the smaller model is made anew, in memory: leave out {strange}")
        if self.streaming and self.retrain is not None and self.retrain.schedule == "allr":
            raise ValueError("retrain.schedule: allr compares with the dense weights: leave out streaming, or use llr")
        if self.streaming and self.prune.sharing().reads == "loss":
            raise ValueError("prune.allocation: this one tries the whole model in memory: leave out streaming")
        whole = [key for key in ("tasks", "speed") if getattr(self.evaluate, key)]
        if self.streaming and whole and self.retrain is None:
            raise ValueError(f"evaluate.{whole[0]}: the whole model must be in memory: leave out this or streaming")
        return self

    def _check_during(self) -> None:
        if self.during is None or self.train is None:
            missing = "train: {steps: 1000}" if self.train is None else "during: elsa"
            raise ValueError(f"during says what prunes, and train how long it trains: give {missing} as well")
        strange = [key for key in ("streaming", "reconstruct") if getattr(self, key)]
        own = ["phases", "allocation", "scope", *([] if self.begins_masked else ["criterion"])]
        check_during(self.during, self.prune, own, strange, decay=self.train.weight_decay)
        self.method().check(self.train.steps, self.train.steps)
        self._check_low_rank(self.during, self.train)

    def _check_low_rank(self, during: Mapping[str, Mapping[str, Any]], train: LanguageTraining) -> None:
        name, options = next(iter(during.items()))
        if "lora" in train.train and not methods.knows(name, "move"):
            raise ValueError(f"train.train: {name} prunes weights that are trained themselves: set it to [full]")
        if "lora" not in train.train and options.get("move") is not None:
            raise ValueError(f"during.{name}.move: weights that are trained themselves move anyway: leave it out")
        if "lora" not in train.train and options.get("lam") == 0:
            raise ValueError(f"during.{name}.lam: 0 pulls no weight that is trained to zero: give more")

    @property
    def begins_masked(self) -> bool:
        """Whether the method of `during` begins with the masks of `prune.criterion`."""
        return self.during is not None and methods.knows(self.during, "prior")

    def method(self, prior: Masks | None = None) -> During:
        """The method of `during`, with the pattern of `prune`, the seed of `train` and masks where it takes them."""
        assert self.during is not None
        asked = self.prune
        return methods.make(
            self.during, asked.sparsity, seed=given(self.train).seed, pattern=asked.pattern, prior=prior
        )

    def _check_retrain(self, retrain: LanguageRetrain) -> None:
        texts = list(self.evaluate.data)
        if retrain.evaluate_every and not texts:
            raise ValueError("retrain.evaluate_every: evaluate.data has no text to measure meanwhile: give one")
        if retrain.watch is not None and retrain.watch not in texts:
            raise ValueError(f"retrain.watch: evaluate.data has no text {retrain.watch!r}, only {', '.join(texts)}")
        if (retrain.keep_best or retrain.patience) and len(texts) < 2:
            raise ValueError(
                "retrain.keep_best, patience: what chooses is not what is reported: give evaluate.data a second text"
            )
        if self.capture is True and retrain.optimizer != "adamw":
            raise ValueError("capture: steps of adamw_8bit are not recorded; leave out one of the two")
        teacher = None if retrain.distill is None else retrain.distill.teacher
        if teacher is not None and looks_local(teacher):
            check_there(teacher, "give a path that exists", key="retrain.distill.teacher: ")

    def phase(self, index: int) -> LanguageRecipe:
        """The recipe of one phase, from 0: its sparsity, and its share of the steps."""
        prune, retrain = self.prune, self.retrain
        prune = prune.model_copy(update={"sparsity": phase_sparsities(prune.sparsity, prune.phases, prune.ramp)[index]})
        if retrain is not None:
            retrain = retrain.model_copy(update={"steps": retrain.shared(retrain.steps, prune.phases)[index]})
        return self.model_copy(update={"prune": prune, "retrain": retrain})

    @property
    def moves(self) -> bool:
        """Whether what pruning leaves is more than the dense model under masks."""
        return bool(self.during or self.reconstruct or self.shrink) or self.prune.how().score is None

    def _check_phases(self) -> None:
        if self.retrain is None or self.retrain.add_biases:
            raise ValueError("prune.phases: each is retrained: give a section retrain, without add_biases")
        strange = [key for key in ("streaming", "reconstruct") if getattr(self, key)]
        if strange:
            raise ValueError(f"prune.phases: the whole model is retrained in each: leave out {strange[0]}")
        self.phase(0)

    def _check_soup(self, soup: Soup) -> None:
        if self.retrain is None:
            raise ValueError("soup: its members are retrained as `retrain` says; give a section retrain")
        if not self.evaluate.data:
            raise ValueError("soup: members are compared by the first text of evaluate.data: give one")
        if strange := [name for name in soup.choosing if name != "greedy"]:
            raise ValueError(f"soup: {strange[0]} averages are made of classifiers; take uniform, greedy or weights")
        if soup.choosing and len(self.evaluate.data) < 2:
            raise ValueError(
                "soup: greedy averages are chosen by the first text of evaluate.data: give a second one to report"
            )
        watching = soup.choosing and (self.retrain.keep_best or self.retrain.patience)
        if watching and len({*list(self.evaluate.data)[:1], self.retrain.watch} - {None}) == len(self.evaluate.data):
            raise ValueError(
                "soup, retrain.watch: what chooses is not what is reported: give evaluate.data a third text"
            )
        vary = {"vary.epochs": soup.vary.epochs, "vary.weight_decay": soup.vary.weight_decay}
        vary |= {"vary.augment": soup.vary.augment, "vary.seed": soup.vary.seed == "order"}
        asked = {**vary, "line": soup.line, "plane": soup.plane, "baselines": set(soup.baselines) - {"longer"}}
        strange = [key for key, value in asked.items() if value]
        if strange:
            raise ValueError(f"soup.{strange[0]}: this goes with soups of classifiers; leave it out")
        check_members(self)
