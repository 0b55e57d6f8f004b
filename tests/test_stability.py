"""Barriers against plain PyTorch and numpy, networks whose barrier is known, and what the finder trains and counts."""

import copy
import dataclasses
import itertools
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ticketfind import TicketfindError, advice, contents, stability
from ticketfind.arms import Arm, Outcome, State, Task
from ticketfind.batches import Order, Split
from ticketfind.layers import from_layers
from ticketfind.recipe import Recipe, RecipeError, Train
from ticketfind.rundir import RunDir
from ticketfind.stability import POINTS, Question, Rung, Stability, barrier, between, errors_between, ladder, next_rung
from ticketfind.ticket import Ticket
from ticketfind.train import fit


class Linear(nn.Module):
    """[b, 12] -> [b, 4], convex in its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x)


def trained(task: Task, how: Train, *seeds: int) -> list[State]:
    """The same initialization trained with these data orders."""
    arms = [Arm(f"seed {seed}", task.start(0), {}, seed) for seed in seeds]
    finals = []
    for _, outcome in fit(arms, task, how):
        assert isinstance(outcome, Outcome)
        finals.append(outcome.final)
    return finals


def question(task: Task, *rungs: int, replicates: int = 2, bisected: bool = False) -> Question:
    arms = [Arm(f"dense, replicate {r}", task.start(r), {}, r, replicate=r) for r in range(replicates)]
    return Question(network="dense", arms=arms, rungs=rungs, bisected=bisected, threshold=0.02)


def rung(iteration: int, stable: bool) -> Rung:
    return Rung.of(iteration, [[0.0, 0.0 if stable else 0.5, 0.0]], 0.02)


# -------------------------------------------------------------------------------------------- the barrier


def test_barrier_by_hand() -> None:
    assert barrier([0.1, 0.5, 0.2]) == pytest.approx(0.35)
    assert barrier([0.1, 0.05, 0.1]) == 0
    assert barrier([0.1, 0.2]) == pytest.approx(0.05)  # the higher end counts as a point of the line


def test_the_line_ends_where_it_should() -> None:
    one = {"w": torch.tensor([1.0, 1e-8]), "count": torch.tensor(7)}
    other = {"w": torch.tensor([-3.0, 1e8]), "count": torch.tensor(9)}
    assert torch.equal(between(one, other, 1.0)["w"], one["w"])
    assert torch.equal(between(one, other, 0.0)["w"], other["w"])
    assert between(one, other, 0.25)["w"][0] == -2.0
    assert between(one, other, 0.25)["count"] == 7


def test_errors_are_those_of_a_few_lines_of_pytorch(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task, how = make_task("mlp"), make_train(iterations=40)
    one, other = trained(task, how, 1, 2)
    test = task.data.test if task.data else None
    assert isinstance(test, Split) and isinstance(test.inputs, Tensor)
    weights = {name: (one[name].double().numpy(), other[name].double().numpy()) for name in one}
    expected = []
    for a in np.linspace(0, 1, 30):
        hidden = test.inputs.double().numpy()
        for layer in ("fc1", "fc2", "fc3"):
            w, b = (a * x + (1 - a) * y for x, y in (weights[f"{layer}.weight"], weights[f"{layer}.bias"]))
            hidden = hidden @ w.T + b
            hidden = hidden if layer == "fc3" else np.maximum(hidden, 0)
        expected.append(np.mean(hidden.argmax(1) != test.targets.numpy()))
    found = errors_between(one, other, task, how)
    assert found == pytest.approx(expected, abs=1e-6)
    assert barrier(found) == pytest.approx(max(expected) - (expected[0] + expected[-1]) / 2, abs=1e-6)
    assert len({*found}) > 1


def test_a_permuted_network_is_the_same_function_behind_a_high_barrier(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task, how = make_task("mlp"), make_train(iterations=150)
    (one,) = trained(task, how, 1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    other = {
        **one,
        "fc1.weight": one["fc1.weight"][order],
        "fc1.bias": one["fc1.bias"][order],
        "fc2.weight": one["fc2.weight"][:, order],
    }
    errors = errors_between(one, other, task, how)
    assert errors[0] == errors[-1] < 0.3
    assert barrier(errors) > 0.1


@pytest.mark.parametrize("net", ["mlp", "normed"])
def test_the_same_weights_twice_have_no_barrier(
    net: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task, how = make_task(net), make_train()
    (one,) = trained(task, how, 1)
    errors = errors_between(one, one, task, how)
    assert len(errors) == POINTS and len({*errors}) == 1 and barrier(errors) == 0


def test_a_convex_model_is_stable_from_the_start(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task, how = make_task(Linear), make_train(iterations=200)
    found = stability.find(question(task, 0), task, how)
    assert found.rungs[0].barrier.mean < 0.02
    assert found.rungs[0].error.mean < 0.5


def test_statistics_are_those_of_the_training_batches(
    make_task: Callable[..., Task], make_train: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against means and variances taken by hand; what statistics the ends had makes no difference."""
    task, how = make_task("normed"), make_train(iterations=40)
    assert task.data is not None
    one, other = trained(task, how, 1, 2)
    seen = []
    error = stability._error

    def spy(model: nn.Module, *rest: Any) -> float:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        assert not model.training and isinstance(model.norm, nn.BatchNorm1d) and model.norm.momentum == 0.1
        return error(model, *rest)

    monkeypatch.setattr(stability, "_error", spy)
    errors = errors_between(one, other, task, how)
    order = Order(stability.derived_seed(0, "statistics"), how.batch_size, 0, len(task.data.train) // how.batch_size)
    batches = [inputs for inputs, _ in task.data.training(order)]
    for share, state in zip(np.linspace(0, 1, POINTS), seen, strict=True):
        weight = share * one["fc1.weight"] + (1 - share) * other["fc1.weight"]
        hidden = [inputs @ weight.float().T for inputs in batches]
        assert torch.allclose(state["norm.running_mean"], torch.stack([h.mean(0) for h in hidden]).mean(0), atol=1e-5)
        assert torch.allclose(state["norm.running_var"], torch.stack([h.var(0) for h in hidden]).mean(0), rtol=1e-4)
    spoiled = {**other, "norm.running_var": 100 * other["norm.running_var"]}
    assert errors_between(one, spoiled, task, how) == errors


def test_targets_that_do_not_count_are_neither_right_nor_wrong(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    plain = make_task("mlp")
    assert plain.data is not None and isinstance(plain.data.test, Split)
    inputs, targets = plain.data.test.inputs, plain.data.test.targets.clone()
    targets[:25] = -100  # one chunk of nothing else, one of both
    data = dataclasses.replace(plain.data, test=Split(inputs, targets))
    task = dataclasses.replace(plain, data=data)
    state = task.start(0)
    model = copy.deepcopy(task.model)
    model.load_state_dict(state)
    wrong = (model(inputs).argmax(1) != targets)[25:].float().mean()
    assert errors_between(state, state, task, make_train())[0] == pytest.approx(float(wrong))


def test_outputs_that_are_no_numbers_are_all_wrong(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task = make_task("mlp", metric=lambda outputs, targets: outputs.sum() * math.nan)
    assert {*errors_between(task.start(0), task.start(1), task, make_train())} == {1.0}


# --------------------------------------------------------------------------------------------- the ladder


@pytest.mark.parametrize(
    ("total", "first", "rungs"),
    [
        (1000, 0, (0, 5, 10, 20, 50, 100, 200, 500)),
        (30_000, 0, (0, 200, 500, 1000, 2000, 5000, 10_000)),
        (30_000, 500, (500, 1000, 2000, 5000, 10_000)),
        (12, 0, (0, 1, 2, 5)),
        (1, 0, (0,)),
        (12, 8, (8,)),
    ],
)
def test_ladder(total: int, first: int, rungs: tuple[int, ...]) -> None:
    assert ladder(total, first) == rungs


@pytest.mark.parametrize("length", range(1, 12))
def test_bisection_finds_the_first_stable_rung(length: int) -> None:
    """Wherever it is, or nowhere; in as few steps as there are bits in the answer, each announced by `most`."""
    rungs = [*itertools.accumulate(range(1, length + 1))]
    for first in [*rungs, math.inf]:
        stable: dict[int, bool] = {}
        while (k := next_rung(rungs, stable)) is not None:
            assert k not in stable
            stable[k] = k >= first
        assert min((k for k, is_stable in stable.items() if is_stable), default=math.inf) == first
        assert len(stable) <= math.ceil(math.log2(length + 1))


def test_which_is_recommended() -> None:
    def of(*stable: bool) -> Stability:
        asked = Question(network="dense", arms=[Arm("a", {}, {}, 0)], rungs=[], bisected=False, threshold=0.02)
        return Stability(asked, 100, 1.0, tuple(rung(k, is_stable) for k, is_stable in enumerate(stable)), 0)

    assert (of(True, True).earliest, of(True, True).contradicting) == (0, ())
    assert (of(False, True, True).earliest, of(False, True, True).contradicting) == (1, ())
    assert (of(False, True, False, True).earliest, of(False, True, False, True).contradicting) == (3, (1,))
    assert (of(True, False).earliest, of(True, False).contradicting) == (None, (0,))


def test_stable_is_when_the_interval_is_below_the_threshold() -> None:
    """Upper end by scipy's t."""
    stats = pytest.importorskip("scipy.stats")
    values = [0.001, 0.012, 0.018]
    upper = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))[1]
    lines = [[0.1, 0.1 + value, 0.1] for value in values]
    assert Rung.of(5, lines, upper + 1e-9).stable and not Rung.of(5, lines, upper - 1e-9).stable
    assert Rung.of(5, lines[:1], 0.002).stable and not Rung.of(5, lines[:1], 0.0005).stable
    assert Rung.of(5, lines, 0.02).error.mean == pytest.approx(0.1)


# ------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("way", ["eager", "stacked"])
def test_a_beginning_is_that_of_the_whole_training(
    way: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task, how = make_task("normed"), make_train(schedule="cosine", warmup=2, momentum=0.9)
    arms = [Arm(f"{seed}", task.start(seed), {}, seed) for seed in (1, 2)]
    share = stability.Way(way, at_once=2)
    whole = [outcome for _, outcome in fit(arms, task, how, way=share, keep_at=5)]
    begun = [outcome for _, outcome in fit(arms, task, how, way=share, until=5)]
    for a, b in zip(whole, begun, strict=True):
        assert isinstance(a, Outcome) and isinstance(b, Outcome) and a.kept is not None
        assert all(torch.equal(a.kept[name], b.final[name]) for name in a.kept)
        assert [point.iteration for point in b.points] == [4, 5]


def test_pairs_share_their_beginning_and_differ_in_their_data_order(
    make_task: Callable[..., Task], make_train: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, how = make_task("mlp"), make_train()
    calls: list[tuple[list[Arm], int | None]] = []

    def spy(arms: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        calls.append(([*arms], kwargs.get("until")))
        return fit(arms, *args, **kwargs)

    monkeypatch.setattr(stability, "fit", spy)
    asked = question(task, 0, 6)
    ticks: list[int] = []
    skipped: list[int] = []
    found = stability.find(asked, task, how, tick=ticks.append, skip=skipped.append)
    at_zero, beginning, at_six = calls
    assert [until for _, until in calls] == [None, 6, None]
    for arms, k in ((at_zero[0], 0), (at_six[0], 6)):
        assert [arm.first for arm in arms] == [k] * 4
        assert len({arm.seed for arm in arms} | {0, 1}) == 6
        for one, other, origin in zip(arms[::2], arms[1::2], asked.arms, strict=True):
            assert all(torch.equal(one.start[name], other.start[name]) for name in one.start)
            same = [torch.equal(one.start[name], origin.start[name]) for name in one.start]
            assert all(same) if k == 0 else not any(same)
    assert beginning[0] == [*asked.arms]
    assert [len(each.barrier.values) for each in found.rungs] == [2, 2]
    assert sum(ticks) == found.iterations == 2 * 24 + 2 * (6 + 12)
    assert skipped == [asked.most(12) - found.iterations] == [0]


def test_bisection_counts_what_it_leaves_out(make_task: Callable[..., Task], make_train: Callable[..., Train]) -> None:
    task, how = make_task(Linear), make_train(iterations=60, lr=0.01)
    ticks: list[int] = []
    skipped: list[int] = []
    asked = dataclasses.replace(question(task, *ladder(60), bisected=True), threshold=1.0)
    found = stability.find(asked, task, how, tick=ticks.append, skip=skipped.append)
    assert [each.iteration for each in found.rungs] == [0, 2] and skipped[0] > 0
    assert sum(ticks) == found.iterations
    assert found.iterations + skipped[0] == asked.most(60)


def test_a_failed_pair_is_left_out_and_said(make_task: Callable[..., Task], make_train: Callable[..., Train]) -> None:
    task, how = make_task("mlp"), make_train()
    asked = question(task, 0, 3)
    spoiled = {name: torch.full_like(value, 1e30) for name, value in asked.arms[1].start.items()}
    asked = dataclasses.replace(asked, arms=[asked.arms[0], dataclasses.replace(asked.arms[1], start=spoiled)])
    notes: list[str] = []
    ticked, skipped = list[int](), list[int]()
    found = stability.find(asked, task, how, note=notes.append, tick=ticked.append, skip=skipped.append)
    assert [len(each.barrier.values) for each in found.rungs] == [1, 1]
    assert sum(ticked) + sum(skipped) == asked.most(int(how.iterations)) and sum(skipped)
    assert any("replicate 1" in note and "left out" in note for note in notes)
    with pytest.raises(TicketfindError, match="iteration 0: expected a pair"):
        stability.find(dataclasses.replace(asked, arms=asked.arms[1:]), task, how)


def test_stopping_is_heeded_between_points(make_task: Callable[..., Task], make_train: Callable[..., Train]) -> None:
    task, how = make_task("mlp"), make_train()
    ticks = 0

    def tick(iterations: int) -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        errors_between(task.start(0), task.start(1), task, how, tick)
    assert ticks == 3


# ------------------------------------------------------------------------------------- what is asked


def test_sparse_networks_begin_where_their_tickets_do(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe({"prune.rewind": "2it"})
    run_search(recipe, make_task("mlp"), tmp_path / "run")
    tickets = contents.tickets(RunDir(tmp_path / "run"), 2)
    task, notes = make_task("mlp"), []
    dense, sparse = stability.questions(task, recipe, tickets, [], 2.0, notes.append)
    assert (dense.network, dense.first, [*dense.rungs]) == ("dense", 0, [0, 1, 2, 5])
    assert (sparse.network, sparse.first, [*sparse.rungs]) == ("sparse", 2, [2, 5])
    assert [arm.seed for arm in sparse.arms] == [arm.seed for arm in dense.arms] == [5, 6]
    assert (dense.bisected, dense.threshold) == (True, 0.02)
    found = stability.find(sparse, task, recipe.train)
    assert found.remaining == pytest.approx(tickets[0].remaining)
    (at,) = stability.questions(task, recipe, tickets, ["1it"], 2.0, notes.append)
    assert (at.network, [*at.rungs], at.bisected) == ("dense", [1], False)
    assert notes == ["the sparse network is left out: its training goes from iteration 2 to 12"]


def test_pruned_weights_are_zero_on_the_whole_line(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    task, how = make_task("mlp"), make_train()
    ticket = make_ticket(task)
    seen = []

    def spy(model: nn.Module, *rest: Any) -> float:
        seen.append(copy.deepcopy(dict(model.named_parameters())))
        return 0.0

    monkeypatch.setattr(stability, "_error", spy)
    arm = Arm("sparse", ticket.init, ticket.masks, 0)
    stability.find(Question(network="sparse", arms=[arm], rungs=[3], bisected=False, threshold=0.02), task, how)
    assert len(seen) == POINTS
    assert all(not bool(w[n][~mask].any()) for w in seen for n, mask in ticket.masks.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12it", "before the training's end at 12, found 12it = 12"),
        ("150%", "found 150% = 18"),
        ("soon", "--at: expected a number of iterations"),
    ],
)
def test_where_there_is_nothing_to_measure(
    text: str, message: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    with pytest.raises(RecipeError, match=message):
        stability.asked_ladder([text], make_task("mlp"), make_train())


def test_at_in_epochs_and_shares(make_task: Callable[..., Task], make_train: Callable[..., Train]) -> None:
    assert stability.asked_ladder(["1ep", "25%", "0", "3it"], make_task("mlp"), make_train()) == (0, 3, 6)


def test_a_training_of_ones_own_is_refused(make_task: Callable[..., Task]) -> None:
    asked = from_layers({"train": {"command": "train {init} {mask} {seed} {out}"}, "run": {"tolerance": 1}})
    with pytest.raises(TicketfindError, match="found your own"):
        stability.questions(make_task("mlp", data=None), asked, [], [], 2.0, print)


# ------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("barriers", "word"), [((0.1, 0.11), "not stable"), ((0.001, 0.02), "unclear"), ((0.001, 0.0011), "stable")]
)
def test_few_pairs_may_leave_it_open(barriers: tuple[float, float], word: str) -> None:
    measured = Rung.of(0, [[0.1, 0.1 + value, 0.1] for value in barriers], 0.02)
    asked = Question(network="dense", arms=[Arm("a", {}, {}, 0)], rungs=[0], bisected=False, threshold=0.02)
    found = Stability(asked, 100, 1.0, (measured,), 0)
    assert advice._rows(found)[0][-1] == word
    assert ("more --replicates" in advice._recommendation(found)) == (word == "unclear")


SMALL = ("--iterations", "20", "--replicates", "2", "--set", "train.eval_every=10")


def test_a_model_a_recipe_and_a_run(command: Callable[..., Any]) -> None:
    ran = command("stability", "digits", *SMALL, "--at", "0", "--at", "50%", "--threshold", "50")
    assert ran.code == 0 and "dense: stable from iteration" in ran.out and "the finder took 140 iterations" in ran.out
    of_model = ("stability", "lenet-300-100", "--data", "digits", "--set", "data.validation=200", "--json")
    found = command(*of_model, *SMALL, "--threshold", "0").json
    assert found["networks"][0]["recommended"] is None and found["threshold"] == 0
    assert (
        command("search", "digits", *SMALL, "--rounds", "2", "--rewind", "5it", "--set", "run.tolerance=100").code == 0
    )
    dense, sparse = command("stability", "--json").json["networks"]
    assert (dense["ladder"], sparse["ladder"]) == ([0, 1, 2, 5, 10], [5, 10])
    assert (dense["remaining"], sparse["remaining"] < 0.7) == (1, True)
    (other,) = [
        each for each in command("stability", "runs/digits", "--round", "1", "--at", "5", "--json").json["networks"]
        if each["network"] == "sparse"
    ]  # fmt: skip
    assert other["remaining"] == pytest.approx(0.8, abs=0.01)


def test_of_a_run_shorter_trainings_than_those_for_its_masks(command: Callable[..., Any]) -> None:
    search = ("search", "digits", *SMALL, "--rounds", "2", "--rewind", "0it", "--mask-iterations", "15it")
    assert command(*search, "--set", "run.tolerance=100").code == 0
    dense, sparse = command("stability", "--iterations", "10", "--at", "0", "--json").json["networks"]
    assert (dense["ladder"], sparse["ladder"]) == ([0], [0])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["digits", "--at", "1000"], 2, "--at: expected an iteration before the training's end at 1000"),
        (["digits", "--round", "2"], 2, "--round is for a run"),
        (["t.safetensors"], 1, "t.safetensors: expected a model, a recipe or a run directory"),
        (["resnet-20"], 2, "data.spec: expected the data to train on"),
        (["nosuch.yaml"], 1, "nosuch.yaml: cannot read the recipe"),
        ([], 1, "run"),
        (["digits", "--threshold", "-1"], 2, "--threshold"),
    ],
)
def test_what_cannot_be_looked_at(arguments: list[str], code: int, message: str, command: Callable[..., Any]) -> None:
    ran = command("stability", *arguments)
    assert (ran.code, ran.out) == (code, "") and message in ran.err and "Traceback" not in ran.err


def test_a_stop_is_one_line(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> list[float]:
        signal.raise_signal(signal.SIGINT)
        _[4](0)
        raise AssertionError("it went on")

    monkeypatch.setattr(stability, "errors_between", interrupt)
    ran = command("stability", "digits", *SMALL)
    assert (ran.code, ran.out, ran.err) == (130, "", "stopped\n")
