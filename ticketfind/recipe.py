"""The recipe: everything that decides a search, as frozen dataclasses, read from and written to YAML.

A recipe is read in layers (a shipped file, the user's file, flags), each a nested dict; every fault of a layer
is reported at once. A *resolved* recipe has nothing left implicit: `Recipe.resolved` turns durations into
iterations and rules into values.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ticketfind import TicketfindError, readers
from ticketfind.readers import Duration, Reader
from ticketfind.specs import is_foreign, suggest

Layer = Mapping[str, Any]
"""A recipe or a part of one as read from YAML: section -> key -> value."""


class RecipeError(TicketfindError):
    """A recipe that cannot be run; one line for each fault."""


def _key(read: Reader, default: Any) -> Any:
    """A recipe key: its default, as a user would write it, and the reader that checks it."""
    return field(default_factory=lambda: default if default is None else read(default), metadata={"read": read})


# ---------------------------------------------------------------------------------------------- the keys


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which network, and the weights that it starts from."""

    spec: str = _key(readers.text, "lenet-300-100")
    """A timm name, a name in nets.py, or module:factory / file.py:factory."""
    args: dict[str, Any] = _key(readers.mapping, {})
    """Keyword arguments for the factory."""
    checkpoint: str | None = _key(readers.or_null(readers.text), None)
    """File with the initial weights; null: the factory's own random initialization."""
    allow_mismatch: tuple[str, ...] = _key(readers.list_of(readers.text, "a list of globs"), [])
    """Entries that the checkpoint may lack or have in another shape; they start freshly initialized."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which examples."""

    spec: str | None = _key(readers.or_null(readers.text), "digits")
    """digits, a folder of IDX files, a .npz or .safetensors file, or module:factory."""
    args: dict[str, Any] = _key(readers.mapping, {})
    """Keyword arguments for the factory."""
    validation: float | int | None = _key(readers.or_null(readers.validation), None)
    """Examples (or share) of the training set held out, drawn with run.seed; null: the data's own, else a tenth."""


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
    warmup: Duration = _key(readers.duration, "5%")
    """Linear rise of the learning rate from zero at the start."""
    eval_every: Duration = _key(readers.duration, "5%")
    """Distance between evaluations on validation and test data."""
    loss: str | None = _key(readers.or_null(readers.code), None)
    """module:fn(outputs, targets) -> mean loss; null: cross-entropy."""
    metric: str | None = _key(readers.or_null(readers.code), None)
    """module:fn(outputs, targets) -> mean over the examples, higher is better; null: accuracy."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """How the mask is drawn."""

    fraction: dict[str, float] = _key(readers.fractions, 0.2)
    """Share of the remaining weights pruned each round; by glob where layers differ, the last match counts."""
    rounds: int | None = _key(readers.or_null(readers.whole(1)), 12)
    """Prunings (the dense training, round 0, comes before the first); null: until `until` only."""
    until: float | None = _key(readers.or_null(readers.remaining), None)
    """Stop once the weights remaining are at or below this."""
    scope: str = _key(readers.choice("layer", "global"), "global")
    """layer: each tensor loses its fraction; global: one ranking over all tensors of a glob in `fraction`."""
    score: str = _key(
        readers.choice_or_code("magnitude", "random", "movement", "magnitude_increase", "large_init"), "magnitude"
    )
    """What is kept: the highest of this score; or module:fn(trained, initial) -> scores."""
    rewind: "Duration | str | None" = _key(readers.or_null(readers.rewind), None)
    """Where the survivors go back to; lr: learning-rate rewinding; null: 0it for a checkpoint, else 2 %."""
    only: tuple[str, ...] = _key(readers.list_of(readers.text, "a list of globs"), [])
    """Prune these parameters, whatever their layer, and no others."""
    skip: tuple[str, ...] = _key(readers.list_of(readers.text, "a list of globs"), [])
    """Leave these parameters alone."""
    allow_collapse: bool = _key(readers.flag, False)
    """Go on when an emptied layer disconnects the network."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What does not change the question: repetitions, seeds, the machine."""

    replicates: int = _key(readers.whole(1), 1)
    """Independent repetitions: own initialization, own data order."""
    seed: int = _key(readers.whole(0, 2**63 - 1), 0)
    """Replicate r uses seed + r."""
    device: str = _key(readers.text, "auto")
    """auto, cpu, cuda, cuda:1."""
    precision: str = _key(readers.choice("fp32"), "fp32")
    """Arithmetic of the training."""
    engine: str = _key(readers.choice("auto", "eager", "processes"), "auto")
    """How arms share the machine: eager, one after another; processes, side by side on CPU cores."""
    tolerance: float | None = _key(readers.or_null(readers.not_negative), None)
    """Percentage points below the dense mean that still match; null: one sd of the dense replicates."""


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

    def resolved(self, *, train_size: int, validation: int, device: str, engine: str) -> "Recipe":
        """This recipe with nothing left implicit.

        train_size, validation: examples left for training and held out. Raises RecipeError where the parts
        contradict each other or the data.
        """
        faults = []
        if self.train.batch_size > train_size:
            faults.append(
                f"train.batch_size: expected at most the {train_size} training examples, found {self.train.batch_size}"
            )
        per_epoch = train_size / self.train.batch_size
        iterations = self.train.iterations.resolved(per_epoch, 0)
        total = int(iterations)
        if total < 1:
            faults.append(f"train.iterations: expected at least 1, found {self.train.iterations} = {total} iterations")

        def at(duration: Duration) -> Duration:
            return duration.resolved(per_epoch, total)

        rewind = self.prune.rewind
        if rewind is None:
            trained = self.model.checkpoint or self.model.args.get("pretrained")
            rewind = Duration(0) if trained else Duration(2, "%")
        if isinstance(rewind, Duration):
            rewind = at(rewind)
            if int(rewind) >= max(total, 1):
                faults.append(
                    f"prune.rewind: expected an iteration before the end of the training ({total}), found {int(rewind)}"
                )
        if self.prune.rounds is None and self.prune.until is None:
            faults.append("prune.rounds: expected a number where prune.until is not given, found null")
        if total and int(at(self.train.warmup)) > total:
            faults.append(
                f"train.warmup: expected at most the training's {total} iterations, found {int(at(self.train.warmup))}"
            )
        if self.train.momentum and self.train.optimizer != "sgd":
            faults.append(f"train.momentum: expected 0 for {self.train.optimizer}, found {self.train.momentum:g}")
        if bool(self.train.milestones) != (self.train.schedule == "step"):
            faults.append(
                f"train.milestones: expected with schedule step, and only there, found {len(self.train.milestones)}"
                f" with schedule {self.train.schedule}"
            )
        if self.train.metric and self.run.replicates == 1 and self.run.tolerance is None:
            faults.append(
                "run.tolerance: expected a number, as one replicate of a metric of your own has no spread, found null"
            )
        if faults:
            raise RecipeError("\n".join(faults))
        every = Duration(max(1, int(at(self.train.eval_every))))
        return dataclasses.replace(
            self,
            data=dataclasses.replace(self.data, validation=validation),
            train=dataclasses.replace(
                self.train,
                iterations=iterations,
                warmup=at(self.train.warmup),
                eval_every=every,
                milestones=tuple(at(milestone) for milestone in self.train.milestones),
            ),
            prune=dataclasses.replace(self.prune, rewind=rewind),
            run=dataclasses.replace(self.run, device=device, engine=engine),
        )

    def code_specs(self, *, score: bool = True) -> dict[str, str]:
        """The specs that would import other people's code or ask a hub for a model: key path -> spec."""
        specs = {
            "model.spec": self.model.spec,
            "data.spec": self.data.spec,
            "train.loss": self.train.loss,
            "train.metric": self.train.metric,
            "prune.score": self.prune.score if score else None,
        }
        return {key: spec for key, spec in specs.items() if spec is not None and is_foreign(spec)}

    def plain(self) -> dict[str, Any]:
        """As nested dicts of plain values; `from_layers(recipe.plain())` gives an equal recipe."""
        plain: dict[str, Any] = {"name": self.name}
        for section in SECTIONS:
            part = getattr(self, section)
            plain[section] = {key.name: _plain(getattr(part, key.name)) for key in dataclasses.fields(part)}
        if isinstance(self.prune.rewind, Duration):
            plain["prune"]["rewind"] = str(self.prune.rewind)
        return plain

    def to_yaml(self) -> str:
        """The recipe file that reads back to an equal recipe."""
        text: str = yaml.dump(self.plain(), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)
        return text


