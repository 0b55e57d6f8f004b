"""The commands' options, each said once: a type for Typer with its flag and its help, and the recipe key it sets."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ticketfind import flags


class ExportFormat(str, Enum):
    """What `export` writes."""

    ticket = "ticket"
    compact = "compact"
    dense = "dense"
    torch_prune = "torch-prune"


class ExtraControl(str, Enum):
    """What `eval` trains where it is asked for; `experiments.EXTRAS`."""

    one_shot = "one-shot"
    init_magnitude = "init-magnitude"


def _option(flag: str, help: str, **more: Any) -> Any:
    return typer.Option(flag, help=help, **more)


def _argument(metavar: str, help: str) -> Any:
    return typer.Argument(metavar=metavar, help=help)


Text = str | None
Texts = list[str] | None
Whole = int | None
Real = float | None

# output
Json = Annotated[bool, _option("--json", "Print one JSON object on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print the result only.")]
Debug = Annotated[bool, _option("--debug", "Show the traceback of an error.")]

# what is searched
RecipeArg = Annotated[Text, _argument("RECIPE", "A shipped recipe's name or a YAML file; default: digits.")]
Model = Annotated[Text, _option("--model", "timm name, built-in net, module:factory or file.py:factory.")]
ModelArg = Annotated[
    Texts, _option("--model-arg", "Argument for the model's factory; repeatable.", metavar="KEY=VALUE")
]
Checkpoint = Annotated[Text, _option("--checkpoint", "File with the initial weights: safetensors or torch.")]
CheckpointKey = Annotated[
    Text, _option("--checkpoint-key", "Entry of the checkpoint that holds the weights (state_dict_ema).")
]
Trained = Annotated[
    Text, _option("--trained", "File with the weights after dense training, instead of round 0's training.")
]
AllowMismatch = Annotated[
    Texts,
    _option(
        "--allow-mismatch",
        "Entries that the checkpoint may lack or have in another shape; repeatable.",
        metavar="GLOB",
    ),
]
Data = Annotated[
    Text,
    _option(
        "--data",
        "digits, folder of images or IDX files, .npz or .safetensors file, timm:NAME, or module:factory.",
    ),
]
DataArg = Annotated[Texts, _option("--data-arg", "Argument for the data's factory; repeatable.", metavar="KEY=VALUE")]
Loss = Annotated[Text, _option("--loss", "module:fn(outputs, targets) -> mean loss; default: cross-entropy.")]
Metric = Annotated[
    Text, _option("--metric", "module:fn(outputs, targets) -> mean, higher is better; default: accuracy.")
]

# how it is pruned
Prune = Annotated[
    Texts,
    _option(
        "--prune",
        "Share of the remaining weights pruned each round; repeatable with globs, the last match counts.",
        metavar="[GLOB=]FRACTION",
    ),
]
Rounds = Annotated[Whole, _option("--rounds", "Prunings.")]
Until = Annotated[Text, _option("--until", "Stop once this share of the weights is left (0.05 or 5%).")]
Rewind = Annotated[Text, _option("--rewind", "Where survivors go back to: 0it, 500it, 2ep, 2% or lr.")]
Scope = Annotated[Text, _option("--scope", "layer, global, or a pattern N:M such as 2:4.")]
Score = Annotated[
    Text,
    _option(
        "--score",
        "What is kept: magnitude, movement, path_length, snip, grasp, synflow, others of docs/guide.md, or module:fn.",
    ),
]
PruneEvery = Annotated[
    Text, _option("--prune-every", "Prune on the way, each time after so many iterations (100it, 2ep, 5%).")
]
MaskStop = Annotated[
    Real,
    _option("--mask-stop", "End a round once the mask that it would draw agrees so much with the last evaluation's."),
]
MaskIterations = Annotated[
    Text,
    _option("--mask-iterations", "Draw masks from trainings of this length, apart from those measured (2000it, 50%)."),
]
MaskRate = Annotated[Real, _option("--mask-lr", "Learning rate of trainings that are there for a mask alone.")]
Ahead = Annotated[
    list[int] | None,
    _option("--ahead", "Rounds whose masks a training draws; repeatable, one number for each training.", min=1),
]
Finetune = Annotated[
    Text, _option("--finetune", "Train on for so long before each further mask of --ahead (500it, 2ep, 12%).")
]
UntilFails = Annotated[
    bool | None,
    _option("--until-fails", "Look for the sparsest matching round, and measure no sparser ones than it takes."),
]
Only = Annotated[Texts, _option("--prune-only", "Prune these parameters and no others; repeatable.", metavar="GLOB")]
Skip = Annotated[Texts, _option("--skip", "Leave these parameters alone; repeatable.", metavar="GLOB")]

# how it is trained
Iterations = Annotated[Whole, _option("--iterations", "Length of a training.")]
Epochs = Annotated[Real, _option("--epochs", "Length of a training, instead of --iterations.")]
BatchSize = Annotated[Whole, _option("--batch-size", "Examples in an iteration.")]
LearningRate = Annotated[Real, _option("--lr", "Learning rate.")]
Augment = Annotated[
    Texts, _option("--augment", "What is done to training images: flip, crop; repeatable.", metavar="NAME")
]
Trainer = Annotated[
    Text, _option("--trainer", "module:fn(model, hold, arm) -> metrics, which trains instead of ticketfind.")
]
TrainCommand = Annotated[
    Text,
    _option("--train-command", "Command that trains instead of ticketfind, with {init} {mask} {seed} {out} in it."),
]
Optimizer = Annotated[Text, _option("--optimizer", "adam, adamw or sgd.")]

# where and how often
Replicates = Annotated[Whole, _option("--replicates", "Independent repetitions.")]
Seed = Annotated[Whole, _option("--seed", "Replicate or trial r uses seed + r.", min=0)]
Snapshot = Annotated[
    Real, _option("--snapshot", "Seconds between snapshots of the trainings under way; 60 unless given.")
]
Tolerance = Annotated[
    Real,
    _option(
        "--tolerance",
        "Points below the dense accuracy that still match; default: by the spread of the dense replicates.",
    ),
]
Device = Annotated[Text, _option("--device", "auto, cpu, cuda, cuda:1.")]
Precision = Annotated[Text, _option("--precision", "fp32, tf32 (CUDA) or bf16.")]
Engine = Annotated[
    Text,
    _option(
        "--engine",
        "How arms share the machine: auto, eager (one after another), processes (side by side on CPU cores),"
        " stacked (as one), graph (CUDA) or compile.",
    ),
]
ArmsAtOnce = Annotated[
    Whole, _option("--arms-at-once", "Arms trained together, at most; default: as many as memory holds.", min=1)
]
Setting = Annotated[Texts, _option("--set", "Any recipe key (train.eval_every=50); repeatable.", metavar="KEY=VALUE")]
RunOut = Annotated[Path | None, _option("--out", "Run directory; default: runs/NAME.")]
DryRun = Annotated[bool, _option("--dry-run", "Show the plan; train nothing, write nothing.")]

Blocks = Annotated[int, _option("--blocks", "Times that each is measured, in turn with the others.", min=1)]
Seconds = Annotated[float, _option("--seconds", "Length of a measurement, about.", min=0.001)]

ShippedName = Annotated[Text, _argument("NAME", "A shipped recipe, to be printed whole; default: a list of all.")]
Timed = Annotated[bool, _option("--time", "Measure a training step of each on this machine.")]

# tickets and runs
TicketOrRun = Annotated[Path | None, _argument("TICKET|RUN", "Ticket file or run directory; default: the latest run.")]
RunArg = Annotated[Path | None, _argument("RUN", "Run directory; default: the latest run.")]
SideA = Annotated[Path, _argument("A", "Ticket file or run.")]
SideB = Annotated[Path, _argument("B", "Ticket file or run.")]
Anything = Annotated[
    Text, _argument("TICKET|RUN|MODEL", "Ticket file, run directory or model; default: the latest run.")
]
Round = Annotated[Whole, _option("--round", "A round of the run; default: the winner.")]
Replicate = Annotated[
    Whole, _option("--replicate", "A replicate of the run; default: the one of lowest validation loss.")
]
Noise = Annotated[
    list[float] | None,
    _option(
        "--noise",
        "Noise on the initial weights, in standard deviations of the layer's initialization; repeatable.",
        min=0,
    ),
]
WeightNoise = Annotated[
    list[float] | None,
    _option("--weight-noise", "The same noise on the trained weights, which are not trained again; repeatable.", min=0),
]
Controls = Annotated[
    list[ExtraControl] | None,
    _option(
        "--control",
        "A further control: pruned once to the same density, by the trained dense weights or by the initial ones.",
    ),
]
Against = Annotated[
    Path | None,
    _option(
        "--against",
        "Another ticket, to be trained beside it, as one found on these data; of a run: the round nearest in density.",
        metavar="TICKET|RUN",
    ),
]
Attacks = Annotated[
    Texts,
    _option(
        "--attack",
        "fgsm or pgd: change test inputs by at most EPS in each number, after training; repeatable.",
        metavar="KIND:EPS",
    ),
]
AttackExamples = Annotated[int, _option("--attack-examples", "Test examples that are attacked, at most.", min=1)]
Trials = Annotated[
    Whole, _option("--trials", "Trainings of each ticket; default: as many as make ten over a run's replicates.", min=1)
]
StabilityTarget = Annotated[
    Text, _argument("MODEL|RECIPE|RUN", "Model, recipe (shipped or YAML) or run directory; default: the latest run.")
]
At = Annotated[
    Texts,
    _option("--at", "Measure here, and nowhere else: 0it, 500it, 2ep, 2%; repeatable. Default: a ladder, bisected."),
]
Threshold = Annotated[float, _option("--threshold", "Points of error; a lower barrier is stable.", min=0)]
SparseRound = Annotated[
    Whole, _option("--round", "The round of the run whose sparse networks are looked at too; default: the winner.")
]
Trust = Annotated[bool, _option("--trust", "Import the code that a ticket file names.")]
Retrain = Annotated[bool, _option("--retrain", "Train the ticket, and compare with the accuracy that it claims.")]
Format = Annotated[
    ExportFormat,
    _option(
        "--format",
        "ticket; compact: bit-packed masks and surviving weights only; dense: a plain masked state dict;"
        " torch-prune: weight_orig and weight_mask.",
    ),
]
ExportOut = Annotated[
    Path | None, typer.Option("--out", "-o", help="File to write; default: RUN-FORMAT.safetensors here.")
]
Shrink = Annotated[
    bool,
    _option("--shrink", "Without the units that the mask has emptied: a smaller dense network of the same outputs."),
]
Beside = Annotated[
    Path | None,
    _option(
        "--beside", "Run of the same search with another dropout rate, for the claim that needs both.", metavar="RUN"
    ),
]
ReportOut = Annotated[
    Path | None, _option("--out", "File to write, with FILE-figures beside it; default: report.html in the run.")
]
Force = Annotated[bool, _option("--force", "Replace a different file of that name.")]
ExitCode = Annotated[bool, _option("--exit-code", "Exit with 1 where the tickets differ, 2 on an error.")]


# ------------------------------------------------------------------------------- options to recipe keys

RECIPE_OPTIONS: dict[str, tuple[Any, str]] = {
    "model": (Model, "model.spec"),
    "model_arg": (ModelArg, "model.args"),
    "checkpoint": (Checkpoint, "model.checkpoint"),
    "checkpoint_key": (CheckpointKey, "model.checkpoint_key"),
    "trained": (Trained, "model.trained"),
    "allow_mismatch": (AllowMismatch, "model.allow_mismatch"),
    "data": (Data, "data.spec"),
    "data_arg": (DataArg, "data.args"),
    "augment": (Augment, "data.augment"),
    "loss": (Loss, "train.loss"),
    "metric": (Metric, "train.metric"),
    "prune": (Prune, "prune.fraction"),
    "rounds": (Rounds, "prune.rounds"),
    "until": (Until, "prune.until"),
    "rewind": (Rewind, "prune.rewind"),
    "scope": (Scope, "prune.scope"),
    "score": (Score, "prune.score"),
    "prune_every": (PruneEvery, "prune.every"),
    "mask_stop": (MaskStop, "prune.mask_stop"),
    "mask_iterations": (MaskIterations, "prune.mask_iterations"),
    "mask_lr": (MaskRate, "prune.mask_lr"),
    "ahead": (Ahead, "prune.ahead"),
    "finetune": (Finetune, "prune.finetune"),
    "until_fails": (UntilFails, "prune.until_fails"),
    "prune_only": (Only, "prune.only"),
    "skip": (Skip, "prune.skip"),
    "iterations": (Iterations, "train.iterations"),
    "epochs": (Epochs, "train.iterations"),
    "batch_size": (BatchSize, "train.batch_size"),
    "lr": (LearningRate, "train.lr"),
    "optimizer": (Optimizer, "train.optimizer"),
    "trainer": (Trainer, "train.trainer"),
    "train_command": (TrainCommand, "train.command"),
    "replicates": (Replicates, "run.replicates"),
    "seed": (Seed, "run.seed"),
    "snapshot": (Snapshot, "run.snapshot"),
    "tolerance": (Tolerance, "run.tolerance"),
    "device": (Device, "run.device"),
    "precision": (Precision, "run.precision"),
    "engine": (Engine, "run.engine"),
    "arms_at_once": (ArmsAtOnce, "run.arms_at_once"),
}
"""A command's parameter -> its option, and the recipe key that it sets."""

