"""The one extension mechanism: ``package.module:name`` or ``path/file.py:name`` names any Python object.

Models, data, losses, metrics and scores are all given this way.
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from ticketfind import TicketfindError

_FETCHED = ("hfds/", "hfids/", "tfds/")
"""Prefixes of timm's data sets that come from elsewhere."""
_OTHER_SCHEMES = ("timm:", "hf-hub:", "hf_hub:", "local-dir:")


def is_code(spec: str) -> bool:
    """True if following `spec` would import Python code other than ticketfind's and timm's own."""
    return ":" in spec and not spec.startswith(_OTHER_SCHEMES)


def is_foreign(spec: str) -> bool:
    """True if `spec` names code, or a model or data described elsewhere (a hub, a folder), which may be fetched."""
    named = spec.removeprefix("timm:")
    return ":" in named or named.lower().startswith(_FETCHED)


def load_object(spec: str, what: str) -> Any:
    """Import the object that `spec` names; `what` ("model", "loss") is for the message.

    The current folder, and the folder of a ``.py`` file, can be imported from, as in a script run there.
    Raises TicketfindError where the module or the name in it is missing, or the module fails to import.
    """
    place, _, chain = spec.rpartition(":")
    if not place or not chain:
        raise TicketfindError(f"{what} {spec!r}: expected package.module:name or path/file.py:name")
    try:
        found: Any = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    except TicketfindError:
        raise
    except (Exception, SystemExit) as error:
        raise TicketfindError(f"{what} {spec!r}: importing {place} failed: {one_line(error)}") from error
    for name in chain.split("."):
        if not hasattr(found, name):
            known = [n for n in dir(found) if not n.startswith("_")]
            raise TicketfindError(f"{what} {spec!r}: {place} has no {name!r}{suggest(name, known)}")
        found = getattr(found, name)
    return found


def suggest(name: str, known: Iterable[str]) -> str:
    """A tail for an error message: the known names closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def one_line(error: BaseException) -> str:
    """An exception's type and text on one line, for a message; cut where it is very long."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 500 else text[:497] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _load_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    """The module in a file: of a package (folders with ``__init__.py``) by its full name, else by one of its own.

    Relative imports work in both; a lone file's folder stands for its package.
    """
    if not path.is_file():
        raise TicketfindError(f"{path}: no such file (expected a Python file)")
    path = path.resolve()
    root, names = path.parent, [] if path.stem == "__init__" else [path.stem]
    while (root / "__init__.py").is_file() and root.name.isidentifier():
        root, names = root.parent, [root.name, *names]
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if root == path.parent or not all(name.isidentifier() for name in names):
        return _load_lone_file(path)
    name = ".".join(names)
    module = importlib.import_module(name)
    if module.__file__ is None or not path.samefile(module.__file__):
        raise ImportError(f"{name} is another module here, {module.__file__}")
    return module


def _load_lone_file(path: Path) -> ModuleType:
    package = ModuleType(f"_ticketfind_user_{abs(hash(str(path.parent))):x}")
    package.__path__ = [str(path.parent)]
    sys.modules.setdefault(package.__name__, package)
    name = f"{package.__name__}.{path.stem.replace('.', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look the module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
