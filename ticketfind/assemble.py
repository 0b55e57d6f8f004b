"""Recipe -> what it names: the task, and the recipe with nothing left implicit."""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ticketfind import (
    TicketfindError,
    checkpoint,
    commands,
    data,
    devices,
    forks,
    layers,
    memory,
    models,
    prunable,
    scores,
    trainers,
)
from ticketfind.arms import Task, Trainer
from ticketfind.batches import Data
from ticketfind.examples import TARGET_KEYS
from ticketfind.outputs import OutputFn, accuracy, call, cross_entropy, find_class_axis, own_loss, predictions
from ticketfind.recipe import Recipe, RecipeError, Run
from ticketfind.specs import is_code, load_object, one_line


@devices.no_denormals()  # for the threads that are started in it
def assemble(recipe: Recipe, *, arms: int | None = None) -> tuple[Recipe, Task]:
    """The task that `recipe` describes, and the resolved recipe.

    arms: trainings that will run together (the replicates unless given). Raises TicketfindError for anything in the
    recipe that does not exist or does not fit the rest.
    """
    if recipe.data.spec is None and not recipe.train.is_external:
        raise RecipeError("data.spec: expected the data to train on; give --data")
    device = devices.resolve_device(recipe.run.device)
    recipe, found = _load_data(recipe, device)
    inputs = None if found is None else found.example()[0]
    if found is not None and found.outputs is None:
        _check_sized(recipe, found)
    source = models.source(
        recipe.model.spec, recipe.model.args, example=inputs, outputs=None if found is None else found.outputs
    )
    model = source.new(recipe.run.seed)
    if found is not None and isinstance(inputs, dict):
        found = found.select(_taken(model, recipe, inputs))
    resident = None if found is None else found.is_resident
    resolved = recipe.resolved(
        train_size=None if found is None else len(found.train),
        validation=None if found is None else len(found.validation),
        device=str(device),
        resident=resident,
    )
    given = _weights(recipe.model.checkpoint, recipe.model.checkpoint_key, model, recipe.model.allow_mismatch)
    with torch.no_grad():  # a move makes recurrent layers compute parametrized weights, which could not be copied
        model.to(device)
    task = Task(
        model=model,
        data=None if found is None else found.to(device),
        device=device,
        fresh=lambda seed: models.state_of(source.new(seed)),
        given={**(source.pretrained or {}), **given.weights},
        given_dtype=given.dtype,
        trained=_weights(recipe.model.trained, recipe.model.trained_key, model, ()).weights,
        loss=_function(recipe.train.loss, "loss") or cross_entropy,
        metric=_function(recipe.train.metric, "metric") or accuracy,
        trainer=_trainer(recipe),
    )
    if not recipe.train.is_external:
        with devices.autocast(devices.Way(precision=recipe.run.precision), device)():
            task = _fitting(recipe, task)
        task = dataclasses.replace(task, need=_need(recipe, task))
    return dataclasses.replace(resolved, run=_settled(resolved, task, arms or recipe.run.replicates)), task


def _settled(recipe: Recipe, task: Task, arms: int) -> Run:
    """How `arms` trainings share the device."""
    run, own = recipe.run, not recipe.train.is_external
    devices.check_precision(run.precision, task.device)
    rounds = 1 if recipe.prune.rounds is None else recipe.prune.rounds + 1
    name = devices.choose(
        run.engine,
        task.device,
        arms=arms,
        parameters=sum(parameter.numel() for parameter in task.model.parameters()),
        steps=int(recipe.train.iterations) * rounds * arms,
        forks=task.data is not None and task.data.is_resident and own,
        own=own,
    )

    def arm_bytes() -> float:
        return memory.total(task.device) if task.need is None else task.need.of(recipe.train.batch_size)

    by_rule = own and devices.is_faster_with_channels_last(task.model, name, task.device, run.precision)
    return dataclasses.replace(
        run,
        engine=name,
        arms_at_once=devices.most_at_once(name, run.arms_at_once, arms, task.device, arm_bytes),
        channels_last=by_rule if run.channels_last is None else run.channels_last,
    )


def _need(recipe: Recipe, task: Task) -> memory.Need | None:
    """The memory that a training takes, tried on few examples; None where that cannot be done with so few."""
    assert task.data is not None
    try:
        return memory.need_of(task.model, recipe.train, task.loss, task.data.example())
    except Exception:  # it is no more than an estimate
        return None


