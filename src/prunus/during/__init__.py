"""Methods that prune while training, one file each, behind the hooks of `protocol.During`.

A new method is one file with one class, and one entry here.
"""

from prunus.during.protocol import During, Plan

__all__ = ["During", "Plan"]
