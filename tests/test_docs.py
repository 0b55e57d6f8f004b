"""The documentation says what the program does: commands, options, JSON keys, recipe keys, examples, links."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from ticketfind import cli, layers, recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PROGRAM = typer.main.get_command(cli.app)


def read(page: Path | str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def fences(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text without code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def sections(text: str, level: int) -> dict[str, str]:
    """Heading of this level -> what stands under it, up to the next heading of this level or above."""
    parts = re.split(rf"^(#{{1,{level}}}) (.+)$", text, flags=re.MULTILINE)[1:]
    triples = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return {title: body for marks, title, body in triples if len(marks) == level}


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, heads left out."""
    lines = [line for line in text.splitlines() if line.startswith(("| ", "|-"))]
    heads = {i for i, line in enumerate(lines[1:]) if line.startswith("|-")}
    kept = [line for i, line in enumerate(lines) if i not in heads and not line.startswith("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept]


# -------------------------------------------------------------------------------------- a tiny real run


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """call("export", "--json") -> its stdout; in a folder of its own that holds a finished run."""
    folder = tmp_path_factory.mktemp("docs")

    def run(*arguments: str) -> str:
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["ticketfind", *arguments])
            patch.setattr(
                "ticketfind.bench.ways", lambda device: ["eager"]
            )  # all of them take seconds, and print the same
            try:
                cli.main()
            except SystemExit as stop:
                assert not stop.code, (arguments, stop.code)
        return out.getvalue()

    run(*TINY)
    return run


TINY = ["search", "--iterations", "20", "--rounds", "2", "--replicates", "2", "--set", "train.eval_every=10"]


# ----------------------------------------------------------------------------------- docs/cli.md


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_cli", DOCS / "generate_cli.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_cli_reference_is_what_the_generator_gives(generator: ModuleType) -> None:
    assert read("cli.md") == generator.page(), "run: python docs/generate_cli.py"


@pytest.mark.parametrize("width", ["20", "200"])
def test_the_cli_reference_does_not_depend_on_the_terminal(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert generator.page() == read("cli.md")


def test_check_notices_a_difference(generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "cli.md"
    monkeypatch.setattr(generator, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["generate_cli.py", "--check"])
    with pytest.raises(SystemExit) as stop:
        generator.main()
    assert stop.value.code and not page.exists()
    page.write_text(generator.page(), encoding="utf-8")
    generator.main()


@pytest.mark.parametrize("name", PROGRAM.commands)
def test_every_option_and_argument_is_in_the_cli_reference(name: str) -> None:
    section = sections(read("cli.md"), 2)[f"ticketfind {name}"]
    for parameter in PROGRAM.commands[name].params:
        if parameter.param_type_name == "option":
            for flag in (*parameter.opts, *parameter.secondary_opts):
                assert re.search(rf"`{flag}[ `]", section), flag
        else:
            assert f"`{parameter.metavar}`" in section or f"`[{parameter.metavar}]`" in section


def test_every_command_is_in_the_cli_reference() -> None:
    names = {f"ticketfind {name}" for name in PROGRAM.commands}
    assert sections(read("cli.md"), 2).keys() == {"ticketfind", *names}


def _commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each command in the code blocks of the pages that are written by hand."""
    found = []
    for page in PAGES:
        if page.name in ("cli.md", "evidence.md"):
            continue
        text = page.read_text(encoding="utf-8")
        blocks = fences(text, "bash") + re.findall(r"^    (ticketfind .*)$", prose(text), re.MULTILINE)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|(?!\w)", line):
                words = shlex.split(part, comments=True)
                if len(words) > 1 and words[0].endswith("ticketfind") and not words[1].startswith("-"):
                    found.append((page.name, words[1:]))
    return found


@pytest.mark.parametrize(("page", "words"), [pytest.param(p, w, id=f"{p}: {' '.join(w)}") for p, w in _commands()])
def test_commands_in_the_documentation_can_be_given(page: str, words: list[str]) -> None:
    PROGRAM.commands[words[0]].make_context(words[0], words[1:])  # parses; runs nothing


# ------------------------------------------------------------------------------------------- links


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = prose(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in _anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:docs|tests|ticketfind|\.ci)/[\w./-]+|[\w-]+\.md)`", text):
        assert (ROOT / name).exists() or (DOCS / name).exists(), name


# ------------------------------------------------------------------------------------ docs/json.md


PRIMITIVES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
}


class Kinds:
    """The kinds of value that the tables of docs/json.md describe."""

    def __init__(self, text: str) -> None:
        self.tables = {
            title: {cells[0].strip("`"): cells[1] for cells in rows(body)}
            for title, body in {**sections(text, 2), **sections(text, 3)}.items()
        }
        for title, body in sections(text, 3).items():
            if inherited := re.match(r"\s*([A-Z]+), and:", body):
                self.tables[title] = self.tables[inherited[1]] | self.tables[title]

    def check(self, value: Any, kind: str, where: str) -> None:
        """Assert that a value is of a kind, key by key."""
        if kind.endswith(" or null"):
            if value is not None:
                self.check(value, kind.removesuffix(" or null"), where)
        elif kind.startswith("list of "):
            assert isinstance(value, list), where
            for index, item in enumerate(value):
                self.check(item, kind.removeprefix("list of "), f"{where}[{index}]")
        elif kind.startswith("map of "):
            assert isinstance(value, dict), where
            for name, item in value.items():
                self.check(item, kind.removeprefix("map of "), f"{where}.{name}")
        elif kind in PRIMITIVES:
            assert isinstance(value, PRIMITIVES[kind]), f"{where}: {value!r} is no {kind}"
            assert kind == "boolean" or not isinstance(value, bool), f"{where}: {value!r} is no {kind}"
        else:
            assert isinstance(value, dict), where
            assert value.keys() == self.tables[kind].keys(), where
            for key, item in value.items():
                self.check(item, self.tables[kind][key], f"{where}.{key}")


KINDS = Kinds(read("json.md"))
PRINTED = {
    "search": TINY,
    "search --dry-run": [*TINY, "--dry-run"],
    "eval": ["eval", "--noise", "0.5", "--trials", "2"],
    "report": ["report"],
    "verify": ["verify"],
    "export": ["export"],
    "diff": ["diff", "runs/digits", "runs/digits"],
    "inspect RUN": ["inspect"],
    "inspect TICKET": ["inspect", "runs/digits/ticket.safetensors"],
    "inspect MODEL": ["inspect", "lenet-300-100", "--data", "digits", "--set", "data.validation=200"],
    "stability": ["stability", "--at", "0", "--at", "10it"],
    "recipes": ["recipes"],
    "bench": ["bench", "--blocks", "1", "--seconds", "0.01"],
}


def test_every_command_has_a_section_on_its_json() -> None:
    assert {title.split()[0] for title in PRINTED} == PROGRAM.commands.keys()
    assert sections(read("json.md"), 2).keys() == {*PRINTED, "Shared objects"}


@pytest.mark.parametrize("title", PRINTED)
def test_json_is_as_documented(title: str, call: Callable[..., str]) -> None:
    printed = call(*PRINTED[title], "--json")
    assert printed.count("\n") == 1
    KINDS.check(json.loads(printed), title, title)


@pytest.mark.parametrize("title", PRINTED)
def test_json_examples_are_as_documented(title: str) -> None:
    (example,) = fences(sections(read("json.md"), 2)[title], "json")
    KINDS.check(json.loads(example), title, title)


def test_every_shared_object_is_used() -> None:
    used = " ".join(kind for table in KINDS.tables.values() for kind in table.values())
    used += " ".join(re.findall(r"^([A-Z]+), and:", read("json.md"), re.MULTILINE))
    assert all(name in used for name in KINDS.tables if name.isupper())


# --------------------------------------------------------------------------------- docs/recipes.md


@pytest.mark.parametrize("section", recipe.SECTIONS)
def test_recipe_keys_and_defaults_are_documented(section: str) -> None:
    documented = {cells[0].strip("`"): cells[1].strip("`") for cells in rows(sections(read("recipes.md"), 3)[section])}
    assert documented.keys() == {key.name for key in fields(recipe.SECTIONS[section])}
    for key, default in documented.items():
        given = layers.from_layers({section: {key: layers.parse_value(default)}})
        assert getattr(given, section) == getattr(recipe.Recipe(), section), key


def test_shipped_recipes_are_documented() -> None:
    table = rows(sections(read("recipes.md"), 2)["Shipped recipes"])
    documented = {cells[0].strip("`"): [cells[2], cells[3], cells[4].split(",")[0], *cells[5:9:2]] for cells in table}
    shipped = {name: layers.from_layers(layers.read_layer(path)) for name, path in layers.shipped().items()}
    assert documented.keys() == shipped.keys()
    for name, found in shipped.items():
        train, prune = found.train, found.prune
        iterations, batch, optimizer, lr, scope = documented[name]
        assert (int(iterations), int(batch), float(lr)) == (int(train.iterations), train.batch_size, train.lr), name
        assert (optimizer, scope) == (train.optimizer, prune.scope), name
    rewinds = {cells[0].strip("`"): cells[8] for cells in table}
    assert rewinds == {name: str(found.prune.rewind) for name, found in shipped.items()}


# ---------------------------------------------------------------------------------------- examples


def test_examples_of_the_ticket_format_run(call: Callable[..., str], tmp_path: Path) -> None:
    page = read("ticket-format.md")
    (exports,) = [block for block in fences(page, "bash") if "export" in block]
    for line in exports.splitlines():
        words = shlex.split(line)
        words[words.index("-o") + 1] = str(tmp_path / words[words.index("-o") + 1])
        call(*words[1:])
    namespace: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for block in fences(page, "python"):
            exec(compile(block, "docs/ticket-format.md", "exec"), namespace)
    assert (namespace["weight"] == 0).any() and namespace["about"]["layout"] == "compact"


def test_the_ticket_metadata_is_documented(call: Callable[..., str], tmp_path: Path) -> None:
    from safetensors import safe_open

    call("export", "--format", "compact", "-o", str(tmp_path / "compact.safetensors"))
    with safe_open(tmp_path / "compact.safetensors", framework="np") as file:
        about = json.loads(file.metadata()["ticketfind"])
    table = rows(sections(read("ticket-format.md"), 2)["Metadata"])
    assert about.keys() == {cells[0].strip("`") for cells in table}


@pytest.mark.parametrize("page", ["guide.md", "recipes.md"])
def test_examples_of_python_run(page: str) -> None:
    import torch

    namespace: dict[str, Any] = {}
    for block in fences(read(page), "python"):
        exec(compile(block, page, "exec"), namespace)
    if page == "guide.md":
        (inputs, targets), test = namespace["blobs"](classes=4)
        assert len(inputs) == len(targets) == 300 and len(test) == 100
    else:
        weights = {"w": torch.tensor([1.0, -3.0])}
        assert namespace["relative_movement"](weights, {"w": torch.tensor([1.0, 1.0])})["w"].tolist() == [0.0, 4.0]


def test_the_example_recipe_is_one() -> None:
    (example,) = fences(read("recipes.md"), "yaml")
    assert layers.from_layers(layers.parse_value(example)).run.replicates == 3


# ---------------------------------------------------------------------------------- what stays light


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["search", "--help"], ["eval", "-h"]])
def test_importing_and_help_import_neither_torch_nor_timm(arguments: list[str]) -> None:
    program = f"""
import sys
import ticketfind
if {arguments!r}:
    from ticketfind.cli import main
    sys.argv = ["ticketfind", *{arguments!r}]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code
print("heavy:", sorted({{"torch", "timm", "numpy"}} & sys.modules.keys()))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("heavy: []\n")


def test_public_names_come_with_their_first_use() -> None:
    program = "import ticketfind, sys; ticketfind.load_ticket; ticketfind.Ticket; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
