"""What is done with texts before and after: where they come from, `calibrate`, `shrink` and `evaluate`."""

from __future__ import annotations

import difflib
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from prunus.recipe.plain import Strict
from prunus.recipe.values import Count, Device, Part, Positive, Seed, Share, Whole, check_there, looks_local

__all__ = ["TEST_TEXT", "TRAIN_TEXT", "Calibrate", "Data", "Evaluate", "Pace", "Shrink", "Writing"]


_OF_A_SOURCE = ("column", "split", "revision", "streamed", "messages", "prompt", "answer", "join", "end")
_ALL = ("embedded", None)  # without a split it is all of them


class Data(Strict):
    """A text or chats: a file, a folder, "embedded", or a data set "name" or "owner/name:config"; or a mixture of them.

    messages: the column of chats; prompt, answer: the columns of pairs. Their loss is on the answers alone.
    part: the share that is used, [start, stop] in [0, 1], cut after tokenisation.
    """

    shorthands: ClassVar[tuple[str, ...]] = ("string", "array")

    source: str | None = None
    column: str = "text"
    split: str | None = None
    revision: str | None = None
    streamed: bool = False
    messages: str | None = None
    prompt: str | None = None
    answer: str | None = None
    join: str = "\n\n"
    end: bool | None = None
    head: bool = True
    part: tuple[Share, Share] = (0.0, 1.0)
    weight: Positive = 1.0
    mix: tuple[Data, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        short = "source" if isinstance(value, str) else "mix" if isinstance(value, list) else None
        return value if short is None else {short: value}

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.part[0] >= self.part[1]:
            raise ValueError(f"part [{self.part[0]}, {self.part[1]}] is empty: give [start, stop] with start < stop")
        if (self.source is None) == (not self.mix):
            raise ValueError("give a source, or a list of several, each with source and weight")
        if any(each.mix for each in self.mix):
            raise ValueError("a mixture is one of sources, not of mixtures; list all sources in one")
        if (self.prompt is None) != (self.answer is None) or (self.prompt is not None and self.messages is not None):
            raise ValueError("chats are in one column, messages, or in two, prompt and answer: give one or two")
        self._check_together()
        if self.source is not None and looks_local(self.source):
            check_there(self.source, "give an existing path or a data set 'owner/name'")
        return self

    def _check_together(self) -> None:
        """Refuse what would be read nowhere."""
        chats = self.messages is not None or self.prompt is not None
        unread = _OF_A_SOURCE if self.mix else ("column", "join", "end") if chats else ()
        strange = next((key for key in unread if getattr(self, key) != type(self).model_fields[key].default), None)
        if strange is not None:
            mend = "of each text of a mixture: say it in the list" if self.mix else "not of chats: leave it out"
            raise ValueError(f"{strange}: {mend}")
        if len({each.head for each in self.mix}) > 1:
            raise ValueError("head: of a whole mixture: say it beside mix")

    def meets(self, other: Data) -> bool:
        """Whether two texts, or some of two mixtures, have tokens in common, as far as recipes say.

        >>> Data(source="embedded").meets(Data(source="embedded", split="test"))
        True
        """
        pairs = product(self.mix or (self,), other.mix or (other,))
        return any(_inside(one, each) or _inside(each, one) for one, each in pairs)


def _inside(one: Data, other: Data) -> bool:
    """Whether one source is the other, or lies in it, and what is used of the two overlaps."""
    place, whole = (Path(str(each.source)).expanduser().resolve() for each in (one, other))
    alike = one.column == other.column and (one.split == other.split or (other.source, other.split) == _ALL)
    apart = place == whole and (one.part[1] <= other.part[0] or other.part[1] <= one.part[0])
    return alike and not apart and place.is_relative_to(whole)


TRAIN_TEXT, TEST_TEXT = Data(source="embedded", split="train"), Data(source="embedded", split="test")


class Calibrate(Strict):
    """Text that shows the layers their inputs: `samples` windows of `length` tokens, `batch_size` at a time."""

    data: Data = TRAIN_TEXT
    samples: Count = 128
    length: Annotated[int, Field(ge=2)] = 2048
    batch_size: Count = 8
    seed: Seed = 0


class Writing(Strict):
    """What a model writes itself, in rows that each begin with some tokens of one's own text; data: that text."""

    model: str = "embedded"
    device: Device = "auto"
    """auto, cpu, cuda or one GPU such as cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory."""
    data: Data = TRAIN_TEXT
    tokens: Count = 1_000_000
    """How many there will be, about, with those of the prompts; 1,000,000."""
    length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a row; 512."""
    prompt: Count = 16
    """Tokens that each row begins with, from anywhere in the text; 16."""
    batch_size: Count = 64
    """Rows that are written at once; 64."""
    temperature: Annotated[float, Field(gt=1e-6, allow_inf_nan=False)] = 1.0
    """Below 1 likely words come oftener than the model says, above 1 more rarely; 1."""
    seed: Seed = 0
    """Of prompts and draws."""

    @model_validator(mode="after")
    def _check(self) -> Writing:
        if looks_local(self.model):
            check_there(self.model, "give a path that exists", key="model: ")
        if self.prompt >= self.length:
            raise ValueError(f"prompt {self.prompt} leaves nothing of length {self.length} to write; give fewer")
        return self

    @property
    def rows(self) -> int:
        """How many are written."""
        return -(-self.tokens // self.length)


class Shrink(Strict):
    """What a language model is without before it is pruned, and then it is really smaller; counts, and shares of all.

    What is left of heads and neurons is fitted on the windows of `calibrate`. vocabulary: the text whose words stay.
    """

    blocks: Whole = 0
    experts: Part = 0.0
    heads: Part = 0.0
    neurons: Part = 0.0
    width: Part = 0.0
    vocabulary: Data | None = None

    @model_validator(mode="after")
    def _check(self) -> Shrink:
        if self == Shrink.model_construct():
            raise ValueError(
                "say what goes: blocks: 4, experts: 0.25, heads: 0.25, neurons: 0.25, width: 0.25, vocabulary: TEXT"
            )
        return self


def _asked(value: Any) -> Any:
    """`true` is a section with its defaults, `false` none."""
    return ({} if value else None) if isinstance(value, bool) else value


class Pace(Strict):
    """How the speed is measured: `tokens` are decoded after a prompt; each phase is repeated for so many seconds."""

    prompt: Count = 512
    tokens: Count = 32
    batch_size: Count = 1
    seconds: Positive = 2.0


_LIKE = 0.75  # "splt" is like split, "target" not like part
_TasksForm = str | list[str] | dict[str, str | None]


def _tasks(value: Any) -> Any:
    """Tasks by name alone, in a list or in one text with commas, or with their files."""
    names = value.split(",") if isinstance(value, str) else value
    return {str(name).strip(): None for name in names} if isinstance(names, (list, tuple)) else names


def _is_key(name: Any) -> bool:
    """Whether a name is a key of a text, or was meant to be one: then the error says so, and no text is opened."""
    return bool(difflib.get_close_matches(str(name), Data.model_fields, 1, _LIKE))


def _texts(value: Any) -> Any:
    """Names and their texts; of one text, in any form that a text has, the name is that of its file."""
    source = value.get("source") if isinstance(value, dict) and all(map(_is_key, value)) else value
    if isinstance(source, str):
        return {Path(source).stem: value}
    return {"mixture": value} if isinstance(value, list) else value


class Evaluate(Strict):
    """Perplexity of each named text: joined, cut into windows without overlap, mean loss over predicted tokens."""

    data: Annotated[dict[str, Data], BeforeValidator(_texts, json_schema_input_type=dict[str, Data] | Data)] = Field(
        default_factory=lambda: {"held-out": TEST_TEXT}
    )
    window: Annotated[int, Field(ge=2)] | None = None
    """Tokens a window; the model's own length (at most 2048) if left out."""
    batch_size: Count = 4
    """Windows at a time."""
    tasks: Annotated[dict[str, str | None], BeforeValidator(_tasks, json_schema_input_type=_TasksForm)] = Field(
        default_factory=dict
    )
    """Tasks of lm-eval, by name or by name and file (needs the extra 'zeroshot')."""
    task_batch_size: Count | Literal["auto"] = 16
    """Requests of tasks at a time, or auto."""
    shots: Whole | None = None
    """Examples before each question; the task's own number if left out."""
    chat: bool = False
    """Ask through the tokenizer's chat template."""
    limit: Count | None = None
    """Only the first so many examples of a task."""
    speed: Annotated[Pace | None, BeforeValidator(_asked, json_schema_input_type=Pace | bool | None)] = None

    @model_validator(mode="after")
    def _check_texts(self) -> Evaluate:
        known: dict[Data, str] = {}
        for name, data in self.data.items():
            if data in known:
                raise ValueError(f"data: {known[data]!r} and {name!r} are one text; choose on one and report another")
            known[data] = name
        return self

    @model_validator(mode="after")
    def _check_tasks(self) -> Evaluate:
        for path in filter(None, self.tasks.values()):
            check_there(path, "check the path", key="tasks: ")
        return self
