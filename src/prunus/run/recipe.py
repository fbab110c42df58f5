"""What a run is asked to do: typed recipes, read from YAML, checked before any work.

A recipe is a plain YAML mapping; every key is a field below. Unknown keys, impossible patterns, sparsities outside
[0, 1) and missing files are refused with the key, the value and the mend.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from prunus.adapt import subsets
from prunus.patterns import Pattern, check_sparsity
from prunus.run.names import (
    AllocationName,
    Choice,
    CriterionName,
    PatternName,
    allocations,
    criteria,
    fixed_sparsity,
    pattern_of,
    retrainings,
)
from prunus.run.plain import read_yaml, yaml_value
from prunus.score import Allocation, Criterion, allocation_of, check_comparable, compared, criterion_of, global_
from prunus.train import Multiplier, Original, constant, cosine, linear, linear_warmup_decay

__all__ = [
    "Calibrate",
    "Data",
    "Device",
    "Evaluate",
    "Prune",
    "Recipe",
    "Reconstruct",
    "Retrain",
    "Soup",
    "Strict",
    "digest",
    "load_recipe",
    "merge",
    "parse",
    "read_yaml",
    "said",
    "yaml_value",
]

Init = Literal["kaiming", "gaussian"]
Section = TypeVar("Section", bound=BaseModel)
Keys = set[str] | Mapping[str, Any]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def looks_local(text: str) -> bool:
    """Whether a source is meant as a path, not as a hub name."""
    endings = (".txt", ".gz", ".parquet", ".jsonl", ".gguf", ".safetensors", ".tsv")
    return text.startswith((".", "/", "~")) or text.endswith(endings) or text.count("/") > 1


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("a device is auto, cpu, cuda or one GPU such as cuda:1")
    return value


Device = Annotated[str, AfterValidator(_device)]


class Strict(BaseModel):
    """A frozen section that refuses keys it does not know."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        ser_json_inf_nan="constants",
        use_attribute_docstrings=True,
    )


class Data(Strict):
    """Text: a local .txt, .jsonl or .parquet file, "embedded", or a Hugging Face data set "owner/name:config".

    part: the share of the text that is used, [start, stop] in [0, 1], cut after tokenisation.
    """

    source: str
    column: str = "text"
    split: str | None = None
    join: str = "\n\n"
    part: tuple[Share, Share] = (0.0, 1.0)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.part[0] >= self.part[1]:
            raise ValueError(f"part [{self.part[0]}, {self.part[1]}] is empty: give [start, stop] with start < stop")
        if looks_local(self.source) and not Path(self.source).exists():
            raise ValueError(
                f"no file {self.source!r} (seen from {os.getcwd()}); give an existing path or a data set 'owner/name'"
            )
        return self


def _subsets(value: Any) -> Any:
    """Subset names from a list or from one text with commas; refused as `adapt` refuses them."""
    if not isinstance(value, str | list | tuple):
        raise ValueError("give names of subsets, as in [biases, norms]")
    names = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)
    subsets.check_subsets(names)
    return names


Subsets = Annotated[tuple[str, ...], BeforeValidator(_subsets)]


class Calibrate(Strict):
    """Text that shows the layers their inputs: `samples` windows of `length` tokens, `batch_size` at a time."""

    data: Data = Data(source="embedded", split="train")
    samples: Annotated[int, Field(ge=1)] = 128
    length: Annotated[int, Field(ge=2)] = 2048
    batch_size: Annotated[int, Field(ge=1)] = 8
    seed: int = 0


