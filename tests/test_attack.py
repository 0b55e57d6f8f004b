"""Accuracy under attack: against the attack by hand in plain PyTorch; what is refused; the command."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ticketfind import TicketfindError, attack
from ticketfind.arms import State, Task
from ticketfind.attack import Attack, Attacked
from ticketfind.batches import Data, Split
from ticketfind.experiments import Design, evaluate
from ticketfind.recipe import Train
from ticketfind.ticket import Ticket

pytest.importorskip("art")


@pytest.fixture
def task(make_task: Callable[..., Task]) -> Task:
    return make_task()


@pytest.fixture
def trained(task: Task) -> State:
    """The tiny network after 300 steps of gradient descent: nothing of ticketfind's own in it."""
    net, data = task.model, task.data.train
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(net(data.inputs), data.targets).backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def by_hand(net: nn.Module, test: Split, epsilon: float, steps: int, size: float) -> float:
    """Accuracy after `steps` steps along the gradient's sign, kept near the input and in the test inputs' range, of
    images channel by channel."""
    x, y = test.inputs, test.targets
    channels = [x] if x.ndim < 4 else x.unbind(1)
    low, high = (torch.stack([f(c) for c in channels]).view(-1, *[1] * (x.ndim - 2)) for f in (torch.min, torch.max))
    changed = x.clone()
    for _ in range(steps):
        changed = changed.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(changed), y), changed)
        changed = torch.clamp(changed + size * gradient.sign(), x - epsilon, x + epsilon).clamp(low, high)
    return float((net(changed).argmax(1) == y).float().mean())


LEVELS = (0.0, 0.1, 0.3, 0.6)


def test_against_attacks_by_hand(task: Task, trained: State) -> None:
    attacks = [Attack(kind, epsilon) for kind in ("fgsm", "pgd") for epsilon in LEVELS]
    found = attack.prepare(task, attacks, 1000).measure(trained)
    net, test = task.model.eval(), task.data.test
    assert [*found] == ["clean", *map(str, attacks)]
    clean = float((net(test.inputs).argmax(1) == test.targets).float().mean())
    assert found["clean"] == found["fgsm:0"] == found["pgd:0"] == pytest.approx(clean) and clean > 0.6
    for epsilon in LEVELS[1:]:
        fgsm, pgd = found[f"fgsm:{epsilon:g}"], found[f"pgd:{epsilon:g}"]
        assert fgsm == pytest.approx(by_hand(net, test, epsilon, 1, epsilon))
        assert pgd == pytest.approx(by_hand(net, test, epsilon, attack.STEPS, attack.STEP * epsilon), abs=1 / len(test))
        assert pgd <= fgsm < clean
    assert found["pgd:0.6"] < found["pgd:0.1"]


@pytest.mark.parametrize(("most", "batch", "parts"), [(1000, 16, 4), (20, 16, 2), (20, 7, 3), (33, 100, 1)])
def test_attacks_are_counted_as_iterations_and_can_be_ended_at_each(
    most: int, batch: int, parts: int, task: Task, trained: State
) -> None:
    """One step for fgsm and forty for pgd, of each batch that as many examples are in training."""
    ticks: list[int] = []

    def tick(iterations: int) -> None:
        ticks.append(iterations)
        if len(ticks) == stop:
            raise KeyboardInterrupt

    stop, attacks = 0, [Attack("fgsm", 0.1), Attack("pgd", 0.1), Attack("pgd", 0.0)]
    prepared = attack.prepare(task, attacks, most, batch_size=batch, tick=tick)
    assert not any(ticks)
    found = prepared.measure(trained)
    assert sum(ticks) == prepared.iterations == parts * (1 + attack.STEPS)
    assert ticks.count(0) > attack.STEPS, "asked at each step"
    stop = len(ticks) + attack.STEPS // 2
    with pytest.raises(KeyboardInterrupt):
        prepared.measure(trained)
    stop = 0
    assert prepared.measure(trained) == found


