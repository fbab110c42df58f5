"""What a process runs on: complete files, ranks, random numbers, modules in a mode, the precision of products."""

from prunus.machine import ranks
from prunus.machine.files import atomic, write_json, write_tensors, write_text
from prunus.machine.modules import import_extra, in_mode, local_part
from prunus.machine.precision import Precision, autocast, full_products, no_autocast, of_training, product_dtype
from prunus.machine.random import random_state, set_random_state

__all__ = [
    "Precision",
    "atomic",
    "autocast",
    "full_products",
    "import_extra",
    "in_mode",
    "local_part",
    "no_autocast",
    "of_training",
    "product_dtype",
    "random_state",
    "ranks",
    "set_random_state",
    "write_json",
    "write_tensors",
    "write_text",
]