class Prune(Strict):
    """Which weights go: a criterion, a pattern and a sparsity (the share of zeros, in [0, 1))."""

    criterion: CriterionName = "wanda"
    """How weights are scored, or layers solved."""
    pattern: PatternName = "unstructured"
    """unstructured, N:M (at most N nonzeros of M) such as 2:4, block RxC, filters."""
    sparsity: float = 0.5
    """Share of zeros, in [0, 1)."""
    scope: Literal["row", "layer", "model"] | None = None
    """Which scores compete."""
    allocation: AllocationName = "uniform"
    """How many weights each layer keeps."""
    phases: Annotated[int, Field(ge=1)] = 1
    """Prune and retrain that many times."""
    include: tuple[str, ...] = ()
    """Globs of layers: only these are pruned."""
    exclude: tuple[str, ...] = ()
    """Globs of layers that stay dense."""

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, value: Any) -> Any:
        """An N:M pattern says its own sparsity."""
        fixed = fixed_sparsity(value)
        return value if fixed is None else {"sparsity": fixed, **value}

    @model_validator(mode="after")
    def _check(self) -> Prune:
        pattern, allocation = pattern_of(self.pattern), self.sharing()
        check_sparsity(pattern, self.sparsity)
        if pattern.sparsity is not None and (self.scope is not None or allocation.reads):
            raise ValueError(
                f"pattern {self.pattern!r} fixes the share of zeros in every group: leave out scope and allocation"
            )
        if pattern.sparsity is not None and self.phases > 1:
            raise ValueError(f"pattern {self.pattern!r} fixes the share of zeros in every group: leave out phases")
        if self.how().score is None and self.phases > 1:
            raise ValueError(
                f"{self.how().name} cannot stay within the masks of an earlier phase: leave out phases, or take a "
                "criterion with a score"
            )
        check_comparable(self.how(), allocation)
        if self.scope == "model" and allocations.make(self.allocation).reads:
            raise ValueError("scope 'model' is an allocation already: leave out allocation")
        return self

    def how(self, seed: int = 0) -> Criterion:
        """The criterion; seed: of one that draws, unless the recipe gives it its own."""
        return criterion_of(criteria.make(self.criterion, seed=seed))

    def sharing(self) -> Allocation:
        """The allocation; scope model is that of one selection over all layers."""
        return allocation_of(global_ if self.scope == "model" else allocations.make(self.allocation))

    def where(self) -> Pattern:
        """The pattern, with the scope that is asked for, or that the criterion and the allocation imply."""
        own = compared(self.how(), self.sharing()) if self.scope is None else self.scope
        return pattern_of(self.pattern, "row" if own == "row" else "layer")


def _schedule(value: Any) -> Any:
    """The linear schedule, or one of retraining by name."""
    return value if value == "linear" else retrainings.check(value)