def test_weights_are_those_given_and_the_network_is_left_alone(task: Task, trained: State) -> None:
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    measure = attack.prepare(task, [Attack("fgsm", 0.3)], 1000).measure
    zeros = {name: torch.zeros_like(value) for name, value in trained.items()}
    assert measure(zeros)["clean"] == measure(zeros)["fgsm:0.3"] == 0.25  # always the first of four classes
    assert measure(trained) == measure(trained) != measure(zeros)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_fewer_examples_are_the_same_for_every_network_and_of_all_classes(task: Task, trained: State) -> None:
    """Drawn and not the first: test sets may be sorted by class."""
    order = task.data.test.targets.argsort()
    test = Split(task.data.test.inputs[order], task.data.test.targets[order])
    small = Task(task.model, Data(task.data.train, task.data.validation, test), task.device, task.fresh)
    name, inputs, targets = attack._examples(small, 24)
    assert name is None and len(targets) == 24 and len(targets.unique()) == 4
    assert torch.equal(inputs, attack._examples(small, 24)[1])


class Recurrent(nn.Module):
    """Dropout between the layers and of its own, and BatchNorm: what training mode would change."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 8, 2, batch_first=True, dropout=0.5)
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.rnn(x.view(-1, 4, 3))[0][:, -1])
        return self.fc(F.dropout(hidden, 0.5, self.training))


class Colors(nn.Module):
    """[b, 3, 2, 2] -> [b, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def test_networks_are_attacked_in_evaluation_mode(make_task: Callable[..., Task]) -> None:
    """A recurrent one too, which the library would attack, and leave, in training mode."""
    task = make_task(Recurrent)
    weights = {name: value * (4 if name == "fc.weight" else 1) for name, value in task.fresh(3).items()}
    weights["norm.running_mean"] += 0.1
    found = attack.prepare(task, [Attack("fgsm", 0.5), Attack("pgd", 0.5)], 1000).measure
    once = found(weights)
    assert found(weights) == once, "nothing is drawn"
    net = task.model.eval()
    net.load_state_dict(weights)
    test = task.data.test
    assert once["clean"] == pytest.approx(float((net(test.inputs).argmax(1) == test.targets).float().mean()))
    assert once["fgsm:0.5"] == pytest.approx(by_hand(net, test, 0.5, 1, 0.5))
    assert once["pgd:0.5"] == pytest.approx(by_hand(net, test, 0.5, 40, 0.05), abs=1 / len(test))


def test_a_channel_of_an_image_has_a_range_of_its_own(make_task: Callable[..., Task]) -> None:
    """As normalized images have; a channel of one number everywhere stays as it is."""
    plain = make_task().data.test
    scale, shift = torch.tensor([1.0, 0.1, 0.0]).view(3, 1, 1), torch.tensor([0.0, 7.0, 2.0]).view(3, 1, 1)
    test = Split(plain.inputs.view(-1, 3, 2, 2).sigmoid().round(decimals=1) * scale + shift, plain.targets)
    task = make_task(Colors, data=Data(test, test, test))
    weights = task.fresh(0)
    attacks = [Attack("fgsm", 0.6), Attack("pgd", 0.6)]
    said: list[str] = []
    prepared = attack.prepare(task, attacks, 1000, note=said.append)
    found = prepared.measure(weights)
    net = task.model.eval()
    net.load_state_dict(weights)
    assert found["fgsm:0.6"] == pytest.approx(by_hand(net, test, 0.6, 1, 0.6))
    assert found["pgd:0.6"] == pytest.approx(by_hand(net, test, 0.6, 40, 0.06), abs=1 / len(test))
    low, high = attack._range(test.inputs)
    assert low.shape == high.shape == (3, 1, 1)
    assert low.ravel()[2] == 2 and high.ravel()[2] == pytest.approx(2, abs=1e-6)
    assert prepared.examples == 60
    assert prepared.inputs == pytest.approx((float(test.inputs.numpy().min()), float(test.inputs.numpy().max())))
    assert said == [
        f"attacked are 60 test examples, inputs from {test.inputs.min():.4g} to {test.inputs.max():.4g};"
        " epsilon is in these units"
    ]


class Dicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(x)}


