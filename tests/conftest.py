"""Small tasks that train in milliseconds, and a search over them."""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ticketfind import cli, experiments, prunable
from ticketfind import plan as planning
from ticketfind import search as searching
from ticketfind.arms import Arm, Task
from ticketfind.batches import Data, Split
from ticketfind.layers import from_layers
from ticketfind.recipe import Recipe, Train
from ticketfind.results import Round
from ticketfind.rundir import RunDir
from ticketfind.scores import SCORES, Score
from ticketfind.ticket import Provenance, Ticket
from ticketfind.train import fit

FIRST = ("test_kill.py::", "::test_distributed_training_by_torchrun")
"""Tests of ten seconds and more, in parts of which a core has nothing to do: side by side, the others fill the time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(part in item.nodeid for part in FIRST))


class Mlp(nn.Module):
    """[b, 12] -> [b, 4]: 192 + 192 + 48 prunable weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 12)
        self.fc3 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Normed(nn.Module):
    """[b, 12] -> [b, 4], with BatchNorm; 192 + 64 prunable weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 16, bias=False)
        self.norm = nn.BatchNorm1d(16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.norm(self.fc1(x))))


class Tied(nn.Module):
    """[b, 12] -> [b, 4]; `decode.weight` is `encode.weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(12, 12)
        self.decode = nn.Linear(12, 12)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.decode(F.relu(self.encode(x)))))


NETS: dict[str, type[nn.Module]] = {"mlp": Mlp, "normed": Normed, "tied": Tied}


def clusters(*, train: int = 90, validation: int = 40, test: int = 60) -> Data:
    """Four noisy clusters in 12 dimensions, hard enough that accuracies differ between trainings."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 12, generator=generator)

    def split(size: int) -> Split:
        targets = torch.arange(size) % 4
        return Split(centers[targets] + 1.5 * torch.randn(size, 12, generator=generator), targets)

    return Data(split(train), split(validation), split(test))


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@pytest.fixture
def make_task() -> Callable[..., Task]:
    """make_task("mlp" | "normed" | "tied" | a module class, device="cpu", **fields of Task) -> Task."""

    def make(net: str | type[nn.Module] = "mlp", device: str = "cpu", **fields: Any) -> Task:
        build = NETS[net] if isinstance(net, str) else net
        settings: dict[str, Any] = {
            "model": seeded(build, 100).to(device),
            "data": clusters().to(torch.device(device)),
            "device": torch.device(device),
            "fresh": lambda seed: {k: v.detach().clone() for k, v in seeded(build, seed).state_dict().items()},
            **fields,
        }
        return Task(**settings)

    return make


@pytest.fixture
def make_train() -> Callable[..., Train]:
    """make_train(**keys of the recipe's train section) -> Train; plain SGD at 0.1 unless told otherwise."""

    def make(**keys: Any) -> Train:
        plain = {
            "iterations": 12, "batch_size": 16, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0, "momentum": 0,
            "schedule": "constant", "warmup": 0, "eval_every": 4,
        }  # fmt: skip
        return from_layers({"train": {**plain, **keys}}).resolved(train_size=90, validation=40, device="cpu").train

    return make


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """make_recipe(**{"prune.rounds": 3, ...}) -> a resolved recipe: 12 iterations, 3 rounds, 2 replicates."""

    def make(settings: Mapping[str, Any] | None = None) -> Recipe:
        layer: dict[str, dict[str, Any]] = {
            "model": {"spec": "tests:tiny"},
            "data": {"spec": "tests:clusters"},
            "train": {
                "iterations": 12, "batch_size": 16, "optimizer": "sgd", "momentum": 0.9, "lr": 0.05,
                "weight_decay": 1e-3, "schedule": "cosine", "warmup": 2, "eval_every": 3,
            },
            "prune": {"fraction": 0.3, "rounds": 3, "scope": "layer", "rewind": "0it"},
            "run": {"replicates": 2, "seed": 5, "tolerance": 100, "engine": "eager"},
        }  # fmt: skip
        for path, value in (settings or {}).items():
            section, key = path.split(".")
            layer[section][key] = value
        recipe = from_layers({"name": "tiny", **layer})
        return recipe.resolved(train_size=90, validation=40, device="cpu")

    return make


@pytest.fixture
def watch() -> Mock:
    """A `search.Watch` that remembers what it is told."""
    return Mock(spec_set=["begin", "tick", "skip", "round", "note"])


@pytest.fixture
def run_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Mock) -> Callable[..., list[Round]]:
    """run_search(recipe, task, path, score=..., watch=...) -> the finished rounds; runs/latest goes to tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(
        recipe: Recipe, task: Task, path: Path, score: Score = SCORES["magnitude"], watch: Any = watch
    ) -> list[Round]:
        plan = planning.make_plan(recipe, task.model)
        return searching.search(recipe, task, RunDir(path), plan, score, watch)

    return run


@pytest.fixture
def trained_arms(monkeypatch: pytest.MonkeyPatch) -> dict[str, Arm]:
    """The arms of an evaluation, by name."""
    seen: dict[str, Arm] = {}

    def spy(arms: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        seen.update({arm.name: arm for arm in arms})
        return fit(arms, *args, **kwargs)

    monkeypatch.setattr(experiments, "fit", spy)
    return seen


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks have no work for a second thread; and sums then come out as in the engine's processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """What a command that runs in this process does on signals ends with the test."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


STOPS = ("SIGINT", "SIGTERM", "SIGHUP")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and a search heeds that
HANDLERS = {number: signal.getsignal(number) for number in signal.Signals if number.name in STOPS}


@pytest.fixture
def make_ticket() -> Callable[..., Ticket]:
    """make_ticket(task, seed=0, keep=0.3, iteration=0) -> a ticket with random masks, a fresh start and true sigmas."""

    def make(task: Task, *, seed: int = 0, keep: float = 0.3, iteration: int = 0) -> Ticket:
        init = task.start(seed)
        generator = torch.Generator().manual_seed(seed)
        names = [c.name for c in prunable.candidates(task.model) if c.pruned]
        kept = {name: torch.rand(init[name].shape, generator=generator) < keep for name in names}
        about = Provenance(
            recipe={"name": "made"},
            round=3,
            replicate=1,
            iteration=iteration,
            sigma={name: float(init[name].double().std(correction=0)) for name in names},
            aliases=prunable.aliases(task.model),
            claims={"ticket": {"replicates": 2}},
            versions={"ticketfind": "0"},
        )
        return Ticket(kept, init, about)

    return make


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1, "one line on stdout, and nothing else"
        found: dict[str, Any] = json.loads(self.out)
        return found


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ran]]:
    """command("search", ...) -> Ran: in this process, in an empty folder, as the console script would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["ticketfind", *map(str, arguments)])
        capfd.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        assert isinstance(code, int)
        return Ran(code, *capfd.readouterr())

    yield call
    for name, module in [*sys.modules.items()]:
        if name not in before and (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