def _plain(value: Any) -> Any:
    if isinstance(value, Duration):
        return int(value) if value.unit == "it" else str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return dict(value)
    return value


# ---------------------------------------------------------------------------------------------- reading


def from_layers(*layers: Layer, where: str = "recipe") -> Recipe:
    """The recipe that `layers` give, the later over the earlier, the rest by rule.

    A mapping value (args, fraction) replaces the earlier one whole. Raises RecipeError with every fault.
    """
    faults: list[str] = []
    merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    name = "recipe"
    for layer in layers:
        if not isinstance(layer, Mapping):
            raise RecipeError(f"{where}: expected a mapping of sections ({', '.join(SECTIONS)})")
        for section, keys in layer.items():
            if section == "name":
                if isinstance(keys, str) and re.fullmatch(r"(?!latest$)[\w][\w.+-]*", keys):
                    name = keys
                else:
                    faults.append(f"name: expected letters, digits and . _ + - (it names a folder), found {keys!r}")
            elif section not in SECTIONS:
                faults.append(f"{section}: unknown key{suggest(str(section), ['name', *SECTIONS])}")
            elif not isinstance(keys, Mapping):
                faults.append(f"{section}: expected a mapping, found {keys!r}")
            else:
                merged[section].update(keys)
    parts = {section: _read_section(section, merged[section], faults) for section in SECTIONS}
    if faults:
        raise RecipeError("\n".join(fault if where == "recipe" else f"{where}: {fault}" for fault in faults))
    return Recipe(name=name, **parts)


