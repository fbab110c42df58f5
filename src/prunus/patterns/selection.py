"""Exact selection of the largest scores: over a matrix, in every row, in small groups, over a whole model.

One rule everywhere: larger scores are kept, and among equal scores the lower flat index is. So the number kept is the
number asked for, whatever the ties. Thresholds come from selection (kthvalue, topk, bit search, histogram), never from
sorting a matrix or a model.

    keep = score > t  or  (score == t and this is one of the first `kept - #(score > t)` equals)

Some searches go by integer keys: a float's bits, read as an integer, are in the floats' order once those of negative
ones, but for the sign, are turned round. Bits are fixed from the top by counting; or the upper and then the lower 16
are counted all at once, which needs one reading each of scores that come tensor by tensor.

On a GPU the same masks come from the Triton programs in `kernels/`. What a pattern means is in `patterns`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from prunus.kernels import uses_kernels

_TOPK = 1 << 22  # largest CUDA problem given to topk, which allocates its result
_Kth = tuple[float, int | None, int]  # a k-th largest score; where known, how many are larger, and how many equal it
_WIDTHS = (torch.float32, torch.bfloat16, torch.float16)  # what the programs read; float64 takes the plain path
_SAMPLED = 1 << 12  # entries of a sample, on a CPU
_CHUNK = 1 << 22  # entries worked on at once: bounds the temporaries (12 bytes an entry) to about 50 MB


def kept_of(numel: int, sparsity: float) -> int:
    """How many of `numel` entries stay at a sparsity (share of zeros, in [0, 1)): `numel - round(sparsity * numel)`.

    Raises ValueError for a sparsity outside [0, 1), NaN included.

    >>> kept_of(10, 0.7)
    3
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share of zeros, in [0, 1); got {sparsity}. 70 % zeros is 0.7")
    return numel - round(sparsity * numel)


def check_scores(score: Tensor, name: str = "score") -> None:
    """Raise ValueError unless `score` is floating and free of NaN (infinities are ordered and may stay)."""
    if not score.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {score.dtype}; pass score.float()")
    if score.numel() and bool(score.amax().isnan()):  # a maximum passes NaN on, and allocates nothing
        refuse_nan(int(score.isnan().sum()), score.numel(), name)


def refuse_nan(count: int, numel: int, name: str = "score") -> None:
    """Raise ValueError if `count` of `numel` entries are NaN, and that is not none."""
    if count:
        raise ValueError(
            f"{name} has {count} NaN of {numel} entries: they cannot be ordered. "
            "Check the weights and the calibration inputs for NaN and Inf"
        )


def goes_to_kernels(score: Tensor) -> bool:
    """Whether Triton programs select among these scores."""
    return score.dtype in _WIDTHS and uses_kernels(score)


def keep_largest(score: Tensor, kept: int, *, wait: bool = True) -> Tensor:
    """The mask of the `kept` largest entries of a whole matrix.

    score: (rows, columns) floating, no NaN (not checked here); 0 <= kept <= score.numel(). Returns bool, same shape.
    wait: False never waits for a GPU, as a captured step must not, and takes longer for millions of entries there.

    >>> keep_largest(torch.tensor([[1.0, 3.0], [3.0, 3.0]]), 2).tolist()
    [[False, True], [True, False]]
    """
    if kept <= 0 or kept >= score.numel():
        return torch.full(score.shape, kept > 0, dtype=torch.bool, device=score.device)
    if wait and goes_to_kernels(score) and score.numel() > _TOPK:
        return _keep_in_kernels(score, kept)
    threshold = _kth(score, kept, wait=wait)
    if wait and score.device.type == "cpu" and int((found := score >= threshold).count_nonzero()) == kept:
        return found  # nothing ties with what is left out
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    above = torch.zeros((), dtype=torch.int64, device=score.device)
    ties: list[Tensor] = []
    for rows in _row_chunks(score):
        above += (score[rows] > threshold).sum()
        ties.append((score[rows] == threshold).sum(1))
    ties_of_row = torch.cat(ties)
    before = ties_of_row.cumsum(0) - ties_of_row  # equals in earlier rows
    wanted = (kept - above - before).clamp_(min=0)  # equals this row may still take
    for rows in _row_chunks(score):
        mask[rows] = _above_or_first(score[rows], threshold, wanted[rows, None])
    return mask


