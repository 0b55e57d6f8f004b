"""Steps against plain PyTorch, and arms side by side against arms one after another."""

import copy
import dataclasses
import functools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_arm import OneArm
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

from ticketfind import TicketfindError, devices, engine, forks
from ticketfind.batches import Data, Split
from ticketfind.devices import Way
from ticketfind.engine import Diverged
from ticketfind.examples import source_of
from ticketfind.lanes import Lane, learning_rate
from ticketfind.recipe import Recipe, Train
from ticketfind.streams import Stream
from ticketfind.train import Arm, Task, cross_entropy, fit

processes = pytest.mark.skipif(sys.platform != "linux", reason="arms side by side need Linux")

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.5},
    "sgd-momentum-decay": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    "adam": {"optimizer": "adam", "lr": 1e-2},
    "adam-decay": {"optimizer": "adam", "lr": 1e-2, "weight_decay": 1e-2},
    "adamw": {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"schedule": "constant"},
    "warmup": {"schedule": "constant", "warmup": 5},
    "cosine": {"schedule": "cosine"},
    "warmup-cosine": {"schedule": "cosine", "warmup": 6},
    "step": {"schedule": "step", "milestones": [10, 21]},
    "warmup-step": {"schedule": "step", "warmup": 4, "milestones": [10, 21]},
}


def torch_optimizer(model: nn.Module, how: Train) -> torch.optim.Optimizer:
    """What a user of PyTorch would write for `how`."""
    common = {"lr": how.lr, "weight_decay": how.weight_decay}
    if how.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=how.momentum, foreach=False, **common)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[how.optimizer](
        model.parameters(), foreach=False, **common
    )


def torch_scheduler(optimizer: torch.optim.Optimizer, how: Train) -> lr_scheduler.LRScheduler:
    """PyTorch's own schedules, put together as `how` describes them."""
    warmup, total = int(how.warmup), int(how.iterations)
    rise = lr_scheduler.LinearLR(optimizer, 1 / max(warmup, 1), 1.0, total_iters=max(warmup - 1, 1))
    if how.schedule == "constant":
        return rise
    if how.schedule == "step":
        drops = lr_scheduler.MultiStepLR(optimizer, [int(m) for m in how.milestones], gamma=0.1)
        return lr_scheduler.ChainedScheduler([rise, drops])
    fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup]) if warmup else fall


def random_batches(count: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 12, generator=generator), torch.randint(0, 4, (size,), generator=generator))
        for _ in range(count)
    ]


