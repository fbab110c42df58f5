"""Methods that prune while training, one file each, behind the hooks of `prunus.train.During`.

A new method is one file with one class, and one entry here; `__all__` holds methods and their protocol alone.
"""

from prunus.during.cs import CS
from prunus.during.dnw import DNW
from prunus.during.dpf import DPF
from prunus.during.dst import DST
from prunus.during.gmp import GMP
from prunus.during.gsm import GSM
from prunus.during.lc import LC
from prunus.during.part import Part as Part
from prunus.during.rigl import RigL
from prunus.during.schedule import cubic as cubic
from prunus.during.set_ import SET
from prunus.during.soft_threshold import STR
from prunus.train import During, Plan

__all__ = ["CS", "DNW", "DPF", "DST", "GMP", "GSM", "LC", "SET", "STR", "During", "Plan", "RigL"]
