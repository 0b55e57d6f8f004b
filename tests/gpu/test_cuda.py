"""On a CUDA device: the promises that do not depend on rounding hold exactly, the rest agrees with the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from one_arm import OneArm
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ticketfind import TicketfindError, devices, results
from ticketfind import search as searching
from ticketfind.augment import augmented
from ticketfind.batches import Data, Order, Split
from ticketfind.devices import EAGER
from ticketfind.examples import source_of
from ticketfind.experiments import evaluate
from ticketfind.masks import SCORES
from ticketfind.outputs import cross_entropy
from ticketfind.recipe import Recipe, Train
from ticketfind.rundir import RunDir
from ticketfind.selection import keep_highest
from ticketfind.streams import Stream
from ticketfind.ticket import Ticket, load_ticket
from ticketfind.train import Arm, Task, fit, is_disconnected
from ticketfind.trainers import by_function

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch finds none here"),
]

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
    watch = Mock(spec_set=["begin", "tick", "round", "note"])
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

    def look(_: int) -> None:
        weights = dict(task.model.named_parameters())
        seen.append(all(torch.equal(weights[name].cpu() == 0, ~mask) for name, mask in kept.items()))

    lane.advance([task.data.train.batch(torch.randint(0, 90, (16,)).to(DEVICE)) for _ in range(50)], 0, look)
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
    inputs, _ = next(
        Data(*[Split(images, torch.zeros(6))] * 3, ["crop"]).to(torch.device(DEVICE)).training(Order(0, 6, 0, 1))
    )
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
        searching.tickets(RunDir(tmp_path / "run"), 2), task, recipe.train, seeds=[5, 6], way=EAGER, noise=[1.0]
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


def test_auto_takes_the_device_and_trains_one_after_another() -> None:
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
    with pytest.raises(TicketfindError, match=r"^arm: the loss is not finite at iteration 3;"):
        list(fit([Arm("arm", huge, {}, 0, first=3)], task, make_train(), way=EAGER))
