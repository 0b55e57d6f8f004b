"""Where a run's weights began and how far the dense training moved them, from its tensor files. numpy, no torch."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ticketfind import TicketfindError
from ticketfind.rundir import RunDir

BINS = 40
READABLE = ("F64", "F32", "F16")
"""What numpy has; bfloat16 it lacks."""


@dataclass(frozen=True)
class Histogram:
    """Densities (of unit area) of two sets of numbers over the same bins."""

    centers: list[float]
    one: list[float]
    other: list[float]


@dataclass(frozen=True)
class Movement:
    """What the tensor files say of one round's masks."""

    means: list[tuple[float, float]]
    """For each replicate the mean |w_T - w_0| over kept weights and over pruned ones; w_0 is the rewind point."""
    moved: Histogram | None
    """|w_T - w_0| of kept and of pruned weights, of the first replicate; both are empty where there is no w_T."""
    initial: dict[str, Histogram]
    """By parameter: initial weights kept, and all of them, of the first replicate."""
    notes: list[str]
    """What could not be read, and why."""


def of_run(run: RunDir, round: int, replicates: Sequence[int]) -> Movement:
    """Of the masks that `round` trains under. Raises TicketfindError for files that are damaged or do not fit."""
    found = Movement([], None, {}, [])
    if not all(run.mask_file(round, r).is_file() and _start(run, r).is_file() for r in replicates):
        found.notes.append(f"weights are not looked at: the run holds no masks of round {round}")
        return found
    first = replicates[0]
    try:
        for name, mask, (start,) in _tensors(run.mask_file(round, first), _start(run, first)):
            if mask.any():
                found.initial[name] = _histogram(start[mask], start.ravel(), (start.min(), start.max()))
        if not all(run.trained_file(r).is_file() for r in replicates):
            found.notes.append("movement is not shown: the run holds no trained weights of round 0")
            return found
        found.means.extend(_means(run, round, r) for r in replicates)
        return Movement(found.means, _moved(run, round, first), found.initial, found.notes)
    except _Unreadable as reason:
        found.notes.append(f"weights are not looked at: {reason}")
        return Movement([], None, {}, found.notes)


def _start(run: RunDir, replicate: int) -> Path:
    """What round 0 is held against: the rewind point; with learning-rate rewinding the initialization."""
    one = run.start_file(replicate)
    return one if one.is_file() else run.start_file(replicate, 0)


class _Unreadable(Exception):
    """A type of number that numpy does not have."""


def _distances(run: RunDir, round: int, replicate: int) -> Iterator[tuple[Any, Any]]:
    """Of each masked tensor the mask and |w_T - w_0|."""
    import numpy as np

    files = (_start(run, replicate), run.trained_file(replicate))
    for _, mask, (start, end) in _tensors(run.mask_file(round, replicate), *files):
        yield mask, np.abs(end.astype(np.float64) - start)


def _means(run: RunDir, round: int, replicate: int) -> tuple[float, float]:
    sums, counts = [0.0, 0.0], [0, 0]
    for mask, distance in _distances(run, round, replicate):
        for side, chosen in enumerate((mask, ~mask)):
            sums[side] += float(distance[chosen].sum())
            counts[side] += int(chosen.sum())
    kept, pruned = (total / max(count, 1) for total, count in zip(sums, counts, strict=True))
    return kept, pruned


def _moved(run: RunDir, round: int, replicate: int) -> Histogram:
    import numpy as np

    distances = (float(np.quantile(d, 0.999)) for _, d in _distances(run, round, replicate) if d.size)
    farthest = max(distances, default=0.0) or 1.0  # 1 where nothing has moved at all
    kept, pruned = np.zeros(BINS), np.zeros(BINS)
    for mask, distance in _distances(run, round, replicate):
        kept += np.histogram(distance[mask], BINS, (0, farthest))[0]
        pruned += np.histogram(distance[~mask], BINS, (0, farthest))[0]
    return _densities(kept, pruned, (0.0, farthest))


def _histogram(one: Any, other: Any, limits: tuple[Any, Any]) -> Histogram:
    import numpy as np

    low, high = (float(limit) for limit in limits)
    span = (low, high if high > low else low + 1)
    counted, others = (np.histogram(values, BINS, span)[0].astype(float) for values in (one, other))
    return _densities(counted, others, span)


def _densities(one: Any, other: Any, limits: tuple[float, float]) -> Histogram:
    import numpy as np

    edges = np.linspace(*limits, BINS + 1)
    wide = max(edges[1] - edges[0], 1e-30)
    one, other = (counts / max(counts.sum() * wide, 1e-30) for counts in (one, other))
    return Histogram(((edges[1:] + edges[:-1]) / 2).tolist(), one.tolist(), other.tolist())


def _tensors(masks: Path, *states: Path) -> Iterator[tuple[str, Any, list[Any]]]:
    """Of each masked parameter its name, its mask and its values in the states; one at a time in memory."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(path, framework="np")) for path in (masks, *states)]
            for name in opened[0].keys():  # noqa: SIM118
                mask = opened[0].get_tensor(name)
                values = []
                for path, file in zip(states, opened[1:], strict=True):
                    kind = file.get_slice(name).get_dtype()
                    if kind not in READABLE:
                        raise _Unreadable(f"{name} is of type {kind}, which numpy does not have")
                    values.append(file.get_tensor(name))
                    if values[-1].shape != mask.shape or mask.dtype != np.bool_ or not np.isfinite(values[-1]).all():
                        raise TicketfindError(f"{path}: {name}: expected finite weights that fit the mask in {masks}")
                yield name, mask, values
        except (OSError, SafetensorError, ValueError) as error:
            raise TicketfindError(
                f"{masks.parent.parent}: expected masks, init and trained to hold the same parameters: {error}"
            ) from error
