import sys

import pytest
import torch

from ticketfind import TicketfindError, specs


@pytest.fixture(autouse=True)
def _same_path_afterwards(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("package.module:name", True),
        ("dir/file.py:name", True),
        ("transformers:AutoModel.from_pretrained", True),
        ("resnet18", False),
        ("timm:resnet18", False),
        ("hf-hub:timm/resnet18", False),
        ("local-dir:weights", False),
        ("folder/data.npz", False),
    ],
)
def test_what_would_import_code(spec, expected):
    assert specs.is_code(spec) is expected


def test_a_name_in_a_module_and_a_chain_of_names():
    assert specs.load_object("torch.nn:Linear", "model") is torch.nn.Linear
    assert specs.load_object("torch:nn.Linear.forward", "model") is torch.nn.Linear.forward


def test_a_file_can_import_its_neighbors_and_is_imported_once(tmp_path):
    (tmp_path / "neighbor_of_a.py").write_text("value = 7\n")
    (tmp_path / "a.py").write_text("import neighbor_of_a\nvalue = neighbor_of_a.value\nobject = object()\n")
    assert specs.load_object(f"{tmp_path}/a.py:value", "data") == 7
    assert specs.load_object(f"{tmp_path}/a.py:object", "data") is specs.load_object(f"{tmp_path}/a.py:object", "data")


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(f"where = {folder!r}\n")
    assert [specs.load_object(f"{tmp_path}/{folder}/a.py:where", "data") for folder in ("x", "y")] == ["x", "y"]


def test_a_dataclass_in_a_file_works(tmp_path):
    (tmp_path / "d.py").write_text(
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass D:\n    x: int = 3\n"
    )
    assert specs.load_object(f"{tmp_path}/d.py:D", "model")().x == 3


def test_modules_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "only_here_42.py").write_text("value = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert specs.load_object("only_here_42:value", "loss") == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torch.nn:Linaer", "model 'torch.nn:Linaer': torch.nn has no 'Linaer'; did you mean Linear"),
        ("torch:nn.xyzzy", "model 'torch:nn.xyzzy': torch has no 'xyzzy'"),
        ("no_such_package.at_all:f", "importing no_such_package.at_all failed: ModuleNotFoundError: No module named"),
        ("missing.py:f", "missing.py: no such file (expected a Python file)"),
        (":f", "model ':f': expected package.module:name or path/file.py:name"),
        ("torch:", "model 'torch:': expected package.module:name or path/file.py:name"),
        ("..relative:f", "importing ..relative failed: TypeError"),
    ],
)
def test_what_cannot_be_found_is_named(spec, message):
    with pytest.raises(TicketfindError) as error:
        specs.load_object(spec, "model")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n", "SyntaxError"),
        ("raise ValueError('first\\nsecond')\n", "ValueError: first second"),
        ("import sys\nsys.exit(0)\n", "SystemExit: 0"),  # a script without a main guard
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_a_file_that_fails_to_import_is_one_line_and_leaves_nothing(tmp_path, source, message):
    file = tmp_path / "broken_user_file.py"
    file.write_text(source)
    with pytest.raises(TicketfindError) as error:
        specs.load_object(f"{file}:f", "loss")
    assert f"importing {file} failed: {message}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not [name for name in sys.modules if "broken_user_file" in name]


def test_a_mended_file_can_be_imported(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("1 / 0")
    with pytest.raises(TicketfindError, match="ZeroDivisionError"):
        specs.load_object(f"{file}:f", "loss")
    file.write_text("f = 'mended'")
    assert specs.load_object(f"{file}:f", "loss") == "mended"


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ValueError("a\n  b"), "ValueError: a b"), (KeyError("w"), "KeyError: 'w'"), (EOFError(), "EOFError")],
)
def test_errors_on_one_line(error, expected):
    assert specs.one_line(error) == expected


def test_suggestions():
    assert specs.suggest("resnet18d", ["resnet18", "vgg"]) == "; did you mean resnet18?"
    assert specs.suggest("xyzzy", ["resnet18", "vgg"]) == ""


# ------------------------------------------------------------------------- relative imports in a user's file


@pytest.fixture
def folder(tmp_path):
    """path/net.py, which imports its neighbor both ways."""
    (tmp_path / "blocks_43.py").write_text("class Block: pass\n")
    (tmp_path / "net.py").write_text(
        "from .blocks_43 import Block\n"
        "import blocks_43\n"
        "class Net(Block): where = __name__, __package__\n"
        "def other(): return blocks_43.Block\n"
    )
    return tmp_path


def test_a_lone_file_imports_its_neighbors_relatively_or_not(folder):
    net = specs.load_object(f"{folder}/net.py:Net", "model")
    assert net.__mro__[1].__name__ == "Block"
    assert specs.load_object(f"{folder}/net.py:other", "model")().__name__ == "Block"
    assert specs.load_object(f"{folder}/net.py:Net", "model") is net


def test_a_file_in_a_package_is_the_packages_module(tmp_path):
    inner = tmp_path / "pkg_44" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "pkg_44" / "__init__.py").write_text("")
    (inner / "__init__.py").write_text("from .blocks import Block\n")
    (inner / "blocks.py").write_text("from ..constants import WIDTH\nclass Block: width = WIDTH\n")
    (tmp_path / "pkg_44" / "constants.py").write_text("WIDTH = 7\n")
    (inner / "net.py").write_text("from ..inner.blocks import Block\nclass Net(Block): pass\n")
    net = specs.load_object(f"{inner}/net.py:Net", "model")
    assert net.__module__ == "pkg_44.inner.net" and net.width == 7
    assert specs.load_object("pkg_44.inner.net:Net", "model") is net  # the one module, however it is named
    assert specs.load_object(f"{inner}/__init__.py:Block", "model") is net.__mro__[1]


def test_two_packages_of_one_name_are_told_apart(tmp_path):
    for side in ("a", "b"):
        (tmp_path / side / "pkg_45").mkdir(parents=True)
        (tmp_path / side / "pkg_45" / "__init__.py").write_text("")
        (tmp_path / side / "pkg_45" / "net.py").write_text(f"side = {side!r}\n")
    assert specs.load_object(f"{tmp_path}/a/pkg_45/net.py:side", "model") == "a"
    with pytest.raises(TicketfindError, match=r"ImportError: pkg_45\.net is another module here, .*a/pkg_45/net\.py"):
        specs.load_object(f"{tmp_path}/b/pkg_45/net.py:side", "loss")


def test_a_relative_import_of_nothing_is_one_line(tmp_path):
    (tmp_path / "net.py").write_text("from .no_such import Block\n")
    with pytest.raises(TicketfindError, match=r"net.py failed: ModuleNotFoundError: No module named .*no_such'"):
        specs.load_object(f"{tmp_path}/net.py:Net", "model")


@pytest.mark.parametrize("spec", ["net.py:Net", "hf-hub:a/b", "timm:hf-hub:a/b", "timm:local-dir:x", "timm:hfds/a"])
def test_what_would_import_or_fetch_is_foreign(spec):
    assert specs.is_foreign(spec)


@pytest.mark.parametrize("spec", ["resnet18", "timm:resnet18", "digits", "photos", "timm:torch/cifar10", "timm:wds/x"])
def test_what_stays_here_is_not(spec):
    assert not specs.is_foreign(spec)