Settings = dict[str, Any]
"""Recipe keys and what a command's options set them to."""


def for_recipe(*names: str, but: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with options for what it takes as `settings`: these of RECIPE_OPTIONS (all, `but` a few), and --set."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        chosen = [name for name in names or RECIPE_OPTIONS if name not in but]
        kinds = {**{name: RECIPE_OPTIONS[name][0] for name in chosen}, "setting": Setting}
        own = inspect.signature(command).parameters.values()
        parameters: list[inspect.Parameter] = []
        for parameter in own:
            if parameter.name == "settings":
                parameters += [
                    inspect.Parameter(name, parameter.kind, default=None, annotation=kind)
                    for name, kind in kinds.items()
                ]
            else:
                parameters.append(parameter)

        def run(**given: Any) -> None:
            settings = recipe_settings({name: given.pop(name) for name in kinds})
            command(settings=settings, **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorated


def recipe_settings(given: Mapping[str, Any]) -> Settings:
    """The recipe keys that a command's options set, `--set` last; those that were not given are left out."""
    from ticketfind.layers import parse_value

    if given.get("iterations") is not None and given.get("epochs") is not None:
        raise typer.BadParameter("give --iterations or --epochs, not both")
    settings: Settings = {}
    for name, (_, key) in RECIPE_OPTIONS.items():
        value = given.get(name)
        if value is None or (isinstance(value, (list, tuple)) and not value):
            continue
        if name in ("model_arg", "data_arg"):
            value = flags.pairs([*value], f"--{name.replace('_', '-')}")
        elif name == "epochs":
            value = f"{value}ep"
        elif name == "prune":
            value = flags.fractions([*value])
        elif name == "until":
            value = parse_value(value)
        settings[key] = value
    if "prune.until" in settings:
        settings.setdefault("prune.rounds", None)
    return settings | flags.pairs(given.get("setting") or [], "--set")
