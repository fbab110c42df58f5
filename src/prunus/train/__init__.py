"""The one training loop and what belongs to it: schedules, hooks, averaged weights, captured steps, checkpoints."""

from prunus.train.averaged import Ema, Swa
from prunus.train.batchnorm import recalibrate_
from prunus.train.capture import unrecorded
from prunus.train.hooks import During, Plan, masks_by_magnitude
from prunus.train.lr import (
    Multiplier,
    Original,
    allr,
    clr,
    constant,
    cosine,
    exponential,
    ft,
    linear,
    linear_warmup_decay,
    llr,
    lrw,
    multistep,
    one_cycle,
    risen,
    slr,
)
from prunus.train.train import Substituted, Trace, classification_loss, next_token_loss, train

__all__ = [
    "During",
    "Ema",
    "Multiplier",
    "Original",
    "Plan",
    "Substituted",
    "Swa",
    "Trace",
    "allr",
    "classification_loss",
    "clr",
    "constant",
    "cosine",
    "exponential",
    "ft",
    "linear",
    "linear_warmup_decay",
    "llr",
    "lrw",
    "masks_by_magnitude",
    "multistep",
    "next_token_loss",
    "one_cycle",
    "recalibrate_",
    "risen",
    "slr",
    "train",
    "unrecorded",
]
