"""The stages of a compression run as functions of a recipe: load, prune, retrain, evaluate.

`single.py` strings them together for one model in place, `grid.py` as the jobs of grids; neither knows what is in
them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunus.adapt import Adaptation, adapt, add_biases, compiled_forward
from prunus.blocks import Source, longest, recomputed, recomputing
from prunus.checkpoint import (
    check_causal,
    check_direction,
    check_finite,
    check_plain,
    check_vocabulary,
    download_weights,
    empty_model,
    hub_folder,
    plain,
    read_checkpoint,
    read_config,
    read_tokenizer,
    weight_files,
)
from prunus.data import ASSETS
from prunus.jobs import check_recordable
from prunus.language.texts import calibration_windows, evaluation_texts, training_windows, window_of
from prunus.layers import View, find_layers
from prunus.machine import Precision, autocast, of_training, ranks
from prunus.masks import Masks
from prunus.measure import Scores, perplexity, speed, streamed_perplexity
from prunus.recipe import LanguageRecipe, LanguageRetrain, given, optimizer_of
from prunus.report import Log, named_log, progress
from prunus.save import INFO_NAME, load_info, loaded_model
from prunus.shrink import trim_vocabulary
from prunus.soup import distance, finish
from prunus.stream import BlockReport, Fit, Shards, Streamed, Work, stream
from prunus.train import During, Watch, distilled_next_token, lighten_, next_token_loss, seeded, train

__all__ = [
    "Loaded",
    "Retrained",
    "evaluate",
    "fitted",
    "home",
    "load",
    "model_path",
    "precision_of",
    "prune",
    "prune_phase",
    "retrain",
]

log = logging.getLogger(__name__)
OnStep = Callable[[int, float], None]
_ROUNDED = 1e-3  # by which a share of zeros may be above the one that was asked for, in small layers
_RESIDENT = 0.75  # largest share of a GPU's free memory that weights take which stay there
_APART = 1_000_003  # between the seeds of two processes that share a training
_RESIDENT_GRAM = 0.4  # criteria that read Gram matrices need several matrices of (in, in) beside them


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer; `folder` is the local folder it came from, `source` its shards when streamed.

    distance: what pruning took away from it, as `soup.distance` measures it. tokens: of a model with fewer words, text
    name -> how many tokens of its own the text has for one of the dense model's.
    """

    model: Any
    tokenizer: Any
    folder: Path | None
    source: Source | None = None
    distance: float = 1.0
    tokens: Mapping[str, float] = field(default_factory=dict)

    def copied(self) -> Loaded:
        """The same with a model of its own."""
        return replace(self, model=copy.deepcopy(self.model))


@dataclass(frozen=True)
class Retrained:
    """What retraining did: which share of the parameters, how fast, how it merged; steps and perplexities meanwhile."""

    trainable: int
    share: float
    tokens: int
    seconds: float
    peak_memory: int
    losses: list[float] = field(default_factory=list)
    merge: dict[str, Any] = field(default_factory=dict)
    watched: list[tuple[int, float]] = field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        """The same for tables, with useful tokens a second: every token of a packed window is trained on."""
        return asdict(self) | {"tokens_per_second": self.tokens / max(self.seconds, 1e-9)}