def _load_data(recipe: Recipe, device: torch.device) -> tuple[Recipe, Data | None]:
    """The data, on the host, and the recipe with what was implicit about it filled in."""
    asked = recipe.data
    if asked.spec is None:
        return recipe, None
    args = data.resolved_args(asked.spec, asked.args, models.image_settings(recipe.model.spec, recipe.model.args))
    found = data.load(
        asked.spec,
        args,
        validation=asked.validation,
        seed=recipe.run.seed,
        stratify=asked.stratify,
        augment=asked.augment,
        resident=asked.resident,
        workers=min(forks.cores(), 8) if asked.workers is None else asked.workers,
        memory=memory.total(device) / 3,
    )
    return dataclasses.replace(recipe, data=dataclasses.replace(asked, args=args)), found


def _taken(model: torch.nn.Module, recipe: Recipe, inputs: dict[str, torch.Tensor]) -> list[str]:
    """The entries of the data's dicts that the network has arguments for."""
    accepted = models.accepted_inputs(model)
    taken = [name for name in inputs if accepted is None or name in accepted]
    if not set(taken) - set(TARGET_KEYS):
        raise TicketfindError(
            f"model {recipe.model.spec!r}: expected an argument for one of {recipe.data.spec}'s entries"
            f" ({', '.join(inputs)}), found {', '.join(accepted or ()) or 'none'}"
        )
    return taken


@dataclass(frozen=True)
class _Weights:
    weights: dict[str, torch.Tensor]
    dtype: str | None


def _weights(file: str | None, key: str | None, model: torch.nn.Module, allow: Sequence[str]) -> _Weights:
    """The weights in a checkpoint file, under the model's names and in its types; none for no file."""
    if file is None:
        return _Weights({}, None)
    path = Path(file).expanduser()
    found = checkpoint.read(path, key)
    matched = checkpoint.match(found, models.state_of(model), allow=allow, path=path, aliases=prunable.aliases(model))
    return _Weights(matched, checkpoint.dtype(found))


def _trainer(recipe: Recipe) -> Trainer | None:
    how = recipe.train
    if how.command is not None:
        return commands.by_command(how.command)
    return trainers.by_function(_function(how.trainer, "trainer")) if how.trainer is not None else None


def score_of(recipe: Recipe) -> scores.Score:
    """What `prune.score` names."""
    named = recipe.prune.score
    return scores.SCORES[named] if named in scores.SCORES else scores.by_function(_function(named, "score"))


def _function(spec: str | None, what: str) -> Any:
    if spec is None:
        return None
    found = load_object(spec, what)
    if not callable(found):
        raise TicketfindError(f"{what} {spec!r}: expected a function, found {type(found).__name__}")
    return found


def _check_sized(recipe: Recipe, found: Data) -> None:
    """Raise TicketfindError where nobody says how many classes the network is to tell apart."""
    model = recipe.model
    _, targets = found.example()
    given = {"num_classes", "outputs"} & set(model.args)
    if not targets.is_floating_point() and not given and models.takes(model.spec, "num_classes"):
        raise TicketfindError(
            f"data {recipe.data.spec}: how many classes it has is not known without reading all of it;"
            " give --model-arg num_classes=N"
        )


@torch.no_grad()
def _fitting(recipe: Recipe, task: Task) -> Task:
    """The task, with defaults for what the model returns. Raises TicketfindError unless the model takes the data's
    inputs, and loss and metric what comes out of it."""
    assert task.data is not None
    spec, (inputs, targets) = recipe.model.spec, task.data.example()
    model = copy.deepcopy(task.model).eval()  # some layers note what they have seen
    try:
        outputs = call(model, inputs)
    except Exception as error:
        default = "; --data names other data" if recipe.data.spec == "digits" else ""
        raise TicketfindError(
            f"model {spec!r}: cannot take {recipe.data.spec}'s inputs ({_described(inputs)}): {one_line(error)[:200]}"
            + default
        ) from error
    uses_labels = [
        what
        for what, given in (
            ("cross-entropy", recipe.train.loss or own_loss(outputs)),
            ("accuracy", recipe.train.metric),
        )
        if given is None
    ]
    if uses_labels and targets.is_floating_point():
        raise TicketfindError(
            f"data {recipe.data.spec}: expected class labels (whole numbers) for {' and '.join(uses_labels)},"
            f" found {_described(targets)} as targets; give --loss and --metric"
        )
    if uses_labels:
        axis = _checked_axis(recipe, task.data, outputs, targets)
        loss, metric = (functools.partial(f, class_axis=axis) for f in (cross_entropy, accuracy))
        task = dataclasses.replace(
            task,
            loss=task.loss if recipe.train.loss else loss,
            metric=task.metric if recipe.train.metric else metric,
        )
    for what, function in (("loss", task.loss), ("metric", task.metric)):
        value = _tried(function, what, getattr(recipe.train, what) or "default", outputs, targets)
        if not isinstance(value, torch.Tensor) or value.ndim:
            found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise TicketfindError(f"{what} {getattr(recipe.train, what)}: expected a scalar tensor, found {found}")
    return task


