"""Unigram and interpolated trigram models: what a trained language model has to beat.

They predict the very tokens that `perplexity` predicts (positions 2 .. L of each window), so the perplexities compare;
they see the whole stream before a token, also across a window's start, which favours them a little.

    p(c | a b) = l3 n(abc)/n(ab.) + l2 n(bc)/n(b.) + l1 n(c)/N + l0/V,   l = l(bucket of n(ab.))
(Jelinek & Mercer 1980.) The weights l are chosen by expectation maximisation on a validation stream, one set for each
power-of-two bucket of the context's count, so that a context never seen falls back to the lower orders by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Ngrams", "count_ngrams", "fit_weights", "trigram_perplexity", "unigram_perplexity"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ngrams:
    """Counts of the 1-, 2- and 3-grams of a training stream of tokens below `vocabulary`.

    unigrams: (V,) counts; bigrams, trigrams: (sorted distinct keys, counts), the key of a b c being (a V + b) V + c.
    """

    vocabulary: int
    unigrams: Ints
    bigrams: tuple[Ints, Ints]
    trigrams: tuple[Ints, Ints]


def count_ngrams(tokens: Ints, vocabulary: int) -> Ngrams:
    """The n-gram counts of the stream tokens (N,).

    Raises: ValueError for fewer than 3 tokens, a token outside the vocabulary, or one too large for 64-bit keys.

    >>> count_ngrams(np.array([0, 1, 0, 1]), vocabulary=2).bigrams
    (array([1, 2]), array([2, 1]))
    """
    if vocabulary > 2**21:
        raise ValueError(f"Trigram keys of a vocabulary of {vocabulary} do not fit 64 bits; at most {2**21} do.")
    stream = tokens.astype(np.int64)
    if stream.size < 3 or stream.min() < 0 or stream.max() >= vocabulary:
        raise ValueError(f"Need at least 3 tokens in [0, {vocabulary}); got {stream.size} tokens.")
    pairs = stream[:-1] * vocabulary + stream[1:]
    triples = pairs[:-1] * vocabulary + stream[2:]
    unigrams = np.bincount(stream, minlength=vocabulary).astype(np.int64)
    return Ngrams(vocabulary, unigrams, _distinct(pairs), _distinct(triples))


def fit_weights(ngrams: Ngrams, validation: Ints, *, rounds: int = 50) -> Floats:
    """The interpolation weights (buckets, 4) for uniform, unigram, bigram and trigram, rows summing to 1.

    Each round of expectation maximisation raises the likelihood of the validation stream (M,), which must be neither
    the training text nor the text reported on. A bucket without validation tokens gets the unigram and uniform halves.

    >>> fit_weights(ngrams, validation_tokens).sum(1)
    """
    parts, buckets = _parts(ngrams, validation)
    count = int(buckets.max()) + 1
    sizes = np.bincount(buckets, minlength=count)
    weights = np.full((count, 4), 0.25)
    for _ in range(rounds):
        shares = weights[buckets] * parts  # (M - 2, 4)
        shares /= shares.sum(1, keepdims=True)
        summed = np.stack([np.bincount(buckets, weights=column, minlength=count) for column in shares.T], axis=1)
        weights = np.where(sizes[:, None] > 0, summed / np.maximum(sizes, 1)[:, None], [0.5, 0.5, 0.0, 0.0])
    return weights


def unigram_perplexity(ngrams: Ngrams, tokens: Ints, *, window: int) -> float:
    """The perplexity of the add-one unigram model p(c) = (n(c) + 1) / (N + V) on the predicted tokens of each window.

    >>> unigram_perplexity(ngrams, tokens, window=512)
    """
    probabilities = (ngrams.unigrams + 1) / (ngrams.unigrams.sum() + ngrams.vocabulary)
    return _perplexity(probabilities[tokens[_predicted(tokens.size, window)]])


def trigram_perplexity(ngrams: Ngrams, weights: Floats, tokens: Ints, *, window: int) -> float:
    """The perplexity of the interpolated trigram model, weights as from `fit_weights`, on the same tokens.

    The second token of the stream has a context of one token only and is predicted with an unseen pair before it.

    >>> trigram_perplexity(ngrams, weights, tokens, window=512)
    """
    parts, buckets = _parts(ngrams, tokens)
    # Buckets larger than any in the validation text behave like its largest.
    mixed = (weights[np.minimum(buckets, len(weights) - 1)] * parts).sum(1)  # (N - 2,): tokens 2 .. N - 1
    second = float((_orders(ngrams, tokens[:1], tokens[1:2])[0] * weights[0, :3]).sum() / weights[0, :3].sum())
    probabilities = np.concatenate([[second], mixed])  # tokens 1 .. N - 1
    return _perplexity(probabilities[_predicted(tokens.size, window) - 1])


def _parts(ngrams: Ngrams, tokens: Ints) -> tuple[Floats, Ints]:
    """For tokens 2.. of the stream: the four probabilities (N - 2, 4), and the bucket of the context's count."""
    stream = tokens.astype(np.int64)
    first, second, third = stream[:-2], stream[1:-1], stream[2:]
    context = first * ngrams.vocabulary + second
    seen = _look_up(ngrams.bigrams, context)
    triple = _look_up(ngrams.trigrams, context * ngrams.vocabulary + third)
    parts = np.column_stack([_orders(ngrams, second, third), triple / np.maximum(seen, 1)])
    return parts, np.ceil(np.log2(seen + 1)).astype(np.int64)  # 0 -> 0, 1 -> 1, 2..3 -> 2, 4..7 -> 3


def _orders(ngrams: Ngrams, second: Ints, third: Ints) -> Floats:
    """Uniform, unigram and bigram probability of `third` after `second`: (n, 3)."""
    uniform = np.full(third.size, 1 / ngrams.vocabulary)
    unigram = ngrams.unigrams[third] / ngrams.unigrams.sum()
    pair = _look_up(ngrams.bigrams, second.astype(np.int64) * ngrams.vocabulary + third)
    return np.column_stack([uniform, unigram, pair / np.maximum(ngrams.unigrams[second], 1)])


def _distinct(keys: Ints) -> tuple[Ints, Ints]:
    found, counts = np.unique(keys, return_counts=True)
    return found, counts.astype(np.int64)


def _look_up(table: tuple[Ints, Ints], keys: Ints) -> Ints:
    known, counts = table
    places = np.minimum(np.searchsorted(known, keys), known.size - 1)
    return np.where(known[places] == keys, counts[places], 0)


def _predicted(size: int, window: int) -> Ints:
    if window < 2 or size < window:
        raise ValueError(f"{size} tokens hold no window of {window} tokens that predicts something.")
    whole = np.arange(size // window * window, dtype=np.int64).reshape(-1, window)
    return whole[:, 1:].reshape(-1)


def _perplexity(probabilities: Floats) -> float:
    return math.exp(-float(np.log(probabilities).mean()))
