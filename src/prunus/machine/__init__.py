"""What a process runs on: files that are complete or absent, ranks, and how a model runs."""

from prunus.machine import ranks
from prunus.machine.files import atomic, json_line, json_value, read_json, write_json, write_tensors, write_text
from prunus.machine.running import (
    Precision,
    autocast,
    full_products,
    import_extra,
    in_mode,
    local_part,
    no_autocast,
    of_training,
    product_dtype,
    random_state,
    set_random_state,
)

__all__ = [
    "Precision",
    "atomic",
    "autocast",
    "full_products",
    "import_extra",
    "in_mode",
    "json_line",
    "json_value",
    "local_part",
    "no_autocast",
    "of_training",
    "product_dtype",
    "random_state",
    "ranks",
    "read_json",
    "set_random_state",
    "write_json",
    "write_tensors",
    "write_text",
]
