"""On a CUDA device: the promises that do not depend on rounding hold exactly, the rest agrees with the CPU.

Every way of training agrees with eager training, which agrees with the CPU.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from one_arm import OneArm, random_masks, state_of
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ticketfind import TicketfindError, contents, devices, engine, masks, memory, results
from ticketfind import search as searching
from ticketfind.arms import Arm, Outcome, Task, Watched
from ticketfind.augment import augmented
from ticketfind.batches import Data, Order, Split, seeded
from ticketfind.connection import is_disconnected
from ticketfind.course import Failed
from ticketfind.devices import EAGER, Way
from ticketfind.engine import Lockstep, Replayed
from ticketfind.examples import source_of
from ticketfind.experiments import evaluate
from ticketfind.nets import NETS
from ticketfind.outputs import cross_entropy
from ticketfind.recipe import Recipe, Train
from ticketfind.rundir import RunDir
from ticketfind.scores import SCORES
from ticketfind.selection import keep_highest
from ticketfind.streams import Stream
from ticketfind.ticket import Ticket, load_ticket
from ticketfind.train import fit
from ticketfind.trainers import by_function

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch finds none here"),
    # PyTorch's advice to use less precision, or other names for its settings, is not about what is tested here
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32"),
]

SHAPES = {"fc1.weight": (16, 12), "fc2.weight": (12, 16), "fc3.weight": (4, 12)}
SIZES = {"fc1.weight": 192, "fc2.weight": 192, "fc3.weight": 48}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2},
    "adam": {"optimizer": "adam", "lr": 1e-2, "weight_decay": 1e-2},
    "adamw": {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1},
}


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Arm, Any]]:
    """Every arm that the search trains and what came of it, by name."""
    seen: dict[str, tuple[Arm, Any]] = {}

    def spy(*args: Any, **kwargs: Any) -> Any:
        for arm, outcome in fit(*args, **kwargs):
            seen[arm.name] = arm, outcome
            yield arm, outcome

    monkeypatch.setattr(searching, "fit", spy)
    return seen


# ------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("score", SCORES)
def test_a_search_prunes_exactly(
    score: str, scope: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Callable[..., list[results.Round]], spied: dict[str, tuple[Arm, Any]], tmp_path: Path,
) -> None:  # fmt: skip
    """Counts, nesting and zeros of every round and replicate, in layer and in global scope."""
    task = make_task(device=DEVICE)
    recipe = make_recipe({"run.device": DEVICE, "prune.score": score, "prune.scope": scope})
    rounds = run_search(recipe, task, tmp_path / "run", SCORES[score])
    groups = [[name] for name in SIZES] if scope == "layer" else [list(SIZES)]
    left = [sum(SIZES[name] for name in group) for group in groups]
    for number, round in enumerate(rounds):
        assert round.remaining == sum(left) / 432
        for replicate in range(2) if number else ():
            mask = load_file(tmp_path / f"run/masks/{number:02}-{replicate}.safetensors")
            assert [sum(int(mask[name].sum()) for name in group) for group in groups] == left
            arm, outcome = spied[f"round {number}, replicate {replicate}"]
            for name, kept in mask.items():
                assert torch.equal(arm.masks[name], kept)
                assert outcome.final[name].device.type == DEVICE
                assert bool((outcome.final[name].cpu()[~kept] == 0).all())
            if number > 1:
                before = load_file(tmp_path / f"run/masks/{number - 1:02}-{replicate}.safetensors")
                assert all(bool((mask[name] <= before[name]).all()) for name in mask)
        left = [n - round_half_even(n * 0.3) for n in left]
    assert len(rounds) == 4


def round_half_even(x: float) -> int:
    return int(torch.tensor(x, dtype=torch.float64).round())


@pytest.mark.parametrize(("rewind", "k"), [("0it", 0), ("5it", 5)])
def test_survivors_start_from_the_bits_that_were_kept(
    rewind: str, k: int, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Callable[..., list[results.Round]], spied: dict[str, tuple[Arm, Any]], tmp_path: Path,
) -> None:  # fmt: skip
    """What is written at the rewind point is what the device held, BatchNorm statistics included."""
    task = make_task("normed", device=DEVICE)
    run_search(make_recipe({"run.device": DEVICE, "prune.rewind": rewind}), task, tmp_path / "run")
    for replicate in range(2):
        _, dense = spied[f"round 0, replicate {replicate}"]
        written = load_file(tmp_path / f"run/init/{replicate}.safetensors")
        for name, value in written.items():
            assert torch.equal(value, dense.kept[name].cpu()), name
            assert k > 0 or torch.equal(value, task.start(5 + replicate)[name]), name
            for round in range(1, 4):
                assert torch.equal(spied[f"round {round}, replicate {replicate}"][0].start[name], value), name
        assert int(written["norm.num_batches_tracked"]) == k


def test_a_search_goes_on_where_it_was_stopped(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Callable[..., list[results.Round]], tmp_path: Path,
) -> None:  # fmt: skip
    recipe = make_recipe({"run.device": DEVICE, "prune.rewind": "5it"})
    watch = Mock(spec_set=["begin", "tick", "skip", "round", "note"])
    watch.round.side_effect = [None, KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        run_search(recipe, make_task("normed", device=DEVICE), tmp_path / "run", watch=watch)
    before = (tmp_path / "run/log.jsonl").read_text()
    rounds = run_search(recipe, make_task("normed", device=DEVICE), tmp_path / "run")
    assert (tmp_path / "run/log.jsonl").read_text().startswith(before) and before.count("\n") == 4
    assert len(rounds) == 4


def test_an_emptied_layer_that_disconnects_is_seen(make_task: Callable[..., Task]) -> None:
    task = make_task(device=DEVICE)
    start = task.start(0)
    kept = {name: torch.ones(start[name].shape, dtype=torch.bool) for name in SIZES}
    assert not is_disconnected(task, start, kept)
    assert is_disconnected(task, start, {**kept, "fc2.weight": torch.zeros(12, 16, dtype=torch.bool)})


# ------------------------------------------------------------------------------------- against the CPU


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", ["mlp", "normed"])
def test_eager_training_agrees_with_the_cpu(
    net: str, optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """20 masked steps in fp32, as far as rounding allows.

    Losses and, under SGD, weights to 1e-5; under Adam, which divides by the size of the gradient and so carries the
    rounding of small gradients into the weights, to 1e-3, a tenth of one step. On the CPU, fp32 and float64 differ
    in these trainings by up to 5e-7 and 3e-5 (20 seeds).
    """
    how = make_train(iterations=20, eval_every=5, schedule="cosine", warmup=3, **OPTIMIZERS[optimizer])
    mask = {"fc1.weight": torch.rand(16, 12, generator=torch.Generator().manual_seed(0)) < 0.4}
    outcomes = {}
    for device in ("cpu", DEVICE):
        task = make_task(net, device=device)
        ((_, outcomes[device]),) = fit([Arm("arm", task.start(1), mask, 1)], task, how, way=EAGER, keep_at=7)
    cpu, cuda = outcomes["cpu"], outcomes[DEVICE]
    for one, other in zip(cpu.points, cuda.points, strict=True):
        assert one.iteration == other.iteration
        assert other.train_loss == pytest.approx(one.train_loss, abs=1e-5)
        assert other.validation_loss == pytest.approx(one.validation_loss, abs=1e-5)
    tolerance = 1e-5 if optimizer == "sgd" else 1e-3
    for a, b in ((cpu.final, cuda.final), (cpu.kept, cuda.kept)):
        assert a is not None and b is not None
        for name, value in a.items():
            torch.testing.assert_close(b[name].cpu(), value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruned_weights_are_exactly_zero_at_every_step(
    optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task = make_task("normed", device=DEVICE)
    start = task.start(0)
    generator = torch.Generator().manual_seed(0)
    kept = {name: torch.rand(start[name].shape, generator=generator) < 0.4 for name in ("fc1.weight", "fc2.weight")}
    lane = OneArm(task.model, start, kept, make_train(**OPTIMIZERS[optimizer]), cross_entropy, seed=0)
    seen = []

    def look() -> None:
        weights = dict(task.model.named_parameters())
        seen.append(all(torch.equal(weights[name].cpu() == 0, ~mask) for name, mask in kept.items()))

    for iteration in range(50):
        lane.advance([task.data.train.batch(torch.randint(0, 90, (16,)).to(DEVICE))], iteration)
        look()
    assert seen == [True] * 50


def test_selection_breaks_ties_as_on_the_cpu() -> None:
    """Thousands of equal scores: the mask is the same function of the scores on every device."""
    scores = torch.randint(0, 5, (10_000,), generator=torch.Generator().manual_seed(0)).float()
    for k in (0, 1, 17, 4_000, 9_999, 10_000):
        among = torch.ones(10_000, dtype=torch.bool)
        (found,) = keep_highest([scores.to(DEVICE)], [among.to(DEVICE)], k)
        assert int(found.sum()) == k
        assert torch.equal(found.cpu(), keep_highest([scores], [among], k)[0])


def test_dropout_follows_the_arms_seed_and_leaves_the_users_generators_alone(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.dropout(x, 0.5, self.training))

    task = make_task(Dropping, device=DEVICE)
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    arms = [Arm("arm", task.start(0), {}, seed) for seed in (1, 1, 2)]
    one, again, other = (out.final["fc.weight"] for _, out in fit(arms, task, make_train(), way=EAGER))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])


# ------------------------------------------------------------------------------------ ways against each other

WAYS = {
    "graph": Way("graph", at_once=9),
    "graph in pairs": Way("graph", at_once=2),
    "graph alone": Way("graph", at_once=1),
    "stacked": Way("stacked", at_once=9),
    "stacked in pairs": Way("stacked", at_once=2),
}
GENTLE: dict[str, dict[str, Any]] = {  # Adam at 1e-3, as it carries the rounding of small gradients into the weights
    "sgd": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2},
    "adam": {"optimizer": "adam", "lr": 1e-3},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1},
}


def arms_of(task: Task, firsts: tuple[int, ...] = (0, 0, 0, 7, 0)) -> list[Arm]:
    """Dense and masked, and one that begins later."""
    return [
        Arm(f"arm {n}", task.start(n), random_masks(task.model, 0.4, seed=n) if n % 2 else {}, n, first=first)
        for n, first in enumerate(firsts)
    ]


def assert_agree(found: list[tuple[Arm, Outcome]], expected: list[tuple[Arm, Outcome]], atol: float = 1e-5) -> None:
    """Points to 1e-5 (or less), final and kept weights to `atol`; pruned weights are exactly zero."""
    assert len(found) == len(expected) > 0
    for (arm, one), (other_arm, other) in zip(found, expected, strict=True):
        assert arm.name == other_arm.name
        assert [point.iteration for point in one.points] == [point.iteration for point in other.points]
        for point, wanted in zip(one.points, other.points, strict=True):
            assert point.train_loss == pytest.approx(wanted.train_loss, abs=min(atol, 1e-5)), arm.name
            assert point.validation_loss == pytest.approx(wanted.validation_loss, abs=min(atol, 1e-5)), arm.name
            assert point.test_accuracy == pytest.approx(wanted.test_accuracy, abs=1.01 / 60)
        assert (one.kept is None) == (other.kept is None)
        for state, values in ((one.final, other.final), (one.kept or {}, other.kept or {})):
            assert state.keys() == values.keys()
            for name, value in values.items():
                torch.testing.assert_close(state[name], value, rtol=0, atol=atol, msg=f"{name} of {arm.name}")
        for name, kept in arm.masks.items():
            assert torch.equal(one.final[name].cpu() == 0, ~kept), f"{name} of {arm.name}"


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every CUDA graph that is recorded."""
    seen: list[object] = []
    begin = torch.cuda.CUDAGraph.capture_begin

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(self)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", noted)
    return seen


