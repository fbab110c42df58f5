"""Triton's interpreter without what is most of its time here.

It patches its language in every call of an inner function as well, which changes nothing: what is patched stays so
until the launch ends. And it asks of every sum of integers whether it overflows, as no compiled program does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

__all__ = ["hasten"]


def hasten() -> None:
    """Let the interpreter of this process be quick; without Triton there is none."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    builder: Any = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    executor: Any = interpreter.GridExecutor
    own, launch = interpreter._patch_lang, executor.__call__
    langs_of: dict[int, frozenset[int]] = {}  # of the globals of a function
    patched: set[int] = set()  # in the launch under way

    def patch_lang(fn: Any) -> Any:
        place = id(fn.__globals__)
        if place not in langs_of:
            values = fn.__globals__.values()
            langs_of[place] = frozenset(id(each) for each in values if each is tl or each is tl.core)
        if langs_of[place] <= patched:
            return None
        patched.update(langs_of[place])
        return own(fn)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, executor.__call__ = patch_lang, call