def precision_of(recipe: LanguageRecipe, device: torch.device) -> Precision:
    """Autocast precision; "auto" is bf16 on a GPU that has it, fp16 on one that has not, fp32 on a CPU."""
    if recipe.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision: fp16 needs a GPU; use fp32 or bf16 on a CPU")
    if recipe.precision != "auto":
        return recipe.precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def fitted(recipe: LanguageRecipe, device: torch.device) -> LanguageRecipe:
    """The recipe with the lengths it does not set cut to what its model takes, and the dtype chosen for `device`.

    Raises ValueError for a model that is not there, a length or window that the model does not take, and a precision
    or recorded steps that the device does not have.
    """
    scaled = precision_of(recipe, device) == "fp16"
    if recipe.capture is True and (recipe.train or recipe.retrain):
        check_recordable(device, scaled=scaled)
    path = model_path(recipe.model)
    config = read_config(path, trust_remote_code=recipe.trust_remote_code)
    _tell_of_zeros(recipe, path)
    limit = longest(config) or 2**31
    changes: dict[str, Any] = {}
    for section in ("calibrate", "train", "retrain"):
        asked: Any = getattr(recipe, section)
        if asked is None:
            continue
        if "length" in asked.model_fields_set:
            check_length(f"{section}.length", asked.length, config, recipe.model)
        changes[section] = asked.model_copy(update={"length": min(asked.length, limit)})
    window = recipe.evaluate.window
    if window is not None:
        check_length("evaluate.window", window, config, recipe.model)
    if recipe.dtype == "auto" and device.type == "cpu" and getattr(config, "dtype", None) == torch.float16:
        _say_once("float16 products are slow on a CPU: computing in float32; what is saved is float16 all the same")
        changes["dtype"] = "float32"
    return recipe.model_copy(update=changes)


def _tell_of_zeros(recipe: LanguageRecipe, path: Path) -> None:
    """Warn where training would fill zeros of a model that Prunus pruned."""
    if not (recipe.train or recipe.retrain or recipe.reconstruct) or not (path / INFO_NAME).is_file():
        return
    try:
        zeros = load_info(path).get("sparsity", {}).get("pruned") or 0.0
    except ValueError:  # of a newer Prunus, or somebody else's
        return
    if zeros > recipe.prune.sparsity + _ROUNDED:
        _say_once(
            f"model: {recipe.model!r} has {zeros:.2%} zeros already, of which training fills those above "
            f"prune.sparsity: set it to {zeros:.4g} at least, or take the dense model"
        )


@cache
def _say_once(text: str) -> None:
    """Members of a grid are of one model."""
    log.warning(text)


def home(recipe: LanguageRecipe, device: torch.device) -> torch.device:
    """Where the weights live from the first stage to the last: on the GPU if they leave room there, else on the CPU.

    Weights on the CPU travel to the device block by block while pruning, and as a whole for the other stages.
    """
    if device.type != "cuda" or recipe.streaming:
        return torch.device("cpu")
    path = model_path(recipe.model)
    files = weight_files(path) if path.is_dir() else []
    if not files:
        return torch.device("cpu")
    size = sum(path.stat().st_size for path in files) * (2 if recipe.dtype == "float32" else 1)
    free = torch.cuda.mem_get_info(device)[0]
    share = _RESIDENT_GRAM if recipe.prune.how().needs == "gram" else _RESIDENT
    return device if size <= free * share else torch.device("cpu")


def model_path(model: str) -> Path:
    """The folder of a recipe's model: a .gguf file's is dequantised, a hub name's downloaded without weights."""
    path = ASSETS if model == "embedded" else Path(model).expanduser()
    return plain(path) if path.exists() else hub_folder(model)


def check_length(key: str, value: int, config: Any, model: str) -> None:
    """Raise ValueError for more tokens at once than a model was made for, naming the key that asks for them."""
    limit = longest(config)
    if limit is not None and value > limit:
        raise ValueError(f"{key}: {value} tokens, but {model!r} was made for at most {limit}; set {key} to {limit}")


