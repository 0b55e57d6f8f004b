"""The recipe: everything that decides a search, as frozen dataclasses.

A *resolved* recipe has nothing left implicit: `Recipe.resolved` turns durations into iterations and rules into values.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from ticketfind import TicketfindError, contradictions, readers
from ticketfind.readers import Duration, Reader
from ticketfind.specs import is_foreign


class RecipeError(TicketfindError):
    """A recipe that cannot be run; one line for each fault."""


def _key(read: Reader, default: Any) -> Any:
    """A recipe key: its default, as a user would write it, and the reader that checks it."""
    return field(default_factory=lambda: default if default is None else read(default), metadata={"read": read})


# ---------------------------------------------------------------------------------------------- the keys

SCORE_NAMES = (
    "magnitude", "small_final", "large_init", "small_init", "large_init_large_final", "small_init_small_final",
    "magnitude_increase", "movement", "path_length", "magnitude_per_layer", "movement_per_layer",
    "path_length_per_layer", "random", "snip", "grasp", "synflow",
)  # fmt: skip
"""What `scores.SCORES` has."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which network, and the weights that it starts from."""

    spec: str = _key(readers.text, "lenet-300-100")
    """A timm name, a name in nets.py, or module:factory / file.py:factory."""
    args: dict[str, Any] = _key(readers.mapping, {})
    """Keyword arguments for the factory."""
    checkpoint: str | None = _key(readers.or_null(readers.text), None)
    """File with the initial weights; null: the factory's own random initialization."""
    checkpoint_key: str | None = _key(readers.or_null(readers.text), None)
    """Which entry of the file holds the weights (state_dict_ema), where it has several; inner ones after a dot."""
    allow_mismatch: tuple[str, ...] = _key(readers.list_of(readers.text, "a list of globs"), [])
    """Entries that the checkpoint may lack or have in another shape; they start freshly initialized."""
    trained: str | None = _key(readers.or_null(readers.text), None)
    """File with the weights after dense training, which stands for round 0's training."""
    trained_key: str | None = _key(readers.or_null(readers.text), None)
    """As checkpoint_key, for that file."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which examples."""

    spec: str | None = _key(readers.or_null(readers.text), "digits")
    """digits, a folder of images or of IDX files, a .npz or .safetensors file, timm:NAME, or module:factory."""
    args: dict[str, Any] = _key(readers.mapping, {})
    """Keyword arguments for the factory; for images size, mean, std, interpolation, crop, channels."""
    validation: float | int | None = _key(readers.or_null(readers.validation), None)
    """Examples (or share) of the training set held out, drawn with run.seed; null: the data's own, else a tenth."""
    stratify: bool = _key(readers.flag, False)
    """Hold out the same share of every class."""
    augment: tuple[str, ...] = _key(readers.list_of(readers.choice("flip", "crop"), "a list of flip, crop"), [])
    """What is done to training images, anew in each epoch, on the device: flip, crop."""
    resident: bool | None = _key(readers.or_null(readers.flag), None)
    """Held on the device as whole tensors (true) or read as needed (false); null: by size, see docs/guide.md."""
    workers: int | None = _key(readers.or_null(readers.whole(0)), None)
    """Processes that read what is not resident; null: one for each CPU core, at most 8."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """How one arm is trained."""

    iterations: Duration = _key(readers.length, "10ep")
    """Length of the training."""
    batch_size: int = _key(readers.whole(1), 128)
    """Examples in an iteration."""
    optimizer: str = _key(readers.choice("adam", "adamw", "sgd"), "adamw")
    """adam, adamw or sgd, with PyTorch's defaults but for the keys below."""
    lr: float = _key(readers.positive, 1e-3)
    """Learning rate, at its highest."""
    momentum: float = _key(readers.below_one, 0)
    """Momentum of sgd."""
    weight_decay: float = _key(readers.not_negative, 0.01)
    """Weight decay, as the optimizer understands it."""
    schedule: str = _key(readers.choice("constant", "cosine", "step"), "cosine")
    """constant; cosine: to zero along half a cosine; step: divided by 10 at each of `milestones`."""
    milestones: tuple[Duration, ...] = _key(readers.list_of(readers.duration, "a list of iterations"), [])
    """Where the step schedule divides the learning rate by 10."""
    clip: float | None = _key(readers.or_null(readers.positive), None)
    """Length that gradients (over all weights) are shortened to; null: no clipping."""
    warmup: Duration = _key(readers.duration, "5%")
    """Linear rise of the learning rate from zero at the start."""
    eval_every: Duration = _key(readers.duration, "5%")
    """Distance between evaluations on validation and test data."""
    loss: str | None = _key(readers.or_null(readers.code), None)
    """module:fn(outputs, targets) -> mean loss; null: cross-entropy."""
    metric: str | None = _key(readers.or_null(readers.code), None)
    """module:fn(outputs, targets) -> mean over the examples, higher is better; null: accuracy."""
    trainer: str | None = _key(readers.or_null(readers.code), None)
    """module:fn(model, hold, arm) -> metrics, which trains in place of ticketfind."""
    command: str | None = _key(readers.or_null(readers.text), None)
    """Command that trains in place of ticketfind, with {init} {mask} {seed} {out} in it."""

    @property
    def is_external(self) -> bool:
        """True if the training is the user's own: trainer or command."""
        return self.trainer is not None or self.command is not None


