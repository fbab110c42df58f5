"""Which parameters are trained: subsets, low-rank adapters whose effective weights keep every zero, their merge.

`adapt` chooses and puts in place, `effective` computes, `adapters` are the modules that use it, `sites` says where an
adapter sits and merges it back.
"""

from prunus.adapt import subsets
from prunus.adapt.adapt import adapt
from prunus.adapt.biases import add_biases
from prunus.adapt.fused import compiled_forward
from prunus.adapt.subsets import ADAPTERS, find_subset

__all__ = ["ADAPTERS", "adapt", "add_biases", "compiled_forward", "find_subset", "subsets"]
