"""Soups of language models: members retrained from one pruned model, and averaged on disk.

    pruned ─▶ retrain, merge, save ─▶ member folders ─ average_folders ─▶ soup
           └▶ retrain as long as all of them

Every member is merged under the one mask, so that the average keeps every zero. A member that is finished is a folder,
complete or absent, and is not trained again. In a grid members are jobs; `blend` makes them here.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.machine import read_json, write_json
from prunus.masks import Masks
from prunus.run import stages
from prunus.run.recipe import Recipe, Retrain, digest, said
from prunus.run.texts import training_windows
from prunus.save import average_folders, save_model
from prunus.soup import check_weights, sms

__all__ = [
    "BEST",
    "LONGER",
    "MEAN",
    "SOUP",
    "Pruned",
    "Souped",
    "averaged",
    "blend",
    "longer_of",
    "member_key",
    "members_of",
]

MEAN, BEST, SOUP, LONGER = "mean of members", "best member", "soup", "as long as all"
Bar = Callable[[str, "float | None"], AbstractContextManager[Any]]
Numbers = dict[str, Any]
Member = tuple[Path, Numbers]  # its folder, and what was measured


def _no_bar(_name: str, _steps: float | None) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Pruned:
    """A pruned model that members are retrained from, its masks, its recipe; bar: shows how far each is."""

    loaded: stages.Loaded
    masks: Masks
    recipe: Recipe
    device: torch.device
    bar: Bar = _no_bar

    def retrained(self, name: str, asked: Retrain, checkpoint: Path) -> tuple[Any, Numbers]:
        """A retrained and merged copy of the model, its perplexity and what retraining did."""
        model = copy.deepcopy(self.loaded.model).to(self.device)
        with self.bar(name, asked.steps) as advance:
            report = stages.retrain(
                model,
                self.masks,
                stages.pruned_views(model, self.masks, self.recipe),
                training_windows(asked, self.loaded.tokenizer),
                asked,
                precision=stages.precision_of(self.recipe, self.device),
                checkpoint=checkpoint,
                distance=self.loaded.distance,
                on_step=None if advance is None else lambda done, _loss: advance.to(done),
            )
        with self.bar(f"evaluate {name}", None):
            found = stages.evaluate(stages.Loaded(model, self.loaded.tokenizer, None), self.recipe, self.device)
        shown = {k: v for k, v in asdict(report).items() if k not in ("losses", "merge")}
        return model.to("cpu"), {
            "perplexity": found,
            "retraining": shown | {"tokens_per_second": report.tokens_per_second},
        }

    def save(self, model: Any, folder: Path, key: str, found: Numbers) -> None:
        """Write a member to a folder, complete or absent."""
        info = {"recipe": self.recipe.model_dump(mode="json"), "pattern": self.recipe.prune.pattern}
        info |= {"member": key, "metrics": found}
        save_model(model, self.loaded.tokenizer, folder, masks=self.masks, info=info, source=self.loaded.folder)


@dataclass(frozen=True)
class Souped:
    """The soup, ready to be saved; the perplexities of members, their mean, the best, the soup and the longer run.

    retraining: name -> what `retrain` reports. summary: what each member changed, which was best, the weights.
    """

    loaded: stages.Loaded
    perplexity: dict[str, dict[str, float]]
    retraining: dict[str, dict[str, Any]]
    summary: dict[str, Any]


def members_of(recipe: Recipe) -> list[Retrain]:
    """The retraining of each member."""
    assert recipe.soup is not None
    assert recipe.retrain is not None
    return recipe.soup.each(recipe.retrain)


def longer_of(recipe: Recipe) -> Retrain | None:
    """The retraining that takes as many steps as all members, if it is asked for."""
    first, *_ = each = members_of(recipe)
    steps = sum(one.steps for one in each)
    return first.model_copy(update={"steps": steps}) if recipe.soup is not None and recipe.soup.longer else None


def member_key(recipe: Recipe, asked: Retrain) -> str:
    """Hash of what decides a member: everything but the other members, the output and what is done later."""
    return digest({**said(recipe, but={"soup", "out", "save"}), "retrain": said(asked)})


def blend(pruned: Pruned, folder: Path, soup: Path) -> Souped:
    """The soup of a pruned model, which stays as it is; members stand in `folder`, their average in `soup`.

    Checkpoints of a member under way are in `folder`, too. One copy of the model is made beside it, and the average is
    made piece by piece. Raises ValueError for members that left their mask, and what retraining raises.
    """
    asked = members_of(pruned.recipe)

    def retrain(pruned: Pruned, phase: int, place: int) -> Member:
        path = folder / str(place + 1)
        return path, _kept(pruned, f"member {place + 1}", asked[place], path)

    def average(pruned: Pruned, members: Sequence[Member]) -> Souped:
        whole = longer_of(pruned.recipe)
        longer = None if whole is None else _kept(pruned, LONGER, whole, folder / "longer.json")
        return averaged(pruned, members, longer, soup)

    before: Souped | None = None
    (made,) = sms(before, phases=1, members=len(asked), prune=lambda *_: pruned, retrain=retrain, average=average)
    assert made.average is not None
    return made.average


def averaged(pruned: Pruned, members: Sequence[Member], longer: Numbers | None, soup: Path) -> Souped:
    """The average of finished members, written to `soup` and measured.

    The best member is that of the lowest perplexity on the first text of `evaluate.data`.
    """
    recipe, asked = pruned.recipe, members_of(pruned.recipe)
    assert recipe.soup is not None
    weights = None if recipe.soup.average == "uniform" else recipe.soup.average
    average_folders([folder for folder, _ in members], soup, weights)
    made = stages.load(
        recipe.model_copy(update={"model": str(soup), "streaming": recipe.streaming and not recipe.evaluate.tasks})
    )
    if made.source is None:
        pruned.masks.check(made.model)
    with pruned.bar("evaluate soup", None):
        own = stages.evaluate(made, recipe, pruned.device)
    found = {f"member {place}": numbers for place, (_, numbers) in enumerate(members, 1)}
    each = [numbers["perplexity"] for _, numbers in members]
    best = _best(each)
    others = {} if longer is None else {LONGER: longer}
    perplexity = {name: numbers["perplexity"] for name, numbers in found.items()} | {
        MEAN: {text: statistics.fmean(one[text] for one in each) for text in each[0]},
        BEST: each[best],
        SOUP: own,
        **{name: other["perplexity"] for name, other in others.items()},
    }
    summary = {
        "members": [{key: getattr(one, key) for key in ("seed", "lr", "steps", "warmup")} for one in asked],
        "best": best + 1,
        "weights": list(check_weights(weights, len(members))),
        "steps": sum(one.steps for one in asked),
    }
    retraining = {name: one["retraining"] for name, one in (found | others).items()}
    loaded = pruned.loaded
    home = loaded.folder if made.source is None else None  # a streamed soup brings its own config and tokenizer
    return Souped(stages.Loaded(made.model, loaded.tokenizer, home, made.source), perplexity, retraining, summary)


def _best(perplexities: Sequence[Mapping[str, float]]) -> int:
    first = next(iter(perplexities[0]))
    return min(range(len(perplexities)), key=lambda place: perplexities[place][first])


def _kept(pruned: Pruned, name: str, asked: Retrain, path: Path) -> Numbers:
    """What a member's folder says, or the file of the longer run, whose model is not kept; else it is trained first."""
    key, alone = member_key(pruned.recipe, asked), path.suffix == ".json"
    stored = path if alone else path / "prunus.json"
    known = read_json(stored) if stored.is_file() else {}
    if known.get("member") == key:
        return known["metrics"]
    checkpoint = path.parent / f"{key[:16]}.pt"
    model, found = pruned.retrained(name, asked, checkpoint)
    if alone:
        write_json(path, {"member": key, "metrics": found})
    else:
        pruned.save(model, path, key, found)
    checkpoint.unlink(missing_ok=True)
    return found
