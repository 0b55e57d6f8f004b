"""Reading and writing recipes: layers (a shipped recipe, a YAML file, flags) put together, the later over the earlier.

A layer is a nested dict; every fault of the layers is reported at once.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ticketfind import TicketfindError, contradictions
from ticketfind.limits import fault_of, short, shown
from ticketfind.recipe import SECTIONS, Recipe, RecipeError
from ticketfind.specs import suggest

MOST_BYTES = 2**17
"""Of a recipe: reading one takes seconds for a megabyte."""

Layer = Mapping[str, Any]
"""A recipe or a part of one as read from YAML: section -> key -> value."""


_MOST_FAULTS = 50
"""That are told at once."""


def from_layers(*layers: Layer, where: str = "recipe") -> Recipe:
    """The recipe that `layers` give, the later over the earlier, the rest by rule.

    A mapping value (args, fraction) replaces the earlier one whole. Raises RecipeError with every fault. The first
    layer may name what a later one leaves without effect; what the later ones name is meant to have one.
    """
    faults: list[str] = []
    meant: set[str] = set()
    merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    name = "recipe"
    for number, layer in enumerate(layers):
        if not isinstance(layer, Mapping):
            raise RecipeError(f"{where}: expected a mapping of sections ({', '.join(SECTIONS)})")
        if fault := fault_of(layer):
            raise RecipeError(f"{where}: expected a recipe, found {fault}")
        for section, keys in layer.items():
            if section == "name":
                if isinstance(keys, str) and re.fullmatch(r"(?!latest$)[\w][\w.+-]{0,199}", keys):
                    name = keys
                else:
                    faults.append(
                        f"name: expected letters, digits and . _ + - (it names a folder), found {shown(keys)}"
                    )
            elif section not in SECTIONS:
                faults.append(f"{_named(section)}: unknown key{suggest(_named(section), ['name', *SECTIONS])}")
            elif not isinstance(keys, Mapping):
                faults.append(f"{section}: expected a mapping, found {shown(keys)}")
            else:
                merged[section].update(keys)
                meant.update(f"{section}.{key}" for key in keys if number)
    if merged["train"].get("trainer") or merged["train"].get("command"):
        merged["data"].setdefault("spec", None)  # they read their own data
    parts = {section: _read_section(section, merged[section], faults) for section in SECTIONS}
    if not faults and "prune.fraction" in meant and contradictions.passes_over_fraction(parts["prune"]):
        faults.append(
            f"prune.fraction: expected none beside scope {parts['prune'].scope}, which says how many weights go in a"
            f" round, found {shown(merged['prune']['fraction'])}; leave it out (--skip GLOB leaves layers whole)"
        )
    if faults:
        more = [f"and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
        told = [*faults[:_MOST_FAULTS], *more]
        raise RecipeError("\n".join(fault if where == "recipe" else f"{where}: {fault}" for fault in told))
    return Recipe(name=name, **parts)


def _read_section(section: str, raw: Layer, faults: list[str]) -> Any:
    cls = SECTIONS[section]
    keys = {key.name: key for key in dataclasses.fields(cls)}
    values = {}
    for name, value in raw.items():
        if name not in keys:
            faults.append(f"{section}.{_named(name)}: unknown key{suggest(_named(name), keys)}")
            continue
        try:
            values[name] = keys[name].metadata["read"](value)
        except ValueError as error:
            faults.append(f"{section}.{name}: expected {error}, found {shown(value)}")
    return cls(**values)


def _named(key: Any) -> str:
    return short(str(key))


class _Loader(yaml.SafeLoader):
    """YAML with numbers as people write them: 1e-3 is a number here (YAML 1.1 wants 1.0e-3), 2:4 is none (YAML 1.1 has
    it for 124, to the base 60).

    Dates stay texts: a recipe is also kept as JSON, which has none. An alias stands for the very value that it names,
    but a merge key (<<) would copy it, and many of them 2^n times over: it is not read.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys are keys like others here."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in ("int", "float", "timestamp", "merge")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that _Loader, or a reader by YAML 1.1 (2:4), would read as numbers."""


_Dumper.yaml_implicit_resolvers = {first: [*pairs] for first, pairs in _Loader.yaml_implicit_resolvers.items()}
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^\d+:\d+$"), list("0123456789"))


def parse_value(text: str) -> Any:
    """A value as YAML reads it, numbers as people write them; a text that is no YAML stays a text."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def read_layer(path: Path) -> Layer:
    """The nested dict in a recipe file. Raises TicketfindError where it is missing or no YAML mapping."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise RecipeError(f"{path}: expected a recipe of at most {MOST_BYTES:,} bytes")
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise TicketfindError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except TicketfindError:
        raise
    except Exception as error:  # YAML raises whatever the text leads it to
        raise RecipeError(f"{path}: expected a YAML recipe: {' '.join(str(error).split())[:500]}") from error
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{path}: expected a mapping of sections ({', '.join(SECTIONS)})")
    return raw


def shipped() -> dict[str, Path]:
    """The recipes that come with ticketfind: name -> file."""
    files = (Path(__file__).parent / "recipes").glob("*.yaml")
    return {path.stem: path for path in sorted(files, key=lambda path: path.stem)}


def shipped_file(name: str) -> Path:
    """The file of a shipped recipe. Raises TicketfindError where there is none of that name."""
    known = shipped()
    if name not in known:
        raise TicketfindError(f"recipe {name!r}: expected one of {', '.join(known)}{suggest(name, known)}")
    return known[name]


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


def without_effect(file: str | None, layer: Layer, asked: Recipe) -> str | None:
    """What a recipe file of the user's, read as `layer`, names to no effect in what is asked; for a message.

    It is no fault: a recipe that ticketfind has written names every key.
    """
    named = file is not None and file not in shipped() and "fraction" in layer.get("prune", {})
    if not named or not contradictions.passes_over_fraction(asked.prune):
        return None
    scope = asked.prune.scope
    return f"{file}: prune.fraction has no say beside scope {scope}, which says how many weights go in a round"


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


def differences(ours: Recipe, theirs: Recipe, but: Sequence[str] = ()) -> Iterator[str]:
    """One text for each key in which two recipes differ, `but` for some."""
    a, b = ours.plain(), theirs.plain()
    if a["name"] != b["name"]:
        yield f"name: {b['name']} there, {a['name']} here"
    for section in SECTIONS:
        for key in a[section]:
            reordered = key == "fraction" and list(a[section][key]) != list(b[section][key])  # the last match counts
            if (a[section][key] != b[section][key] or reordered) and f"{section}.{key}" not in but:
                yield f"{section}.{key}: {shown(b[section][key])} there, {shown(a[section][key])} here"


def to_yaml(recipe: Recipe) -> str:
    """The recipe file that reads back to an equal recipe."""
    text: str = yaml.dump(recipe.plain(), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)
    return text