@pytest.mark.parametrize("optimizer", GENTLE)
@pytest.mark.parametrize("net", ["mlp", "normed", "tied"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_as_eager_does(
    way: str, net: str, optimizer: str, captures: list[object],
    make_task: Callable[..., Task], make_train: Callable[..., Train],
) -> None:  # fmt: skip
    """20 steps in fp32, BatchNorm's statistics included; arms are branches of a graph, or stacked, or alone."""
    task = make_task(net, device=DEVICE)
    how = make_train(iterations=20, eval_every=6, schedule="cosine", warmup=3, clip=1.0, **GENTLE[optimizer])
    notes: list[str] = []
    ticks: list[int] = []
    expected = [*fit(arms_of(task), task, how, way=EAGER, keep_at=7)]
    assert not captures
    found = [*fit(arms_of(task), task, how, way=WAYS[way], keep_at=7, tick=ticks.append, note=notes.append)]
    assert not notes
    assert_agree(found, expected, 1e-5 if optimizer == "sgd" else 1e-4)
    groups = {9: 3, 2: 4, 1: 5}[WAYS[way].at_once]  # of arms that begin together
    assert sum(ticks) == 4 * 20 + 13
    assert len(captures) == 2 * groups  # of one step and of several


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("net", ["mlp", "normed"])
def test_compiled_training_is_eager_training(
    net: str, captures: list[object], make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Compiled once for all arms, and recorded."""
    task = make_task(net, device=DEVICE)
    how = make_train(iterations=20, eval_every=6, schedule="cosine", warmup=3, **GENTLE["sgd"])
    notes: list[str] = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = [*fit(arms_of(task), task, how, way=Way("compile"), keep_at=7, note=notes.append)]
    assert not notes
    assert len(captures) == 2 * 5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_agree(found, [*fit(arms_of(task), task, how, way=EAGER, keep_at=7)])


def images(net: str, dtype: torch.dtype = torch.float32, size: int = 8) -> dict[str, Any]:
    """The fields of a task: noise in four classes, and a network for it."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        return Split(torch.randn(n, 3, size, size, generator=generator).to(dtype), torch.arange(n) % 4)

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return NETS[net](input_shape=(3, size, size), num_classes=4).to(dtype)

    device = torch.device(DEVICE)
    return {
        "model": build(0).to(device),
        "data": Data(split(90), split(40), split(60)).to(device),
        "fresh": lambda seed: state_of(build(seed)),
    }


@pytest.mark.parametrize(
    ("net", "dtype", "lr"),
    [
        ("conv-2", torch.float32, 2.0**-7),
        ("resnet-20", torch.float32, 2.0**-14),
        ("resnet-20", torch.float64, 2.0**-7),
    ],
)
@pytest.mark.parametrize("way", ["graph", "graph alone", "stacked"])
def test_convolutions_are_trained_as_eagerly(
    way: str, net: str, dtype: torch.dtype, lr: float,
    make_task: Callable[..., Task], make_train: Callable[..., Train], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """resnet-20 at a usual rate in float64 only: its BatchNorms of 2x2 images make much of float32's rounding.

    Rates are powers of two: as a float32 tensor, which a recorded step reads, they are the same numbers.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # some algorithms add up in any order
    task = make_task(device=DEVICE, **images(net, dtype))
    how = make_train(iterations=20, eval_every=10, optimizer="sgd", momentum=0.9, lr=lr)
    notes: list[str] = []
    arms = arms_of(task, (0, 0))
    found = [*fit(arms, task, how, way=WAYS[way], keep_at=7, note=notes.append)]
    assert not notes
    assert_agree(found, [*fit(arms, task, how, way=EAGER, keep_at=7)])


@pytest.mark.parametrize(
    "schedule",
    [
        {"schedule": "constant"},
        {"schedule": "cosine", "warmup": 20},
        {"schedule": "step", "milestones": [100, 255, 290]},
    ],
)
@pytest.mark.parametrize("way", ["graph", "stacked"])
def test_no_schedule_needs_another_recording(
    way: str, schedule: dict[str, Any], captures: list[object],
    make_task: Callable[..., Task], make_train: Callable[..., Train],
) -> None:  # fmt: skip
    """Two blocks of rows, evaluations that fall on no multiple of eight: recorded once for 8 steps and once for 1."""
    task = make_task("normed", device=DEVICE)
    how = make_train(iterations=300, eval_every=47, **{**GENTLE["sgd"], "lr": 1e-3}, **schedule)
    arms = arms_of(task, (0, 0, 0))
    found = [*fit(arms, task, how, way=WAYS[way], keep_at=150)]
    assert len(captures) == 2
    assert_agree(found, [*fit(arms, task, how, way=EAGER, keep_at=150)])


class Asking(nn.Module):
    """Asks the device for a number in the middle of its work, which cannot be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(F.relu(hidden) if hidden.sum().item() > 0 else hidden)


class AskingAndDropping(Asking):
    """And draws at random: the generator must have come out of the recording that failed."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.1, self.training))


@pytest.mark.parametrize("net", [Asking, AskingAndDropping])
@pytest.mark.parametrize("way", ["graph", "graph in pairs", "stacked"])
def test_what_cannot_be_recorded_is_trained_eagerly_and_said_once(
    way: str, net: type[nn.Module], make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Of several groups and fits, too; and the device is as good as before: another network is recorded."""
    task, how = make_task(net, device=DEVICE), make_train(iterations=12, **GENTLE["sgd"])
    arms, notes = arms_of(task, (0, 0, 0)), []
    stream = torch.cuda.current_stream()
    expected = [*fit(arms, task, how, way=EAGER, keep_at=7)]
    for _ in range(2):
        found = [*fit(arms, task, how, way=WAYS[way], keep_at=7, note=notes.append)]
        if net is Asking:  # arms of a group draw from one generator
            assert_agree(found, expected, 1e-6)
        assert all(math.isfinite(point.train_loss) for _, out in found for point in out.points)
    assert torch.cuda.current_stream() == stream
    name = WAYS[way].name
    assert notes[0].startswith(f"--engine {name}, recorded as a CUDA graph, cannot train this model, which is trained")
    assert len(notes) == (2 if name == "stacked" else 1)  # neither recorded nor by vmap
    assert all("\n" not in note for note in notes)
    after: list[str] = []
    fine = make_task("normed", device=DEVICE)
    assert_agree(
        [*fit(arms_of(fine), fine, how, way=WAYS["graph"], keep_at=7, note=after.append)],
        [*fit(arms_of(fine), fine, how, way=EAGER, keep_at=7)],
    )
    assert not after


@pytest.mark.parametrize("augment", [(), ("flip", "crop")])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("way", ["graph", "stacked"])
def test_recorded_steps_take_data_as_it_is_read_and_augmented(
    way: str, streamed: bool, augment: tuple[str, ...], make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    fields = images("lenet-300-100")
    data = fields["data"]
    if streamed:
        examples = [(x, int(y)) for x, y in zip(data.train.inputs.cpu(), data.train.targets.cpu(), strict=True)]
        stream = Stream(source_of(examples, "data"), torch.arange(90), 0).to(torch.device(DEVICE))
        data = Data(stream, data.validation, data.test)
    data = Data(data.train, data.validation, data.test, augment)
    task = make_task(device=DEVICE, **{**fields, "data": data})
    how, notes = make_train(iterations=30, eval_every=11, schedule="cosine", **{**GENTLE["sgd"], "lr": 1e-3}), []
    arms = arms_of(task, (0, 0, 7))
    found = [*fit(arms, task, how, way=WAYS[way], keep_at=9, note=notes.append)]
    assert not notes
    assert_agree(found, [*fit(arms, task, how, way=EAGER, keep_at=9)])


# ---------------------------------------------------------------------------------------- a recording itself


def begun(way: Way, task: Task, arms: list[Arm], how: Train) -> Lockstep:
    """Arms under way, as `fit` has them."""
    total, notes = int(how.iterations), []
    training = engine.begin(
        way,
        task.model,
        [(arm.start, arm.masks) for arm in arms],
        lambda: [task.data.training(Order(arm.seed, how.batch_size, 0, total)) for arm in arms],
        how,
        task.loss,
        device=task.device,
        note=notes.append,
    )
    assert not notes
    assert isinstance(training, Replayed) == (way.name != "eager")
    return training


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", ["graph", "stacked"])
def test_recorded_steps_keep_pruned_weights_exactly_zero(
    way: str, optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """After every one of 20 single steps and of ten times eight; survivors are not zero."""
    task = make_task("normed", device=DEVICE)
    arms = arms_of(task, (0, 0, 0, 0))
    training = begun(WAYS[way], task, arms, make_train(iterations=100, **OPTIMIZERS[optimizer]))
    for steps in (0, *[1] * 20, *[8] * 10):
        if steps:
            training.advance(steps)
        for arm, state in zip(arms, training.states(), strict=True):
            for name, kept in arm.masks.items():
                assert torch.equal(state[name].cpu() == 0, ~kept), f"{name} of {arm.name}"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, PyTorch refuses to wait for the device, as far as it notices that."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("way", ["eager", "stacked", "graph"])
def test_what_masks_are_drawn_from_is_as_on_the_cpu(
    way: str, optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Paths, and pruning on the way, in recorded steps too."""
    generator = torch.Generator().manual_seed(1)
    kept = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items()}
    how = make_train(optimizer=optimizer, lr=0.01)
    found = []
    for device, chosen in (("cpu", EAGER), (DEVICE, Way(way, at_once=2))):
        task = make_task(device=device)
        watched = Watched(
            every=5, tighter=lambda arm, look, device=device: {name: mask.to(device) for name, mask in kept.items()}
        )
        arms = [Arm(f"a{seed}", task.start(seed), masks.dense(SHAPES), seed, replicate=seed) for seed in (3, 4)]
        found.append([outcome for _, outcome in fit(arms, task, how, way=chosen, paths=True, watched=watched)])
    for here, there in zip(*found, strict=True):
        assert not masks.nonzero_outside(kept, {name: t.cpu() for name, t in there.final.items()})
        for name in here.path:
            torch.testing.assert_close(there.path[name].cpu(), here.path[name], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(there.final[name].cpu(), here.final[name], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # "is a prototype feature"
@pytest.mark.parametrize("way", ["eager", "graph", "stacked"])
def test_the_host_does_not_wait_between_evaluations(
    way: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Not where the next 256 iterations' order and learning rates are put on the device, either."""
    task = make_task("normed", device=DEVICE)
    how = make_train(iterations=300, schedule="cosine", warmup=20, clip=1.0, **GENTLE["adam"])
    training = begun(WAYS.get(way, EAGER), task, arms_of(task, (0, 0, 0))[: 1 if way == "eager" else 3], how)
    training.advance(1)  # the first batches are read here
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.ones(1, device=DEVICE).item()  # it does notice
    with no_waiting():
        training._train(290)  # what `advance` does before it fetches the losses
    assert all(math.isfinite(float(value.sum())) for state in training.states() for value in state.values())


def test_arms_of_a_graph_diverge_by_name(make_task: Callable[..., Task], make_train: Callable[..., Train]) -> None:
    task = make_task(device=DEVICE)
    arms = arms_of(task, (0, 0, 0, 0))
    arms[2] = Arm("arm 2", {name: value * 1e30 for name, value in task.start(2).items()}, {}, 2)
    for way in ("graph", "stacked"):
        found = {arm.name: outcome for arm, outcome in fit(arms, task, make_train(), way=WAYS[way])}
        failed = found.pop("arm 2")
        assert isinstance(failed, Failed) and failed.iteration == 0
        others = [arm for arm in arms if arm.name != "arm 2"]
        for arm, alone in fit(others, task, make_train(), way=WAYS[way]):
            assert found[arm.name].measured.accuracy_end == pytest.approx(alone.measured.accuracy_end, abs=0.02)


def test_dropout_in_a_recording_is_drawn_anew_in_every_step(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """At a learning rate of almost nothing losses differ between steps on the same batch; and follow the seed."""
    net = lambda: nn.Sequential(nn.Linear(12, 64), nn.Dropout(0.5), nn.Linear(64, 4))  # noqa: E731
    task = make_task(net, device=DEVICE)
    whole = Split(task.data.train.inputs[:16], task.data.train.targets[:16])
    task = make_task(net, device=DEVICE, data=Data(whole, task.data.validation, task.data.test))
    how = make_train(iterations=32, lr=1e-12)

    def losses() -> list[list[float]]:
        training = begun(WAYS["graph"], task, arms_of(task, (0, 0)), how)
        return training.advance(32)

    first = losses()
    assert all(len({round(loss, 6) for loss in of_arm}) > 25 for of_arm in first)
    assert losses() == first


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("way", ["eager", "graph", "stacked", "compile"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_precisions_train_and_come_close(
    way: str, precision: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Settings are in force while the network runs and as before afterwards; weights stay in fp32."""
    seen = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if way != "compile":
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, outputs.dtype))
        return F.cross_entropy(outputs.float(), targets)

    fields = images("conv-2")
    task = make_task(device=DEVICE, **fields, loss=loss)
    how = make_train(iterations=20, eval_every=10, **{**GENTLE["sgd"], "lr": 1e-3})
    arms, notes = arms_of(task, (0, 0)), []
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    used = Way(way, at_once=2, precision=precision)
    found = [*fit(arms, task, how, way=used, keep_at=9, note=notes.append)]
    assert not notes
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    settings = {"fp32": ("highest", False), "tf32": ("high", True), "bf16": ("high", True)}[precision]
    output = torch.bfloat16 if precision == "bf16" and way != "stacked" else torch.float32  # pytorch#192617: + bias
    assert {*seen} <= {(*settings, output)}
    expected = [*fit(arms, make_task(device=DEVICE, **fields), how, way=EAGER, keep_at=9)]
    for (arm, one), (_, other) in zip(found, expected, strict=True):
        for point, wanted in zip(one.points, other.points, strict=True):
            far = {"fp32": 1e-5, "tf32": 2e-2, "bf16": 1e-1}[precision]
            assert point.train_loss == pytest.approx(wanted.train_loss, abs=far)
            assert point.validation_loss == pytest.approx(wanted.validation_loss, abs=far)
        for name, value in other.final.items():
            assert one.final[name].dtype == value.dtype == torch.float32
            far = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 2e-2}[precision]
            torch.testing.assert_close(one.final[name], value, rtol=0, atol=far, msg=name)
        if precision == "bf16":
            assert not torch.equal(one.final["fc1.weight"], other.final["fc1.weight"])
        assert all(torch.equal(one.final[name].cpu() == 0, ~kept) for name, kept in arm.masks.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", ["eager", "graph"])
def test_channels_last_changes_the_memory_and_hardly_the_numbers(
    way: str, precision: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Convolutions see their images and weights that way; what comes out is contiguous."""
    seen: list[bool] = []
    task = make_task(device=DEVICE, **images("conv-2", size=16))

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # a step, not a look at what the network does to its buffers
            seen.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (args[0], module.weight))

    task.model.conv2.register_forward_pre_hook(look)
    how = make_train(iterations=20, eval_every=10, **{**GENTLE["sgd"], "lr": 1e-3})
    arms, notes = arms_of(task, (0, 0)), []
    used = Way(way, at_once=2, precision=precision, channels_last=True)
    found = [*fit(arms, task, how, way=used, note=notes.append)]
    assert not notes and seen and all(seen)
    assert all(value.is_contiguous() for _, out in found for value in out.final.values())
    for (arm, one), (_, other) in zip(found, fit(arms, task, how, way=Way(precision=precision)), strict=True):
        far = 1e-5 if precision == "fp32" else 1e-1
        assert one.points[-1].train_loss == pytest.approx(other.points[-1].train_loss, abs=far)
        assert all(torch.equal(one.final[name].cpu() == 0, ~kept) for name, kept in arm.masks.items())


@pytest.mark.parametrize("way", ["graph", "stacked"])
def test_as_many_arms_as_are_let_into_half_of_the_memory_take_no_more_than_all_of_it(
    way: str, make_task: Callable[..., Task], make_train: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three arms, nearly all of it what backward passes need; nor is far too much reckoned with."""
    task = make_task(device=DEVICE, **images("resnet-20", size=64))
    how, notes = make_train(iterations=10, eval_every=10, batch_size=64, optimizer="adam", lr=1e-3), []
    each = memory.need_of(task.model, how, task.loss, task.data.train.first(64)).of(64)
    monkeypatch.setattr(memory, "total", lambda device: 7.0 * each)
    at_once = devices.most_at_once(way, None, 9, task.device, lambda: each)
    assert at_once == 3
    arms = arms_of(task, (0,) * at_once)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    finished = [arm.name for arm, _ in fit(arms, task, how, way=Way(way, at_once=at_once), note=notes.append)]
    assert finished == ["arm 0", "arm 1", "arm 2"] and not notes
    taken = torch.cuda.max_memory_reserved() - before
    assert at_once * each / 4 < taken < 7 * each


def test_channels_last_is_the_rule_for_convolutions_with_tensor_cores() -> None:
    device, net = torch.device(DEVICE), NETS["conv-2"](input_shape=(3, 8, 8))
    assert devices.is_faster_with_channels_last(net, "graph", device, "bf16")
    assert not devices.is_faster_with_channels_last(net, "graph", device, "fp32")
    assert not devices.is_faster_with_channels_last(net, "stacked", device, "bf16")


# -------------------------------------------------------------------------------------- the same masks, in all


def bits_that_differ(one: Path, other: Path) -> tuple[int, int]:
    """Of all masks that two searches wrote; and how many there are."""
    files = sorted(path.name for path in (one / "masks").iterdir())
    assert files == sorted(path.name for path in (other / "masks").iterdir())
    pairs = [(load_file(one / "masks" / file), load_file(other / "masks" / file)) for file in files]
    differ = sum(int((mine[name] != theirs[name]).sum()) for mine, theirs in pairs for name in mine)
    return differ, sum(mask.numel() for mine, _ in pairs for mask in mine.values())


@pytest.mark.parametrize(
    "engine_name", ["graph", "stacked", pytest.param("compile", marks=pytest.mark.filterwarnings("ignore"))]
)
@pytest.mark.parametrize("net", ["mlp", "normed"])
def test_a_search_finds_the_same_masks_in_every_way(
    net: str, engine_name: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Callable[..., list[results.Round]], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Up to ties that rounding breaks: one bit in a hundred at most, and how many it were is printed."""
    for name in ("eager", engine_name):
        recipe = make_recipe({"run.device": DEVICE, "run.engine": name, "run.arms_at_once": 2, "prune.rewind": "2it"})
        run_search(recipe, make_task(net, device=DEVICE), tmp_path / name)
    differ, total = bits_that_differ(tmp_path / "eager", tmp_path / engine_name)
    with capsys.disabled():
        print(f"\n{net}, {engine_name} and eager: {differ} of {total} bits differ")
    assert differ <= total / 100


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_whole_searches_on_the_digits(command: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    """As a user runs them, in each engine: the same counts, about the same accuracy, and the same masks up to ties."""
    found = {}
    for name in ("eager", "graph", "stacked", "compile", "auto"):
        lengths = ("--iterations", 100, "--rounds", 2, "--replicates", 3, "--set", "train.eval_every=50it")
        found[name] = command("search", "--device", DEVICE, "--engine", name, *lengths, "--out", name, "--json").json
        with capfd.disabled():
            differ, total = bits_that_differ(Path("eager"), Path(name))
            print(f"\ndigits, {name} and eager: {differ} of {total} bits differ")
        assert differ <= total / 100
    assert RunDir(Path("auto")).recipe().run.engine == "graph"
    assert RunDir(Path("graph")).recipe().run.arms_at_once == 3
    for name, out in found.items():
        assert len(out["rounds"]) == 3, name
        for one, other in zip(out["rounds"], found["eager"]["rounds"], strict=True):
            assert one["remaining"] == other["remaining"]


# --------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_data_train_as_resident_data(
    workers: int, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """The same batches, pinned and copied ahead; the same bits in the end."""
    task = make_task(device=DEVICE)
    split = task.data.train.to(torch.device("cpu"))
    examples = [(x, int(y)) for x, y in zip(split.inputs, split.targets, strict=True)]
    stream = Stream(source_of(examples, "data"), torch.arange(len(examples)), workers)
    streamed = Data(stream, task.data.validation, task.data.test).to(torch.device(DEVICE))
    arms = [Arm("arm", task.start(1), {}, 1)]
    ((_, one),) = fit(arms, task, make_train(), way=EAGER)
    ((_, other),) = fit(arms, make_task(device=DEVICE, data=streamed), make_train(), way=EAGER)
    assert all(torch.equal(one.final[name], other.final[name]) for name in one.final)


def test_augmentation_draws_the_same_as_on_the_cpu() -> None:
    images = torch.rand(6, 3, 16, 24)
    draw = next(Order(0, 6, 0, 1).draws(6, 3))[0]
    here = augmented(images.to(DEVICE), draw, ["flip", "crop"])
    assert torch.equal(here.cpu(), augmented(images, draw, ["flip", "crop"]))
    data = Data(*[Split(images, torch.zeros(6))] * 3, ["crop"]).to(torch.device(DEVICE))
    inputs, _ = next(iter(data.training(Order(0, 6, 0, 1))))
    assert isinstance(inputs, Tensor) and inputs.device.type == DEVICE


def test_a_trainer_of_the_users_own_trains_here(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    def train(model: nn.Module, hold: Callable[..., None], arm: Arm) -> dict[str, Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        hold(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            (model(torch.eye(12, device=DEVICE)) - 1).square().mean().backward()
            optimizer.step()
        return {"accuracy": torch.tensor(0.5, device=DEVICE)}

    task = make_task(device=DEVICE, data=None, trainer=by_function(train))
    mask = {"fc1.weight": torch.rand(16, 12, generator=torch.Generator().manual_seed(0)) < 0.4}
    ((_, outcome),) = fit([Arm("arm", task.start(0), mask, 0)], task, make_train(), way=EAGER, keep_at=3)
    assert outcome.kept is not None and not torch.equal(outcome.kept["fc1.bias"], outcome.final["fc1.bias"])
    assert bool((outcome.final["fc1.weight"].cpu()[~mask["fc1.weight"]] == 0).all())


# ------------------------------------------------------------------------------------------- the ticket


def test_a_ticket_found_here_is_used_on_the_cpu(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Callable[..., list[results.Round]], tmp_path: Path,
) -> None:  # fmt: skip
    recipe = make_recipe({"run.device": DEVICE, "prune.rewind": "5it"})
    run_search(recipe, make_task("normed", device=DEVICE), tmp_path / "run")
    ticket = load_ticket(tmp_path / "run/ticket.safetensors")
    assert all(value.device.type == "cpu" for value in (*ticket.masks.values(), *ticket.init.values()))
    task = make_task("normed")
    ticket.apply(task.model)
    assert all(torch.equal(task.model.get_parameter(name) == 0, ~mask) for name, mask in ticket.masks.items())
    found = evaluate([ticket], task, recipe.train, seeds=[0, 1], way=EAGER, noise=[0.5])
    assert list(found.arms) == ["dense", "ticket", "noise=0.5", "reinit", "random"]


def test_an_evaluation_repeats_the_searchs_round(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Callable[..., list[results.Round]], tmp_path: Path,
) -> None:  # fmt: skip
    """On the run's own seeds, up to one of the 60 test images."""
    recipe = make_recipe({"run.device": DEVICE})
    task = make_task("normed", device=DEVICE)
    rounds = run_search(recipe, task, tmp_path / "run")
    found = evaluate(
        contents.tickets(RunDir(tmp_path / "run"), 2), task, recipe.train, seeds=[5, 6], way=EAGER, noise=[1.0]
    )
    expected = rounds[2].stats.accuracy_end.values
    assert found.arms["ticket"].accuracy_end.values == pytest.approx(expected, abs=1.01 / 60)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_hold_keeps_zeros_here(
    optimizer: str, make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]
) -> None:
    task = make_task("normed", device=DEVICE)
    ticket = make_ticket(task)
    settings = {"lr": 0.05, "weight_decay": 0.01, **({"momentum": 0.9} if optimizer == "SGD" else {"fused": True})}
    torchs = getattr(torch.optim, optimizer)(task.model.parameters(), **settings)
    ticket.apply(task.model)
    ticket.hold(task.model, torchs)
    for _ in range(50):
        torchs.zero_grad()
        F.cross_entropy(task.model(task.data.train.inputs), task.data.train.targets).backward()
        torchs.step()
    assert all(torch.equal(task.model.get_parameter(name).cpu() == 0, ~mask) for name, mask in ticket.masks.items())


# ------------------------------------------------------------------------------------------- the device


def test_auto_takes_the_device_and_records() -> None:
    device = devices.resolve_device("auto")
    assert device.type == DEVICE
    assert devices.choose("auto", device, arms=5, parameters=1000) == "graph"
    with pytest.raises(
        TicketfindError, match="processes needs Linux, several CPU cores and resident data, found device cuda"
    ):
        devices.choose("processes", device, arms=5, parameters=1000)


def test_a_device_number_that_is_not_there_is_named() -> None:
    with pytest.raises(TicketfindError, match="expected a device that works here, found 'cuda:99'"):
        devices.resolve_device("cuda:99")


def test_a_loss_that_is_not_finite_names_arm_and_iteration(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task = make_task(device=DEVICE)
    huge = {name: value * 1e30 for name, value in task.start(0).items()}
    ((_, failed),) = fit([Arm("arm", huge, {}, 0, first=3)], task, make_train(), way=EAGER)
    assert isinstance(failed, Failed) and failed.reason.startswith("the loss is not finite at iteration 3;")


def test_what_is_drawn_on_the_device_follows_from_the_seed_and_changes_nothing_outside() -> None:
    def drawn(seed: int) -> float:
        with seeded(seed, torch.device(DEVICE)):
            return torch.rand((), device=DEVICE).item()

    before = torch.cuda.get_rng_state()
    assert drawn(3) == drawn(3) != drawn(4)
    assert torch.equal(torch.cuda.get_rng_state(), before)
