"""What a search will do, known before any training: what is pruned, weights and iterations of each round, costs."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ticketfind import TicketfindError, masks, prunable, readers
from ticketfind.readers import Duration
from ticketfind.recipe import Prune, Recipe


@dataclass(frozen=True)
class Plan:
    """What a search will do, known before any training."""

    candidates: list[prunable.Candidate]
    groups: list[masks.Group]
    kept: list[int]
    """Weights kept in each round, the dense round 0 first."""
    rewind: int
    """Iteration that survivors go back to; with learning-rate rewinding 0, where the schedule starts over."""
    moves: bool
    """Learning-rate rewinding: each round starts from the last one's trained weights."""
    iterations: list[int]
    """Iterations of each round, of one replicate."""
    measured: int
    """Rounds that are measured, the dense one included: all, but that a one-shot mask from weights that are trained
    already is drawn and no more; at most, where the search may end before."""
    apart: dict[int, int]
    """Rounds with a training of its own for the next mask, beside the one that is measured, and its iterations, at
    most: with `prune.mask_stop` and `prune.mask_iterations` those that draw one mask, but the first; with `prune.every`
    that too."""
    ahead: dict[int, int]
    """Rounds that draw masks in the training that is measured, and how many; they are measured first."""
    finetune: int
    """Iterations that a network is trained on between two masks of one training."""
    may_end_early: bool
    """Whether trainings, or rounds, may turn out not to be needed."""
    memory: int
    """Bytes of weights, gradients, optimizer state and masks of the trainings that run at once."""
    disk: int
    """Bytes of the finished run."""

    @property
    def total(self) -> int:
        """Iterations of one replicate, at most."""
        tuned = sum(self.finetune * len(self.tuned(round)) for round in self.ahead)
        return sum(self.iterations) + sum(self.apart.values()) + tuned

    def draws(self, round: int) -> range:
        """The rounds whose masks come of the training of a round that is measured."""
        following = range(round + 1, len(self.kept))
        return range(0) if round in self.apart else following[: self.ahead.get(round, 0)]

    def tuned(self, round: int) -> range:
        """Those of them whose masks are drawn after training on, under the mask before."""
        return self.draws(round)[1:] if self.finetune else range(0)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Prunable parameters and their shapes."""
        return {c.name: c.shape for c in self.candidates if c.pruned}


def candidates(recipe: Recipe, model: nn.Module) -> list[prunable.Candidate]:
    """Every parameter, and whether the recipe prunes it and why."""
    settings = recipe.prune
    _, block = readers.pattern(settings.scope) or (1, None)
    return prunable.candidates(model, only=settings.only, skip=settings.skip, block=block)


def weights_kept(recipe: Recipe, candidates: list[prunable.Candidate]) -> tuple[list[masks.Group], list[int]]:
    """What is ranked together, and the weights kept in each round, the dense round 0 first."""
    settings = recipe.prune
    prunable.check_globs(settings.fraction, [c.name for c in candidates], "prune.fraction")
    sizes = {c.name: math.prod(c.shape) for c in candidates if c.pruned}
    groups = masks.make_groups(list(sizes), settings.fraction, settings.scope, settings.rounds)
    return groups, masks.plan(sizes, groups, settings.rounds, settings.until)


def make_plan(recipe: Recipe, model: nn.Module) -> Plan:
    """The plan of a resolved recipe. Raises TicketfindError where nothing is left to prune, or what is asked has no
    round to be for."""
    settings = recipe.prune
    found = candidates(recipe, model)
    if not any(c.pruned for c in found):
        raise TicketfindError(
            f"model {recipe.model.spec!r}: expected a parameter to prune, found none; ticketfind inspect MODEL says why"
        )
    groups, kept = weights_kept(recipe, found)
    if len(kept) < 2:
        raise TicketfindError(
            "prune.fraction: expected to prune a weight in the first round, found that it prunes none"
        )
    moves = settings.rewind == "lr"
    rewind = int(settings.rewind) if isinstance(settings.rewind, Duration) else 0
    total = int(recipe.train.iterations)
    iterations = [total] + [max(1, total - rewind)] * (len(kept) - 1)
    measured = len(kept)
    if recipe.model.trained:
        iterations[0] = 0
        if settings.rounds == 1:
            iterations[1], measured = 0, 1
    ahead, first = _ahead(settings.ahead, len(kept)), 0 if settings.every is not None else 1
    single = [round for round, count in ahead.items() if settings.draws_apart and count == 1 and round >= first]
    apart = {round: int(settings.mask_iterations or iterations[max(1, round)]) for round in single}
    parameters, replicates = sum(math.prod(c.shape) for c in found), recipe.run.replicates
    at_once = min(recipe.run.arms_at_once or 1, replicates)
    optimizer_slots = 2 if recipe.train.optimizer != "sgd" else int(recipe.train.momentum > 0)
    memory = 4 * at_once * (parameters * (2 + optimizer_slots) + kept[0])
    starts = replicates * (len(kept) if moves else 1)
    disk = 4 * parameters * (starts + replicates + 1) + kept[0] * (replicates * (len(kept) - 1) + 1)
    if recipe.train.command is not None:  # what it writes is kept, see commands.by_command
        disk += 4 * parameters * replicates * (measured + (rewind > 0))
    plan = Plan(
        candidates=found,
        groups=groups,
        kept=kept,
        rewind=rewind,
        moves=moves,
        iterations=iterations,
        measured=measured,
        apart=apart,
        ahead=ahead,
        finetune=0 if settings.finetune is None else int(settings.finetune),
        may_end_early=settings.mask_stop is not None or settings.until_fails,
        memory=memory,
        disk=disk,
    )
    if plan.finetune and not any(plan.tuned(round) for round in plan.ahead):
        raise _nothing_for("finetune", "draws several masks", settings, len(kept) - 1)
    for key in ("mask_iterations", "mask_lr"):
        if getattr(settings, key) is not None and not plan.apart:
            raise _nothing_for(key, "draws one mask, after the first", settings, len(kept) - 1)
    return plan


def _nothing_for(key: str, what: str, settings: Prune, rounds: int) -> TicketfindError:
    return TicketfindError(
        f"prune.{key}: expected a training that {what}, found none:"
        f" {rounds} round{'s' * (rounds != 1)} with --ahead {' --ahead '.join(map(str, settings.ahead))};"
        " leave it out, or take more rounds"
    )


def _ahead(each: Sequence[int], rounds: int) -> dict[int, int]:
    """Of `rounds`, the dense one included: those that draw masks, and how many."""
    found: dict[int, int] = {}
    round = 0
    for count in itertools.chain(each, itertools.repeat(each[-1])):
        if round + 1 >= rounds:
            return found
        found[round] = min(count, rounds - round - 1)
        round += count
    raise AssertionError
