"""One arm's training, step by step, for tests."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ticketfind.batches import Batch, Examples
from ticketfind.engine import Lockstep
from ticketfind.lanes import Lane
from ticketfind.outputs import OutputFn
from ticketfind.recipe import Train


class OneArm:
    """A lane, and what the engine does with it."""

    def __init__(
        self,
        model: nn.Module,
        start: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        how: Train,
        loss: OutputFn,
        seed: int = 0,
    ) -> None:
        self._lane, self._how = Lane(model, start, dict(masks), how, loss), how
        torch.manual_seed(seed)

    def advance(self, batches: Iterable[Batch], first: int, tick: Callable[[int], None]) -> list[float]:
        """Train on `batches`, the first of which is iteration `first`; the losses."""
        batches = list(batches)
        (losses,) = Lockstep([self._lane], [batches], self._how, first).advance(len(batches), tick)  # type: ignore[list-item]
        return losses

    def measure(self, examples: Examples, functions: Sequence[OutputFn], batch_size: int) -> list[float]:
        """The mean of each function over all examples."""
        (means,) = Lockstep([self._lane], [], self._how).measure(examples, functions, batch_size).tolist()
        return list(means)

    def state(self) -> dict[str, Tensor]:
        """A copy of every parameter and buffer."""
        return self._lane.states()[0]