def keep_largest_of_row(score: Tensor, kept: int, extra: int = 0) -> Tensor:
    """The mask of the `kept` largest entries of every row, and one more in each of the first `extra` rows.

    score: (rows, columns) floating, no NaN (not checked here); 0 <= kept <= columns, less than that where there is an
    extra one. Returns bool, same shape.

    >>> keep_largest_of_row(torch.tensor([[1.0, 2.0, 2.0], [5.0, 0.0, 1.0]]), 1).tolist()
    [[False, True, False], [True, False, False]]
    """
    if goes_to_kernels(score):
        from prunus.kernels import keep_of_rows, takes_rows

        if takes_rows(score):
            return keep_of_rows(score, kept, extra)[0]
    if extra:
        return torch.cat([keep_largest_of_row(score[:extra], kept + 1), keep_largest_of_row(score[extra:], kept)])
    columns = score.shape[1]
    if kept <= 0 or kept >= columns:
        return torch.full(score.shape, kept > 0, dtype=torch.bool, device=score.device)
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    for rows in _row_chunks(score):
        part = score[rows]
        threshold = part.kthvalue(columns - kept + 1, dim=1, keepdim=True).values
        if score.device.type == "cpu" and bool(((found := part >= threshold).count_nonzero(1) == kept).all()):
            mask[rows] = found  # nothing ties with what is left out
            continue
        wanted = kept - (part > threshold).sum(1, keepdim=True)
        mask[rows] = _above_or_first(part, threshold, wanted)
    return mask


