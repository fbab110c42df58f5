"""Soups of language models: members retrained from one pruned model, one after another, and averaged on disk.

    pruned ─▶ retrain, merge, save ─▶ FOLDER/1 .. FOLDER/m ─ average_folders ─▶ SOUP
           └▶ retrain as long as all of them ─▶ FOLDER/longer.json

Every member is merged under the one mask, so that the average keeps every zero. A member that is finished is a folder,
complete or absent, and is not trained again.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.machine import write_json
from prunus.masks import Masks
from prunus.run import stages
from prunus.run.recipe import Recipe, Retrain, digest, said
from prunus.save import average_folders, load_info, save_model
from prunus.soup import check_weights

__all__ = ["BEST", "LONGER", "MEAN", "SOUP", "Souped", "blend"]

MEAN, BEST, SOUP, LONGER = "mean of members", "best member", "soup", "as long as all"
Bar = Callable[[str, "float | None"], AbstractContextManager[Any]]
Perplexity = dict[str, float]


@dataclass(frozen=True)
class Souped:
    """The soup, ready to be saved; the perplexities of members, their mean, the best, the soup and the longer run.

    retraining: name -> what `retrain` reports. summary: what each member changed, which was best, the weights.
    """

    loaded: stages.Loaded
    perplexity: dict[str, Perplexity]
    retraining: dict[str, dict[str, Any]]
    summary: dict[str, Any]


def blend(
    loaded: stages.Loaded,
    masks: Masks,
    recipe: Recipe,
    device: torch.device,
    folder: Path,
    soup: Path,
    *,
    bar: Bar = lambda _name, _steps: nullcontext(),
) -> Souped:
    """The soup of the pruned model `loaded`, which stays as it is; members stand in `folder`, their average in `soup`.

    Checkpoints of a member under way are in `folder`, too. One copy of the model is made beside it, and the average is
    made piece by piece. The best member is that of the lowest perplexity on the first text of `evaluate.data`.
    Raises ValueError for members that left their mask, and what retraining raises.
    """
    assert recipe.soup is not None
    assert recipe.retrain is not None
    oven = _Oven(loaded, masks, recipe, device, folder, bar)
    asked = recipe.soup.each(recipe.retrain)
    members = [oven.member(place + 1, each) for place, each in enumerate(asked)]
    longer = asked[0].model_copy(update={"steps": sum(each.steps for each in asked)})
    found = {f"member {place + 1}": member for place, member in enumerate(members)}
    others = {LONGER: oven.longer(longer)} if recipe.soup.longer else {}
    weights = None if recipe.soup.average == "uniform" else recipe.soup.average
    average_folders([folder / str(place + 1) for place in range(len(members))], soup, weights)
    made = stages.load(
        recipe.model_copy(update={"model": str(soup), "streaming": recipe.streaming and not recipe.evaluate.tasks})
    )
    if made.source is None:
        masks.check(made.model)
    with bar("evaluate soup", None):
        perplexity = {SOUP: stages.evaluate(made, recipe, device)}
    each = [member["perplexity"] for member in members]
    best = _best(each)
    perplexity = {name: member["perplexity"] for name, member in found.items()} | {
        MEAN: {text: statistics.fmean(one[text] for one in each) for text in each[0]},
        BEST: each[best],
        **perplexity,
        **{name: other["perplexity"] for name, other in others.items()},
    }
    changes = [{key: getattr(one, key) for key in ("seed", "lr", "steps", "warmup")} for one in asked]
    summary = {
        "members": changes,
        "best": best + 1,
        "weights": list(check_weights(weights, len(members))),
        "steps": longer.steps,
    }
    retraining = {name: one["retraining"] for name, one in (found | others).items()}
    home = loaded.folder if made.source is None else None  # a streamed soup brings its own config and tokenizer
    return Souped(stages.Loaded(made.model, loaded.tokenizer, home, made.source), perplexity, retraining, summary)


def _best(perplexities: Sequence[Mapping[str, float]]) -> int:
    first = next(iter(perplexities[0]))
    return min(range(len(perplexities)), key=lambda place: perplexities[place][first])


@dataclass(frozen=True)
class _Oven:
    """Retrains copies of one pruned model."""

    loaded: stages.Loaded
    masks: Masks
    recipe: Recipe
    device: torch.device
    folder: Path
    bar: Bar

    def member(self, number: int, asked: Retrain) -> dict[str, Any]:
        """Perplexity and retraining of a member, from its folder or after it was trained and saved there."""
        place, key = self.folder / str(number), self._key(asked)
        info = load_info(place) if (place / "prunus.json").is_file() else {}
        if info.get("member") == key:
            return info["metrics"]
        model, found = self._trained(f"member {number}", asked, key)
        info = {"recipe": self.recipe.model_dump(mode="json"), "pattern": self.recipe.prune.pattern}
        info |= {"member": key, "metrics": found}
        save_model(model, self.loaded.tokenizer, place, masks=self.masks, info=info, source=self.loaded.folder)
        self._checkpoint(key).unlink(missing_ok=True)
        return found

    def longer(self, asked: Retrain) -> dict[str, Any]:
        """Perplexity and retraining of the run that takes as many steps as all members; its model is not kept."""
        path, key = self.folder / "longer.json", self._key(asked)
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if stored.get("member") == key:
            return stored["metrics"]
        _, found = self._trained(LONGER, asked, key)
        write_json(path, {"member": key, "metrics": found})
        self._checkpoint(key).unlink(missing_ok=True)
        return found

    def _trained(self, name: str, asked: Retrain, key: str) -> tuple[Any, dict[str, Any]]:
        model = copy.deepcopy(self.loaded.model).to(self.device)
        tokens = stages.text_tokens(asked.data, self.loaded.tokenizer)
        with self.bar(name, asked.steps) as advance:
            report = stages.retrain(
                model,
                self.masks,
                stages.pruned_views(model, self.masks, self.recipe),
                tokens,
                asked,
                precision=stages.precision_of(self.recipe, self.device),
                checkpoint=self._checkpoint(key),
                on_step=None if advance is None else lambda done, _loss: advance.to(done),
                distance=self.loaded.distance,
            )
        with self.bar(f"evaluate {name}", None):
            found = stages.evaluate(stages.Loaded(model, self.loaded.tokenizer, None), self.recipe, self.device)
        shown = {k: v for k, v in asdict(report).items() if k not in ("losses", "merge")}
        shown |= {"tokens_per_second": report.tokens_per_second}
        return model.to("cpu"), {"perplexity": found, "retraining": shown}

    def _checkpoint(self, key: str) -> Path:
        return self.folder / f"{key[:16]}.pt"

    def _key(self, asked: Retrain) -> str:
        """Hash of what decides a member: everything but the other members, the output and what is done later."""
        whole = said(self.recipe, but={"soup", "out", "save"})
        return digest({**whole, "retrain": said(asked)})
