"""Pickles as torch.save writes them, looked at before torch unpickles them (with ``weights_only``, which runs no code).

What that leaves open: it makes things as large as a file says, and hashes tuples that hold one another 2^n times over.
"""

import math
import pickletools
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from ticketfind.archives import open_zip

_MAKERS = re.compile(
    r"builtins bytearray|torch(\.\w+)* \w*Tensor|torch._utils _rebuild_(wrapper|device|meta|nested)\w*"
)
"""Called with a number, they make something of that size, or tensors that are none on this machine."""
_REBUILDS = re.compile(r"torch._utils _rebuild_(tensor|tensor_v2|tensor_v3|qtensor)")
"""Called with storage, place in it, sides and strides."""
_STORAGES = re.compile(r"torch(?:\.\w+)* (\w+)Storage")
_BYTES = {"Half": 2, "BFloat16": 2, "Short": 2, "Float": 4, "Int": 4, "Double": 8, "Long": 8, "ComplexDouble": 16}
_UNUSUAL = "it makes a tensor in another way than torch.save does"
_MOST_STEPS = 2**20
"""In a pickle: two seconds. A tensor takes 40."""
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
                _check(file, size, size)
        return
    with open_zip(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise Refused("it is compressed, which torch.save never does")
        if sum(record.file_size for record in records) > size:
            raise Refused("its records say that they are longer than the file")
        pickles = [record for record in records if record.filename.lower().endswith("data.pkl")]  # as torch finds it
        if len(pickles) > 1:
            raise Refused("it holds several pickles")
        for record in pickles:
            with archive.open(record) as opened:
                _check(opened, record.file_size, size)


class _Sized:
    """A file of which no more is read than there is: a pickle may say that a text of 4 GB follows."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise Refused(f"{count} bytes are to follow in a file of {self._size}")
        return self._file.read(count)


@dataclass(frozen=True)
class _Value:
    """What is known of a value on a pickle's stack."""

    weight: int = 1
    """Values in it, written out."""
    said: Any = None
    """The number, text or name that the pickle says."""
    items: "tuple[_Value, ...]" = ()
    """Of a tuple; of a storage those of the tuple that describes it: "storage", type, key, place, elements."""


def _check(file: IO[bytes], length: int, size: int) -> None:
    """Follow one pickle, of at most `length` bytes, in a file of `size` bytes without making anything."""
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[Any, _Value] = {}
    storages: dict[Any, int] = {}
    repeated = 0
    try:
        for count, (op, said, _) in enumerate(pickletools.genops(cast(IO[bytes], _Sized(file, length)))):
            if count > _MOST_STEPS:
                raise Refused(f"it takes more than {_MOST_STEPS:,} steps to read")
            if op.name == "MARK":
                marks.append(len(stack))
                continue
            if op.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                memo[len(memo) if said is None else said] = stack[-1]
                continue
            takes, taken = [*op.stack_before], []
            if pickletools.markobject in takes:
                taken, stack = stack[marks[-1] :], stack[: marks.pop()]
                takes = takes[: takes.index(pickletools.markobject)]
            if takes:
                taken, stack = [*stack[-len(takes) :], *taken], stack[: -len(takes)]
            found = _Value(said=said)
            if "TUPLE" in op.name:
                found = _Value(1 + sum(value.weight for value in taken), None, tuple(taken))
            elif op.name == "BINPERSID":
                found = taken[0]
                storages[_key_of(found)] = _bytes_of(found)
                if sum(storages.values()) > size:
                    raise Refused("its tensors say that they are longer than the file")
            elif op.name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
                _check_call(str(taken[0].said), taken[1].items, size)
            elif op.name in ("BINGET", "LONG_BINGET", "GET"):
                found = memo[said]
                repeated += found.weight - 1
                if repeated > _MOST_REPEATED:
                    raise Refused("it holds tuples that hold one another many times over")
            stack += [found for _ in op.stack_after]
    except Refused:
        raise
    except Exception:  # no pickle, which is torch's to say
        return


def _check_call(name: str, given: tuple[_Value, ...], size: int) -> None:
    """Raise Refused for a call that makes more than there are bytes for."""
    if name == "torch._tensor _rebuild_from_type_v2":
        if len(given) < 3:
            raise Refused(_UNUSUAL)
        return _check_call(str(given[0].said), given[2].items, size)
    if _MAKERS.fullmatch(name):
        raise Refused(f"it makes a {name.replace(' ', '.')} of a size that it says")
    if not _REBUILDS.fullmatch(name):
        return
    if len(given) < 4 or len(given[0].items) < 5:
        raise Refused(_UNUSUAL)
    numbers = [given[1].said, *(value.said for part in given[2:4] for value in part.items)]
    sides, strides = ([value.said for value in part.items] for part in given[2:4])
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or len(sides) != len(strides):
        raise Refused(_UNUSUAL)
    last = numbers[0] + sum((side - 1) * stride for side, stride in zip(sides, strides, strict=True))
    held = given[0].items[4].said
    if math.prod(sides) > 4 * size or (math.prod(sides) and (not isinstance(held, int) or last >= held)):
        raise Refused("a tensor says that it is larger than what the file holds of it")


def _key_of(storage: _Value) -> Any:
    return storage.items[2].said


def _bytes_of(storage: _Value) -> int:
    """Raises Refused where that is no number of at least 0."""
    kind = _STORAGES.fullmatch(str(storage.items[1].said))
    elements = storage.items[4].said
    if not isinstance(elements, int) or elements < 0:
        raise Refused(_UNUSUAL)
    return elements * _BYTES.get(kind[1] if kind else "", 1)