class Places(Dicts):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x).unsqueeze(-1)


class Few(Dicts):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x)[:, :3]


class Cut(Dicts):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x.detach())


class Named(Dicts):
    def forward(self, *, values: Tensor, labels: Tensor | None = None) -> Any:
        return {"logits": self.fc(values), "loss": torch.zeros(())}


def test_inputs_by_name(make_task: Callable[..., Task]) -> None:
    """As transformers' image classifiers have them, along with the labels: the numbers are those of plain ones."""
    plain = make_task(Dicts)
    test = plain.data.test
    named = Split({"values": test.inputs, "labels": test.targets}, test.targets)
    attacks = [Attack("fgsm", 0.1), Attack("pgd", 0.3)]
    weights = plain.fresh(0)
    found = attack.prepare(make_task(Named, data=Data(named, named, named)), attacks, 50).measure(weights)
    assert found == attack.prepare(plain, attacks, 50).measure(weights)


def test_outputs_of_any_kind_that_hold_scores(make_task: Callable[..., Task]) -> None:
    task = make_task(Dicts)
    assert attack.prepare(task, [Attack("fgsm", 0.1)], 50).measure(task.fresh(0)).keys() == {"clean", "fgsm:0.1"}


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (Places, r"expected a score for each of 4 classes \(\[b, classes\]\), found outputs of \[2, 4, 1\]"),
        (Few, r"expected a score for each of 4 classes .* found outputs of \[2, 3\]"),
        (Cut, r"the network cannot be attacked: .*"),
    ],
)
def test_a_network_that_cannot_be_attacked_is_said_before_any_training(
    make_task: Callable[..., Task], net: type[nn.Module], says: str
) -> None:
    with pytest.raises(TicketfindError, match=f"^attack: {says}$"):
        attack.prepare(make_task(net), [Attack("fgsm", 0.1)], 50)


@pytest.mark.parametrize(
    ("inputs", "targets", "says"),
    [
        ({"a": torch.zeros(8, 12), "b": torch.zeros(8)}, torch.arange(8) % 4, "a, b by name"),
        (torch.zeros(8, 12, dtype=torch.int64), torch.arange(8) % 4, "torch.int64"),
        (torch.zeros(8, 12), torch.zeros(8), "torch.float32 of shape"),
        (torch.zeros(8, 12), torch.zeros(8, 3, dtype=torch.int64), r"shape \[8, 3\]"),
        (torch.zeros(8, 12), torch.arange(8) % 4 - 1, r"shape \[8\], -1 the lowest"),
    ],
)
def test_what_cannot_be_attacked_is_said(
    make_task: Callable[..., Task], inputs: Any, targets: Tensor, says: str
) -> None:
    split = Split(inputs, targets)
    with pytest.raises(TicketfindError, match=f"attack: expected .* found .*{says}"):
        attack.prepare(make_task(data=Data(split, split, split)), [Attack("fgsm", 0.1)], 50)
    with pytest.raises(TicketfindError, match="expected test data, found none"):
        attack.prepare(make_task(data=None), [Attack("fgsm", 0.1)], 50)


def test_without_the_library(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "art"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "art", None)
    with pytest.raises(TicketfindError, match=r"not installed; pip install 'ticketfind\[attack\]'"):
        attack.prepare(task, [Attack("fgsm", 0.1)], 50)


