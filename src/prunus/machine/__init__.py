"""What a process runs on: files that are complete or absent, ranks, the precision of matrix products."""

from prunus.machine import ranks
from prunus.machine.files import write_json, write_text
from prunus.machine.precision import Precision, autocast, full_products, no_autocast, of_training, product_dtype

__all__ = [
    "Precision",
    "autocast",
    "full_products",
    "no_autocast",
    "of_training",
    "product_dtype",
    "ranks",
    "write_json",
    "write_text",
]