@dataclass(frozen=True, kw_only=True)
class Prune:
    """How the mask is drawn."""

    fraction: dict[str, float] = _key(readers.fractions, 0.2)
    """Share of the remaining weights pruned each round; by glob where layers differ, the last match counts."""
    rounds: int | None = _key(readers.or_null(readers.whole(1)), 12)
    """Prunings (the dense training, round 0, comes before the first); null: until `until` only."""
    until: float | None = _key(readers.or_null(readers.remaining), None)
    """Stop once the weights remaining are at or below this."""
    scope: str = _key(readers.scope, "global")
    """layer: each tensor loses its fraction; global: one ranking over all tensors of a glob in `fraction`; N:M (2:4):
    N of each M consecutive weights along a layer's inputs are kept, one of each M goes in a round, by no fraction."""
    score: str = _key(readers.choice_or_code(*SCORE_NAMES), "magnitude")
    """What is kept: the highest of this score; or module:fn(trained, initial) -> scores. See docs/guide.md."""
    every: Duration | None = _key(readers.or_null(readers.duration), None)
    """Prune on the way, after each so many iterations of a training that is there for the mask alone; null: prune once,
    at the end of a round's training."""
    mask_stop: float | None = _key(readers.or_null(readers.share), None)
    """End a training that is there for the mask alone once the masks of two evaluations in a row agree as much (Cohen's
    kappa over the weights left); null: masks are drawn from the full trainings."""
    mask_iterations: Duration | None = _key(readers.or_null(readers.duration), None)
    """Length, from the rewind point, of the training that draws a mask, where it draws no others (see ahead): it is
    then there for the mask alone; null: masks are drawn from the full trainings."""
    mask_lr: float | None = _key(readers.or_null(readers.positive), None)
    """Learning rate, at its highest, of trainings that are there for one mask alone (every, mask_stop,
    mask_iterations); null: train.lr."""
    ahead: tuple[int, ...] = _key(readers.list_of(readers.whole(1), "a list of numbers of rounds"), [1])
    """How many rounds' masks a training draws, training after training; the last number goes on."""
    finetune: Duration | None = _key(readers.or_null(readers.duration), None)
    """Train on under each mask that a training draws, for so many iterations with the schedule's last learning rates,
    before it draws the next; null: they are drawn from the same weights."""
    until_fails: bool = _key(readers.flag, False)
    """Measure no round that is sparser than one that does not match."""
    rewind: "Duration | str | None" = _key(readers.or_null(readers.rewind), None)
    """Where the survivors go back to; lr: learning-rate rewinding; null: 0it for a checkpoint, else 2 %."""
    only: tuple[str, ...] = _key(readers.list_of(readers.text, "a list of globs"), [])
    """Prune these parameters, whatever their layer, and no others."""
    skip: tuple[str, ...] = _key(readers.list_of(readers.text, "a list of globs"), [])
    """Leave these parameters alone."""
    allow_collapse: bool = _key(readers.flag, False)
    """Go on when an emptied layer disconnects the network."""

    @property
    def draws_apart(self) -> bool:
        """Whether trainings for one mask alone are asked for; of which rounds, Plan.apart says."""
        return any(value is not None for value in (self.every, self.mask_stop, self.mask_iterations))