def test_an_evaluation_counts_its_attacks_but_for_networks_that_failed(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    task = make_task()
    tickets = [make_ticket(task, seed=seed) for seed in range(2)]
    tickets[1] = replace(tickets[1], init={name: value * 1e30 for name, value in tickets[1].init.items()})
    told: dict[str, list[int]] = {"begin": [], "tick": [], "skip": []}
    design = Design(tickets=tickets, trials=1, attacks=[Attack("pgd", 0.1), Attack("fgsm", 0.1)], attack_examples=20)
    counted = {name: each.append for name, each in told.items()}
    found = evaluate(design, task, make_train(), first_seed=0, **counted)
    assert len(found.attacks["pgd:0.1"].arms["ticket"].values) == 1  # and not two
    begin, tick, skip = (sum(each) for each in told.values())
    assert begin == 2 * 4 * (12 + 2 * (40 + 1)) == tick + skip and skip  # batches of 16


def test_comparisons_are_of_replicates() -> None:
    """Trials are averaged within a replicate; the interval is Welch's, by scipy."""
    from scipy import stats

    found = Attacked.of({"dense": {0: [0.5, 0.7], 1: [0.4]}, "ticket": {1: [0.3, 0.5], 0: [0.3]}}, 1000)
    assert found.arms["dense"].values == pytest.approx((0.6, 0.4))
    assert found.arms["ticket"].values == pytest.approx((0.3, 0.4)), "in order, whichever came first"
    (compared,) = found.comparisons
    assert (compared.arm, compared.other) == ("ticket", "dense") and compared.difference == pytest.approx(-0.15)
    expected = stats.ttest_ind([0.3, 0.4], [0.6, 0.4], equal_var=False).confidence_interval(0.95)
    assert compared.interval == pytest.approx((expected.low, expected.high))


def test_no_spread_is_smaller_than_one_example() -> None:
    """Two replicates that agree to the last of 50 examples: Student's t, by scipy, with a deviation of one of them."""
    from scipy import stats

    found = Attacked.of({"dense": {0: [0.6], 1: [0.6]}, "ticket": {0: [0.4], 1: [0.4]}}, 50)
    width = stats.t.ppf(0.975, 2) / 50
    assert found.comparisons[0].interval == pytest.approx((-0.2 - width, -0.2 + width))


def test_the_command(command: Callable[..., Any]) -> None:
    small = ["--iterations", "60", "--rounds", "2", "--replicates", "2", "--set", "train.eval_every=30"]
    assert command("search", *small).code == 0
    asked = ["eval", "--round", "2", "--trials", "1", "--attack", "pgd:0.05", "--attack", "fgsm:0.05"]
    found = command(*asked, "--json").json
    assert [*found["attacks"]] == ["clean", "fgsm:0.05", "pgd:0.05"], "by kind, and not as they are given"
    assert (found["attack_examples"], found["attack_range"]) == (400, [0, 1]), "all of digits.npz"
    assert found["seed"] == 2, "behind those of the search's two replicates"
    for attacked in found["attacks"].values():
        assert attacked["arms"].keys() == found["arms"].keys() == {"dense", "ticket", "reinit", "random"}
        assert [c["other"] for c in attacked["comparisons"]] == ["dense", "reinit", "random"]
    for arm, stats in found["arms"].items():
        clean, fgsm, pgd = (np.array(a["arms"][arm]["values"]) for a in found["attacks"].values())
        assert clean == pytest.approx(stats["accuracy_end"]["values"]), "the weights after the last iteration"
        assert (pgd <= fgsm).all() and (fgsm < clean).all()
    before = {*Path("runs/digits/evals").iterdir()}
    few = command(*asked, "--attack-examples", "40")
    (newest,) = {*Path("runs/digits/evals").iterdir()} - before
    assert json.loads(newest.read_text())["attack_examples"] == 40
    assert "fgsm:0.05" in few.out and "ticket above it by" in few.out
    for bad in ("fgsm", "fgsm:-1", "fgsm:nan", "cw:0.1", "pgd:much"):
        refused = command("eval", "--attack", bad)
        assert refused.code == 2 and "expected fgsm:EPS or pgd:EPS" in refused.err
