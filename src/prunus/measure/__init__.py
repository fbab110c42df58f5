"""Measurements of a model."""

from prunus.measure.accuracy import Accuracy, accuracy
from prunus.measure.corruptions import MEASURES, Corrupted, corrupted_accuracy, corrupted_sets
from prunus.measure.cost import Cost, Energy, cost, flops_of, own_flops, weight_change
from prunus.measure.ensemble import Ensemble, ensemble_accuracy
from prunus.measure.latency import latency
from prunus.measure.perplexity import perplexity
from prunus.measure.streamed import streamed_perplexity
from prunus.measure.zeroshot import read_task, zero_shot

__all__ = [
    "MEASURES",
    "Accuracy",
    "Corrupted",
    "Cost",
    "Energy",
    "Ensemble",
    "accuracy",
    "corrupted_accuracy",
    "corrupted_sets",
    "cost",
    "ensemble_accuracy",
    "flops_of",
    "latency",
    "own_flops",
    "perplexity",
    "read_task",
    "streamed_perplexity",
    "weight_change",
    "zero_shot",
]