class DenseRates(Strict):
    """What the learning rate did in the training of the dense model, as its authors say; its peak is retrain.lr."""

    steps: Annotated[int, Field(ge=1)]
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    end: Annotated[float, Field(ge=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _check(self) -> DenseRates:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup: {self.warmup} steps leave none of the {self.steps}; set fewer")
        return self

    def original(self, peak: float) -> Original:
        """The learning rate of every step."""
        warmup = self.warmup
        made = {
            "constant": lambda: constant(self.steps, warmup=warmup),
            "linear": lambda: linear(self.steps, self.end, warmup=warmup),
            "cosine": lambda: cosine(self.steps, self.end, warmup=warmup),
        }[self.schedule]()
        return Original.of((peak * made(step) for step in range(self.steps)), warmup)


class Retrain(Strict):
    """Which parameters are retrained on packed text, and how: by AdamW, on one schedule.

    schedule: "linear" falls linearly after a linear warm-up; or one of those of retraining, of which all but llr go by
    the `dense` training.
    """

    train: Subsets = ("mask_lora",)
    """Parameters: biases,norms or mask_lora or full ..."""
    data: Data = Data(source="embedded", split="train")
    steps: Annotated[int, Field(ge=1)] = 200
    """Optimizer steps."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Sequences at a time."""
    length: Annotated[int, Field(ge=2)] = 1024
    """Tokens a sequence."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients make one step."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    lrs: dict[str, Annotated[float, Field(gt=0)]] = {}
    schedule: Annotated[Choice, BeforeValidator(_schedule)] = "linear"
    """Of the learning rate: linear, ft, lrw, slr, clr, llr or allr."""
    dense: DenseRates | None = None
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the rate rises."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Of adapters."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Of adapters: the update is scaled by alpha / rank."""
    init: Init = "kaiming"
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    add_biases: bool = False
    """Give layers zero biases first."""
    checkpointing: bool | Literal["auto"] = False
    keep_effective: bool = False
    compile: bool = False
    """Compile the blocks."""
    seed: int = 0
    """Of the order of sequences, and of adapters."""

    @model_validator(mode="after")
    def _check(self) -> Retrain:
        strange = [name for name in self.lrs if name not in self.train]
        if strange:
            raise ValueError(f"lrs names {strange[0]!r}, which is not in train={list(self.train)}: leave it out")
        if self.dense is None and self.schedule not in ("linear", "llr"):
            raise ValueError(f"schedule {self.schedule} goes by the dense training: give dense: {{steps: 100000}}")
        return self

    def rates(self, distance: float = 1.0) -> Multiplier:
        """The learning rate of every step, in units of its peak. distance: what pruning took away, for allr."""
        if self.schedule == "linear":
            return linear_warmup_decay(self.steps, self.warmup)
        original = Original.of([self.lr]) if self.dense is None else self.dense.original(self.lr)
        share = min(1.0, self.steps / original.steps)
        return retrainings.make(self.schedule, original, self.steps, distance=distance, share=share, warmup=self.warmup)


class Soup(Strict):
    """Several retrainings of the one pruned model, and their average.

    vary: key of `retrain` -> its value in each member; members differ in their seed, seed + 1000 * place, unless it
    names seed. average: "uniform", or a weight for each. longer: also train one member as long as all together.
    """

    members: Annotated[int, Field(ge=2)] = 3
    vary: dict[Literal["seed", "lr", "steps", "warmup"], list[Any]] = {}
    average: Literal["uniform"] | list[Annotated[float, Field(ge=0, le=1)]] = "uniform"
    longer: bool = True

    @model_validator(mode="after")
    def _check(self) -> Soup:
        weights = {} if self.average == "uniform" else {"average": self.average}
        for key, values in {**self.vary, **weights}.items():
            if len(values) != self.members:
                raise ValueError(f"{key} has {len(values)} values for {self.members} members; give one each")
        if self.average != "uniform" and abs(sum(self.average) - 1) > 1e-6:
            raise ValueError(f"average: weights add up to 1; these to {sum(self.average):g}")
        return self

    def each(self, retrain: Retrain) -> list[Retrain]:
        """The retraining of every member."""
        plain = retrain.model_dump()
        seeds = [retrain.seed + 1000 * place for place in range(self.members)]
        vary = {"seed": seeds, **self.vary}
        changes = [{key: values[place] for key, values in vary.items()} for place in range(self.members)]
        return [Retrain.model_validate({**plain, **change}) for change in changes]


class Reconstruct(Strict):
    """Fit each pruned block to its dense outputs, right after it is pruned."""

    window: Literal["block", "half", "matrix"] = "block"
    train: Subsets = ("full",)
    inputs: Literal["pruned", "dense"] = "pruned"
    steps: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    init: Init = "kaiming"
    seed: int = 0


class Evaluate(Strict):
    """Perplexity of each named text: joined, cut into windows without overlap, mean loss over predicted tokens."""

    data: dict[str, Data] = {"held-out": Data(source="embedded", split="test")}
    window: Annotated[int, Field(ge=2)] | None = None
    """Tokens a window; the model's own length (at most 2048) if left out."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Windows at a time."""
    tasks: dict[str, str] = {}
    """Zero-shot tasks and their files (needs the extra 'zeroshot')."""
    task_batch_size: Annotated[int, Field(ge=1)] = 16
    """Requests of zero-shot tasks at a time."""

    @model_validator(mode="after")
    def _check_tasks(self) -> Evaluate:
        missing = [path for path in self.tasks.values() if looks_local(path) and not Path(path).exists()]
        if missing:
            raise ValueError(f"tasks: no file {missing[0]!r} (seen from {os.getcwd()})")
        return self

    @model_validator(mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("data"), str):
            return {**value, "data": {Path(value["data"]).stem: value["data"]}}
        return value


class Recipe(Strict):
    """A whole compression run: load, prune, (reconstruct), (retrain, merge), evaluate, save.

    model: a Hugging Face name or folder, a .gguf file, or "embedded". dtype: "auto" is the checkpoint's own.
    precision: autocast while retraining; trained parameters are float32 throughout.
    """

    model: str = "embedded"
    """Name, folder or file; 'embedded'; or a network such as resnet18."""
    trust_remote_code: bool = False
    """Run code that lies beside the model's weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights in memory and on disk."""
    device: Device = "auto"
    """auto, cpu, cuda or one GPU such as cuda:1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of matrix products."""
    streaming: bool = False
    """Read blocks from the checkpoint one at a time, for models larger than memory."""
    prune: Prune = Prune()
    calibrate: Calibrate = Calibrate()
    reconstruct: Reconstruct | None = None
    retrain: Retrain | None = None
    soup: Soup | None = None
    evaluate: Evaluate = Evaluate()
    out: str = "runs/compress"
    """Run folder."""
    save: bool = True
    """Whether the model is written."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.soup is not None:
            if self.retrain is None:
                raise ValueError("soup: its members are retrained as `retrain` says; give a section retrain")
            self.soup.each(self.retrain)
        if looks_local(self.model) and not Path(self.model).exists():
            raise ValueError(
                f"model: no file or folder {self.model!r} (seen from {os.getcwd()}); give a path that exists"
            )
        if self.retrain is not None and "lora" in self.retrain.train and self.prune.sparsity > 0:
            raise ValueError(
                "retrain.train: merging 'lora' would fill pruned weights; train 'mask_lora' or 'scale_lora', which "
                "keep them zero, or 'lora_prune', which drops that part"
            )
        if Path(self.out).is_file():
            raise ValueError(f"out: {self.out!r} is a file; give a folder")
        if self.prune.phases > 1:
            self._check_phases()
        if self.streaming and self.retrain is not None and self.retrain.schedule == "allr":
            raise ValueError("retrain.schedule: allr compares with the dense weights: leave out streaming, or use llr")
        if self.streaming and self.evaluate.tasks and self.retrain is None:
            raise ValueError("evaluate.tasks need the whole model in memory: leave out tasks or streaming")
        return self

    def _check_phases(self) -> None:
        if self.retrain is None or self.retrain.add_biases:
            raise ValueError("prune.phases: each is retrained: give a section retrain, without add_biases")
        strange = [key for key in ("streaming", "reconstruct", "soup") if getattr(self, key)]
        if strange:
            raise ValueError(f"prune.phases: the whole model is retrained in each: leave out {strange[0]}")


def load_recipe(path: Path | None, overrides: dict[str, Any] | None = None) -> Recipe:
    """The checked recipe of a YAML file with dotted overrides (`{"prune.sparsity": 0.6}`) put on top.

    Raises ValueError that lists every wrong key with its value and mend; FileNotFoundError for a missing recipe.
    """
    raw = {} if path is None else read_yaml(path)
    return parse(merge(raw, overrides or {}), Recipe, str(path or "flags"))


def parse(raw: dict[str, Any], model: type[Section], where: str) -> Section:
    """The checked section `model` of a plain mapping; errors as in `load_recipe`."""
    strange = next(_not_finite(raw), None)
    if strange is not None:
        raise ValueError(f"{where}: {strange[0]} is {strange[1]}; give a finite number")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = _united([_line(item, model) for item in error.errors()])
        raise ValueError(f"{where}: " + "\n".join(lines)) from None


def _not_finite(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Dotted keys whose values are nan or infinite, wherever they stand; but lp is a norm for p = inf."""
    if isinstance(value, float) and not math.isfinite(value) and not (key.endswith(".p") and value > 0):
        yield key or "the value", value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _not_finite(item, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for item in value:
            yield from _not_finite(item, key)


def merge(raw: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with dotted keys set."""
    out = json.loads(json.dumps(raw))
    for dotted, value in overrides.items():
        *path, last = dotted.split(".")
        here = out
        for key in path:
            if not isinstance(here.get(key), dict):
                here[key] = {}
            here = here[key]
        here[last] = value
    return out


def said(section: BaseModel, *, only: Keys | None = None, but: Keys | None = None) -> dict[str, Any]:
    """What a recipe or a section says beside its defaults, as JSON: what hashes are made of.

    A key that is added later, with a default that means what was done before, changes no hash. only, but: keys of the
    section, or nested mappings of them.
    """
    return section.model_dump(mode="json", exclude_defaults=True, include=only, exclude=but)


def digest(value: Any) -> str:
    """Hash of a JSON-like value, or of what a recipe says, independent of key order."""
    plain = said(value) if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


_MEMBER = re.compile(r"\.(?:bool|int|float|str|dict|list|tuple|literal|constrained|function|\[key\])(?:\W.*)?$")


def _united(lines: Sequence[str]) -> list[str]:
    """What the members of a union each say of one value, in one line."""
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        key, _, said = line.partition(": ")
        whole = line.startswith("unknown key")
        found.setdefault(line if whole else _MEMBER.sub("", key), {})["" if whole else said] = None
    return [": ".join(filter(None, (key, " or ".join(said)))) for key, said in found.items()]


def _line(item: Any, model: type[BaseModel]) -> str:
    path = [str(part) for part in item["loc"] if part != "value"]
    key = ".".join(path) or "recipe"
    if item["type"] == "extra_forbidden":
        known = sorted(_fields(model, path[:-1]))
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {item['input']!r})" if not isinstance(item["input"], dict) else f"{key}: {message}"


def _fields(model: Any, path: list[str]) -> list[str]:
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            continue
        options = [field.annotation, *get_args(field.annotation)]
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        model = models[0] if models else model
    return list(getattr(model, "model_fields", {}))
