"""Files that are whole or absent."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ticketfind import TicketfindError


@contextmanager
def whole(path: Path, root: Path | None = None) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there is flushed and renamed to `path` on leaving.

    Folders that are missing are made; with `root` only those below it: a folder that has been moved away is not begun
    anew. On an exception nothing is left. Raises TicketfindError where the folder cannot be written.
    """
    temporary: Path | None = None
    try:
        make_folder(path.parent, root)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:_LONGEST]}.", suffix=".tmp")
        temporary = Path(name)
        os.close(handle)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
        sync_entries(path.parent)
    except OSError as error:
        raise TicketfindError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # no reason to hide the first one
                temporary.unlink(missing_ok=True)


_LONGEST = 40
"""Characters of a file's name in that of its temporary file: a name may be as long as the file system allows."""


def make_folder(folder: Path, root: Path | None = None) -> None:
    """Make `folder` and what is missing above it, with `root` only what is below that; on disk when this returns.

    Raises OSError.
    """
    missing = []
    while folder not in (root, folder.parent) and not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync_entries(each.parent)


def sync_entries(folder: Path) -> None:
    """New names in `folder` outlive a power cut when this returns. Raises OSError."""
    if os.name == "posix":
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_text(path: Path, text: str, root: Path | None = None) -> None:
    """Write `text` so that `path` is whole or absent; root: as `whole` has it."""
    with whole(path, root) as temporary:
        temporary.write_text(text, encoding="utf-8")


def leftovers(folder: Path) -> list[Path]:
    """What a program that was killed has left half written in `folder`, or one that runs is writing."""
    return [path for pattern in (".*.tmp", ".tmp*") for path in folder.glob(pattern)]  # ours, and those of safetensors


def sweep(folder: Path) -> None:
    """Remove what is half written in `folder`; nobody must be writing there."""
    for path in leftovers(folder):
        path.unlink(missing_ok=True)