def load(recipe: LanguageRecipe, home: torch.device | None = None) -> Loaded:
    """The model and tokenizer a recipe names, on `home` (default: the CPU), or on meta with its shards when streaming.

    Weights are read straight to `home`: the host holds one shard's pages at a time.
    Raises ValueError, before weights are read, for a checkpoint that is not the model of its config.json; see
    `checkpoint.check_causal`.
    """
    path, trust = model_path(recipe.model), recipe.trust_remote_code
    straight: dict[str, Any] = {} if home is None or home.type == "cpu" else {"device_map": {"": home}}
    if not Path(recipe.model).expanduser().exists() and recipe.model != "embedded":
        path = download_weights(recipe.model)
    config, checkpoint = read_config(path, trust_remote_code=trust), read_checkpoint(path)
    check_direction(config, f"model: {recipe.model!r}")
    check_plain(checkpoint)
    tokenizer = read_tokenizer(path, trust_remote_code=trust)
    dtype = checkpoint.dtype(config) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    model: Any = empty_model(config, dtype, trust_remote_code=trust)
    check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, f"model: {recipe.model!r}")
    if recipe.streaming:
        return Loaded(model, tokenizer, path, Shards.of(model, checkpoint))
    check_causal(checkpoint, model)
    model = loaded_model(checkpoint, model, dtype=dtype, **straight)
    check_finite(model.named_parameters(), path)
    return Loaded(model, tokenizer, path)


def empty(recipe: LanguageRecipe) -> Loaded:
    """The tokenizer and the model that a recipe names, on the meta device: what config.json alone says of it."""
    path, trust = model_path(recipe.model), recipe.trust_remote_code
    config = read_config(path, trust_remote_code=trust)
    check_direction(config, f"model: {recipe.model!r}")
    dtype = config.dtype or torch.float32 if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    tokenizer = read_tokenizer(path, trust_remote_code=trust)
    return Loaded(empty_model(config, dtype, trust_remote_code=trust), tokenizer, None)


def check_weights(recipe: LanguageRecipe, model: Any) -> None:
    """Raise ValueError for weights on this machine that an empty model is not made for; only their headers are read."""
    path = model_path(recipe.model)
    if path.is_dir() and weight_files(path):
        check_causal(read_checkpoint(path), model)


def prune(
    loaded: Loaded,
    recipe: LanguageRecipe,
    device: torch.device,
    *,
    within: Masks | None = None,
    work: Work | None = None,
    on_block: Callable[[BlockReport], object] = lambda _: None,
) -> Streamed:
    """Masks and block reports after the recipe's pruning (and reconstruction) of the model in place.

    within: the masks of an earlier phase; what they prune stays pruned. Of several processes all take what the main one
    wrote to the work folder.
    """
    chosen, calibrate = recipe.prune, recipe.calibrate
    tokens = calibration_windows(calibrate, loaded.tokenizer)
    where: dict[str, Any] = {
        "tokens": tokens,
        "source": loaded.source,
        "device": device,
        "batch_size": calibrate.batch_size,
        "precision": precision_of(recipe, device),
        "include": chosen.include,
        "exclude": chosen.exclude,
    }
    fit = None
    if recipe.reconstruct is not None:
        fit = Fit(**recipe.reconstruct.model_dump(), precision=precision_of(recipe, device))
    shared = ranks.count() > 1 and fit is None and len(tokens) >= ranks.count()
    with progress("prune", int(getattr(loaded.model.config, "num_hidden_layers", 0)) or None) as advance:

        def told(report: BlockReport) -> None:
            on_block(report)
            advance(1)

        streamed = stream(
            loaded.model,
            chosen.how(calibrate.seed),
            chosen.where(),
            chosen.sparsity,
            allocation=chosen.sharing(),
            within=within,
            fit=fit,
            work=work,
            shared=shared,
            on_block=told,
            **where,
        )
    ranks.wait()
    return streamed if ranks.is_main() or work is None else _as_written(work, loaded, streamed)


def _as_written(work: Work, loaded: Loaded, streamed: Streamed) -> Streamed:
    """The pruning of the main process, in place of this one's: two GPUs may differ in the last bit."""
    masks: dict[str, Tensor] = {}
    for report in streamed.reports:
        masks |= work.masks(report.name)
        if loaded.source is None:
            work.restore_(report.name, loaded.model.get_submodule(report.name), {})
    return Streamed(Masks(masks), streamed.reports)


