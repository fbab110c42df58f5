"""Prunus: make a neural network sparse and keep it good.

The names that a script needs stand in `__init__.pyi`, each once with the room it lives in, and are imported when they
are first used, so `import prunus` costs next to nothing. Everything else is reached by its room (`prunus.train`).

    tokens ─▶ calibration ─▶ stream(model, wanda, NM(2, 4), ...) ─▶ Masks
    adapt(model, ["mask_lora"]) ─▶ train ─▶ merge_ ─▶ perplexity ─▶ save_model
"""

from __future__ import annotations

from typing import Any

import lazy_loader

__version__ = "0.1.0"

_find, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'prunus' has no attribute {name!r}; public names are {', '.join(__all__)}")
    return _find(name)