def _checked_axis(recipe: Recipe, found: Data, outputs: Any, targets: torch.Tensor) -> int:
    """Where the classes are in the outputs. Raises TicketfindError where there are fewer than labels."""
    axis, scores = find_class_axis(outputs, targets), predictions(outputs)
    if scores.shape[axis] < (found.classes or 1):
        raise TicketfindError(
            f"model {recipe.model.spec!r}: expected an output for each of {recipe.data.spec}'s labels 0 to"
            f" {(found.classes or 1) - 1}, found outputs of shape {list(scores.shape)}"
        )
    return axis


def _tried(function: OutputFn, what: str, spec: str, outputs: Any, targets: torch.Tensor) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*target size.*")  # broadcast, and so not what was meant
            return function(outputs, targets)
    except Exception as error:
        raise TicketfindError(
            f"{what} {spec}: failed on outputs ({_described(outputs)}) and targets ({_described(targets)}):"
            f" {one_line(error)}"
        ) from error


def _described(value: Any) -> str:
    """``[2, 10] float32``, or what else a network takes and gives."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_described(entry)}" for name, entry in value.items())
    return type(value).__name__


def model_alone(recipe: Recipe) -> torch.nn.Module:
    """The recipe's network, sized by its factory's own defaults, with the checkpoint's weights if there is one."""
    asked = recipe.model
    model = models.source(asked.spec, asked.args).new(recipe.run.seed)
    weights = _weights(asked.checkpoint, asked.checkpoint_key, model, asked.allow_mismatch).weights
    model.load_state_dict(weights, strict=False)
    return model


def of_ticket(
    own: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    where: Path | None,
    elsewhere: bool,
    trusted: bool,
    arms: int,
) -> tuple[Recipe, Task]:
    """The task to train a ticket again: its own recipe, but for the settings.

    where: its file, for messages. elsewhere: on another machine than the search's, perhaps. trusted: whether code that
    the recipe, and not the user, names is run. Raises TicketfindError where it is not, and as `assemble` does.
    """
    given = dict(settings)
    if "data.spec" in given and not data.takes_args(given["data.spec"]):
        given.setdefault("data.args", {})
    if elsewhere:
        given = {"run.device": "auto", "run.engine": "auto", **given}
    recipe = layers.from_layers(own, where=str(where or "recipe"))
    asked = layers.from_layers(for_ticket(recipe).plain(), layers.nested(given))
    named = [f"{key}: {spec}" for key, spec in asked.code_specs(score=False).items() if key not in given]
    if named and not trusted:
        raise TicketfindError(
            f"{where}: names code ({', '.join(named)}), which is not run from a file alone;"
            " give them yourself (--model, --data, --set KEY=SPEC), or --trust where you know the file"
        )
    return assemble(asked, arms=arms)


def for_ticket(recipe: Recipe) -> Recipe:
    """The recipe to train a ticket again: its weights are in the file, so no checkpoint is read or fetched."""
    args = recipe.model.args
    if not is_code(recipe.model.spec):
        args = {key: value for key, value in args.items() if key not in models.WEIGHT_ARGS}
    model = dataclasses.replace(
        recipe.model, checkpoint=None, checkpoint_key=None, trained=None, trained_key=None, allow_mismatch=(), args=args
    )
    return masks_given(dataclasses.replace(recipe, model=model))


def masks_given(recipe: Recipe) -> Recipe:
    """The recipe where the masks are there: how long trainings for masks are is not asked of those that are left."""
    prune = dataclasses.replace(
        recipe.prune, every=None, mask_stop=None, mask_iterations=None, mask_lr=None, ahead=(1,), finetune=None
    )
    return dataclasses.replace(recipe, prune=prune)
