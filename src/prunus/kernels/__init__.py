"""Triton programs for what is bound by memory or launches, each beside the plain function it replaces.

`switch` says which of the two runs. A program is imported inside the function that calls it, because Triton is not
everywhere that torch is.
"""