def prune_phase(
    loaded: Loaded,
    recipe: LanguageRecipe,
    device: torch.device,
    *,
    compares: bool,
    within: Masks | None = None,
    work: Work | None = None,
    checkpoint: Path | None = None,
    on_block: Callable[[BlockReport], object] = lambda _: None,
    log: Log | None = None,
) -> tuple[Streamed, float]:
    """Masks and reports after the pruning of the model in place that a recipe asks for, by a criterion or in training.

    And what it took away, as `soup.distance` measures it; 1 where a criterion pruned and nothing compares. work,
    checkpoint: from which either goes on.
    """
    if recipe.during is not None:
        streamed, lost = _prune_in_training(loaded, recipe, device, checkpoint, log)
        on_block(streamed.reports[0])
        return streamed, lost
    before = _prunable(loaded, recipe) if compares else {}
    work = work and work.open()
    streamed = prune(loaded, recipe, device, within=within, work=work, on_block=on_block)
    return streamed, distance(before, streamed.masks, within) if compares else 1.0


def _prunable(loaded: Loaded, recipe: LanguageRecipe) -> dict[str, Tensor]:
    """Copies of the prunable weights, on the CPU."""
    views = find_layers(loaded.model, include=recipe.prune.include, exclude=recipe.prune.exclude)
    parameters = dict(loaded.model.named_parameters())
    return {view.parameter: parameters[view.parameter].detach().to("cpu", copy=True) for view in views}


def _prune_in_training(
    loaded: Loaded, recipe: LanguageRecipe, device: torch.device, checkpoint: Path | None, log: Log | None
) -> tuple[Streamed, float]:
    """Masks and one report, after all (or LoRA) was trained on `device` while the recipe's method pruned."""
    name, asked, home = next(iter(recipe.during or ())), given(recipe.train), next(loaded.model.parameters()).device
    ends: list[tuple[Masks, float]] = []
    with progress(name, asked.steps, tokens=asked.step_tokens) as advance:
        prior = None
        if recipe.begins_masked:
            prior = prune(loaded.copied(), recipe, device).masks
        method = recipe.method(prior)
        found = retrain(
            loaded,
            Masks({}),
            recipe.model_copy(update={"retrain": asked}),
            device,
            checkpoint=checkpoint,
            on_step=advance.step,
            log=log and named_log(log, name),
            before_merge=lambda _: ends.append(finish(method, loaded.model)),
            during=[method],
        )
    loaded.model.to(home)
    ((masks, lost),) = ends
    masks.check(loaded.model)
    table = masks.table()
    kept, total = ({name: counts[place] for name, counts in table.items()} for place in (0, 1))
    return Streamed(masks, [BlockReport("all blocks", kept, total, found.seconds)]), lost


def summary(streamed: Streamed) -> dict[str, Any]:
    """Sparsity of the whole and by layer, and the block reports, as plain values."""
    kept = {name: n for report in streamed.reports for name, n in report.kept.items()}
    total = {name: n for report in streamed.reports for name, n in report.total.items()}
    return {
        "sparsity": 1 - sum(kept.values()) / max(1, sum(total.values())),
        "pruned_parameters": sum(total.values()),
        "by_layer": {name: 1 - kept[name] / total[name] for name in kept},
        "seconds": sum(report.seconds for report in streamed.reports),
        "blocks": [asdict(report) for report in streamed.reports],
    }


def pruned_views(model: nn.Module, masks: Masks, recipe: LanguageRecipe) -> list[View]:
    """The layers of `model` that the recipe pruned: those that an adapter adapts."""
    found = find_layers(model, include=recipe.prune.include, exclude=recipe.prune.exclude)
    return [view for view in found if view.parameter in masks]


