"""Settings of a recipe that do not go together."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ticketfind import readers
from ticketfind.readers import Duration

if TYPE_CHECKING:
    from ticketfind.recipe import Model, Prune, Recipe, Train

BEFORE_TRAINING = ("snip", "grasp", "synflow")
"""Those that ask the network, and not its training."""
OF_THE_WAY = ("path_length", "path_length_per_layer")
"""Those that ask what was between a training's ends."""


def of(recipe: "Recipe") -> Iterator[str]:
    """Faults that need no look at the data."""
    model, train, prune, run = recipe.model, recipe.train, recipe.prune, recipe.run
    if prune.rounds is None and prune.until is None and not readers.pattern(prune.scope):
        yield "prune.rounds: expected a number where prune.until is not given, found null"
    if prune.until is not None and readers.pattern(prune.scope):
        yield f"prune.until: expected null with scope {prune.scope}, which says how much is left, found {prune.until:g}"
    if train.momentum and train.optimizer != "sgd":
        yield f"train.momentum: expected 0 for {train.optimizer}, found {train.momentum:g}"
    if bool(train.milestones) != (train.schedule == "step"):
        yield (
            f"train.milestones: expected with schedule step, and only there, found {len(train.milestones)}"
            f" with schedule {train.schedule}"
        )
    yield from _of_drawing(model, prune, train)
    if train.metric and run.replicates == 1 and run.tolerance is None:
        yield "run.tolerance: expected a number, as one replicate of a metric of your own has no spread, found null"
    for key, file in (("checkpoint", model.checkpoint), ("trained", model.trained)):
        entry = getattr(model, f"{key}_key")
        if entry and not file:
            yield f"model.{key}_key: expected null without model.{key}, found {entry}"
    if train.is_external:
        yield from _of_external(recipe)
    if model.trained and prune.rewind != "lr":
        if not (model.checkpoint or model.args.get("pretrained")):
            yield (
                "model.trained: expected with model.checkpoint, the weights that its training started from"
                " (or with rewind lr), found none"
            )
        if isinstance(prune.rewind, Duration) and prune.rewind.amount:
            yield f"prune.rewind: expected 0it or lr, as model.trained shows no iteration between, found {prune.rewind}"


def passes_over_fraction(prune: "Prune") -> bool:
    """Whether the shares in `prune.fraction` have no say: a pattern heeds only those of 0, which leave layers whole."""
    return readers.pattern(prune.scope) is not None and 0 not in prune.fraction.values()


def _of_drawing(model: "Model", prune: "Prune", train: "Train") -> Iterator[str]:
    if prune.every is not None and prune.mask_stop is not None:
        yield "prune.mask_stop: expected null beside prune.every, found both"
    if prune.every is not None and readers.pattern(prune.scope):
        yield f"prune.every: expected null with the pattern {prune.scope}, found {prune.every}"
    if prune.every is not None and prune.mask_iterations is not None:
        yield f"prune.mask_iterations: expected null beside prune.every, found {prune.mask_iterations}"
    if prune.mask_lr is not None and not prune.draws_apart:
        yield (
            "prune.mask_lr: expected with --mask-iterations, --mask-stop or --prune-every (trainings for a mask alone),"
            f" found {prune.mask_lr:g} without"
        )
    keys = ("every", "mask_iterations", "finetune", "mask_stop")
    asked = {key: value for key in keys if (value := getattr(prune, key)) is not None}
    if prune.score in BEFORE_TRAINING:
        for key, value in asked.items():
            yield f"prune.{key}: expected null with {prune.score}, which looks at no training, found {value}"
    if prune.finetune is not None and {*prune.ahead} == {1}:
        yield f"prune.finetune: expected with --ahead 2 or more (several masks), found {prune.finetune} without"
    if not prune.ahead:
        yield "prune.ahead: expected at least one number of rounds, found none"
    if prune.ahead != (1,) and (prune.every is not None or prune.mask_stop is not None or prune.rewind == "lr"):
        yield "prune.ahead: expected [1] beside prune.every, prune.mask_stop and rewind lr, found others"
    if model.trained and prune.every is not None:
        yield f"prune.every: expected null, as model.trained stands for a training that is over, found {prune.every}"
    if model.trained and prune.score in OF_THE_WAY:
        yield (
            f"prune.score: expected one of a training's ends, as model.trained shows no way there, found {prune.score}"
        )
    if train.is_external:
        for key, value in asked.items():
            yield f"prune.{key}: expected null, as a training of your own is not looked at on its way, found {value}"
        if prune.score in (*BEFORE_TRAINING, *OF_THE_WAY):
            yield f"prune.score: expected one of a training's ends, as the training is your own, found {prune.score}"


def _of_external(recipe: "Recipe") -> Iterator[str]:
    model, train, run = recipe.model, recipe.train, recipe.run
    if train.trainer and train.command:
        yield "train.command: expected null beside train.trainer, found both"
    for key, value in (("train.loss", train.loss), ("train.metric", train.metric), ("model.trained", model.trained)):
        if value is not None:
            yield f"{key}: expected null, as a training of your own measures itself, found {value}"
    if recipe.data.augment:
        yield "data.augment: expected none, as a training of your own reads its own data"
    if run.replicates == 1 and run.tolerance is None:
        yield "run.tolerance: expected a number, as one replicate of your own training has no spread, found null"
