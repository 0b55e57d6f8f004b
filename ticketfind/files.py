"""Files that are whole or absent."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ticketfind import TicketfindError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there is flushed and renamed to `path` on leaving.

    On an exception nothing is left. Raises TicketfindError where the folder cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        os.close(handle)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
        if os.name == "posix":  # the new name must outlive a power cut too
            _sync(path.parent)
    except OSError as error:
        raise TicketfindError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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


def write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` is whole or absent."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def leftovers(folder: Path) -> list[Path]:
    """What a program that was killed has left half written in `folder`, or one that runs is writing."""
    return [path for pattern in (".*.tmp", ".tmp*") for path in folder.glob(pattern)]  # ours, and those of safetensors


def sweep(folder: Path) -> None:
    """Remove what is half written in `folder`; nobody must be writing there."""
    for path in leftovers(folder):
        path.unlink(missing_ok=True)
