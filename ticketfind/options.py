"""The commands' options, each said once: a type for Typer with its flag and its help."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class ExportFormat(str, Enum):
    """What `export` writes."""

    ticket = "ticket"
    compact = "compact"
    dense = "dense"
    torch_prune = "torch-prune"


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
AllowMismatch = Annotated[
    Texts,
    _option(
        "--allow-mismatch",
        "Entries that the checkpoint may lack or have in another shape; repeatable.",
        metavar="GLOB",
    ),
]
Data = Annotated[Text, _option("--data", "digits, folder of IDX files, .npz or .safetensors file, or module:factory.")]
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
Scope = Annotated[Text, _option("--scope", "layer or global.")]
Score = Annotated[Text, _option("--score", "magnitude, random, movement, magnitude_increase, large_init or module:fn.")]
Only = Annotated[Texts, _option("--prune-only", "Prune these parameters and no others; repeatable.", metavar="GLOB")]
Skip = Annotated[Texts, _option("--skip", "Leave these parameters alone; repeatable.", metavar="GLOB")]

# how it is trained
Iterations = Annotated[Whole, _option("--iterations", "Length of a training.")]
Epochs = Annotated[Real, _option("--epochs", "Length of a training, instead of --iterations.")]
BatchSize = Annotated[Whole, _option("--batch-size", "Examples in an iteration.")]
LearningRate = Annotated[Real, _option("--lr", "Learning rate.")]
Optimizer = Annotated[Text, _option("--optimizer", "adam, adamw or sgd.")]

# where and how often
Replicates = Annotated[Whole, _option("--replicates", "Independent repetitions.")]
Seed = Annotated[Whole, _option("--seed", "Replicate or trial r uses seed + r.", min=0)]
Tolerance = Annotated[
    Real,
    _option(
        "--tolerance", "Points below the dense accuracy that still match; default: one sd of the dense replicates."
    ),
]
Device = Annotated[Text, _option("--device", "auto, cpu, cuda, cuda:1.")]
Engine = Annotated[
    Text, _option("--engine", "auto, eager (one after another) or processes (side by side on CPU cores).")
]
Setting = Annotated[Texts, _option("--set", "Any recipe key (train.eval_every=50); repeatable.", metavar="KEY=VALUE")]
RunOut = Annotated[Path | None, _option("--out", "Run directory; default: runs/NAME.")]
DryRun = Annotated[bool, _option("--dry-run", "Show the plan; train nothing, write nothing.")]

# tickets and runs
TicketOrRun = Annotated[Path | None, _argument("TICKET|RUN", "Ticket file or run directory; default: the latest run.")]
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
Trials = Annotated[
    Whole, _option("--trials", "Trials of a ticket file, 5 unless given; a run has its replicates.", min=1)
]
Trust = Annotated[bool, _option("--trust", "Import the code that a ticket file names.")]
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
Force = Annotated[bool, _option("--force", "Replace a different file of that name.")]
ExitCode = Annotated[bool, _option("--exit-code", "Exit with 1 where the tickets differ, 2 on an error.")]
