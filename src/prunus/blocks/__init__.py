"""A model as a chain of blocks: found in the module tree, run one by one, recomputed or compiled where that pays."""

from prunus.blocks.chain import Arguments, Source, embed, find_blocks, find_recomputing, finish, run_block
from prunus.blocks.compiled import allow_programs, compile_blocks_, uncompiled
from prunus.blocks.recompute import recomputed, recomputing

__all__ = [
    "Arguments",
    "Source",
    "allow_programs",
    "compile_blocks_",
    "embed",
    "find_blocks",
    "find_recomputing",
    "finish",
    "recomputed",
    "recomputing",
    "run_block",
    "uncompiled",
]
