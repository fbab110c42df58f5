"""Triton's interpreter without what is most of its time here.

It patches its language in every launch, and in every call of an inner function as well: what is patched here stays so,
because nothing is compiled in a process that interprets. It asks of every sum of integers whether it overflows, as no
compiled program does. It makes a table of all types whenever it looks one up and a shape for each tensor, and combines
by exclusive or, of which sorts are made, entry by entry.
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
    _patch_once(interpreter, tl)
    _remember_types(interpreter, tl)
    _fold_exclusive_or(interpreter, tl)


def _patch_once(interpreter: Any, tl: Any) -> None:
    own, langs_of, patched = interpreter._patch_lang, dict[int, frozenset[int]](), set[int]()

    def patch_lang(fn: Any) -> Any:
        place = id(fn.__globals__)  # of a module, which stays
        if place not in langs_of:
            values = fn.__globals__.values()
            langs_of[place] = frozenset(id(each) for each in values if each is tl or each is tl.core)
        if not langs_of[place] <= patched:
            patched.update(langs_of[place])
            own(fn)
        return interpreter._LangPatchScope()  # with nothing to restore

    interpreter._patch_lang = patch_lang


def _remember_types(interpreter: Any, tl: Any) -> None:
    own, found = interpreter._get_np_dtype, dict[str, Any]()

    def of_type(asked: Any) -> Any:
        entry = asked.element_ty if isinstance(asked, tl.block_type) else asked
        if entry.name not in found:
            found[entry.name] = own(entry)
        return found[entry.name]

    interpreter._get_np_dtype = of_type
    make, shapes = tl.core.tensor.__init__, dict[str, tuple[Any, Any]]()

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name in shapes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = shapes[type.name]
        else:
            make(self, handle, type)
            shapes[type.name] = self.numel, self.shape

    tl.core.tensor.__init__ = make_tensor


def _fold_exclusive_or(interpreter: Any, tl: Any) -> None:
    import numpy as np

    own = interpreter.ReduceOps.apply_impl

    def apply_impl(self: Any, input: Any) -> Any:
        if self.combine_fn is tl.standard._xor_combine:
            return self.min_max(input[0], val_reduce_op=np.bitwise_xor.reduce)
        return own(self, input)

    interpreter.ReduceOps.apply_impl = apply_impl
