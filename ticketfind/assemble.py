"""Recipe -> what it names: the task, and the recipe with nothing left implicit."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ticketfind import TicketfindError, checkpoint, data, engine, masks, models
from ticketfind.recipe import Recipe, RecipeError
from ticketfind.specs import is_code, load_object, one_line
from ticketfind.train import Task, accuracy, cross_entropy


def assemble(recipe: Recipe, *, arms: int | None = None) -> tuple[Recipe, Task]:
    """The task that `recipe` describes, and the resolved recipe.

    arms: trainings that will run together (the replicates unless given). Raises TicketfindError for anything in the
    recipe that does not exist or does not fit the rest.
    """
    if recipe.data.spec is None:
        raise RecipeError("data.spec: expected the data to train on; give --data")
    device = engine.resolve_device(recipe.run.device)
    found = data.load(recipe.data.spec, recipe.data.args, validation=recipe.data.validation, seed=recipe.run.seed).to(
        device
    )
    source = models.source(recipe.model.spec, recipe.model.args, input_shape=found.input_shape, classes=found.classes)
    model = source.new(recipe.run.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    resolved = recipe.resolved(
        train_size=len(found.train),
        validation=len(found.validation),
        device=str(device),
        engine=engine.choose(recipe.run.engine, device, arms=arms or recipe.run.replicates, parameters=parameters),
    )
    given = source.pretrained or {}
    if recipe.model.checkpoint is not None:
        path = Path(recipe.model.checkpoint).expanduser()
        given = checkpoint.match(
            checkpoint.read(path),
            models.state_of(model),
            allow=recipe.model.allow_mismatch,
            path=path,
            aliases=masks.aliases(model),
        )
    task = Task(
        model=model.to(device),
        data=found,
        device=device,
        fresh=lambda seed: models.state_of(source.new(seed)),
        given=given,
        loss=_function(recipe.train.loss, "loss") or cross_entropy,
        metric=_function(recipe.train.metric, "metric") or accuracy,
    )
    _check_fits(recipe, task)
    return resolved, task


def score_function(recipe: Recipe) -> masks.ScoreFn:
    """The function that `prune.score` names."""
    named = recipe.prune.score
    return masks.SCORES[named] if named in masks.SCORES else _function(named, "score")


def _function(spec: str | None, what: str) -> Any:
    if spec is None:
        return None
    found = load_object(spec, what)
    if not callable(found):
        raise TicketfindError(f"{what} {spec!r}: expected a function, found {type(found).__name__}")
    return found


@torch.no_grad()
def _check_fits(recipe: Recipe, task: Task) -> None:
    """Raise TicketfindError unless the model takes the data's inputs and has an output for each label."""
    spec, inputs, targets = recipe.model.spec, task.data.test.inputs[:2], task.data.test.targets[:2]
    task.model.eval()
    try:
        outputs = task.model(inputs)
    except Exception as error:
        text = " ".join(str(error).split())
        raise TicketfindError(
            f"model {spec!r}: cannot take {recipe.data.spec}'s inputs of shape {task.data.input_shape},"
            f" {str(inputs.dtype).removeprefix('torch.')}: {text[:200]}"
        ) from error
    if not isinstance(outputs, torch.Tensor):
        raise TicketfindError(f"model {spec!r}: expected a tensor as its output, found {type(outputs).__name__}")
    if recipe.train.loss is None:
        classes = task.data.classes
        if classes is None:
            raise TicketfindError(
                f"data {recipe.data.spec}: expected class labels (whole numbers, one an example) for cross-entropy,"
                f" found {str(targets.dtype).removeprefix('torch.')} targets of shape {tuple(targets.shape)};"
                " give --loss and --metric"
            )
        if outputs.ndim != 2 or outputs.shape[1] < classes:
            raise TicketfindError(
                f"model {spec!r}: expected an output for each of {recipe.data.spec}'s labels 0 to {classes - 1},"
                f" found outputs of shape {tuple(outputs.shape[1:])}"
            )
    elif recipe.train.metric is None and targets.is_floating_point():
        raise TicketfindError(
            f"data {recipe.data.spec}: expected class labels (whole numbers) for accuracy, found"
            f" {str(targets.dtype).removeprefix('torch.')} targets of shape {tuple(targets.shape)}; give --metric"
        )
    for what, function in (("loss", task.loss), ("metric", task.metric)):
        try:
            value = function(outputs, targets)
        except Exception as error:
            raise TicketfindError(
                f"{what} {getattr(recipe.train, what) or 'default'}: failed on outputs {tuple(outputs.shape)}"
                f" and targets {tuple(targets.shape)}: {one_line(error)}"
            ) from error
        if not isinstance(value, torch.Tensor) or value.ndim:
            found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise TicketfindError(f"{what} {getattr(recipe.train, what)}: expected a scalar tensor, found {found}")


def for_ticket(recipe: Recipe) -> Recipe:
    """The recipe to train a ticket again: its weights are in the file, so no checkpoint is read or fetched."""
    args = recipe.model.args
    if not is_code(recipe.model.spec):
        args = {key: value for key, value in args.items() if key not in models.WEIGHT_ARGS}
    model = dataclasses.replace(recipe.model, checkpoint=None, allow_mismatch=(), args=args)
    return dataclasses.replace(recipe, model=model)


def model_alone(spec: str, args: dict[str, Any], data_spec: str | None, data_args: dict[str, Any]) -> torch.nn.Module:
    """The model that `spec` names, sized for the data where there is one, else by its factory's own defaults."""
    if data_spec is None:
        return models.source(spec, args).new(0)
    found = data.load(data_spec, data_args, validation=None, seed=0)
    return models.source(spec, args, input_shape=found.input_shape, classes=found.classes).new(0)
