"""Pruning block by block, from memory or from disk: observe, solve, fit, hand on, write, free.

`stream` is the loop; `work` the folder from which a killed run goes on.
"""

from prunus.stream.reconstruct import Fit
from prunus.stream.sources import Shards, ahead, carried
from prunus.stream.stream import Streamed, stream, survey
from prunus.stream.work import BlockReport, Work

__all__ = ["BlockReport", "Fit", "Shards", "Streamed", "Work", "ahead", "carried", "stream", "survey"]