def keep_largest_of_groups(score: Tensor, kept: int, width: int) -> Tensor:
    """The mask of the `kept` largest of every `width` consecutive entries of a row.

    score: (rows, columns) floating, no NaN (not checked here); `width` divides columns. Returns bool, same shape.

    >>> keep_largest_of_groups(torch.tensor([[1.0, 4.0, 1.0, 0.0]]), 1, 2).tolist()
    [[False, True, True, False]]
    """
    if goes_to_kernels(score):
        from prunus.kernels import keep_of_groups

        return keep_of_groups(score, kept, width)[0]
    rows, columns = score.shape
    groups = score.reshape(rows, columns // width, width)
    return keep_largest_of_group(groups, kept).view(rows, columns)


def keep_largest_of_group(score: Tensor, kept: int) -> Tensor:
    """The mask of the `kept` largest entries along the last, short dimension.

    score: (..., m) floating, no NaN (not checked here); 0 <= kept <= m. Returns bool, same shape. Each entry's rank is
    counted, #(larger) + #(equal and earlier): m^2 comparisons a group, no sort and no host synchronisation.

    >>> keep_largest_of_group(torch.tensor([1.0, 4.0, 1.0, 0.0]), 2).tolist()
    [True, True, False, False]
    """
    m = score.shape[-1]
    if score.numel() * m <= _CHUNK:  # one comparison of all pairs: fewest kernel launches
        mine, other = score.unsqueeze(-1), score.unsqueeze(-2)
        earlier = torch.ones(m, m, dtype=torch.bool, device=score.device).tril_(-1)
        return ((other > mine) | ((other == mine) & earlier)).sum(-1) < kept
    rank = torch.zeros(score.shape, dtype=torch.int16, device=score.device)
    for j in range(m):  # one opponent at a time: least memory
        opponent = score[..., j : j + 1]
        rank[..., :j] += opponent > score[..., :j]
        rank[..., j + 1 :] += opponent >= score[..., j + 1 :]
    return rank < kept


def select_global_share(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """How many entries of each tensor stay when this share of all, in [0, 1), goes; exact, in bounded memory.

    scores: name -> float32, bfloat16 or float16 of any shape; read three times in the mapping's order, so values may be
    computed on access. The order-preserving integer key of a float32 is refined by two histograms of 16 bits, or on a
    GPU by a sample and a histogram of what lies near its k-th (a reading more where scores are few or far apart, two
    where the sample misleads). Ties go to earlier tensors, then to lower flat indices: `keep_largest` with these counts
    gives the mask of one direct model-wide selection. Raises ValueError for NaN or float64.

    >>> select_global_share({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([3.0, 4.0])}, 0.5)
    {'a': 1, 'b': 1}
    """
    kept_of(0, sparsity)  # refuse before the readings
    total, kth = _first_reading(scores)
    return _select(scores, kept_of(total, sparsity), kth)


def keep_largest_of_all(scores: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
    """The masks of the `kept` largest of all entries of all tensors; ties as in `select_global_share`.

    scores: name -> (rows, columns), otherwise as there. Raises ValueError for NaN, float64, or kept outside 0..(number
    of scores).

    >>> keep_largest_of_all({"a": torch.tensor([[1.0, 5.0]]), "b": torch.tensor([[3.0]])}, 2)
    {'a': tensor([[False,  True]]), 'b': tensor([[True]])}
    """
    _, kth = _first_reading(scores)
    threshold, above, equal = kth(kept) if kept else (torch.inf, None, 0)
    if above is not None and all(goes_to_kernels(score) for score in scores.values()):
        from prunus.kernels import LISTED, Kth, keep_of_all

        if equal <= LISTED or above + equal == kept:
            masks = keep_of_all(scores.values(), Kth(threshold, above, equal), kept)
            return dict(zip(scores, masks, strict=True))
        shares = _shares(scores, kept, threshold)
        return {name: _keep_above_and_first(score, threshold, *shares[name]) for name, score in scores.items()}
    counts = _select(scores, kept, lambda _: (threshold, above, equal))
    return {name: keep_largest(score, counts[name]) for name, score in scores.items()}


def _kth_by_bits(flat: Tensor, k: int) -> Tensor:
    """The k-th largest by fixing one bit of its integer key after the other, from the top.

    On CUDA kthvalue gives one long row to a single block; this reads the keys 32 times with the whole device.
    """
    keys, bits = _keys(flat)
    found = torch.full((), -(1 << (bits - 1)), dtype=keys.dtype, device=keys.device)
    for bit in reversed(range(bits)):
        flip = 1 << bit if bit < bits - 1 else -(1 << (bits - 1))
        trial = found ^ flip
        found = torch.where((keys >= trial).sum() >= k, trial, found)
    return _unkey(found)


def _high_histogram(score: Tensor) -> Tensor:
    """Counts of the upper 16 key bits of a tensor, (65536,) int64 on the CPU."""
    histogram = torch.zeros(65536, dtype=torch.int64)
    for part in _flat_chunks(score):
        high = (_keys(part)[0] >> 16) + 32768
        histogram += torch.bincount(high, minlength=65536).cpu()
    return histogram


def _refine(scores: Mapping[str, Tensor], k: int, histogram: Tensor) -> float:
    """The k-th largest of all, where the `high_histogram` of all is known."""
    _check_rank(k, int(histogram.sum()))
    high, above = _bin_of(histogram, k)
    low = torch.zeros(65536, dtype=torch.int64)
    for score in scores.values():
        for part in _flat_chunks(score):
            keys = _keys(part)[0]
            inside = keys[(keys >> 16) + 32768 == high] & 0xFFFF
            low += torch.bincount(inside, minlength=65536).cpu()
    key = ((high - 32768) << 16) | _bin_of(low, k - above)[0]
    return float(_unkey(torch.tensor(key, dtype=torch.int32)))


def _check_rank(k: int, total: int) -> None:
    """Raise ValueError unless k is in 1..total."""
    if not 1 <= operator.index(k) <= total:
        raise ValueError(f"there is no {k}-th largest of {total} entries")


def _flat_chunks(score: Tensor) -> Iterator[Tensor]:
    """Its entries in float32, some at a time."""
    for part in score.detach().reshape(-1).split(_CHUNK):
        yield part.float()  # a threshold of another dtype must not be rounded to a tensor's own


def _select(scores: Mapping[str, Tensor], kept: int, kth: Callable[[int], _Kth]) -> dict[str, int]:
    if kept == 0:
        for name, score in scores.items():
            check_scores(score, f"score of '{name}'")
        return dict.fromkeys(scores, 0)
    shares = _shares(scores, kept, kth(kept)[0])
    return {name: above + taken for name, (above, _, taken) in shares.items()}


def _shares(scores: Mapping[str, Tensor], kept: int, threshold: float) -> dict[str, tuple[int, int, int]]:
    """Of each tensor how many entries are above the kept-th largest of all, how many equal it, and how many of those
    stay."""
    counts = {name: _count(score, threshold) for name, score in scores.items()}
    device = next(iter(counts.values())).device  # one wait for all counts
    found = dict(zip(counts, torch.stack([count.to(device) for count in counts.values()]).tolist(), strict=True))
    wanted = kept - sum(above for above, _ in found.values())
    result: dict[str, tuple[int, int, int]] = {}
    for name, (above, equal) in found.items():
        result[name] = above, equal, min(equal, wanted)
        wanted -= min(equal, wanted)
    return result


def _keep_above_and_first(score: Tensor, threshold: float, above: int, equal: int, taken: int) -> Tensor:
    """The mask, by programs, of what is above the threshold and of its equals the first `taken`."""
    from prunus.kernels import keep_above, keep_first, key_of, value_of

    if taken == equal:
        return keep_above(score, threshold)
    if not taken:
        return keep_above(score, value_of(key_of(threshold) + 1))
    return keep_first(score, torch.full((), threshold, device=score.device), above + taken)


def _count(score: Tensor, threshold: float) -> Tensor:
    """How many entries are above and how many equal the threshold, (2,) int64."""
    if goes_to_kernels(score):
        from prunus.kernels import count_of

        return count_of(score, torch.full((), threshold, device=score.device)).sum(1)
    count = torch.zeros(2, dtype=torch.int64, device=score.device)
    for part in _flat_chunks(score):
        count += torch.stack([(part > threshold).sum(), (part == threshold).sum()])
    return count


def _first_reading(scores: Mapping[str, Tensor]) -> tuple[int, Callable[[int], _Kth]]:
    """How many scores there are, and a function that finds the k-th largest of them, by the device of the first."""
    histogram = torch.zeros(65536, dtype=torch.int64)
    samples: list[Tensor] = []
    total, sampled = 0, False
    for name, score in scores.items():
        sampled = uses_kernels(score) if not total else sampled
        _check_width(score, name, nan=not sampled)  # what reads sampled scores for their k-th notices NaN
        total += score.numel()
        if sampled:
            from prunus.kernels import sample_of

            samples.append(sample_of(score).to((samples or [score])[0].device))
        else:
            histogram += _high_histogram(score)
    if sampled:
        return total, lambda k: _kth_by_sample(scores, k, torch.cat(samples), total)
    return total, lambda k: (_refine(scores, k, histogram), None, 0)


def _check_width(score: Tensor, name: str, *, nan: bool) -> None:
    check_scores(score if nan else score.reshape(-1)[:0], f"score of '{name}'")
    if score.dtype == torch.float64:
        raise ValueError(f"model-wide selection compares float32 scores; '{name}' is float64: pass score.float()")


def _kth(score: Tensor, k: int, *, wait: bool) -> Tensor:
    """The k-th largest entry of a matrix as a scalar tensor. wait: whether numbers may be looked at, on a CPU."""
    flat = score.reshape(-1)
    smaller = flat.numel() - k + 1  # the same entry, counted from below
    if not flat.is_cuda:
        return _kth_between(flat, k) if wait else flat.kthvalue(smaller).values
    if flat.numel() > _TOPK:
        return _kth_by_bits(flat, k)
    if k <= smaller:
        return flat.topk(k, sorted=False).values.min()
    return flat.topk(smaller, largest=False, sorted=False).values.max()


def _kth_between(flat: Tensor, k: int) -> Tensor:
    """The k-th largest on a CPU: among the few entries between two of a sample, if it lies there, else among all."""
    numel = flat.numel()
    if numel > 4 * _SAMPLED:
        sample = flat[:: numel // _SAMPLED].sort(descending=True).values
        place = k * len(sample) // numel
        width = 2 * math.isqrt(len(sample))  # four deviations of a random sample's rank
        most, least = sample[max(place - width, 0)], sample[min(place + width, len(sample) - 1)]
        above = int((flat > most).count_nonzero())
        between = flat[(flat >= least) & (flat <= most)]
        if above < k <= above + len(between):
            return between.kthvalue(len(between) - (k - above) + 1).values
    return flat.kthvalue(numel - k + 1).values


def _keep_in_kernels(score: Tensor, kept: int) -> Tensor:
    from prunus.kernels import LISTED, keep_first, keep_of_all, kth_of, sample_of

    found = kth_of([score], sample_of(score), kept, score.numel())
    if found is None or math.isnan(found.value):
        return keep_first(score, _kth_by_bits(score.reshape(-1), kept).float(), kept)
    if found.equal <= LISTED or found.above + found.equal == kept:
        return keep_of_all([score], found, kept)[0]
    return keep_first(score, torch.full((), found.value, device=score.device), kept)


def _kth_by_sample(scores: Mapping[str, Tensor], k: int, sample: Tensor, total: int) -> _Kth:
    from prunus.kernels import kth_of

    _check_rank(k, total)
    found = kth_of(scores.values(), sample, k, total)
    if found is None or math.isnan(found.value):
        for name, score in scores.items():
            check_scores(score, f"score of '{name}'")
        histogram = sum((_high_histogram(score) for score in scores.values()), torch.tensor(0))
        return _refine(scores, k, histogram), None, 0
    return found


def _above_or_first(score: Tensor, threshold: Tensor, wanted: Tensor) -> Tensor:
    """Entries above the threshold, and in each row the first `wanted` (rows, 1) that equal it."""
    equal = score == threshold
    return (score > threshold) | (equal & (equal.cumsum(1, dtype=torch.int32) <= wanted))


def _row_chunks(score: Tensor) -> Iterator[slice]:
    rows, columns = score.shape
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _keys(flat: Tensor) -> tuple[Tensor, int]:
    """Integers in the order of the floats, and their width in bits. -0 gets a key below +0: compare by value after."""
    if flat.dtype == torch.float64:
        raw = flat.view(torch.int64)
        return raw ^ ((raw >> 63) & 0x7FFFFFFFFFFFFFFF), 64
    raw = flat.float().view(torch.int32)
    return raw ^ ((raw >> 31) & 0x7FFFFFFF), 32


def _unkey(key: Tensor) -> Tensor:
    if key.dtype == torch.int64:
        return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).view(torch.float64)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _bin_of(histogram: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and how many entries lie in higher bins."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, torch.tensor(k)))
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, above