def random_masks(model: nn.Module, keep: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    return {name: torch.rand(p.shape, generator=generator) < keep for name, p in weights.items()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def nothing(_: int) -> None:
    """A tick for nobody."""


# ------------------------------------------------------------------------------------------------- one arm


def assert_trains_as_plain_pytorch(model: nn.Module, how: Train, moved: str) -> None:
    """30 steps under random masks, here and in the loop that a user would write; `moved` must have moved."""
    masks, batches, start = random_masks(model), random_batches(30), state_of(model)
    plain = copy.deepcopy(model)
    masked = [(plain.get_parameter(name), mask) for name, mask in masks.items()]
    for parameter, mask in masked:
        parameter.data *= mask
    torchs = torch_optimizer(plain, how)
    scheduler = torch_scheduler(torchs, how)
    losses = []
    plain.train()
    for inputs, targets in batches:
        torchs.zero_grad()
        loss = F.cross_entropy(plain(inputs), targets)
        loss.backward()
        for parameter, mask in masked:
            parameter.grad *= mask
        torchs.step()
        scheduler.step()
        for parameter, mask in masked:
            parameter.data *= mask
        losses.append(loss.item())

    lane = OneArm(model, start, masks, how, cross_entropy, seed=0)
    assert lane.advance(batches, 0, nothing) == pytest.approx(losses, abs=1e-6)
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(lane.state()[name], expected, rtol=0, atol=1e-6, msg=name)
    assert (lane.state()[moved] - start[moved])[masks[moved]].abs().max() > 3e-3  # the comparison was of something


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", ["mlp", "normed"])
def test_masked_training_is_what_plain_pytorch_does(
    net: str, optimizer: str, schedule: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    how = make_train(iterations=30, **OPTIMIZERS[optimizer], **SCHEDULES[schedule])
    assert_trains_as_plain_pytorch(make_task(net).model, how, "fc1.weight")


class Transposed(nn.Module):
    """[b, 12] -> [b, 4]; autograd gives the weight a gradient with its memory the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w.t() * 1.0).contiguous()


class Summed(Transposed):
    """[b, 12] -> [b, 4]; autograd gives both parameters one and the same tensor as their gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(4, 12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w + self.v)


class Images(nn.Module):
    """[b, 12] -> [b, 4]; a convolution with its weight in channels-last memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.w = nn.Conv2d(3, 4, 2), nn.Parameter(torch.eye(4))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.conv(x.view(-1, 3, 2, 2)).flatten(1), self.w)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", [Transposed, Summed, Images])
def test_gradients_of_any_memory_are_taken_as_plain_pytorch_takes_them(
    net: type[nn.Module], optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    assert_trains_as_plain_pytorch(make_task(net).model, make_train(iterations=30, **OPTIMIZERS[optimizer]), "w")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_are_those_of_pytorchs_schedulers(schedule: str, make_train: Callable[..., Train]) -> None:
    how = make_train(iterations=30, lr=0.4, **SCHEDULES[schedule])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=how.lr)
    scheduler = torch_scheduler(optimizer, how)
    expected = []
    for _ in range(30):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [learning_rate(how, i) for i in range(30)] == pytest.approx(expected, rel=1e-9)


def test_learning_rates_by_hand(make_train: Callable[..., Train]) -> None:
    """Warmup ends at the full rate; cosine is half way down in the middle; milestones count from iteration 0."""
    cosine = make_train(iterations=24, lr=0.8, schedule="cosine", warmup=4)
    assert [learning_rate(cosine, i) for i in (0, 1, 3, 4, 14)] == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.4])
    assert 0 < learning_rate(cosine, 23) < 0.01
    step = make_train(iterations=24, lr=0.8, schedule="step", milestones=[10, 20])
    assert [learning_rate(step, i) for i in (9, 10, 19, 20)] == pytest.approx([0.8, 0.08, 0.08, 0.008])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruned_weights_are_exactly_zero_at_every_step(
    optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    model = make_task("normed").model
    masks = random_masks(model)
    weights = dict(model.named_parameters())
    lane = OneArm(
        model, state_of(model), masks, make_train(iterations=50, **OPTIMIZERS[optimizer]), cross_entropy, seed=0
    )

    def all_zero() -> bool:
        return all(torch.equal(weights[name] == 0, ~mask) for name, mask in masks.items())

    assert all_zero()
    seen = []
    lane.advance(random_batches(50), 0, lambda n: seen.append((n, all_zero())))
    assert seen == [(1, True)] * 50  # survivors are not zero, pruned weights are, after every single step


@pytest.mark.parametrize("net", ["mlp", "normed"])
def test_a_lane_starts_from_exactly_what_it_is_given(
    net: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Nothing of the model's previous training is left: weights, statistics, optimizer state."""
    task, how, batches = make_task(net), make_train(momentum=0.9), random_batches(6)
    start, masks = task.start(3), random_masks(task.model)
    OneArm(task.model, task.start(4), {}, how, cross_entropy, seed=0).advance(batches, 0, nothing)
    lane = OneArm(task.model, start, masks, how, cross_entropy, seed=0)
    for name, value in lane.state().items():
        expected = start[name] * masks[name] if name in masks else start[name]
        assert torch.equal(value, expected), name
    losses = lane.advance(batches, 0, nothing)
    assert losses == OneArm(make_task(net).model, start, masks, how, cross_entropy, seed=0).advance(batches, 0, nothing)


def test_tied_weights_are_masked_under_all_their_names(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task = make_task("tied")
    mask = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    start = task.start(1)
    lane = OneArm(task.model, start, {"encode.weight": mask}, make_train(), cross_entropy, seed=0)
    for name in ("encode.weight", "decode.weight"):
        assert torch.equal(lane.state()[name], start[name] * mask), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_and_sometimes_unused_parameters_are_left_alone_as_in_pytorch(
    optimizer: str, make_train: Callable[..., Train]
) -> None:
    """Stochastic depth: a layer takes no part in the first steps, and joins later."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late, self.frozen = nn.Linear(12, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.frozen.requires_grad_(False)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = self.early(x)
            return self.frozen(self.late(x) if self.calls > 2 else x)

    how, batches = make_train(**OPTIMIZERS[optimizer]), random_batches(5)
    model = Skipping()
    plain = copy.deepcopy(model)
    start = state_of(model)
    torchs = torch_optimizer(plain, how)
    for inputs, targets in batches:
        torchs.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        torchs.step()
    lane = OneArm(model, start, {}, how, cross_entropy, seed=0)
    lane.advance(batches, 0, nothing)
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(lane.state()[name], expected, rtol=0, atol=1e-6, msg=name)
    assert torch.equal(lane.state()["frozen.weight"], start["frozen.weight"])
    assert not torch.equal(lane.state()["late.weight"], start["late.weight"])


def test_advance_takes_the_schedule_up_where_it_is_told(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """In two parts as in one; and from iteration 20 with iteration 20's learning rate."""
    how, batches = make_train(iterations=30, schedule="cosine", warmup=5, momentum=0.9), random_batches(30)
    task = make_task()
    start = task.start(0)
    whole = OneArm(make_task().model, start, {}, how, cross_entropy, seed=0)
    parts = OneArm(task.model, start, {}, how, cross_entropy, seed=0)
    losses = whole.advance(batches, 0, nothing)
    assert losses == parts.advance(batches[:13], 0, nothing) + parts.advance(batches[13:], 13, nothing)
    assert all(torch.equal(value, parts.state()[name]) for name, value in whole.state().items())

    lane = OneArm(task.model, start, {}, make_train(iterations=30, schedule="cosine"), cross_entropy, seed=0)
    lane.advance(batches[:1], 20, nothing)
    rate = 0.1 * 0.5 * (1 + math.cos(math.pi * 20 / 30))
    plain = make_task().model
    plain.load_state_dict(start)
    F.cross_entropy(plain(batches[0][0]), batches[0][1]).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(lane.state()[name], start[name] - rate * parameter.grad, rtol=1e-5, atol=1e-7)


def test_dropout_follows_the_lanes_seed(make_train: Callable[..., Train]) -> None:
    def losses(seed: int, drawn_before: int) -> list[float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 4))
            torch.rand(drawn_before)
            lane = OneArm(model, state_of(model), {}, make_train(), cross_entropy, seed)
            return lane.advance(random_batches(4), 0, nothing)

    assert losses(1, 0) == losses(1, 5)
    assert losses(1, 0) != losses(2, 0)


def test_measure_is_the_mean_over_the_examples_in_evaluation_mode(make_train: Callable[..., Train]) -> None:
    """Large inputs are taken a few at a time, and the last, smaller batch does not weigh more."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(F.adaptive_avg_pool1d(x.flatten(1).unsqueeze(1), 8).squeeze(1)))

    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(10, 2**18, generator=generator), torch.arange(10) % 4)
    model = Pooled()
    lane = OneArm(model, state_of(model), {}, make_train(), cross_entropy, seed=0)
    sizes = []

    def count(outputs: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(targets))
        return torch.tensor(0.0)

    loss, hits, _ = lane.measure(
        split, (cross_entropy, lambda o, t: (o.argmax(1) == t).double().mean(), count), batch_size=3
    )
    assert sizes == [4, 4, 2]  # 2**20 numbers at once
    model.eval()
    with torch.no_grad():
        outputs = model(split.inputs)
        assert loss == pytest.approx(float(F.cross_entropy(outputs, split.targets)), rel=1e-6)
        assert hits == int((outputs.argmax(1) == split.targets).sum()) / 10
    assert int(model.norm.num_batches_tracked) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_loss_that_is_not_finite_is_named(
    bad: float, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    model = make_task().model
    batches = random_batches(8)
    batches[5][0][0, 0] = bad
    lane = OneArm(model, state_of(model), {}, make_train(), cross_entropy, seed=0)
    with pytest.raises(Diverged) as caught:
        lane.advance(batches, 100, nothing)
    assert caught.value.iteration == 105


# -------------------------------------------------------------------------------------------- several arms


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "meta2"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(TicketfindError, match=f"run.device: expected a device that works here, found '{name}'"):
        devices.resolve_device(name)


@processes
@pytest.mark.parametrize("net", ["mlp", "normed"])
def test_side_by_side_and_one_after_another_give_the_same_bits(
    net: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task, how = make_task(net), make_train(optimizer="adam", lr=1e-2, schedule="cosine", warmup=2)
    masks = random_masks(task.model)
    arms = [
        Arm(f"arm {seed}", task.start(seed), masks if seed % 2 else {}, seed, first=seed // 3 * 5) for seed in range(6)
    ]
    ticks: dict[str, int] = dict.fromkeys(("eager", "processes"), 0)

    def count(way: str) -> Callable[[int], None]:
        def tick(n: int) -> None:
            ticks[way] += n

        return tick

    before = torch.get_rng_state()
    found = {way: list(fit(arms, task, how, way=Way(way, at_once=8), keep_at=5, tick=count(way))) for way in ticks}
    assert torch.equal(torch.get_rng_state(), before)  # a search leaves the user's generator alone
    assert ticks == dict.fromkeys(ticks, 3 * 12 + 3 * 7)
    for (arm, one), (other_arm, other), expected in zip(found["eager"], found["processes"], arms, strict=True):
        assert arm is expected and other_arm is expected  # in order
        assert one.points == other.points and len(one.points) > 1
        for a, b in ((one.final, other.final), (one.kept, other.kept)):
            assert a is not None and b is not None and a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)


@processes
@pytest.mark.parametrize("count", [1, 3, 20])
def test_results_come_in_order_whatever_finishes_first(count: int) -> None:
    def train(index: int, tick: Callable[[int], None]) -> int:
        time.sleep(0.05 if index % 2 == 0 else 0)
        return index**2

    assert list(engine.each(Way("processes", at_once=8), count, train, nothing)) == [index**2 for index in range(count)]
    assert not multiprocessing.active_children()


class Picky(Exception):
    """Pickles, and does not unpickle."""

    def __init__(self, what: str, how: str) -> None:
        super().__init__(f"{what} is {how}")


def fail_plainly() -> None:
    raise ValueError("no such thing")


def fail_pickily() -> None:
    raise Picky("it", "broken")


def fail_locally() -> None:
    class Local(Exception):
        """Does not even pickle."""

    raise Local("far away")


@pytest.mark.parametrize("way", ["eager", pytest.param("processes", marks=processes)])
@pytest.mark.parametrize(
    ("fail", "text"),
    [(fail_plainly, "no such thing"), (fail_pickily, "it is broken"), (fail_locally, "far away")],
)
def test_an_exception_in_a_training_names_the_arm(
    way: str, fail: Callable[[], None], text: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape[0] == 16 and bool((outputs == 0).all()):
            fail()
        return cross_entropy(outputs, targets)

    task = make_task(loss=loss)
    zero = {name: torch.zeros_like(value) for name, value in task.start(0).items()}
    arms = [Arm("good", task.start(0), {}, 0), Arm("round 7, replicate 2", zero, {}, 0)]
    with pytest.raises(TicketfindError, match=rf"^round 7, replicate 2: .*{text}$"):
        list(fit(arms, task, make_train(), way=Way(way, at_once=8)))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("way", ["eager", pytest.param("processes", marks=processes)])
def test_a_loss_that_is_not_finite_names_arm_and_iteration(
    way: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """The arm whose start holds a huge weight overflows; the message says where, and what to try."""
    task = make_task()
    huge = {name: value * 1e30 for name, value in task.start(0).items()}
    arms = [Arm("round 0, replicate 0", task.start(0), {}, 0), Arm("round 0, replicate 1", huge, {}, 1, first=3)]
    with pytest.raises(TicketfindError, match=r"^round 0, replicate 1: the loss is not finite at iteration 3;.*--lr"):
        list(fit(arms, task, make_train(), way=Way(way, at_once=8)))
    assert not multiprocessing.active_children()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@processes
def test_a_child_that_dies_is_reported_and_the_others_are_ended(
    tmp_path: Path, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        assert os.getpid() != parent
        (tmp_path / str(os.getpid())).touch()
        if bool((outputs == 0).all()):
            while len(list(tmp_path.iterdir())) < 3:
                time.sleep(0.01)
            os._exit(7)
        time.sleep(60)
        return cross_entropy(outputs, targets)

    parent = os.getpid()
    task = make_task(loss=loss)
    zero = {name: torch.zeros_like(value) for name, value in task.start(0).items()}
    arms = [Arm(f"arm {i}", start, {}, 0) for i, start in enumerate((task.start(0), zero, task.start(1)))]
    began = time.monotonic()
    with pytest.raises(TicketfindError, match=r"a training process was killed \(exit code 7\).*--engine eager"):
        list(fit(arms, task, make_train(), way=Way("processes", at_once=8)))
    assert time.monotonic() - began < 30
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 3 and not any(map(alive, pids))
    assert not multiprocessing.active_children()


@processes
def test_a_child_that_dies_while_it_reports_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_a_message(sending: Any, *_: Any) -> None:
        os.write(sending.fileno(), (100).to_bytes(4, "big") + b"x" * 50)
        os._exit(9)

    monkeypatch.setattr(forks, "_child", half_a_message)
    with pytest.raises(TicketfindError, match=r"a training process was killed \(exit code 9\)"):
        list(engine.each(Way("processes", at_once=8), 1, lambda index, tick: None, nothing))


@processes
def test_an_interrupt_ends_the_children(tmp_path: Path) -> None:
    def train(index: int, tick: Callable[[int], None]) -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    def tick(_: int) -> None:
        if len(list(tmp_path.iterdir())) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(engine.each(Way("processes", at_once=8), 3, train, tick))
    assert not any(alive(int(path.name)) for path in tmp_path.iterdir())
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------ arms in lockstep, every way


def arms_of(task: Task, count: int = 5) -> list[Arm]:
    """Dense and masked, from iteration 0 and, the last two, 5."""
    masks = random_masks(task.model)
    return [
        Arm(f"arm {seed}", task.start(seed), masks if seed % 2 else {}, seed, first=5 if seed > 2 else 0)
        for seed in range(count)
    ]


def assert_same(found: list[tuple[Arm, Any]], expected: list[tuple[Arm, Any]], tolerance: float = 1e-5) -> None:
    """Points, final and kept weights."""
    for (arm, one), (other_arm, other) in zip(found, expected, strict=True):
        assert arm.name == other_arm.name
        for point, wanted in zip(one.points, other.points, strict=True):
            assert point.iteration == wanted.iteration
            assert point.train_loss == pytest.approx(wanted.train_loss, abs=tolerance)
            assert point.validation_loss == pytest.approx(wanted.validation_loss, abs=tolerance)
            assert (point.validation_accuracy, point.test_accuracy) == (
                wanted.validation_accuracy, wanted.test_accuracy,
            )  # fmt: skip
        assert (one.kept is None) == (other.kept is None)
        for a, b in ((one.final, other.final), (one.kept or {}, other.kept or {})):
            assert a.keys() == b.keys()
            for name, value in a.items():
                torch.testing.assert_close(value, b[name], rtol=0, atol=tolerance, msg=f"{name} of {arm.name}")


@pytest.fixture
def recorded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[engine.Replayed]:
    """`graph` as on CUDA, with steps that are done where there they would be replayed."""
    made = []

    class Replayed(engine.Replayed):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    def begin(way: Way, model: nn.Module, starts: Any, feeds: Any, how: Train, loss: Any, **rest: Any) -> Any:
        members = [Lane(copy.deepcopy(model), start, masks, how, loss) for start, masks in starts]
        return Replayed(members, feeds(), how, rest["first"])

    monkeypatch.setattr("ticketfind.train.engine.begin", begin)
    return made


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", ["mlp", "normed", "tied"])
def test_stacked_arms_are_trained_as_one_after_another(
    net: str, optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """20 iterations, groups of at most two arms that begin at the same one."""
    task = make_task(net)
    how = make_train(iterations=20, eval_every=7, schedule="cosine", warmup=3, **{**OPTIMIZERS[optimizer], "lr": 0.01})
    notes: list[str] = []
    stacked = fit(arms_of(task), task, how, way=Way("stacked", at_once=2), keep_at=9, note=notes.append)
    assert_same([*stacked], [*fit(arms_of(task), task, how, keep_at=9)], 2e-5 if "adam" in optimizer else 1e-5)
    assert not notes


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_eager_training(
    backend: str, make_task: Callable[..., Task], make_train: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm's statistics move in compiled code too; compiled once for all arms and both calls.

    With the backend that generates no C++, which takes up to a minute; and, among the slow tests, with the usual one.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    task, how = make_task("normed"), make_train(iterations=20, momentum=0.9)
    notes: list[str] = []
    way = Way("compile")
    torch._dynamo.reset()
    found = [*fit(arms_of(task)[:3], task, how, way=way, keep_at=9, note=notes.append)]
    found += fit(arms_of(task)[3:], task, how, way=way, keep_at=9, note=notes.append)
    assert_same(found, [*fit(arms_of(task), task, how, keep_at=9)])
    assert not notes
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_recorded_step_follows_data_and_schedule(
    schedule: str, make_task: Callable[..., Task], make_train: Callable[..., Train],
    recorded_on_the_cpu: list[engine.Replayed],
) -> None:  # fmt: skip
    """300 iterations are two blocks of rows; evaluations fall on no multiple of the steps of a recording."""
    task = make_task("normed")
    how = make_train(iterations=300, eval_every=47, momentum=0.5, lr=1e-3, **SCHEDULES[schedule])
    expected = [*fit_with(engine.Lockstep, arms_of(task), task, how, keep_at=150)]
    ticks: list[int] = []
    found = [*fit(arms_of(task), task, how, way=Way("graph", at_once=3), keep_at=150, tick=ticks.append)]
    assert_same(found, expected)
    assert sum(ticks) == 3 * 300 + 2 * 295 and min(ticks) == 2 and max(ticks) == 3 * engine.UNROLLED
    assert len(recorded_on_the_cpu) == 2


def fit_with(kind: type[engine.Lockstep], arms: list[Arm], task: Task, how: Train, keep_at: int = 9) -> Any:
    """Arms one after another, by a kind of lockstep, whatever `engine.begin` is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ticketfind.train.engine.begin",
            lambda way, model, starts, feeds, how, loss, **rest: kind(
                [Lane(copy.deepcopy(model), start, masks, how, loss) for start, masks in starts],
                feeds(), how, rest["first"],
            ),
        )  # fmt: skip
        yield from [*fit(arms, task, how, keep_at=keep_at)]


def test_a_recorded_step_takes_data_as_it_is_read_and_augmented(
    make_task: Callable[..., Task], make_train: Callable[..., Train], recorded_on_the_cpu: list[engine.Replayed]
) -> None:
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(90, 1, 8, 8, generator=generator), torch.randint(4, (90,), generator=generator))
    streamed = Stream(source_of(TensorDataset(split.inputs, split.targets), "pairs"), torch.arange(90), workers=0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    how = make_train(iterations=20, eval_every=9)
    for train in (split, streamed):
        task = make_task(data=Data(train, split, split, ["flip", "crop"]))
        task = dataclasses.replace(task, model=net, fresh=lambda seed: state_of(net))
        assert_same([*fit(arms_of(task), task, how, keep_at=9)], [*fit_with(engine.Lockstep, arms_of(task), task, how)])


@pytest.mark.parametrize("way", ["stacked", "graph"])
def test_the_arm_of_a_group_that_diverges_is_named(
    way: str, make_task: Callable[..., Task], make_train: Callable[..., Train], request: pytest.FixtureRequest
) -> None:
    if way == "graph":
        request.getfixturevalue("recorded_on_the_cpu")
    task = make_task()
    arms = [Arm(f"arm {n}", task.start(n), {}, n) for n in range(3)]
    arms[1] = Arm("arm 1", {name: value * math.nan for name, value in task.start(1).items()}, {}, 1)
    with pytest.raises(TicketfindError, match=r"^arm 1: the loss is not finite at iteration 0"):
        list(fit(arms, task, make_train(), way=Way(way, at_once=3)))


class Branching(nn.Module):
    """What it does depends on what it sees: nothing for vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(F.relu(x) if x.sum() > 0 else torch.tanh(x))


def test_what_cannot_be_stacked_is_trained_eagerly_and_said_once(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task, how, notes = make_task(Branching), make_train(), []
    expected = [*fit(arms_of(task), task, how)]
    for _ in range(2):
        found = [*fit(arms_of(task), task, how, way=Way("stacked", at_once=5), note=notes.append)]
        assert_same(found, expected, 0)
    assert len(notes) == 1
    assert notes[0].startswith("--engine stacked cannot train this model, which is trained without it: RuntimeError")


@processes
def test_a_seeded_search_draws_the_same_masks_every_way(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Callable[..., Any], tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Not a bit of 3 rounds x 2 replicates differs here; ties that rounding breaks otherwise are possible elsewhere."""
    masks = {}
    for way in ("eager", "processes", "stacked", "graph"):
        if way == "graph":
            request.getfixturevalue("recorded_on_the_cpu")
        recipe = make_recipe({"run.engine": way, "run.arms_at_once": 2})
        run_search(recipe, make_task("normed"), tmp_path / way)
        files = sorted((tmp_path / way / "masks").iterdir())
        masks[way] = [load_file(file) for file in files]
        assert len(files) == 6
    for way in masks:
        differing = sum(
            int((mine[name] != theirs[name]).sum())
            for mine, theirs in zip(masks[way], masks["eager"], strict=True)
            for name in mine
        )
        assert differing == 0, way