def retrain(
    loaded: Loaded,
    masks: Masks,
    recipe: LanguageRecipe,
    device: torch.device,
    *,
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
    log: Log | None = None,
    before_merge: Callable[[Adaptation], None] | None = None,
    during: Sequence[During] = (),
) -> Retrained:
    """What happened while the recipe's parameters were retrained on packed text and merged, in place, on `device`.

    before_merge is called between training and merging, with what is still in place. during: methods that take
    part; the caller finishes them.
    """
    model, asked, prune = loaded.model.to(device), given(recipe.retrain), recipe.prune
    if asked.add_biases:
        add_biases(model)
    precision = precision_of(recipe, device)
    precision = precision if "full" in asked.train else of_training(model, precision)
    views = find_layers(model, include=prune.include, exclude=prune.exclude)  # before adapters hide them
    adaptation = adapt(
        model,
        asked.train,
        masks=masks,
        views=views if during else pruned_views(model, masks, recipe),
        rank=asked.rank,
        alpha=asked.alpha,
        init=asked.init,
        generator=torch.Generator().manual_seed(asked.seed),
    )
    if asked.keep_effective:
        adaptation.keep_effective()
    packed = training_windows(asked, loaded.tokenizer)
    capture = _capture(recipe, device)
    groups = adaptation.param_groups(asked.peak, asked.lrs, weight_decay=asked.weight_decay)
    optimizer = optimizer_of(asked.optimizer)(groups, **_recordable(asked, device, capture is not False))
    spare = "free" if asked.checkpointing == "auto" else 0
    teacher = _teacher(loaded, recipe)
    with (
        compiled_forward(model) if recipe.compile else nullcontext(),
        _compiled(teacher if recipe.compile else None),
        recomputed(model, spare=spare) if asked.checkpointing else nullcontext(),
        seeded(asked.seed + _APART * ranks.index(), device),  # whatever was done before, in this process or in another
    ):
        trace = train(
            model,
            lambda step: packed.batch(step, batch=asked.batch_size, seed=asked.seed),
            optimizer,
            asked.rates(loaded.distance),
            steps=asked.steps,
            loss=_loss(teacher, asked),
            masks=adaptation.held,
            during=during,
            views=views if during else None,
            accumulate=asked.accumulate,
            precision=precision,
            clip=asked.clip,
            capture=capture,
            watch=_watch(loaded, recipe, device),
            checkpoint=checkpoint,
            on_step=on_step,
            log=log,
        )
    model.eval()
    if before_merge is not None:
        before_merge(adaptation)
    report = adaptation.merge_()
    masks.check(model)
    used = len(trace.losses) * asked.step_tokens
    return Retrained(
        adaptation.trainable,
        adaptation.share,
        used,
        trace.seconds,
        trace.peak_bytes,
        list(trace.losses),
        asdict(report),
        trace.watched,
    )


def _recordable(asked: LanguageRetrain, device: torch.device, recorded: bool) -> dict[str, Any]:
    """What an AdamW of torch's is told, so that its steps may be recorded."""
    fused = True if device.type == "cuda" else None
    return {"capturable": recorded, "fused": fused} if asked.optimizer == "adamw" else {}


def _watch(loaded: Loaded, recipe: LanguageRecipe, device: torch.device) -> Watch | None:
    """What is measured while a model is retrained: the perplexity of one text."""
    asked = given(recipe.retrain)
    if not asked.evaluate_every:
        return None
    name = asked.watch or next(iter(recipe.evaluate.data))
    alone = recipe.evaluate.model_copy(update={"data": {name: recipe.evaluate.data[name]}})
    one = recipe.model_copy(update={"evaluate": alone})
    plain = replace(loaded, source=None)

    def measure() -> float:
        return evaluate(plain, one, device)[name]

    return Watch(measure, asked.evaluate_every, asked.patience, asked.keep_best)


def _capture(recipe: LanguageRecipe, device: torch.device) -> Literal["auto"] | bool:
    """Whether training steps are recorded: where nothing else is asked for, on a GPU."""
    return False if recipe.capture == "auto" and device.type != "cuda" else recipe.capture


