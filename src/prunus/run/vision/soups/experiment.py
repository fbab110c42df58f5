"""One soup from end to end: the dense training, the chains side by side, and a row for each of them.

    dense ─┬─ soup: prune ─▶ members ─▶ average, * phases ─▶ also: other averages, mean and best member, ensemble
           └─ imp, m times longer imp, IMP-RePrune, soup of dense members           (the baselines that are asked for)

After a method that prunes during training there is one phase, under its masks (see `begin`).
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunus.masks import Masks
from prunus.run.vision.setting import Setting
from prunus.run.vision.soups.begin import Bar, Begin, begin_at
from prunus.run.vision.soups.between import Between, between
from prunus.run.vision.soups.branches import Store
from prunus.run.vision.soups.chains import dense_soup, reprune, souped
from prunus.run.vision.soups.follow import Chain, follow
from prunus.run.vision.soups.mixing import mixer, single
from prunus.run.vision.soups.pools import Pool
from prunus.run.vision.soups.recipe import SoupRecipe
from prunus.run.vision.soups.rows import Rows
from prunus.run.vision.soups.together import bundles

__all__ = ["SoupOutcome", "soup_experiment"]


@dataclass(frozen=True)
class SoupOutcome:
    """A finished soup: the network, its masks, its numbers, and what lies between its members."""

    model: nn.Module
    masks: Masks
    result: dict[str, Any]
    between: Between | None


def soup_experiment(
    setting: Setting,
    dense_folder: Path,
    store: Store,
    pool: Pool,
    *,
    checkpoint: Path | None = None,
    bar: Bar = lambda _name, _steps: nullcontext(),
    picture: bool = True,
) -> SoupOutcome:
    """Run a soup's recipe; trainings that are in the store already are not repeated.

    dense_folder, checkpoint: as `dense` takes them. pool: runs the members. bar: (what, how many or None) -> a context
    that shows how far it is. picture: measure the plane of three members too.
    Raises RuntimeError, after all other members ended, when one failed for good.
    """
    started = time.perf_counter()
    recipe = setting.recipe
    assert isinstance(recipe, SoupRecipe)
    stacked = _stacks(setting, recipe)
    begin = begin_at(setting, recipe, dense_folder, store, checkpoint, bar)
    with bar("members", None) as advance:
        found = follow(
            _chains(begin),
            store,
            pool,
            retries=recipe.soup.retries,
            units=bundles(stacked),
            on_done=(lambda count: advance(count)) if advance is not None else lambda _: None,
        )
    rows = Rows(begin, found)
    result = rows.result()
    apart = None
    members = [store.state(branch) for branch in rows.last.branches]
    if len(members) > 1:
        apart = between(begin, members, list(rows.soup.masks), picture=picture)
        result["between"] = apart.numbers()
    result["seconds"] = time.perf_counter() - started
    return SoupOutcome(begin.put(rows.soup.state), rows.soup.masks, result, apart)


def _stacks(setting: Setting, recipe: SoupRecipe) -> bool:
    """Whether members are stacked. "auto" is no: by benchmarks/stacked.py threads are faster, and so is one by one.

    3 and 10 ResNet-18 at batch 128 on an H100, images per second of all: 39,800 and 39,800 one after another, 51,400
    and 51,200 in threads, 19,800 and 24,000 stacked and captured. On a CPU stacking took 1.3 to 1.7 times as long.
    """
    stacked = recipe.soup.stacked is True
    narrow = setting.device.type == "cuda" and setting.precision != "fp32"
    if stacked and narrow and setting.sets.train.pixels.shape[1] == 1:
        raise ValueError(
            f"soup.stacked: one-channel images cannot be stacked in {setting.precision} on a GPU, where "
            "torch's vectorised BatchNorm refuses them: set precision: fp32, or leave stacked out"
        )
    return stacked


def _chains(begin: Begin) -> dict[str, Chain[Any]]:
    """What is followed; a longer run also takes the snapshots of stochastic weight averaging.

    After a method that pruned there is neither another mask to average over nor a dense network.
    """
    asked = begin.recipe.soup
    mix = mixer(asked.average, begin.setting, begin.model)
    chains: dict[str, Chain[Any]] = {"soup": souped(begin, list(range(asked.members)), mix)}
    for name in asked.baselines:
        if name == "imp":
            chains[name] = souped(begin, [None], single)
        elif name == "reprune" and begin.masks is None:
            chains[name] = reprune(begin, single)
        elif name == "dense" and begin.masks is None:
            chains[name] = dense_soup(begin, single)
    if "longer" in asked.baselines or "swa" in asked.baselines:
        swa = asked.swa if "swa" in asked.baselines else None
        chains["longer"] = souped(begin, [None], single, slower=asked.members, swa=swa)
    return chains
