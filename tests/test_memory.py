"""Large networks: what pruning, saving and comparing hold in memory beside what is there anyway."""

import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ticketfind import masks, selection
from ticketfind.scores import SCORES, Seen, scored
from ticketfind.tensorfile import read_tensors, save_tensors
from ticketfind.ticket import Provenance, Ticket

COUNT = 40
SIZE = 300_000
"""Weights of each layer: more than `selection` looks through at once."""
BIG, FEW = 500_000, 100_000
"""The same where a whole process is measured, which has a floor of its own; and where every weight is treated alike."""


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that operations inside make, and the most there are at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.note(tensor, 0)  # there anyway, unless made inside
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor, tensor.untyped_storage().nbytes())
        return out

    def note(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, storage._cdata, size)

    def free(self, key: int, size: int) -> None:
        self.now -= size
        self.seen.discard(key)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    assert SIZE > selection._SMALL
    return drawn(SIZE)


def drawn(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer{n}": torch.randn(size, generator=generator) for n in range(COUNT)}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kept", [1.0, 0.3])
def test_pruning_holds_a_score_and_a_byte_for_each_weight(scope: str, kept: float, weights: dict[str, Tensor]) -> None:
    """And, of one tensor at a time, a few bytes a weight more. Against a sort of everything in numpy."""
    generator = torch.Generator().manual_seed(1)
    old = {name: torch.rand(SIZE, generator=generator) < kept for name in weights}
    groups = masks.make_groups([*weights], {"*": 0.2}, scope)
    with Held() as held:
        scores = scored(SCORES["magnitude"], Seen(weights, weights, old), seed=0)
        new = masks.prune(old, scores, groups)
    assert 5 * COUNT * SIZE <= held.most <= 5 * COUNT * SIZE + 16 * SIZE
    for group in [[*weights]] if scope == "global" else [[name] for name in weights]:
        values = torch.cat([weights[name][old[name]].abs() for name in group]).sort().values
        threshold = values[round(0.2 * len(values))]
        for name in group:
            assert torch.equal(new[name], old[name] & (weights[name].abs() >= threshold))


def test_saving_copies_only_what_the_format_cannot_hold(tmp_path: Path) -> None:
    whole, shared = torch.randn(1000, 100), torch.randn(500)
    given = {"a": whole, "b": torch.randn(300), "t": torch.randn(10, 20).t(), "s1": shared, "s2": shared}
    with Held() as held:
        save_tensors(tmp_path / "x.safetensors", given)
    assert held.most <= 4 * (10 * 20 + 500) + 4 * 500
    found, _ = read_tensors(tmp_path / "x.safetensors", "file")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], value) for name, value in given.items())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Tickets of 20 million weights, 100 MB each."""
    files, weights = [], drawn(BIG)
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        kept = {name: torch.rand(BIG, generator=generator) < 0.2 for name in weights}
        about = Provenance(recipe={}, round=1, replicate=0, iteration=0, sigma={})
        files.append(tmp_path_factory.mktemp("tickets") / f"{number}.safetensors")
        Ticket(kept, weights, about).save(files[-1])
    yield files
    for file in files:
        file.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_comparing_reads_tensor_by_tensor(two: list[Path]) -> None:
    """A process of its own: what it holds but for pages of files, which the system takes back when it needs to."""
    program = """
import sys
from ticketfind.agreement import difference
from ticketfind.ticket import load_ticket
def held(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
before = held()
a, b = map(load_ticket, sys.argv[1:])
loaded = held()
assert difference(a, b).same_init
print(loaded - before, held() - before)
"""
    found = subprocess.run(
        [sys.executable, "-c", program, *map(str, two)], check=True, capture_output=True, text=True
    ).stdout
    loaded, compared = (1024 * int(number) for number in found.split())
    assert loaded < 20e6 and compared < 30e6  # of 200 MB


@pytest.mark.parametrize(
    ("name", "width"), [("magnitude_per_layer", 4), ("large_init_large_final", 8), ("small_init_small_final", 8)]
)
def test_a_score_of_a_whole_layer_takes_one_layer_at_a_time(name: str, width: int) -> None:
    weights = drawn(FEW)
    whole = {key: torch.ones(FEW, dtype=torch.bool) for key in weights}
    with Held() as held:
        scored(SCORES[name], Seen(weights, weights, whole), seed=0)
    assert held.most <= width * COUNT * FEW + 48 * FEW
