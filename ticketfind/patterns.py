"""N:M patterns, such as the 2:4 of NVIDIA's sparse tensor cores: of each M consecutive weights along a layer's inputs
exactly N are kept.

Inputs are a weight's dimension 1: of [outputs, inputs] the last, as `torch.sparse.to_sparse_semi_structured` has it; of
a convolution's [outputs, inputs, *kernel] the input channels at each place of the kernel, as NVIDIA's ASP (apex) and
TensorRT have it, since their kernels keep channels last. Blocks are [number of blocks, M].
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def fits(shape: Sequence[int], block: int) -> bool:
    """Whether a weight of this shape can be divided into blocks."""
    return len(shape) > 1 and 0 not in shape and shape[1] % block == 0


def steps(keep: int, block: int, rounds: int | None) -> tuple[int, ...]:
    """Weights kept in each block, round by round: ``block`` first, ``keep`` last.

    One weight is taken from each block in a round (4, 3, 2), more where there are fewer `rounds` than that takes.
    """
    count = min(rounds or block, block - keep)
    return tuple(block - (block - keep) * number // count for number in range(count + 1))


def keep_highest(scores: Tensor, among: Tensor, keep: int, block: int) -> Tensor:
    """Bool tensor, True for the `keep` highest scores of each block; ties go to what comes first.

    among: bool tensor of the same shape, True where a score takes part.
    """
    values, part = _blocks(scores, block), _blocks(among, block)
    higher = torch.zeros(values.shape, dtype=torch.int16, device=values.device)  # how many of its block come before
    place = torch.arange(block, device=values.device)
    for other in range(block):
        value = values[:, other : other + 1]
        comes_before = (value > values) | ((value == values) & (other < place))
        higher += comes_before & part[:, other : other + 1]
    return _whole(part & (higher < keep), scores.shape)


def kept_in_each(mask: Tensor, block: int) -> int | None:
    """How many weights every block keeps; None where they differ."""
    if not fits(mask.shape, block):
        return None
    counts = _blocks(mask, block).sum(1)
    return int(counts[0]) if bool((counts == counts[0]).all()) else None


def _blocks(weight: Tensor, block: int) -> Tensor:
    return weight.movedim(1, -1).reshape(-1, block)


def _whole(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    moved = [shape[0], *shape[2:], shape[1]]
    return blocks.view(moved).movedim(-1, 1).contiguous()
