"""Arms under way, and every way of training several against one after another."""

import copy
import dataclasses
import functools
import itertools
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
from one_arm import OPTIMIZERS, SCHEDULES, OneArm, begin_as_on_cuda, nothing, random_batches, random_masks, state_of
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ticketfind import TicketfindError, devices, engine, forks
from ticketfind.arms import Arm, Task
from ticketfind.batches import Data, Feed, Order, Split
from ticketfind.course import Failed
from ticketfind.devices import Way
from ticketfind.engine import Lockstep, Rehearsed, Replayed
from ticketfind.examples import source_of
from ticketfind.lanes import Lane, Member, Stack
from ticketfind.outputs import cross_entropy
from ticketfind.recipe import Recipe, Train
from ticketfind.streams import Stream
from ticketfind.train import fit, judge

processes = pytest.mark.skipif(sys.platform != "linux", reason="arms side by side need Linux")


# ------------------------------------------------------------------------------------------ arms under way


def test_advance_takes_the_schedule_up_where_it_is_told(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """In two parts as in one; and from iteration 20 with iteration 20's learning rate."""
    how, batches = make_train(iterations=30, schedule="cosine", warmup=5, momentum=0.9), random_batches(30)
    task = make_task()
    start = task.start(0)
    whole = OneArm(make_task().model, start, {}, how, cross_entropy, seed=0)
    parts = OneArm(task.model, start, {}, how, cross_entropy, seed=0)
    losses = whole.advance(batches, 0)
    assert losses == parts.advance(batches[:13], 0) + parts.advance(batches[13:], 13)
    assert all(torch.equal(value, parts.state()[name]) for name, value in whole.state().items())

    lane = OneArm(task.model, start, {}, make_train(iterations=30, schedule="cosine"), cross_entropy, seed=0)
    lane.advance(batches[:1], 20)
    rate = 0.1 * 0.5 * (1 + math.cos(math.pi * 20 / 30))
    plain = make_task().model
    plain.load_state_dict(start)
    F.cross_entropy(plain(batches[0][0]), batches[0][1]).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(lane.state()[name], start[name] - rate * parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", ["eager", "stacked", pytest.param("processes", marks=processes)])
def test_dropout_follows_the_arms_seed(
    way: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Whatever was drawn before; and a training leaves the user's generator alone."""
    task = make_task(lambda: nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 4)))
    start = task.start(0)
    data = task.data.train
    task = dataclasses.replace(task, data=Data(Split(data.inputs[:16], data.targets[:16]), data, data))

    def final(seed: int, drawn_before: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.rand(drawn_before)
            before = torch.get_rng_state()
            ((_, outcome),) = fit([Arm("arm", start, {}, seed)], task, make_train(), way=Way(way, at_once=2))
            assert torch.equal(torch.get_rng_state(), before)
            return outcome.final["0.weight"]

    assert torch.equal(final(1, 0), final(1, 5))
    assert (final(1, 0) - final(2, 0)).abs().max() > 1e-3  # on the same 16 examples in every iteration


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
def test_losses_are_given_as_they_are(
    bad: float, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    model = make_task().model
    batches = random_batches(8)
    batches[5][0][0, 0] = bad
    lane = OneArm(model, state_of(model), {}, make_train(), cross_entropy, seed=0)
    assert [math.isfinite(loss) for loss in lane.advance(batches, 100)] == [True] * 5 + [False] * 3


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
def test_a_loss_that_is_not_finite_ends_its_arm_and_no_other(
    way: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """The arm whose start holds a huge weight overflows; the message says where, and what to try."""
    task = make_task()
    huge = {name: value * 1e30 for name, value in task.start(0).items()}
    arms = [Arm("round 0, replicate 0", task.start(0), {}, 0), Arm("round 0, replicate 1", huge, {}, 1, first=3)]
    (_, good), (_, failed) = fit(arms, task, make_train(), way=Way(way, at_once=8))
    assert isinstance(failed, Failed) and failed.iteration == 3
    assert failed.reason.startswith("the loss is not finite at iteration 3; try a lower learning rate")
    ((_, alone),) = fit(arms[:1], task, make_train(), way=Way(way, at_once=8))
    assert good.points == alone.points and all(torch.equal(good.final[name], alone.final[name]) for name in good.final)
    assert not multiprocessing.active_children()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@processes
def test_a_child_that_dies_is_reported_and_the_others_are_ended(
    tmp_path: Path, make_task: Callable[..., Task], make_train: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "PATIENCE", 0.5)

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
    with pytest.raises(TicketfindError, match=r"^a training process ended before its training did \(exit code 7\)$"):
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
    with pytest.raises(TicketfindError, match=r"a training process ended before its training did \(exit code 9\)"):
        list(engine.each(Way("processes", at_once=8), 1, lambda index, tick: None, nothing))


@processes
def test_an_interrupt_ends_the_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even those that are in the middle of something long, in the end."""
    monkeypatch.setattr(forks, "PATIENCE", 0.5)

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
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[engine.Lockstep]:
    """Trainings begin as on a CUDA device, and do step by step what there would be replayed."""
    return begin_as_on_cuda(monkeypatch)


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
    torch._dynamo.utils.counters.clear()
    found = [*fit(arms_of(task)[:3], task, how, way=way, keep_at=9, note=notes.append)]
    found += fit(arms_of(task)[3:], task, how, way=way, keep_at=9, note=notes.append)
    assert_same(found, [*fit(arms_of(task), task, how, keep_at=9)])
    assert not notes
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("way", ["eager", "stacked", "compile", pytest.param("processes", marks=processes)])
def test_bf16_rounds_what_the_network_computes_and_not_its_weights(
    way: str, make_task: Callable[..., Task], make_train: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch.autocast does it: the same training within bfloat16's 8 bits, of weights in fp32."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    task, how, notes = make_task("mlp"), make_train(iterations=20, lr=0.01, momentum=0.9), []
    expected = [*fit(arms_of(task), task, how)]
    found = [*fit(arms_of(task), task, how, way=Way(way, at_once=2, precision="bf16"), note=notes.append)]
    assert not notes
    for (arm, one), (_, other) in zip(found, expected, strict=True):
        assert abs(one.points[-1].train_loss - other.points[-1].train_loss) < 0.02
        assert max(float((one.final[name] - value).abs().max()) for name, value in other.final.items()) > 1e-5
        for name, value in other.final.items():
            assert one.final[name].dtype == value.dtype
            torch.testing.assert_close(one.final[name], value, rtol=0, atol=0.02, msg=name)
        assert all(torch.equal(one.final[name] == 0, ~kept) for name, kept in arm.masks.items())


def test_given_weights_are_judged_in_the_precision_of_trained_ones(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task, how = make_task("mlp"), make_train(iterations=5)
    ((arm, trained),) = fit(arms_of(task)[:1], task, how, way=Way(precision="bf16"))
    found = {}
    for precision in ("bf16", "fp32"):
        ((_, outcome),) = judge([(arm, trained.final)], task, how, precision=precision)
        found[precision] = outcome.points[-1].validation_loss
    assert found["bf16"] == trained.points[-1].validation_loss != found["fp32"]


@pytest.mark.parametrize(
    ("way", "schedule"), [("graph", "constant"), ("graph", "warmup-step"), ("stacked", "warmup-cosine")]
)
def test_a_recorded_step_follows_data_and_schedule(
    way: str, schedule: str, make_task: Callable[..., Task], make_train: Callable[..., Train],
    as_on_cuda: list[engine.Lockstep],
) -> None:  # fmt: skip
    """300 iterations are two blocks of rows; evaluations fall on no multiple of the steps of a recording."""
    task, notes = make_task("normed"), []
    how = make_train(iterations=300, eval_every=47, momentum=0.5, lr=1e-3, **SCHEDULES[schedule])
    ticks: list[int] = []
    told: dict[str, Any] = {"tick": ticks.append, "note": notes.append}
    found = [*fit(arms_of(task), task, how, way=Way(way, at_once=3), keep_at=150, **told)]
    assert [type(training) for training in as_on_cuda] == [engine.Replayed] * 2 and not notes
    assert sum(ticks) == 3 * 300 + 2 * 295 and ticks[0] == 3
    assert_same(found, [*fit(arms_of(task), task, how, keep_at=150)], 1e-6)


@pytest.mark.parametrize("augment", [(), ("flip", "crop")])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("way", ["graph", "stacked"])
def test_a_recorded_step_takes_data_as_it_is_read_and_augmented(
    way: str, streamed: bool, augment: tuple[str, ...], make_task: Callable[..., Task],
    make_train: Callable[..., Train], as_on_cuda: list[engine.Lockstep],
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(90, 1, 8, 8, generator=generator), torch.randint(4, (90,), generator=generator))
    stream = Stream(source_of(TensorDataset(split.inputs, split.targets), "pairs"), torch.arange(90), workers=0)
    data = Data(stream if streamed else split, split, split, augment)
    task = make_task(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), data=data)
    how, notes = make_train(iterations=20, eval_every=9), []
    found = [*fit(arms_of(task), task, how, way=Way(way, at_once=3), keep_at=9, note=notes.append)]
    assert {type(training) for training in as_on_cuda} == {engine.Replayed} and not notes
    assert_same(found, [*fit(arms_of(task), task, how, keep_at=9)])


@pytest.mark.parametrize("way", ["stacked", "graph"])
def test_the_arm_of_a_group_that_diverges_ends_and_the_others_go_on(
    way: str, make_task: Callable[..., Task], make_train: Callable[..., Train], request: pytest.FixtureRequest
) -> None:
    if way == "graph":
        request.getfixturevalue("as_on_cuda")
    task = make_task()
    arms = [Arm(f"arm {n}", task.start(n), {}, n) for n in range(3)]
    arms[1] = Arm("arm 1", {name: value * math.nan for name, value in task.start(1).items()}, {}, 1)
    found = [outcome for _, outcome in fit(arms, task, make_train(), way=Way(way, at_once=3))]
    failed = found.pop(1)
    assert isinstance(failed, Failed) and failed.reason.startswith("the loss is not finite at iteration 0;")
    others = [arms[0], arms[2]]
    assert_same([*zip(others, found, strict=True)], [*fit(others, task, make_train())])
    arms[1] = Arm("arm 1", task.start(1), {}, 1)  # beside one that does not fail they have the same bits
    beside = [outcome for arm, outcome in fit(arms, task, make_train(), way=Way(way, at_once=3)) if arm in others]
    assert_same([*zip(others, found, strict=True)], [*zip(others, beside, strict=True)], 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["lanes", "stack"])
@pytest.mark.parametrize("way", [Lockstep, Rehearsed, Replayed])
def test_what_is_not_finite_stays_with_its_arm(
    way: type[Lockstep], kind: str, bad: float, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Arm 2 at iteration 105, in the second of two advances; arm 1 follows one iteration later."""
    model, how = make_task().model, make_train(iterations=200)
    batches = [[(x.clone(), y) for x, y in random_batches(8)] for _ in range(4)]
    batches[2][5][0][0, 0] = batches[1][6][0][3, 1] = bad
    starts = [(state_of(model), random_masks(model, seed=arm)) for arm in range(4)]
    feeds = [Feed.of(own) for own in batches]
    if kind == "stack":
        members: list[Member] = [Stack(copy.deepcopy(model), starts, how, cross_entropy)]
        feeds = [Feed.merged(feeds)]
    else:
        members = [Lane(copy.deepcopy(model), *start, how, cross_entropy) for start in starts]
    training = way(members, feeds, how, 100)
    assert all(len(losses) == 3 for losses in training.advance(3))
    finite = [[math.isfinite(loss) for loss in losses] for losses in training.advance(5)]
    assert finite == [[True] * 5, [True, True, True, False, False], [True, True, False, False, False], [True] * 5]


class Double(nn.Module):
    """float32 -> float64."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Small:
    """A training set of 70 noisy examples, resident, streamed or augmented, and a network for it."""

    def __init__(self, kind: str) -> None:
        generator = torch.Generator().manual_seed(4)
        shape = (1, 8, 8) if kind == "augmented" else (12,)
        inputs = torch.randn(70, *shape, generator=generator)
        targets = torch.randint(4, (70,), generator=generator)
        split = Split(inputs, targets)
        examples = [(x, int(y)) for x, y in zip(inputs, targets, strict=True)]
        stream = Stream(source_of(examples, "data"), torch.arange(70), 0)
        self.data = Data(
            stream if kind == "streamed" else split, split, split, ["flip", "crop"] if kind == "augmented" else ()
        )
        torch.manual_seed(0)
        layers = [nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)]
        if kind == "augmented":
            layers = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)]
        self.model = nn.Sequential(Double(), *layers).double()


@pytest.mark.parametrize("optimizer", ["sgd-momentum-decay", "adam"])
@pytest.mark.parametrize("together", ["lanes", "stack"])
@pytest.mark.parametrize(
    ("kind", "first", "stops", "schedule"),
    [
        ("resident", 0, (4, 23, 261, 600), {"schedule": "cosine", "warmup": 30}),  # rows of 256, steps of 8
        ("resident", 250, (251, 300, 515), {"schedule": "step", "milestones": [255, 400]}),
        ("resident", 0, (3,), {"schedule": "constant"}),  # fewer rows than are unrolled
        ("streamed", 5, (6, 17, 30), {"schedule": "cosine", "warmup": 10}),
        ("augmented", 0, (13, 40), {"schedule": "cosine"}),
    ],
)
def test_replayed_steps_are_the_steps(
    kind: str, first: int, stops: tuple[int, ...], schedule: dict[str, Any], together: str, optimizer: str,
    make_train: Callable[..., Train],
) -> None:  # fmt: skip
    """Losses of every iteration and weights at every stop, as step by step; every iteration is told of, once.

    In float64, as Adam makes much of the rounding of gradients that are zero; rates are in float32 here and there.
    """
    small, total = Small(kind), stops[-1]
    model = small.model
    how = make_train(iterations=total, batch_size=10, **{**OPTIMIZERS[optimizer], "lr": 1e-3}, **schedule)
    starts = [(state_of(model), random_masks(model, 0.3 + 0.3 * arm, seed=arm)) for arm in range(2)]

    def made(way: type[Lockstep]) -> Lockstep:
        feeds = [small.data.training(Order(seed, 10, first, total)) for seed in range(2)]
        if together == "stack":
            members: list[Member] = [Stack(copy.deepcopy(model), starts, how, cross_entropy)]
            return way(members, [Feed.merged(feeds)], how, first)
        return way([Lane(copy.deepcopy(model), *start, how, cross_entropy) for start in starts], feeds, how, first)

    trainings = made(Lockstep), made(Replayed)
    for begin, stop in itertools.pairwise((first, *stops)):
        usual, replayed = (torch.tensor(training.advance(stop - begin)) for training in trainings)
        assert usual.shape == replayed.shape == (2, stop - begin)
        torch.testing.assert_close(replayed, usual, rtol=0, atol=1e-6)
        for one, other, (start, masks) in zip(trainings[0].states(), trainings[1].states(), starts, strict=True):
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6, msg=f"{name} at {stop}")
            assert all(torch.equal(other[name] == 0, ~mask) for name, mask in masks.items())
            moved = max(float((other[name] - start[name])[mask].abs().max()) for name, mask in masks.items())
            assert moved > 1e-4 or stop < total


@pytest.mark.parametrize("way", [Rehearsed, Replayed])
def test_what_is_tried_first_is_undone(
    way: type[Lockstep], make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Weights, statistics and optimizer are as before the steps that warm up; no batch is lost."""
    model, how = make_task("normed").model, make_train(optimizer="adam", lr=0.01)
    start, masks = state_of(model), random_masks(model)
    lane = Lane(copy.deepcopy(model), start, masks, how, cross_entropy)
    training = way([lane], [Feed.of(random_batches(5))], how)
    for name, value in training.states()[0].items():
        assert torch.equal(value, start[name] * masks[name] if name in masks else start[name]), name
    fresh = OneArm(copy.deepcopy(model), start, masks, how, cross_entropy)
    (losses,) = training.advance(5)
    assert losses == pytest.approx(fresh.advance(random_batches(5), 0), abs=1e-6)


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


@pytest.mark.parametrize(
    ("way", "instead"), [("graph", engine.Lockstep), ("stacked", engine.Rehearsed), ("compile", engine.Rehearsed)]
)
def test_what_cannot_be_recorded_is_trained_without_and_said_once(
    way: str, instead: type[engine.Lockstep], make_task: Callable[..., Task], make_train: Callable[..., Train],
    as_on_cuda: list[engine.Lockstep], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the same way where that goes without a recording; what was tried before leaves no trace."""

    def fails(*_: Any) -> None:
        raise RuntimeError("not permitted when a stream is capturing\nand more lines")

    monkeypatch.setattr(engine.Replayed, "_recorded", fails)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    task, how, notes = make_task("normed"), make_train(momentum=0.9), []
    for _ in range(2):
        found = [*fit(arms_of(task), task, how, way=Way(way, at_once=2), keep_at=9, note=notes.append)]
        assert_same(found, [*fit(arms_of(task), task, how, keep_at=9)])
    assert {type(training) for training in as_on_cuda} == {instead, engine.Lockstep}
    (note,) = notes
    assert note.startswith(f"--engine {way}, recorded as a CUDA graph, cannot train this model, which is trained")
    assert "not permitted when a stream is capturing" in note and "\n" not in note


@pytest.mark.parametrize("name", ["stacked", "compile"])
def test_streamed_batches_that_a_failed_way_took_are_read_again(
    name: str, make_task: Callable[..., Task], make_train: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The eager training that takes over sees every batch from the first one on; and says why in one line."""

    class Refusing(engine.Rehearsed):
        def __init__(self, members: Any, feeds: Any, *rest: Any) -> None:
            super().__init__(members, feeds, *rest)
            raise RuntimeError("not this one\nat all")

    monkeypatch.setattr(engine, "Rehearsed", Refusing)
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    split, how = make_task().data.train, make_train()
    stream = Stream(source_of(TensorDataset(split.inputs, split.targets), "pairs"), torch.arange(90), workers=0)
    task = make_task(data=Data(stream, split, split))
    notes: list[str] = []
    found = [*fit(arms_of(task), task, how, way=Way(name, at_once=2), keep_at=9, note=notes.append)]
    assert_same(found, [*fit(arms_of(task), task, how, keep_at=9)], 0)
    (note,) = notes
    assert note.startswith(f"--engine {name} cannot train this model, which is trained without it: ")
    assert "not this one" in note and "\n" not in note


class Replacing(nn.Module):
    """It counts its calls in a buffer that it makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + (1 if self.training else 0)
        return self.fc1(x) * (1 + self.seen / 100)


@pytest.mark.parametrize("way", ["stacked", "compile"])
def test_a_network_that_replaces_its_buffers_is_trained_eagerly(
    way: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """What is put in a buffer's place would be lost, or never be read."""
    task, how, notes = make_task(Replacing), make_train(), []
    expected = [*fit(arms_of(task), task, how)]
    assert_same([*fit(arms_of(task), task, how, way=Way(way, at_once=5), note=notes.append)], expected, 0)
    assert expected[0][1].final["seen"] == 12
    (note,) = notes
    assert note.startswith(f"--engine {way} cannot train this model") and "replaces seen" in note


@processes
def test_a_seeded_search_draws_the_same_masks_every_way(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Callable[..., Any], tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Not a bit of 3 rounds x 2 replicates differs here; ties that rounding breaks otherwise are possible elsewhere."""
    masks = {}
    for way in ("eager", "processes", "stacked", "graph"):
        if way == "graph":
            request.getfixturevalue("as_on_cuda")
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
