"""Perplexity of models and of n-grams, against independent plain loops."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from ngram import count_ngrams, fit_weights, trigram_perplexity, unigram_perplexity
from transformers import BloomConfig, GPT2Config, LlamaConfig, LlavaConfig, MptConfig, OPTConfig, OPTForCausalLM

from prunus import Unstructured, magnitude, stream
from prunus.blocks import longest
from prunus.measure.perplexity import perplexity
from prunus.train import next_token_loss


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=32, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24,
        max_position_embeddings=16, init_std=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=1, dropout=0.5,
    )  # fmt: skip
    return OPTForCausalLM(config)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_by_ten_plain_lines(model, batch_size):
    tokens = torch.randint(2, 32, (53,), generator=torch.Generator().manual_seed(1))
    model.eval()
    logs = []
    for start in range(0, 48, 8):
        part = tokens[start : start + 8]
        for place in range(1, 8):  # each token from its prefix alone
            logits = model(part[None, :place]).logits[0, -1].double()
            logs.append(torch.log_softmax(logits, 0)[part[place]].item())
    model.train()
    assert len(logs) == 6 * 7
    found = perplexity(model, tokens, window=8, batch_size=batch_size)
    assert found == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-5)
    assert model.training


def test_windows_that_predict_nothing_are_refused(model):
    with pytest.raises(ValueError, match="window of 1"):
        perplexity(model, torch.arange(8), window=1)
    with pytest.raises(ValueError, match="8 tokens hold no window of 9"):
        perplexity(model, torch.arange(8), window=9)


@pytest.mark.parametrize("wrong", [-1, 32])
def test_tokens_of_another_vocabulary_are_refused(model, wrong):
    with pytest.raises(ValueError, match=f"token {wrong} is not in the model's vocabulary of 32"):
        perplexity(model, torch.tensor([2, 3, wrong, 4]), window=4)


@pytest.mark.parametrize("run", [
    lambda model, tokens: perplexity(model, tokens.flatten(), window=17),
    next_token_loss,
    lambda model, tokens: stream(model, magnitude, Unstructured("row"), 0.5, tokens=tokens),
])  # fmt: skip
def test_windows_longer_than_the_positions_of_the_model_are_refused(model, run):
    with pytest.raises(ValueError, match="windows of 17 tokens, but the model was made for 16 at most"):
        run(model, torch.full((2, 17), 3))


def test_a_model_says_how_much_it_takes_in_its_own_words():
    sizes = {"hidden_size": 8, "num_attention_heads": 1}
    assert longest(GPT2Config(n_positions=5)) == longest(MptConfig(max_seq_len=5)) == 5
    assert longest(LlavaConfig(text_config=LlamaConfig(max_position_embeddings=5, **sizes))) == 5
    assert longest(BloomConfig()) is None


def text(size: int, seed: int) -> np.ndarray:
    """A stream over 6 tokens in which the next token depends on the two before it."""
    random = np.random.default_rng(seed)
    stream = [0, 1]
    for _ in range(size - 2):
        stream.append((stream[-1] + 2 * stream[-2] + 1) % 6 if random.random() < 0.7 else int(random.integers(6)))
    return np.array(stream)


def test_trigrams_by_plain_counting():
    training, validation, tokens = text(300, 0), text(120, 1), text(50, 2)
    ngrams = count_ngrams(training, 6)
    weights = fit_weights(ngrams, validation)
    assert weights.sum(1) == pytest.approx(np.ones(len(weights)))
    rows = training.tolist()
    one, two = Counter(rows), Counter(itertools.pairwise(rows))
    three = Counter(zip(rows, rows[1:], rows[2:], strict=False))
    logs = []
    for place in (p for p in range(48) if p % 8):  # windows of 8: all but their first tokens
        c, b = int(tokens[place]), int(tokens[place - 1])
        parts = [1 / 6, one[c] / 300, two[b, c] / one[b]]
        if place == 1:
            logs.append(math.log(np.dot(weights[0, :3], parts) / weights[0, :3].sum()))
            continue
        a = int(tokens[place - 2])
        weight = weights[min(math.ceil(math.log2(two[a, b] + 1)), len(weights) - 1)]
        logs.append(math.log(np.dot(weight, [*parts, three[a, b, c] / max(two[a, b], 1)])))
    assert trigram_perplexity(ngrams, weights, tokens, window=8) == pytest.approx(math.exp(-np.mean(logs)))
    plain = [math.log((one[int(tokens[p])] + 1) / 306) for p in range(48) if p % 8]
    assert unigram_perplexity(ngrams, tokens, window=8) == pytest.approx(math.exp(-np.mean(plain)))


def test_more_rounds_of_fitting_raise_the_likelihood():
    ngrams, validation = count_ngrams(text(2000, 0), 6), text(500, 1)
    found = [
        trigram_perplexity(ngrams, fit_weights(ngrams, validation, rounds=rounds), validation, window=500)
        for rounds in (0, 1, 5, 50)
    ]
    assert found == sorted(found, reverse=True)
    # The structure is in the trigrams, and the model finds it: the source's own perplexity is 6 ** 0.6 or so.
    assert found[-1] < 0.7 * unigram_perplexity(ngrams, validation, window=500)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match=r"tokens in \[0, 4\)"):
        count_ngrams(np.array([0, 1, 4]), 4)
    with pytest.raises(ValueError, match="do not fit 64 bits"):
        count_ngrams(np.array([0, 1, 2]), 2**22)
    with pytest.raises(ValueError, match="hold no window"):
        unigram_perplexity(count_ngrams(np.array([0, 1, 2]), 4), np.array([0, 1]), window=3)