@dataclass(frozen=True, kw_only=True)
class Run:
    """What does not change the question: repetitions, seeds, the machine."""

    replicates: int = _key(readers.whole(1), 1)
    """Independent repetitions: own initialization, own data order."""
    seed: int = _key(readers.whole(0, 2**63 - 1), 0)
    """Replicate r uses seed + r."""
    device: str = _key(readers.text, "auto")
    """auto, cpu, cuda, cuda:1."""
    precision: str = _key(readers.choice("fp32", "tf32", "bf16"), "fp32")
    """Arithmetic of the training: fp32; tf32 (CUDA); bf16, weights kept in fp32."""
    engine: str = _key(readers.choice("auto", "eager", "processes", "stacked", "graph", "compile"), "auto")
    """How arms share the machine: eager, processes, stacked, graph or compile; auto: by rule, see docs/guide.md."""
    arms_at_once: int | None = _key(readers.or_null(readers.whole(1)), None)
    """Arms trained together by processes, stacked and graph, at most; null: as many as the memory holds."""
    channels_last: bool | None = _key(readers.or_null(readers.flag), None)
    """Images and convolutions with the channels last in memory; null: by rule, see docs/guide.md."""
    snapshot: float | None = _key(readers.or_null(readers.positive), 60)
    """Seconds between snapshots of the trainings under way; null: only when a search is stopped."""
    tolerance: float | None = _key(readers.or_null(readers.not_negative), None)
    """Percentage points below the dense mean that still match; null: one sd of the dense replicates."""


CONVENIENCES = ("run.snapshot", "run.arms_at_once")
"""Keys that a search may go on with other values of."""
ASIDE = (
    "data.resident", "data.workers", "run.replicates", "run.device", "run.engine", "run.channels_last", "run.tolerance",
    *CONVENIENCES,
)  # fmt: skip
"""Keys that what is trained, and on what, does not depend on."""

