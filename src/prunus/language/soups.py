"""Soups of language models: members retrained from one pruned model, and averaged on disk.

    pruned ─▶ retrain, merge, save ─▶ member folders ─ write_average ─▶ soup
           └▶ retrain as long as all of them

Every member is merged under the one mask, so that the average keeps every zero. A member that is finished is a folder,
complete or absent, and is not trained again. In a grid members are jobs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prunus.adapt import Adaptation
from prunus.jobs import BEST, LONGER, MEAN, SOUP, choose_greedily, joined_by
from prunus.language import stages
from prunus.machine import hidden_folder, read_json, write_json
from prunus.masks import Masks
from prunus.recipe import Choice, LanguageRecipe, LanguageRetrain, averages, digest, given, member_of, said
from prunus.report import Log, named_log, progress
from prunus.save import average_folders, is_whole, save_model
from prunus.soup import check_weights
from prunus.train import lowest

__all__ = [
    "Member",
    "Pruned",
    "Souped",
    "as_long_as_all",
    "averaged",
    "longer_of",
    "member",
    "member_key",
    "members_of",
    "write_average",
]

Average = Choice | tuple[float, ...]
Numbers = dict[str, Any]
Member = tuple[Path, Numbers]  # its folder, and what was measured


@dataclass(frozen=True)
class Pruned:
    """A pruned model that members are retrained from, its masks, the recipe of its phase, from 0.

    log: to trackers.
    """

    loaded: stages.Loaded
    masks: Masks
    recipe: LanguageRecipe
    device: torch.device
    phase: int = 0
    log: Log | None = None

    def retrain_(
        self, name: str, checkpoint: Path | None = None, before_merge: Callable[[Adaptation], None] | None = None
    ) -> stages.Retrained:
        """What happened while the model was retrained and merged in place, as the recipe says."""
        asked = given(self.recipe.retrain)
        with progress(name, asked.steps, tokens=asked.step_tokens) as advance:
            return stages.retrain(
                self.loaded,
                self.masks,
                self.recipe,
                self.device,
                checkpoint=checkpoint,
                on_step=advance.step,
                log=self.log and named_log(self.log, name),
                before_merge=before_merge,
            )

    def member(self, name: str, asked: LanguageRetrain, checkpoint: Path, folder: Path | None, key: str) -> Numbers:
        """The perplexity of a retrained and merged copy, and what retraining did. folder: where the copy is saved."""
        loaded = self.loaded.copied()
        own = replace(self, loaded=loaded, recipe=self.recipe.model_copy(update={"retrain": asked}))
        report = own.retrain_(name, checkpoint)
        with progress(f"evaluate {name}", None):
            perplexity = stages.evaluate(loaded, self.recipe, self.device)
        shown = {k: v for k, v in report.numbers().items() if k not in ("losses", "merge")}
        found = {"perplexity": perplexity, "retraining": shown}
        if folder is not None:
            loaded.model.to("cpu")
            info = {"recipe": self.recipe.model_dump(mode="json"), "pattern": self.recipe.prune.pattern}
            own.save(folder, info | {"member": key, "metrics": found})
        return found

    def save(self, folder: Path, info: Mapping[str, Any]) -> None:
        """Write the model to a folder, complete or absent."""
        loaded = self.loaded
        save_model(loaded.model, loaded.tokenizer, folder, masks=self.masks, info=info, source=loaded.folder)


@dataclass(frozen=True)
class Souped:
    """The soup, ready to be saved; the perplexities of members, their mean, the best, the soup and the longer run.

    retraining: name -> what `retrain` reports. summary: what each member changed, which was best, the weights.
    """

    loaded: stages.Loaded
    perplexity: dict[str, dict[str, float]]
    retraining: dict[str, dict[str, Any]]
    summary: dict[str, Any]


def members_of(recipe: LanguageRecipe) -> list[LanguageRetrain]:
    """The retraining of each member."""
    return [given(member_of(recipe, place).retrain) for place in range(given(recipe.soup).members)]


def longer_of(recipe: LanguageRecipe) -> LanguageRetrain | None:
    """The retraining that takes as many steps as all members, if it is asked for."""
    first, *_ = each = members_of(recipe)
    steps = sum(one.steps for one in each)
    return first.model_copy(update={"steps": steps}) if "longer" in given(recipe.soup).baselines else None


def write_average(pruned: Pruned, members: Sequence[Member], average: Average, out: Path) -> tuple[float, ...] | None:
    """Write the average of finished members to `out`; the weights of a mean, None: all equal.

    A greedy soup is chosen by perplexity on the first text of `evaluate.data`.
    """
    folders = [folder for folder, _ in members]
    weights = average if isinstance(average, tuple) else _chosen(pruned, members, average, out)
    if isinstance(average, tuple) or averages.name(average) in ("uniform", *given(pruned.recipe.soup).choosing):
        average_folders(folders, out, weights)
        return weights
    join = joined_by(average, len(folders))
    with hidden_folder(out) as place:
        base = place / "base" if averages.knows(average, "base") else None
        if base is not None:
            pruned.save(base, {})
        average_folders(folders, out, how=join, base=base)
    return tuple(join.weights)


def _chosen(pruned: Pruned, members: Sequence[Member], average: Choice, out: Path) -> tuple[float, ...] | None:
    """The weights that a greedy soup gives members; None for other averages."""
    if averages.name(average) not in given(pruned.recipe.soup).choosing:
        return None
    text, data = next(iter(pruned.recipe.evaluate.data.items()))
    alone = pruned.recipe.evaluate.model_copy(update={"data": {text: data}})
    recipe = pruned.recipe.model_copy(update={"evaluate": alone})
    known = {folder: numbers["perplexity"] for folder, numbers in members}

    def score(folder: Path) -> float:
        return -(known.get(folder) or _measured(pruned, recipe, folder)[1])[text]

    chosen = choose_greedily([*known], out, score).members
    return tuple(1 / len(chosen) if place in chosen else 0.0 for place in range(len(members)))


def _measured(pruned: Pruned, recipe: LanguageRecipe, folder: Path) -> tuple[stages.Loaded, dict[str, float]]:
    """An average on disk, and its perplexities."""
    streaming = recipe.streaming and not recipe.evaluate.tasks
    made = stages.load(recipe.model_copy(update={"model": str(folder), "streaming": streaming}))
    made = replace(made, tokens=pruned.loaded.tokens)
    if made.source is None:
        pruned.masks.check(made.model)
    return made, stages.evaluate(made, recipe, pruned.device)


def member_key(recipe: LanguageRecipe, asked: LanguageRetrain) -> str:
    """Hash of what decides a member: everything but the other members, the output and what is done later."""
    return digest({**said(recipe, but={"soup", "out", "save"}), "retrain": said(asked)})


def member(pruned: Pruned, place: int, folder: Path) -> Member:
    """A member, from 0: trained, merged and written below `folder`, unless it stands there."""
    path = folder / str(place + 1)
    return path, _kept(pruned, f"member {place + 1}", members_of(pruned.recipe)[place], path)


def as_long_as_all(pruned: Pruned, folder: Path) -> Numbers | None:
    """What one member is that is trained as long as all together, if it is asked for; its model is not kept."""
    asked = longer_of(pruned.recipe)
    return None if asked is None else _kept(pruned, LONGER, asked, folder / "longer.json")


def averaged(
    pruned: Pruned, members: Sequence[Member], longer: Numbers | None, soup: Path, *, last: bool = True
) -> Souped:
    """The average of finished members, written to `soup` and measured. last: with the further averages, measured only.

    The best member is that of the lowest perplexity on the first text of `evaluate.data`.
    """
    recipe, asked = pruned.recipe, members_of(pruned.recipe)
    more: dict[str, dict[str, float]] = {}
    for name, choice in (given(recipe.soup).further if last else {}).items():
        with hidden_folder(soup) as place:
            write_average(pruned, members, choice, place / "also")
            more[f"{SOUP}, {name}"] = _measured(pruned, recipe, place / "also")[1]
    weights = write_average(pruned, members, given(recipe.soup).average, soup)
    with progress("evaluate soup", None):
        made, own = _measured(pruned, recipe, soup)
    found = {f"member {place}": numbers for place, (_, numbers) in enumerate(members, 1)}
    each = [numbers["perplexity"] for _, numbers in members]
    best = _best(each)
    others = {} if longer is None else {LONGER: longer}
    perplexity = {name: numbers["perplexity"] for name, numbers in found.items()} | {
        MEAN: {text: statistics.fmean(one[text] for one in each) for text in each[0]},
        BEST: each[best],
        SOUP: own,
        **more,
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
    made = replace(loaded, model=made.model, folder=home, source=made.source)
    return Souped(made, perplexity, retraining, summary)


def _best(perplexities: Sequence[Mapping[str, float]]) -> int:
    first = next(iter(perplexities[0]))
    return lowest([each[first] for each in perplexities])


def _kept(pruned: Pruned, name: str, asked: LanguageRetrain, path: Path) -> Numbers:
    """What a member's folder says, or the file of the longer run, whose model is not kept; else it is trained first."""
    key, alone = member_key(pruned.recipe, asked), path.suffix == ".json"
    stored = path if alone else path / "prunus.json"
    known = read_json(stored) if stored.is_file() else {}
    if known.get("member") == key and (alone or is_whole(path)):
        return known["metrics"]
    checkpoint = path.parent / f"{key[:16]}.pt"
    found = pruned.member(name, asked, checkpoint, None if alone else path, key)
    if alone:
        write_json(path, {"member": key, "metrics": found})
    checkpoint.unlink(missing_ok=True)
    return found