def _teacher(loaded: Loaded, recipe: LanguageRecipe) -> nn.Module | None:
    """The dense model that is asked while another is retrained, read from its checkpoint, with the student's words."""
    asked = given(recipe.retrain).distill
    if asked is None:
        return None
    of_teacher = {"model": asked.teacher or recipe.model, "dtype": asked.dtype or recipe.dtype, "streaming": False}
    home = recipe.model_copy(update=of_teacher)
    dense = load(home)
    model = dense.model
    if recipe.shrink is not None and recipe.shrink.vocabulary is not None:
        ids, words = dense.tokenizer.get_vocab(), loaded.tokenizer.get_vocab()
        lacking = next((word for word in words if word not in ids), None)
        if lacking is not None:
            raise ValueError(
                f"retrain.distill.teacher: {home.model!r} does not know the word {lacking!r}; a teacher knows all words"
            )
        model = trim_vocabulary(model, torch.tensor([ids[word] for word in sorted(words, key=words.__getitem__)]))
    return lighten_(model.requires_grad_(False), loaded.model)


def _compiled(teacher: nn.Module | None) -> AbstractContextManager[object]:
    """Context in which a teacher's blocks are compiled, if it has such and holds its weights whole (see `lighten_`)."""
    if teacher is None or len(recomputing(teacher)) < 2:
        return nullcontext()
    return nullcontext() if any(map(parametrize.is_parametrized, teacher.modules())) else compiled_forward(teacher)


def _loss(teacher: nn.Module | None, asked: LanguageRetrain) -> Callable[[nn.Module, Any], Tensor]:
    """The loss of retraining."""
    if teacher is None or asked.distill is None:
        return next_token_loss
    return distilled_next_token(teacher, asked.distill.weight, asked.distill.temperature)


def evaluate(loaded: Loaded, recipe: LanguageRecipe, device: torch.device) -> dict[str, float]:
    """Text name -> perplexity, by the recipe's window or the model's own length; block by block when streamed.

    Of a model with fewer words it is that of the dense model's tokens: exp of the loss a text has for each of them.
    """
    model, asked = loaded.model, recipe.evaluate
    precision = precision_of(recipe, device)
    tokens = evaluation_texts(recipe, model, loaded.tokenizer)
    how: dict[str, Any] = {"window": window_of(recipe, model), "batch_size": asked.batch_size, "device": device}
    if loaded.source is not None:
        how |= {"source": loaded.source, "precision": precision}
        return {name: streamed_perplexity(model, text, **how) for name, text in tokens.items()}
    with _on(model, device), autocast(device, precision):
        found = {name: perplexity(model, text, **how) for name, text in tokens.items()}
        return {name: each ** loaded.tokens.get(name, 1.0) for name, each in found.items()}


def zero_shot(model: Any, tokenizer: Any, recipe: LanguageRecipe, device: torch.device) -> Scores | None:
    """What lm-eval finds; None when the recipe asks for no task."""
    asked = recipe.evaluate
    if not asked.tasks:
        return None
    from prunus.measure import zero_shot as measure

    how: dict[str, Any] = {"shots": asked.shots, "chat": asked.chat, "limit": asked.limit}
    with _on(model, device), autocast(device, precision_of(recipe, device)):
        return measure(model, tokenizer, asked.tasks, batch_size=asked.task_batch_size, **how)


def pace(model: nn.Module, recipe: LanguageRecipe, device: torch.device) -> dict[str, Any]:
    """The model's speed as numbers; empty when the recipe does not ask for it."""
    asked = recipe.evaluate.speed
    if asked is None:
        return {}
    with _on(model, device):
        return asdict(speed(model, **asked.model_dump(), precision=precision_of(recipe, device)))


@contextmanager
def _on(model: nn.Module, device: torch.device) -> Generator[None]:
    """The model on `device` in eval mode for a while."""
    home, training = next(model.parameters()).device, model.training
    model.to(device).eval()
    try:
        yield
    finally:
        model.to(home).train(training)