SECTIONS: dict[str, type] = {"model": Model, "data": Data, "train": Train, "prune": Prune, "run": Run}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole configuration of a search."""

    name: str = "recipe"
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    prune: Prune = field(default_factory=Prune)
    run: Run = field(default_factory=Run)

    def resolved(
        self, *, train_size: int | None, validation: int | None, device: str, resident: bool | None = True
    ) -> "Recipe":
        """This recipe with nothing left implicit but for how arms share the device, which `engine` settles.

        train_size, validation: examples left for training and held out; None without data. Raises RecipeError where
        the parts contradict each other or the data.
        """
        faults = [*contradictions.of(self)]
        if train_size is not None and self.train.batch_size > train_size and not self.train.is_external:
            faults.append(
                f"train.batch_size: expected at most the {train_size} training examples, found {self.train.batch_size}"
            )
        lengths = _Lengths.of(self.train, train_size)
        if lengths.total < 1:
            faults.append(
                f"train.iterations: expected at least 1, found {self.train.iterations} = {lengths.total} iterations"
            )
        if self.train.iterations.unit != "it" and re.search(r"(?<!\{)(\{\{)*\{iterations\b", self.train.command or ""):
            faults.append(
                "train.iterations: expected a number (--iterations N) beside {iterations} in train.command,"
                f" found {self.train.iterations}"
            )
        rewind = _rewind(self, lengths)
        if isinstance(rewind, Duration) and rewind.unit != "it":
            faults.append(
                f"prune.rewind: expected iterations (500it) or lr, as a training of your own has no known length,"
                f" found {rewind}"
            )
        elif isinstance(rewind, Duration) and int(rewind) >= max(lengths.total, 1) and lengths.known:
            faults.append(
                f"prune.rewind: expected an iteration before the end of the training ({lengths.total}),"
                f" found {int(rewind)}"
            )
        first = int(rewind) if isinstance(rewind, Duration) and rewind.unit == "it" else 0
        round_length = lengths.total - first
        asked = {key: getattr(self.prune, key) for key in ("every", "mask_iterations", "finetune")}
        within: dict[str, Any] = {
            key: lengths.at(own) for key, own in asked.items() if own is not None and lengths.known
        }
        for key, length in within.items():
            if not 1 <= int(length) <= round_length:
                faults.append(
                    f"prune.{key}: expected 1 to the {round_length} iterations of a round, found {asked[key]}"
                    f" = {int(length)} iterations"
                )
        warmup = lengths.at(self.train.warmup)
        if lengths.total and int(warmup) > lengths.total:
            faults.append(
                f"train.warmup: expected at most the training's {lengths.total} iterations, found {int(warmup)}"
            )
        elif "mask_iterations" in within and int(warmup) > first + int(within["mask_iterations"]):
            faults.append(
                f"prune.mask_iterations: expected an end after the warmup, iteration {int(warmup)},"
                f" found {first + int(within['mask_iterations'])}; take more, or a shorter train.warmup"
            )
        if faults:
            raise RecipeError("\n".join(faults))
        return dataclasses.replace(
            self,
            data=dataclasses.replace(self.data, validation=validation, resident=resident),
            train=dataclasses.replace(
                self.train,
                iterations=Duration(lengths.total),
                warmup=warmup,
                eval_every=Duration(max(1, int(lengths.at(self.train.eval_every)))),
                milestones=tuple(map(lengths.at, self.train.milestones)),
            ),
            prune=dataclasses.replace(self.prune, rewind=rewind, **within),
            run=dataclasses.replace(self.run, device=device),
        )

    def code_specs(self, *, score: bool = True) -> dict[str, str]:
        """The specs that would import other people's code or ask a hub for a model: key path -> spec."""
        specs = {
            "model.spec": self.model.spec,
            "data.spec": self.data.spec,
            "train.loss": self.train.loss,
            "train.metric": self.train.metric,
            "train.trainer": self.train.trainer,
            "prune.score": self.prune.score if score else None,
        }
        foreign = {key: spec for key, spec in specs.items() if spec is not None and is_foreign(spec)}
        return foreign | ({} if self.train.command is None else {"train.command": self.train.command})

    def plain(self) -> dict[str, Any]:
        """As nested dicts of plain values; `from_layers(recipe.plain())` gives an equal recipe."""
        plain: dict[str, Any] = {"name": self.name}
        for section in SECTIONS:
            part = getattr(self, section)
            plain[section] = {key.name: _plain(getattr(part, key.name)) for key in dataclasses.fields(part)}
        if isinstance(self.prune.rewind, Duration):
            plain["prune"]["rewind"] = str(self.prune.rewind)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Duration):
        return int(value) if value.unit == "it" else str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return dict(value)
    return value


# ------------------------------------------------------------------------------------------- resolving


@dataclass(frozen=True)
class _Lengths:
    """How long things take, in iterations."""

    total: int
    per_epoch: float
    known: bool
    """False for a training of the user's own whose iterations are not given; it then counts as one iteration."""

    @classmethod
    def of(cls, train: Train, train_size: int | None) -> "_Lengths":
        per_epoch = 0.0 if train_size is None else train_size / train.batch_size
        if train.is_external and (train.iterations.unit != "it" or int(train.iterations) == 1):  # 1: resolved before
            return cls(1, per_epoch, known=False)
        return cls(int(train.iterations.resolved(per_epoch, 0)), per_epoch, known=True)

    def at(self, duration: Duration) -> Duration:
        """`duration` in iterations."""
        return duration.resolved(self.per_epoch, self.total)


def _rewind(recipe: Recipe, lengths: _Lengths) -> Duration | str:
    """`prune.rewind` resolved; left as it is where that is not possible."""
    asked = recipe.prune.rewind
    if asked is None:
        start = recipe.train.is_external or recipe.model.checkpoint or recipe.model.args.get("pretrained")
        asked = Duration(0) if start or recipe.model.trained else Duration(2, "%")
    if isinstance(asked, str) or not (lengths.known or asked.unit == "it"):
        return asked
    return lengths.at(asked)
