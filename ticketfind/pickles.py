"""Pickles as torch.save writes them, looked at before torch unpickles them (with ``weights_only``, which runs no code).

What that leaves open: it makes things as large as a file says, and hashes tuples that hold one another 2^n times over.
"""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO, Any, cast

from ticketfind.archives import open_zip

_MAKERS = re.compile(r"builtins bytearray|torch(\.\w+)* \w*Tensor")
"""Called with a number, they make something of that size."""
_MOST_REPEATED = 10**6
"""Values in tuples that are named again, written out."""


class Refused(ValueError):
    """A pickle that asks for more than its bytes."""


def check(path: Path) -> None:
    """Raise ValueError for a torch file, of either format, that asks for more than its bytes.

    What is damaged otherwise is left for torch to find.
    """
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            for _ in range(5):  # magic number, version, system, the objects, what storages are called
                _check(file, size)
        return
    with open_zip(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise Refused("it is compressed, which torch.save never does")
        if sum(record.file_size for record in records) > size:
            raise Refused("its records say that they are longer than the file")
        for record in records:
            if record.filename.endswith(".pkl"):
                with archive.open(record) as opened:
                    _check(opened, record.file_size)


class _Sized:
    """A file of which no more is read than there is: a pickle may say that a text of 4 GB follows."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise Refused(f"{count} bytes are to follow in a file of {self._size}")
        return self._file.read(count)


def _check(file: IO[bytes], size: int) -> None:
    """Follow one pickle without making anything: of each value on its stack the size, written out, and its name."""
    stack: list[tuple[int, str]] = []
    marks: list[int] = []
    memo: dict[Any, tuple[int, str]] = {}
    repeated = 0
    try:
        for op, said, _ in pickletools.genops(cast(IO[bytes], _Sized(file, size))):
            if op.name == "MARK":
                marks.append(len(stack))
                continue
            if op.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                memo[len(memo) if said is None else said] = stack[-1]
                continue
            takes = [*op.stack_before]
            if pickletools.markobject in takes:
                taken, stack = stack[marks[-1] :], stack[: marks.pop()]
                takes = takes[: takes.index(pickletools.markobject)]
            else:
                taken = []
            if takes:
                taken, stack = [*stack[-len(takes) :], *taken], stack[: -len(takes)]
            if op.name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX") and _MAKERS.fullmatch(taken[0][1]):
                raise Refused(f"it makes a {taken[0][1].replace(' ', '.')} of a size that it says")
            found = (1 + sum(weight for weight, _ in taken) if "TUPLE" in op.name else 1, "")
            if op.name == "GLOBAL":
                found = (1, str(said))
            if op.name in ("BINGET", "LONG_BINGET", "GET"):
                found = memo[said]
                repeated += found[0] - 1
                if repeated > _MOST_REPEATED:
                    raise Refused("it holds tuples that hold one another many times over")
            stack += [found for _ in op.stack_after]
    except Refused:
        raise
    except Exception:  # no pickle, which is torch's to say
        return
