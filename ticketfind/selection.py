"""The k highest of many scores, exactly, without sorting them: linear in their number, and without a copy of them all.

Legend: a group is a list of tensors that are ranked together; `among` are bool tensors of the same shapes, True where
a score takes part.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_SAMPLE = 2**16
"""Scores that are sorted, to guess where the threshold lies."""
_SMALL = 2**18
"""Scores that are looked through at once."""


def keep_highest(scores: Sequence[Tensor], among: Sequence[Tensor], k: int) -> list[Tensor]:
    """Bool tensors, True for exactly k of the scores that take part: the highest.

    Ties go to what comes first: tensors in the group's order, entries in row-major order. Exact for any scores, and
    without the 16-million limit of `torch.quantile`.
    """
    n = sum(int(part.sum()) for part in among)
    if k <= 0:
        return [torch.zeros_like(part) for part in among]
    if k >= n:
        return [part.clone() for part in among]
    threshold, above = _threshold(scores, among, k, n)
    room = k - above
    kept = []
    for values, part in zip(scores, among, strict=True):
        ties = (values == threshold) & part
        count = int(ties.sum())
        if count > room:
            ties = (ties.flatten() & (ties.flatten().cumsum(0) <= room)).view(ties.shape)
        room -= min(count, room)
        kept.append(((values > threshold) & part).logical_or_(ties))
    return kept


def _threshold(scores: Sequence[Tensor], among: Sequence[Tensor], k: int, n: int) -> tuple[Tensor, int]:
    """The k-th highest score, and how many are higher.

    A sorted sample gives an interval in which it should lie; only what is inside is looked through, and everything in
    the rare case that it lies outside.
    """
    interval = _interval(scores, among, k / n) if n > _SMALL else None
    if interval is not None:
        low, high = interval
        above = sum(int(((values > high) & part).sum()) for values, part in zip(scores, among, strict=True))
        found = _picked(scores, ((v >= low) & (v <= high) & part for v, part in zip(scores, among, strict=True)))
        if above < k <= above + found.numel():
            return _kth(found, k - above, above)
    return _kth(_picked(scores, among), k, 0)


def _picked(scores: Sequence[Tensor], where: Iterable[Tensor]) -> Tensor:
    return torch.cat([values[part] for values, part in zip(scores, where, strict=True)])


def _kth(values: Tensor, k: int, above: int) -> tuple[Tensor, int]:
    threshold = values.kthvalue(values.numel() - k + 1).values
    return threshold, above + int((values > threshold).sum())


def _interval(scores: Sequence[Tensor], among: Sequence[Tensor], share: float) -> tuple[Tensor, Tensor] | None:
    """Two scores between which, very probably, the share's highest end: eight standard errors of a sample's quantile.

    None where a sample does not tell: few scores take part, or the share is nearly all or nothing of them.
    """
    step = max(1, sum(part.numel() for part in among) // _SAMPLE)
    rows = [(values.flatten()[::step], part.flatten()[::step]) for values, part in zip(scores, among, strict=True)]
    sample = torch.cat([values[part] for values, part in rows]).sort(descending=True).values
    size = sample.numel()
    reach = 8 * (share * (1 - share) * size) ** 0.5 + 2
    first, last = int(share * size - reach), int(share * size + reach)
    return (sample[last], sample[first]) if first >= 0 and last < size else None