def _read_section(section: str, raw: Layer, faults: list[str]) -> Any:
    cls = SECTIONS[section]
    keys = {key.name: key for key in dataclasses.fields(cls)}
    values = {}
    for name, value in raw.items():
        if name not in keys:
            faults.append(f"{section}.{name}: unknown key{suggest(str(name), keys)}")
            continue
        try:
            values[name] = keys[name].metadata["read"](value)
        except ValueError as error:
            faults.append(f"{section}.{name}: expected {error}, found {_shown(value)}")
    return cls(**values)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Loader(yaml.SafeLoader):
    """YAML with numbers as people write them: 1e-3 is a number here (YAML 1.1 wants 1.0e-3).

    Dates stay texts: a recipe is also kept as JSON, which has none.
    """


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that _Loader would read as numbers."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def parse_value(text: str) -> Any:
    """A value as YAML reads it, numbers as people write them; a text that is no YAML stays a text."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def read_layer(path: Path) -> Layer:
    """The nested dict in a recipe file. Raises TicketfindError where it is missing or no YAML mapping."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise TicketfindError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: expected a YAML recipe: {' '.join(str(error).split())}") from error
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{path}: expected a mapping of sections ({', '.join(SECTIONS)})")
    return raw


def shipped() -> dict[str, Path]:
    """The recipes that come with ticketfind: name -> file."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def find_layer(name: str) -> Layer:
    """The layer of a shipped recipe's name or of a YAML file. Raises TicketfindError for neither."""
    known = shipped()
    if name in known:
        return read_layer(known[name])
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        layer = read_layer(path)
        return layer if "name" in layer else {"name": re.sub(r"[^\w.+-]", "-", path.stem), **layer}
    raise TicketfindError(
        f"recipe {name!r}: expected a shipped recipe ({', '.join(known)}) or a YAML file{suggest(name, known)}"
    )


def base_layers(recipe: str | None, model: str | None, data: str | None) -> list[Layer]:
    """What a search starts from, before flags: the recipe that is named; else, where neither a model nor data is
    given, digits; else the shipped recipe that is called as the model is; else the rules, under a name of their own.
    """
    if recipe is not None:
        return [find_layer(recipe)]
    if model is None and data is None:
        return [find_layer("digits")]
    if model in shipped():
        return [find_layer(model)]
    parts = [re.sub(r"[^\w.+-]+", "-", Path(spec.rpartition("/")[2] or spec).name) for spec in (model, data) if spec]
    return [{"name": "-".join(parts).strip("-.") or "search"}]


def nested(settings: Mapping[str, Any]) -> Layer:
    """``{"train.lr": 0.1}`` as a layer, ``{"train": {"lr": 0.1}}``."""
    layer: dict[str, Any] = {}
    for path, value in settings.items():
        section, _, key = path.partition(".")
        part = layer.setdefault(section, {}) if key else None
        if isinstance(part, dict):
            part[key] = value
        elif not key:
            layer[section] = value
    return layer


def differences(ours: Recipe, theirs: Recipe) -> Iterator[str]:
    """One text for each key in which two recipes differ."""
    a, b = ours.plain(), theirs.plain()
    if a["name"] != b["name"]:
        yield f"name: {b['name']} there, {a['name']} here"
    for section in SECTIONS:
        for key in a[section]:
            reordered = key == "fraction" and list(a[section][key]) != list(b[section][key])  # the last match counts
            if a[section][key] != b[section][key] or reordered:
                yield f"{section}.{key}: {_shown(b[section][key])} there, {_shown(a[section][key])} here"
