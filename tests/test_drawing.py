"""Masks that are drawn on a training's way, and searches that measure less than they draw."""

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ticketfind import TicketfindError, contents, masks, train, verify
from ticketfind.arms import Arm, Look, Outcome, Task, Watched, measured
from ticketfind.batches import Order, derived_seed
from ticketfind.course import Failed, Point
from ticketfind.devices import Way
from ticketfind.drawing import Drawing, Settled, Tightening
from ticketfind.masks import Group, Masks
from ticketfind.plan import make_plan
from ticketfind.recipe import Recipe, RecipeError, Train
from ticketfind.rundir import RunDir
from ticketfind.scores import SCORES, Score, Seen, scored
from ticketfind.train import fit
from ticketfind.updates import Update

SHAPES = {"fc1.weight": (16, 12), "fc2.weight": (12, 16), "fc3.weight": (4, 12)}
Search = Callable[..., Any]
WAYS = ["eager", "stacked"]


def half(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items()}


def assert_progress_ends_at_its_total(watch: Mock, *, resumed: bool = False) -> None:
    """What an earlier process has done, and each iteration, are what is in all but for those skipped."""
    total, done = watch.begin.call_args.args
    ticked, skipped = (sum(call.args[0] for call in each.call_args_list) for each in (watch.tick, watch.skip))
    assert total - skipped == done + ticked
    assert resumed or done == 0


def way_of(name: str) -> Way:
    return Way(name, at_once=2)


# ------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("way", WAYS)
def test_paths_are_the_steps_of_plain_pytorch_added_up(
    way: str, optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task, how, kept = make_task(), make_train(optimizer=optimizer, lr=0.01), half()
    arms = [Arm(f"a{seed}", task.start(seed), kept, seed) for seed in (3, 4)]
    for arm, outcome in fit(arms, task, how, way=way_of(way), paths=True):
        assert isinstance(outcome, Outcome)
        model = copy.deepcopy(task.model)
        model.load_state_dict(masks.masked(arm.start, kept))
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
        steps, path = kind(model.parameters(), lr=0.01), {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for inputs, targets in task.data.training(Order(arm.seed, 16, 0, 12)):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            steps.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            for name, p in model.named_parameters():
                p.grad *= kept.get(name, torch.ones_like(p))
            steps.step()
            for name, p in model.named_parameters():
                path[name] += (p.detach() - before[name]).abs()
        assert outcome.path is not None
        assert outcome.path.keys() == path.keys()
        for name in path:
            torch.testing.assert_close(outcome.path[name], path[name], rtol=1e-4, atol=1e-6)
        assert all(bool((outcome.path[name][~mask] == 0).all()) for name, mask in kept.items())
        for name, p in arm.start.items():  # no shorter than the net change
            assert bool((outcome.path[name] >= (outcome.final[name] - p * kept.get(name, 1)).abs() - 1e-6).all())


def test_paths_change_no_weight(make_task: Callable[..., Task], make_train: Callable[..., Train]) -> None:
    task, how = make_task(), make_train()
    ((_, a),) = fit([Arm("a", task.start(0), {}, 0)], task, how)
    ((_, b),) = fit([Arm("a", task.start(0), {}, 0)], task, how, paths=True)
    assert all(torch.equal(a.final[name], b.final[name]) for name in a.final)
    assert a.path is None


# ----------------------------------------------------------------------------------------- pruning on the way


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_pruned_on_the_way_stays_zero(
    way: str, optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task = make_task()
    how = make_train(optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0, weight_decay=0.01)
    seen: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []
    nested = {5: half(1), 10: {name: mask & half(2)[name] for name, mask in half(1).items()}}

    def tighter(arm: Arm, look: Look) -> dict[str, Tensor]:
        seen.append((look.at, look.state, look.path or {}))
        return nested[look.at]

    arms = [Arm(f"a{seed}", task.start(seed), masks.dense(SHAPES), seed, replicate=seed) for seed in (3, 4)]
    watched = Watched(every=5, tighter=tighter)
    for _, outcome in fit(arms, task, how, way=way_of(way), paths=True, watched=watched):
        assert isinstance(outcome, Outcome)
        assert outcome.masks is not None
        assert all(torch.equal(outcome.masks[name], nested[10][name]) for name in SHAPES)
        assert not masks.nonzero_outside(nested[10], outcome.final)
        assert [point.iteration for point in outcome.points] == [12]
    for at, state, path in seen:
        if at == 10:  # five iterations under the first masks; the path is that of these five alone
            assert not masks.nonzero_outside(nested[5], state)
            assert not masks.nonzero_outside(nested[5], path)
    assert sorted(at for at, _, _ in seen) == [5, 5, 10, 10]


def test_a_training_goes_on_from_its_masks_as_if_pruned_by_hand(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """SGD without momentum has no other memory than its weights."""
    task, how, kept = make_task(), make_train(), half()
    watched = Watched(every=8, tighter=lambda arm, look: kept)
    ((_, on_the_way),) = fit([Arm("a", task.start(0), masks.dense(SHAPES), 0)], task, how, watched=watched)
    ((_, begun),) = fit([Arm("a", task.start(0), {}, 0)], task, how, until=8)
    ((_, by_hand),) = fit([Arm("a", begun.final, kept, 0, first=8)], task, how)
    assert all(torch.equal(on_the_way.final[name], by_hand.final[name]) for name in by_hand.final)


def counts(found: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in found.items()}


@pytest.mark.parametrize(("score", "first"), [("path_length", 0), ("movement", 0), ("magnitude", 0), ("movement", 4)])
def test_pruning_on_the_way_ends_at_the_rounds_count(
    score: str, first: int, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    tmp_path: Path,
) -> None:  # fmt: skip
    """What is drawn is nested and as many as planned; what is measured are full trainings of the tickets. All begin at
    the rewind point."""
    recipe = make_recipe({"prune.every": 4, "prune.score": score, "prune.rewind": f"{first}it"})
    rounds = run_search(recipe, make_task(), tmp_path / "run", SCORES[score])
    assert [round.round for round in rounds] == [0, 1, 2, 3]
    for round in (1, 2, 3):
        found = load_file(tmp_path / f"run/masks/{round:02}-0.safetensors")
        expected = {"fc1.weight": 192, "fc2.weight": 192, "fc3.weight": 48}
        for _ in range(round):
            expected = {name: n - builtin_round(n * 0.3) for name, n in expected.items()}
        assert counts(found) == expected
    drawn = [json.loads(line) for line in (tmp_path / "run/drawn.jsonl").read_text().splitlines()]
    assert [(line["round"], line["replicate"], line["iterations"]) for line in drawn] == [
        (round, replicate, 12 - first) for round in range(3) for replicate in range(2)
    ]
    assert all(check.passed is not False for check in verify.of_run(RunDir(tmp_path / "run")))


builtin_round = round


def test_each_pruning_on_the_way_sees_what_changed_since_the_last(make_task: Callable[..., Task]) -> None:
    """By hand: of ten weights, half are to go in two prunings; the score is how far they moved in between."""
    told: list[Seen] = []

    def note(seen: Seen) -> dict[str, Tensor]:
        told.append(seen)
        return {"w": (seen.trained["w"] - seen.initial["w"]).abs()}

    drawing = Drawing(Score(note), make_task(), Mock(), [Group(("w",), 0.5)], {"w": (10,)})
    tighten = Tightening(drawing, every=5, total=10)
    arm = Arm("a", {"w": torch.zeros(10)}, masks.dense({"w": (10,)}), 0)
    first = tighten(arm, Look(5, {"w": torch.arange(10.0)}, None))
    assert first["w"].tolist() == [False] * 3 + [True] * 7  # 10 * (5 / 10) ** (1 / 2) = 7.07
    moved = torch.arange(10.0) + torch.tensor([0, 0, 0, 9, 1, 2, 3, 4, 5, 6.0])
    second = tighten(arm, Look(10, {"w": moved}, None))
    assert second["w"].tolist() == [False] * 3 + [True, False, False, True, True, True, True]
    assert torch.equal(told[1].initial["w"], torch.tensor([0, 0, 0, 3, 4, 5, 6, 7, 8, 9.0]))


# -------------------------------------------------------------------------------------------- settled masks


def test_agreement_within_is_cohens_kappa() -> None:
    outer = {"a": torch.tensor([1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)}
    a = {"a": torch.tensor([1, 1, 1, 0, 0, 1, 0, 0], dtype=torch.bool)}
    b = {"a": torch.tensor([1, 1, 0, 1, 0, 1, 0, 0], dtype=torch.bool)}
    same, chance = 4 / 6, (4 / 6) * (4 / 6) + (2 / 6) * (2 / 6)
    assert masks.agreement_within(a, b, outer) == pytest.approx((same - chance) / (1 - chance))
    assert masks.agreement_within(a, a, outer) == 1


def test_a_mask_has_settled_where_two_looks_agree(make_task: Callable[..., Task]) -> None:
    drawing = Drawing(SCORES["magnitude"], make_task(), Mock(), [Group(("w",), 0.5)], {"w": (4,)})
    settled = Settled(drawing, lambda arm: {"w": torch.zeros(4)}, threshold=0.9)
    arms = [Arm("a", {}, {}, 0, replicate=r) for r in range(2)]

    def look(*weights: float) -> Look:
        return Look(0, {"w": torch.tensor(weights)}, None)

    assert not settled(arms[0], look(1, 2, 3, 4))
    assert not settled(arms[0], look(4, 3, 2, 1))
    assert not settled(arms[1], look(8, 7, 2, 1))  # another replicate's first
    assert settled(arms[0], look(9, 8, 1, 2))


@pytest.mark.parametrize("threshold", [0.0001, 1.0])
def test_a_round_ends_when_its_mask_has_settled(
    threshold: float, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    watch: Mock, tmp_path: Path,
) -> None:  # fmt: skip
    recipe = make_recipe({"prune.mask_stop": threshold, "train.schedule": "constant", "train.warmup": 0})
    rounds = run_search(recipe, make_task(), tmp_path / "run")
    drawn = [json.loads(line) for line in (tmp_path / "run/drawn.jsonl").read_text().splitlines()]
    assert {(line["round"], line["replicate"]) for line in drawn} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    if threshold < 0.1:  # any agreement above chance, at the second look
        assert {line["iterations"] for line in drawn} == {6}
    assert [round.round for round in rounds] == [0, 1, 2, 3]
    assert all(round.stats.early_stop.mean > 0 for round in rounds)
    assert_progress_ends_at_its_total(watch)


# ---------------------------------------------------------------------------------------- what is measured


def planted(accuracies: dict[int, float]) -> Any:
    """A trainer of the user's own whose accuracy depends on the round alone."""

    def train(task: Task, arm: Arm, work: Any) -> Outcome:
        work.tick(12 - arm.first)
        points = (Point(12, None, 1.0, accuracies[arm.round], accuracies[arm.round]),)
        final = masks.masked(arm.start, arm.masks)
        return Outcome(None, points, final, arm.start, measured(points), 60)

    return train


FALLING = {0: 0.9, **{round: 0.9 if round <= 5 else 0.5 for round in range(1, 9)}}


def test_until_fails_ends_with_the_first_round_that_does_not_match(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, watch: Mock, tmp_path: Path
) -> None:
    recipe = make_recipe({"prune.until_fails": True, "prune.rounds": 8, "run.tolerance": 1})
    rounds = run_search(recipe, make_task(trainer=planted(FALLING)), tmp_path / "run")
    assert [(round.round, round.matching) for round in rounds][-2:] == [(5, True), (6, False)]
    assert contents.chosen(RunDir(tmp_path / "run"), None).round == 5
    total, _ = watch.begin.call_args.args
    skipped = sum(call.args[0] for call in watch.skip.call_args_list)
    assert total - skipped == 12 * 2 * 7


def test_until_fails_brackets_where_masks_are_drawn_apart(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Four of eight rounds are measured: 4, 6, 5; the others' masks can be exported all the same."""
    recipe = make_recipe({
        "prune.until_fails": True, "prune.rounds": 8, "prune.fraction": 0.1, "run.tolerance": 1, "prune.mask_stop": 1.0,
    })  # fmt: skip
    own = fit

    def measured_by_plan(arms: Any, task: Task, how: Train, **more: Any) -> Any:
        return own(arms, make_task(trainer=planted(FALLING)), how, **more)

    monkeypatch.setattr("ticketfind.search.fit", measured_by_plan)
    rounds = run_search(recipe, make_task(), tmp_path / "run")
    assert [round.round for round in rounds] == [0, 4, 5, 6]
    log = [json.loads(line)["round"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log == [0, 0, 4, 4, 6, 6, 5, 5]
    run = RunDir(tmp_path / "run")
    assert contents.chosen(run, None).round == 5
    assert contents.load(run, 7, 1).about.claims.keys() == {"dense"}
    assert contents.load(run, 4, 1).about.claims.keys() == {"dense", "ticket"}
    with pytest.raises(TicketfindError, match="round: expected 1 to 8, found 9"):
        contents.chosen(run, 9)
    again = run_search(recipe, make_task(), tmp_path / "run")  # it is finished
    assert [round.round for round in again] == [0, 4, 5, 6]


def test_masks_drawn_ahead_are_those_of_one_training_pruned_again_and_again(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    recipe = make_recipe({"prune.ahead": [2, 3, 1], "prune.rounds": 8})
    rounds = run_search(recipe, make_task(), tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["round"] for line in log if line["replicate"] == 0] == [0, 2, 5, 6, 7, 1, 3, 4, 8]
    assert [round.round for round in rounds] == [*range(9)]
    final = load_file(tmp_path / "run/trained/0.safetensors")
    old = masks.dense(SHAPES)
    for round in (1, 2):
        found = scored(SCORES["magnitude"], Seen(final, final, old), seed=0)
        old = masks.prune(old, found, [Group((name,), 0.3) for name in SHAPES])
        there = load_file(tmp_path / f"run/masks/{round:02}-0.safetensors")
        assert all(torch.equal(old[name], there[name]) for name in SHAPES)
    assert all(check.passed is not False for check in verify.of_run(RunDir(tmp_path / "run")))


@pytest.mark.parametrize("score", ["magnitude", "movement"])
def test_finetuned_masks_are_those_of_plain_pytorch_that_goes_on_under_the_mask_before(
    score: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    """Eight steps of SGD with the schedule's last rate, a tenth of the first, from what the training before came to;
    each replicate's in an order of its own. What has moved has moved since the rewind point."""
    settings = {"prune.ahead": [3, 2], "prune.rounds": 5, "train.schedule": "step", "train.milestones": [4]}
    settings |= {"train.warmup": 0, "train.momentum": 0.0, "train.weight_decay": 0.0, "train.lr": 2.0}
    task = make_task()
    for name, more in (("tuned", {"prune.finetune": 8}), ("at once", {})):
        run_search(make_recipe({**settings, **more, "prune.score": score}), task, tmp_path / name, SCORES[score])

    def drawn(name: str, round: int, replicate: int = 0) -> Masks:
        return load_file(tmp_path / name / f"masks/{round:02}-{replicate}.safetensors")

    how, run, groups = make_recipe(settings).train, make_recipe(settings).run, [Group((n,), 0.3) for n in SHAPES]
    assert task.data is not None
    for replicate in range(2):
        net, old, seed = copy.deepcopy(task.model), masks.dense(SHAPES), run.seed + replicate
        initial = load_file(tmp_path / f"tuned/init/{replicate}.safetensors")
        net.load_state_dict(load_file(tmp_path / f"tuned/trained/{replicate}.safetensors"))
        for round in (1, 2, 3):
            state = net.state_dict()
            old = masks.prune(old, scored(SCORES[score], Seen(state, initial, old), seed=0), groups)
            assert all(torch.equal(old[name], drawn("tuned", round, replicate)[name]) for name in SHAPES), round
            named = dict(net.named_parameters())
            for name, kept in old.items():
                named[name].data *= kept
            order = Order(derived_seed(seed, "finetune", round), how.batch_size, 4, 12)
            for inputs, targets in task.data.training(order):
                gradients = torch.autograd.grad(F.cross_entropy(net(inputs), targets), [*named.values()])
                for name, gradient in zip(named, gradients, strict=True):
                    named[name].data -= how.lr / 10 * gradient * old.get(name, 1)
    assert all(torch.equal(drawn("tuned", 1)[name], drawn("at once", 1)[name]) for name in SHAPES)
    assert not all(torch.equal(drawn("tuned", 3)[name], drawn("at once", 3)[name]) for name in SHAPES)
    assert {path.name for path in (tmp_path / "tuned/trained").iterdir()} == {"0.safetensors", "1.safetensors"}
    assert all(check.passed is not False for check in verify.of_run(RunDir(tmp_path / "tuned")))


@pytest.mark.parametrize("rate", [None, 0.2])
@pytest.mark.parametrize("way", WAYS)
def test_masks_of_short_trainings_are_those_of_plain_pytorch(
    rate: float | None, way: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Search, watch: Mock, tmp_path: Path,
) -> None:  # fmt: skip
    """From the rewind point, iteration 2, four steps; the milestone comes in the middle of 6 as it would of 12."""
    recipe = make_recipe({
        "prune.mask_iterations": 4, "prune.mask_lr": rate, "prune.rewind": "2it", "train.schedule": "step",
        "train.milestones": [6], "train.weight_decay": 0.0, "run.engine": way, "run.arms_at_once": 2,
    })  # fmt: skip
    task, run = make_task(), tmp_path / "run"
    assert task.data is not None
    rounds = run_search(recipe, task, run)
    for replicate in range(2):
        net = copy.deepcopy(task.model)
        for round in (1, 2):
            old, new = (load_file(run / f"masks/{number:02}-{replicate}.safetensors") for number in (round, round + 1))
            net.load_state_dict(load_file(run / f"init/{replicate}.safetensors"))
            named = dict(net.named_parameters())
            for name, kept in old.items():
                named[name].data *= kept
            optimizer = torch.optim.SGD(net.parameters(), lr=rate or 0.05, momentum=0.9)
            for iteration in range(2, 6):
                optimizer.param_groups[0]["lr"] = (rate or 0.05) / (10 if iteration >= 3 else 1)
                inputs, targets = next(iter(task.data.train.batches(Order(5 + replicate, 16, iteration, 12))))
                optimizer.zero_grad()
                F.cross_entropy(net(inputs), targets).backward()
                for name, kept in old.items():
                    named[name].grad *= kept
                optimizer.step()
            for name, kept in old.items():
                left = int(kept.sum()) - int(0.3 * int(kept.sum()) + 0.5)
                bound = (named[name].detach().abs() * kept).flatten().sort(descending=True).values[left - 1]
                assert torch.equal(new[name], kept & (named[name].detach().abs() >= bound)), (round, name)
    drawn = [json.loads(line) for line in (run / "drawn.jsonl").read_text().splitlines()]
    assert [(line["round"], line["replicate"], line["iterations"]) for line in drawn] == [
        (1, 0, 4), (1, 1, 4), (2, 0, 4), (2, 1, 4),
    ]  # fmt: skip
    assert [round.round for round in rounds] == [0, 1, 2, 3]
    assert watch.begin.call_args.args == (2 * (12 + 3 * 10 + 2 * 4), 0)  # what is measured is trained in full
    assert all(check.passed is not False for check in verify.of_run(RunDir(run)))


@pytest.mark.parametrize("first", [0, 5])
def test_trainings_that_are_pruned_on_their_way_are_planned_from_the_rewind_point(
    first: int, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, watch: Mock,
    tmp_path: Path,
) -> None:  # fmt: skip
    recipe = make_recipe({"prune.every": 4, "prune.rewind": f"{first}it"})
    assert make_plan(recipe, make_task().model).total == 12 + 3 * (12 - first) + 3 * (12 - first)
    run_search(recipe, make_task(), tmp_path / "run")
    assert watch.begin.call_args.args == (sum(call.args[0] for call in watch.tick.call_args_list), 0)


def test_single_masks_come_of_short_trainings_and_several_of_those_measured(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, watch: Mock,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The dense training draws two masks, that of round 2 two, that of round 4 three, and each of the last two one."""
    settings = {"prune.rounds": 9, "prune.ahead": [2, 2, 3, 1], "prune.finetune": 3}
    recipe = make_recipe({**settings, "prune.mask_iterations": "50%", "prune.mask_lr": 1.0})
    plan = make_plan(recipe, make_task().model)
    assert (plan.apart, plan.total) == ({7: 6, 8: 6}, 10 * 12 + 4 * 3 + 2 * 6)
    rounds = run_search(recipe, make_task(), tmp_path / "run")
    assert [round.round for round in rounds] == [*range(10)]
    lines = [json.loads(line) for line in (tmp_path / "run/drawn.jsonl").read_text().splitlines()]
    assert [(line["round"], line["iterations"]) for line in lines] == [(7, 6), (7, 6), (8, 6), (8, 6)]
    run_search(make_recipe(settings), make_task(), tmp_path / "full")

    def drawn(name: str, round: int) -> list[Masks]:
        return [load_file(tmp_path / name / f"masks/{round:02}-{replicate}.safetensors") for replicate in range(2)]

    for round in range(1, 10):
        short, full = drawn("run", round), drawn("full", round)
        same = all(torch.equal(a[name], b[name]) for a, b in zip(short, full, strict=True) for name in SHAPES)
        assert same == (round <= 7), round  # whose mask is the last of a full training
    assert all(check.passed is not False for check in verify.of_run(RunDir(tmp_path / "run")))


@pytest.mark.parametrize(
    ("last", "measured", "drawn"),
    [(1, [0, 2, 1], 3), (2, [0, 2, 4, 3], 5), (5, [0, 2, 4, 7, 5, 6], 10), (10, [0, 2, 4, 7, 9, 10], 10)],
)
@pytest.mark.parametrize("stopped", [False, True])
def test_until_fails_draws_no_mask_that_it_does_not_need(
    last: int, measured: list[int], drawn: int, stopped: bool, make_task: Callable[..., Task],
    make_recipe: Callable[..., Recipe], run_search: Search, watch: Mock, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of ten rounds those up to `last` match; the masks of rounds 7 to 10 are drawn one by one."""

    def some(arms: Any, *args: Any, **more: Any) -> Any:
        for arm, outcome in fit(arms, *args, **more):
            good = 0.9 if arm.round <= last else 0.1
            yield arm, replace(outcome, numbers=outcome.numbers and replace(outcome.numbers, accuracy_early=good))

    monkeypatch.setattr("ticketfind.search.fit", some)
    recipe = make_recipe({
        "prune.rounds": 10, "prune.ahead": [2, 2, 2, 1], "prune.finetune": 3, "prune.mask_iterations": 5,
        "prune.until_fails": True, "run.tolerance": 5, "prune.fraction": 0.1,
    })  # fmt: skip
    for _ in range(60 if stopped else 0):
        with suppress(Enough):
            run_search(recipe, make_task(), tmp_path / "run", watch=stopping(25))
            break
    run_search(recipe, make_task(), tmp_path / "run", watch=watch)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["round"] for line in log if line["replicate"] == 0] == measured
    assert max(int(path.name[:2]) for path in (tmp_path / "run/masks").iterdir()) == drawn
    assert contents.chosen(RunDir(tmp_path / "run"), None).round == last
    if not stopped:
        assert_progress_ends_at_its_total(watch)


@pytest.mark.parametrize("way", WAYS)
def test_a_training_that_is_not_measured_is_the_same_training(
    way: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task, how = make_task(), make_train(optimizer="adamw")
    arms = [Arm(f"a{seed}", task.start(seed), half(), seed, first=5, replicate=seed) for seed in (3, 4)]
    for every in (7, 2):  # its last look is at its end, or before
        found = [
            [outcome for _, outcome in fit(arms, task, how, way=way_of(way), paths=True, watched=watched)]
            for watched in (Watched(every=every), Watched(every=every, at_end=False))
        ]
        for with_numbers, without in zip(*found, strict=True):
            assert isinstance(with_numbers, Outcome) and isinstance(without, Outcome)
            assert with_numbers.path is not None and without.path is not None
            assert [point.iteration for point in with_numbers.points] == [12] and not without.points
            assert without.numbers is None
            assert all(torch.equal(without.final[name], value) for name, value in with_numbers.final.items())
            assert all(torch.equal(without.path[name], value) for name, value in with_numbers.path.items())


def test_no_evaluation_is_made_that_nothing_asks_for(
    make_task: Callable[..., Task],
    make_recipe: Callable[..., Recipe],
    run_search: Search,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Of each round there are four, every three of twelve iterations, of each of two replicates, finetuned or not."""
    made = Mock(wraps=train._measure)
    monkeypatch.setattr(train, "_measure", made)
    run_search(make_recipe({"prune.ahead": [3], "prune.finetune": 5}), make_task(), tmp_path / "run")
    assert made.call_count == 4 * 4 * 2


def test_until_fails_measures_between_the_trainings_that_draw_ahead(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    recipe = make_recipe({
        "prune.ahead": [4], "prune.until_fails": True, "prune.rounds": 12, "prune.fraction": 0.1, "run.tolerance": 1,
    })  # fmt: skip
    rounds = run_search(
        recipe, make_task(trainer=planted({**FALLING, **dict.fromkeys(range(9, 13), 0.5)})), tmp_path / "run"
    )
    assert [(round.round, round.matching) for round in rounds] == [
        (0, True), (4, True), (5, True), (6, False), (8, False),
    ]  # fmt: skip
    run = RunDir(tmp_path / "run")
    assert contents.chosen(run, None).round == 5
    assert contents.load(run, 3, 1).about.claims.keys() == {"dense"}  # drawn, and not measured


def test_a_search_that_draws_apart_goes_on_to_the_same_bytes(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    class Enough(BaseException):
        pass

    recipe = make_recipe({"prune.every": 4, "prune.score": "path_length", "prune.until_fails": True})
    run_search(recipe, make_task(), tmp_path / "whole", SCORES["path_length"])
    stops = 0
    for limit in (30, 50, 60, 80, 90):
        watch, left = Mock(spec_set=["begin", "tick", "skip", "round", "note"]), [limit]

        def tick(iterations: int, left: list[int] = left) -> None:
            left[0] -= iterations
            if left[0] < 0:
                raise Enough

        watch.tick = tick
        try:
            run_search(recipe, make_task(), tmp_path / "cut", SCORES["path_length"], watch)
        except Enough:
            stops += 1
    run_search(recipe, make_task(), tmp_path / "cut", SCORES["path_length"])

    def tree(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert stops >= 3
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune.every": 3, "prune.mask_stop": 0.9}, "prune.mask_stop: expected null beside prune.every, found both"),
        ({"prune.every": 3, "prune.score": "snip"}, "prune.every: expected null with snip, which looks at no training"),
        (
            {"prune.mask_stop": 0.8, "prune.score": "snip"},
            "prune.mask_stop: expected null with snip, which looks at no training, found 0.8",
        ),
        (
            {"prune.every": 3, "prune.mask_iterations": 3},
            "prune.mask_iterations: expected null beside prune.every, found 3",
        ),
        (
            {"prune.mask_iterations": 3, "prune.score": "snip"},
            "prune.mask_iterations: expected null with snip, which looks",
        ),
        (
            {"prune.mask_iterations": "0%"},
            "prune.mask_iterations: expected 1 to the 12 iterations of a round, found 0%",
        ),
        (
            {"prune.mask_iterations": 9, "prune.rewind": 4},
            "prune.mask_iterations: expected 1 to the 8 iterations of a round",
        ),
        (
            {"prune.mask_iterations": 3, "prune.rewind": 2, "train.warmup": 6},
            "prune.mask_iterations: expected an end after the warmup, iteration 6, found 5; take more",
        ),
        (
            {"prune.mask_iterations": 3, "train.trainer": "a:b"},
            "prune.mask_iterations: expected null, as a training of your",
        ),
        ({"prune.mask_lr": 0.1}, "prune.mask_lr: expected with --mask-iterations, --mask-stop or --prune-every"),
        ({"prune.mask_lr": 0}, "prune.mask_lr: expected a number above 0, found 0"),
        ({"prune.every": "1%"}, "prune.every: expected 1 to the 12 iterations of a round, found 1% = 0 iterations"),
        ({"prune.every": 13}, "prune.every: expected 1 to the 12 iterations of a round, found 13"),
        ({"prune.ahead": []}, "prune.ahead: expected at least one number of rounds, found none"),
        ({"prune.ahead": [2], "prune.rewind": "lr"}, "prune.ahead: expected [1] beside prune.every"),
        ({"prune.finetune": 3}, "prune.finetune: expected with --ahead 2 or more (several masks)"),
        ({"prune.ahead": [1, 1], "prune.finetune": 3}, "prune.finetune: expected with --ahead 2 or more"),
        (
            {"prune.ahead": [3], "prune.finetune": "200%"},
            "prune.finetune: expected 1 to the 12 iterations of a round, found 200% = 24 iterations",
        ),
        (
            {"prune.ahead": [3], "prune.finetune": 3, "prune.score": "synflow"},
            "prune.finetune: expected null with synflow, which looks at no training, found 3",
        ),
        (
            {"prune.ahead": [3], "prune.finetune": 3, "train.trainer": "a:b"},
            "prune.finetune: expected null, as a training of your own is not looked at on its way, found 3",
        ),
        ({"prune.mask_stop": 1.5}, "prune.mask_stop: expected a number above 0, up to 1, found 1.5"),
        ({"prune.every": 3, "train.trainer": "a:b"}, "prune.every: expected null, as a training of your own"),
        ({"prune.score": "synflow", "train.trainer": "a:b"}, "prune.score: expected one of a training's ends"),
        (
            {"prune.score": "path_length", "model.trained": "t", "model.checkpoint": "c"},
            "prune.score: expected one of a training's ends, as model.trained shows no way there, found path_length",
        ),
        (
            {"prune.every": 3, "model.trained": "t", "model.checkpoint": "c"},
            "prune.every: expected null, as model.trained stands for a training that is over, found 3",
        ),
        ({"prune.every": 9, "prune.rewind": 4}, "prune.every: expected 1 to the 8 iterations of a round, found 9"),
    ],
)
def test_contradictions(settings: dict[str, Any], message: str, make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError) as error:
        make_recipe(settings)
    assert message in str(error.value)


@pytest.mark.parametrize("rounds", [*range(1, 8)])
@pytest.mark.parametrize("ahead", [[2], [4], [1, 2], [1, 1, 3], [3, 1], [4, 3, 2]])
def test_a_finetuning_is_refused_where_no_training_draws_two_masks(
    ahead: list[int], rounds: int, make_recipe: Callable[..., Recipe], make_task: Callable[..., Task]
) -> None:
    of_one_mask = next(place for place, count in enumerate(ahead) if count > 1)  # trainings before one of several
    tunes = rounds >= of_one_mask + 2
    recipe = make_recipe({"prune.ahead": ahead, "prune.rounds": rounds, "prune.finetune": 3})
    with nullcontext() if tunes else pytest.raises(TicketfindError, match="draws several masks, found none"):
        make_plan(recipe, make_task().model)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"prune.ahead": [4], "prune.rounds": 1}, "found none: 1 round with --ahead 4;"),
        ({"prune.ahead": [1, 1, 3], "prune.rounds": 3}, "3 rounds with --ahead 1 --ahead 1 --ahead 3;"),
        ({"prune.ahead": [1, 2], "prune.rounds": 9, "prune.scope": "2:4"}, "2 rounds with --ahead 1 --ahead 2;"),
        ({"prune.ahead": [4], "prune.rounds": 5, "prune.until": 0.9}, "1 round with --ahead 4;"),
        ({"prune.ahead": [4], "prune.rounds": None, "prune.until": 0.9}, "1 round with --ahead 4;"),
    ],
)
def test_however_few_rounds_come_about_a_finetuning_for_none_is_refused(
    settings: dict[str, Any], found: str, make_recipe: Callable[..., Recipe], make_task: Callable[..., Task]
) -> None:
    with pytest.raises(TicketfindError, match=found):
        make_plan(make_recipe({"prune.finetune": 3, **settings}), make_task().model)


@pytest.mark.parametrize(("ahead", "rounds"), [([1], 1), ([4], 4), ([4, 3], 7), ([2], 6)])
def test_short_trainings_for_no_mask_are_refused(
    ahead: list[int], rounds: int, make_recipe: Callable[..., Recipe], make_task: Callable[..., Task]
) -> None:
    settings = {"prune.ahead": ahead, "prune.rounds": rounds, "prune.mask_iterations": 5}
    with pytest.raises(TicketfindError, match="expected a training that draws one mask, after the first, found none"):
        make_plan(make_recipe(settings), make_task().model)


def test_a_learning_rate_for_no_mask_is_refused(
    make_recipe: Callable[..., Recipe], make_task: Callable[..., Task]
) -> None:
    """With one round; pruning on the way, which draws the first mask apart too, has one."""
    model, settings = make_task().model, {"prune.rounds": 1, "prune.mask_lr": 0.1}
    assert make_plan(make_recipe({**settings, "prune.every": 3}), model).apart == {0: 12}
    with pytest.raises(TicketfindError, match=r"prune.mask_lr: expected a training that draws one mask, after the"):
        make_plan(make_recipe({**settings, "prune.mask_stop": 0.8}), model)


# ------------------------------------------------------------------------------------------ what fails


def failing(monkeypatch: pytest.MonkeyPatch, apart: bool | None, places: set[tuple[int, int]]) -> None:
    """Have trainings of these (round, replicate) fail: those for a mask alone, those measured, or (None) both."""

    def some(*args: Any, **more: Any) -> Any:
        for arm, outcome in fit(*args, **more):
            is_bad = apart in (None, "watched" in more) and (arm.round, arm.replicate) in places
            yield arm, Failed(1, "the loss is not finite") if is_bad else outcome

    for module in ("drawing", "search"):
        monkeypatch.setattr(f"ticketfind.{module}.fit", some)


def stopping(limit: int) -> Mock:
    """A watch that ends the search after so many iterations."""
    watch = Mock(spec_set=["begin", "tick", "skip", "round", "note"])
    done = 0

    def tick(iterations: int) -> None:
        nonlocal done
        done += iterations
        if done > limit:
            raise Enough

    watch.tick = tick
    return watch


class Enough(BaseException):
    pass


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("engine", ["eager", "stacked"])
@pytest.mark.parametrize(
    ("settings", "apart", "places", "measured"),
    [
        ({"prune.every": 4}, True, {(1, 1)}, [2, 2, 1, 1]),  # it has a mask for round 1, and none for the next
        ({"prune.every": 4}, True, {(0, 0)}, [2, 1, 1, 1]),
        ({"prune.every": 4}, False, {(0, 1)}, [1, 1, 1, 1]),  # the dense training
        ({"prune.mask_stop": 1.0}, True, {(1, 1)}, [2, 2, 1, 1]),
        ({"prune.mask_iterations": 3}, True, {(1, 1)}, [2, 2, 1, 1]),
        ({"prune.mask_iterations": 3}, False, {(2, 0)}, [2, 2, 1, 1]),
        ({"prune.mask_iterations": 3, "prune.ahead": [2, 1]}, False, {(2, 0)}, [2, 2, 1, 1]),
        ({"prune.mask_stop": 1.0}, False, {(2, 0)}, [2, 2, 1, 1]),
        ({"prune.ahead": [2]}, False, {(1, 1)}, [2, 1, 1, 1]),  # measured after round 2
        ({"prune.ahead": [3], "prune.finetune": 3}, True, {(1, 1)}, [2, 2, 1, 1]),  # on to the mask of round 2
        ({"prune.ahead": [2, 1], "prune.finetune": 3}, False, {(1, 1)}, [2, 1, 1, 1]),
        ({"prune.ahead": [3], "prune.finetune": 3}, True, {(1, 0), (1, 1)}, [2, 2]),
        ({"prune.every": 4}, True, {(0, 0), (0, 1)}, [2]),
        ({"prune.mask_stop": 1.0, "prune.until_fails": True}, True, {(1, 0), (1, 1)}, [2, 2]),
        ({"prune.ahead": [2]}, False, {(2, 0), (2, 1)}, [2, 2]),
    ],
)
def test_a_replicate_that_fails_takes_nothing_with_it(
    settings: dict[str, Any], apart: bool, places: set[tuple[int, int]], measured: list[int], engine: str,
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And a search that is stopped again and again ends in the same bytes, with one line for each failure."""
    recipe = make_recipe({**settings, "run.engine": engine, "run.arms_at_once": 2, "prune.rewind": "2it"})
    failing(monkeypatch, apart, places)
    rounds = run_search(recipe, make_task(), tmp_path / "whole")
    assert [len(round.replicates) for round in rounds] == measured
    assert [round.round for round in rounds] == [*range(len(measured))]
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert len([line for line in log if "failed" in line]) == len(places)
    assert all(check.passed is not False for check in verify.of_run(RunDir(tmp_path / "whole")))
    for _ in range(40):
        try:
            run_search(recipe, make_task(), tmp_path / "cut", watch=stopping(25))
        except Enough:
            assert all(check.passed is not False for check in verify.of_run(RunDir(tmp_path / "cut")))
            continue
        break
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_what_fails_for_a_mask_alone_is_said_to(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    """Under a name of its own, and of neither `train.lr` nor its flag, which it does not go by."""
    recipe = make_recipe({"prune.mask_iterations": 3, "prune.mask_lr": 1e30, "run.replicates": 1, "run.tolerance": 9})
    run_search(recipe, make_task(), tmp_path / "run")
    (failed,) = [line["failed"] for line in RunDir(tmp_path / "run").log() if "failed" in line]
    assert failed.startswith("round 1, replicate 0, for the mask of round 2: the loss is not finite at iteration ")
    assert "learning rate (now 1e+30)" in failed and "--lr" not in failed


@pytest.mark.parametrize("which", [0, 1])
def test_a_crash_after_a_failure_leaves_those_trained_in_step_together(
    which: int, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, watch: Mock,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Numbers of stacked networks may depend on how many there are."""
    together: list[list[tuple[int, int]]] = []

    def some(arms: Any, *args: Any, **more: Any) -> Any:
        if "watched" in more and arms:
            together.append([(arm.round, arm.replicate) for arm in arms])
        for arm, outcome in fit(arms, *args, **more):
            is_bad = "watched" in more and (arm.round, arm.replicate) == (1, which)
            yield arm, Failed(1, "the loss is not finite") if is_bad else outcome

    own = RunDir.append

    def crash(self: RunDir, entry: Any, log: Path | None = None) -> None:
        own(self, entry, log)
        if "failed" in entry:
            raise Enough

    monkeypatch.setattr("ticketfind.search.fit", some)
    recipe = make_recipe(
        {"prune.ahead": [4], "prune.rounds": 4, "prune.finetune": 3, "run.engine": "stacked", "run.arms_at_once": 2}
    )
    run_search(recipe, make_task(), tmp_path / "whole")
    whole, together[:] = together[:], []
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "append", crash)
        with pytest.raises(Enough):
            run_search(recipe, make_task(), tmp_path / "cut")
    watch.reset_mock()
    run_search(recipe, make_task(), tmp_path / "cut", watch=watch)
    assert whole == [[(1, 0), (1, 1)], [(2, 1 - which)], [(3, 1 - which)]]
    assert together == ([whole[0], *whole] if which == 0 else whole)  # replicate 1's mask is not there, or all is done
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert_progress_ends_at_its_total(watch, resumed=True)


def test_what_is_drawn_again_in_step_is_counted_once_more(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, watch: Mock,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A crash between two replicates' lines: both are trained again, and the progress ends at its total."""
    own = RunDir.append

    def crash(self: RunDir, entry: Any, log: Path | None = None) -> None:
        own(self, entry, log)
        if log == self.drawn_file and entry["round"] == 1:
            raise Enough

    recipe = make_recipe({"prune.mask_stop": 1.0, "run.engine": "stacked", "run.arms_at_once": 2})
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "append", crash)
        with pytest.raises(Enough):
            run_search(recipe, make_task(), tmp_path / "run")
    watch.reset_mock()
    run_search(recipe, make_task(), tmp_path / "run", watch=watch)
    assert_progress_ends_at_its_total(watch, resumed=True)


def test_a_network_without_an_output_is_not_trained_on(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    """What a measured round refuses is refused before it is trained on, and the same again."""
    settings = {"prune.ahead": [3], "prune.finetune": 3, "prune.fraction": {"*": 0.3, "fc3.weight": 0.995}}
    for _ in range(2):
        with pytest.raises(TicketfindError, match="replicate 0, on to the mask of round 2: no weight is left in fc3"):
            run_search(make_recipe(settings), make_task(), tmp_path / "run")


def test_what_is_trained_on_is_on_disk_no_longer_than_it_takes(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, watch: Mock, tmp_path: Path
) -> None:
    recipe, most = make_recipe({"prune.ahead": [1, 6], "prune.rounds": 8, "prune.finetune": 3}), {0: 0, 1: 0}

    def look(iterations: int) -> None:
        for replicate in most:
            most[replicate] = max(most[replicate], len([*(tmp_path / "run/trained").glob(f"??-{replicate}.*")]))

    watch.tick = look
    run_search(recipe, make_task(), tmp_path / "run")
    assert most == {0: 2, 1: 1}  # at each iteration; the last replicate's file is there once its training is over
    assert {path.name for path in (tmp_path / "run/trained").iterdir()} == {"0.safetensors", "1.safetensors"}


@pytest.mark.parametrize("when", ["the weights", "the loss"])
@pytest.mark.parametrize("settings", [{"prune.every": 4}, {"prune.mask_stop": 0.0001}])
@pytest.mark.parametrize("engine", ["eager", "stacked"])
def test_a_training_whose_numbers_end_on_its_way_takes_no_other_with_it(
    when: str, settings: dict[str, Any], engine: str, make_task: Callable[..., Task],
    make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its weights are looked at before they are scored: the first arm of the first mask's training has lost them."""
    own, looks = train.Lockstep.states, []

    def states(self: Any) -> Any:
        found = own(self)
        looks.append(len(found))
        if self is training[0]:
            found[0]["fc1.weight"][0, 0] = torch.nan
        return found

    training: list[Any] = [None]
    advance = train.Lockstep.advance

    def bad(self: Any, iterations: int) -> Any:
        losses = advance(self, iterations)
        if watching and training[0] is None:
            training[0] = self
        if self is training[0] and when == "the loss":
            losses[0][0] = float("nan")
        return losses

    watching: list[bool] = []

    def apart(*args: Any, **more: Any) -> Any:
        watching.append(True)
        yield from fit(*args, **more)
        watching.clear()

    monkeypatch.setattr("ticketfind.drawing.fit", apart)
    monkeypatch.setattr(train.Lockstep, "states", states)
    monkeypatch.setattr(train.Lockstep, "advance", bad)
    recipe = make_recipe({**settings, "run.engine": engine, "run.arms_at_once": 2})
    rounds = run_search(recipe, make_task(), tmp_path / "run")
    assert looks
    drawn = 1 if "prune.every" in settings else 2  # the round whose mask the first training is for
    assert [round.replicates for round in rounds] == [(0, 1)] * drawn + [(1,)] * (4 - drawn)


def test_paths_of_half_precision_are_added_up_in_whole(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """In bfloat16 a sum does not grow any more by what is less than a 256th of it."""
    update = Update(
        [torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)], [None], make_train(lr=1.0), None, paths=True
    )
    (leaf,) = update._leaves
    for sign in [1, -1] * 500:
        update(sign * leaf.sum(), 1.0)
    assert update.paths[0].tolist() == [1000.0]


def test_a_frozen_parameter_has_gone_nowhere(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    task = make_task()
    task.model.fc2.weight.requires_grad_(False)
    recipe = make_recipe({"prune.score": "path_length", "prune.only": ["fc*.weight"]})
    run_search(recipe, task, tmp_path / "run", SCORES["path_length"])
    found = load_file(tmp_path / "run/masks/01-0.safetensors")["fc2.weight"].flatten()
    assert found.tolist() == [True] * 134 + [False] * 58  # ties go by place


def test_each_arm_in_step_is_looked_at_each_time(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """What an arm says of two looks in a row is of two looks in a row, whatever the arms before it say."""
    asked: list[tuple[int, int]] = []

    def enough(arm: Arm, look: Look) -> bool:
        asked.append((look.at, arm.replicate))
        return False

    task = make_task()
    arms = [Arm(f"a{seed}", task.start(seed), {}, seed, replicate=seed) for seed in range(2)]
    [*_] = fit(arms, task, make_train(), way=way_of("stacked"), watched=Watched(every=4, enough=enough))
    assert asked == [(4, 0), (4, 1), (8, 0), (8, 1), (12, 0), (12, 1)]


def test_arms_in_step_end_when_all_have_enough(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """When all have enough; looks are counted from where they begin."""
    task, asked = make_task(), list[int]()

    def enough(arm: Arm, look: Look) -> bool:
        asked.append(look.at)
        return look.at >= 2 + 3 * (arm.replicate + 1)

    arms = [Arm(f"a{seed}", task.start(seed), {}, seed, first=2, replicate=seed) for seed in range(2)]
    watched = Watched(every=3, enough=enough)
    for _, outcome in fit(arms, task, make_train(), way=way_of("stacked"), watched=watched):
        assert isinstance(outcome, Outcome) and [point.iteration for point in outcome.points] == [8]
    assert asked == [5, 5, 8, 8]


def test_an_arm_that_fails_beside_one_that_has_enough_leaves_the_rest_of_the_whole(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task, skipped = make_task(), list[int]()
    starts = [{name: value * factor for name, value in task.start(0).items()} for factor in (1e30, 1)]
    arms = [Arm(f"a{number}", start, {}, 0, replicate=number) for number, start in enumerate(starts)]
    watched = Watched(every=4, enough=lambda arm, look: True)
    found = [o for _, o in fit(arms, task, make_train(), way=way_of("stacked"), watched=watched, skip=skipped.append)]
    assert isinstance(found[0], Failed) and isinstance(found[1], Outcome)
    assert found[0].left == 12 - 4 and skipped == [8]


@pytest.mark.parametrize(
    ("settings", "apart", "places"),
    [
        ({"prune.every": 4}, True, {(1, 1)}),
        ({"prune.every": 4}, False, {(0, 1)}),
        ({"prune.ahead": [2]}, False, {(1, 1)}),
        ({"prune.ahead": [3], "prune.finetune": 3}, True, {(1, 1)}),
        ({"prune.ahead": [2], "prune.finetune": 3}, False, {(0, 1)}),
        ({"prune.mask_iterations": 5, "prune.ahead": [2, 1], "prune.rounds": 5}, False, {(2, 1)}),
        ({"prune.mask_stop": 1.0}, None, {(1, 1)}),  # for the mask of round 2, and later as it is measured
        ({"prune.mask_iterations": 5, "prune.rounds": 5}, None, {(2, 1)}),
        ({"prune.ahead": [4], "prune.finetune": 3, "prune.rounds": 5}, None, {(1, 1)}),
    ],
)
def test_what_a_failure_spares_is_counted(
    settings: dict[str, Any], apart: bool | None, places: set[tuple[int, int]], make_task: Callable[..., Task],
    make_recipe: Callable[..., Recipe], run_search: Search, watch: Mock, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Once, though a replicate may fail twice. The failures here are told of when the training is over: all of it has
    been done."""
    failing(monkeypatch, apart, places)
    run_search(make_recipe(settings), make_task(), tmp_path / "run")
    assert_progress_ends_at_its_total(watch)


@pytest.mark.parametrize("engine", ["eager", "stacked"])
@pytest.mark.parametrize("replicates", [{1}, {0, 1}])
@pytest.mark.parametrize(
    ("settings", "apart", "round"),
    [
        ({}, False, 2),
        ({"prune.every": 4}, True, 1),
        ({"prune.every": 4}, False, 1),
        ({"prune.mask_stop": 1.0}, True, 1),
        ({"prune.mask_iterations": 5}, True, 1),
        ({"prune.mask_iterations": 5, "prune.ahead": [2, 1]}, False, 2),
        ({"prune.ahead": [2]}, False, 2),
        ({"prune.ahead": [3], "prune.finetune": 3}, True, 1),
    ],
)
def test_what_a_training_that_fails_on_its_way_does_not_come_to_is_counted(
    settings: dict[str, Any], apart: bool, round: int, replicates: set[int], engine: str,
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, watch: Mock,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nothing trains from such weights; of arms in step the others go on."""

    def spoiled(arms: Sequence[Arm], *args: Any, **more: Any) -> Any:
        places = {(round, replicate) for replicate in replicates} if ("watched" in more) == apart else set()
        huge = [
            replace(arm, start={name: value * 1e30 for name, value in arm.start.items()})
            if (arm.round, arm.replicate) in places
            else arm
            for arm in arms
        ]
        return fit(huge, *args, **more)

    for module in ("drawing", "search"):
        monkeypatch.setattr(f"ticketfind.{module}.fit", spoiled)
    recipe = make_recipe({**settings, "run.engine": engine, "run.arms_at_once": 2, "train.eval_every": 2})
    run_search(recipe, make_task(), tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert {line["replicate"] for line in log if "failed" in line} == replicates
    assert_progress_ends_at_its_total(watch)


SEARCHES: list[dict[str, Any]] = [
    {"prune.ahead": [3, 2], "prune.until_fails": True, "prune.rounds": 8, "run.tolerance": 2},
    {"prune.ahead": [4, 3], "prune.finetune": 5, "prune.until_fails": True, "prune.rounds": 9, "run.tolerance": 2},
    {"prune.ahead": [3], "prune.finetune": "25%", "run.engine": "stacked", "run.arms_at_once": 2},
    {"prune.mask_stop": 0.3, "prune.until_fails": True, "prune.rounds": 8, "run.tolerance": 2},
    {"prune.mask_stop": 0.3, "prune.rewind": "lr", "run.engine": "stacked", "run.arms_at_once": 2},
    {"prune.every": 3, "prune.rewind": "lr", "prune.scope": "global"},
    {
        "prune.ahead": [3, 1],
        "prune.finetune": 4,
        "prune.mask_iterations": 7,
        "prune.mask_lr": 0.1,
        "prune.rounds": 6,
    },
    {"prune.mask_iterations": 8, "prune.mask_stop": 0.3, "run.engine": "stacked", "run.arms_at_once": 2},
    {"prune.mask_stop": 0.3, "prune.scope": "2:4", "prune.rewind": "3it"},
    {"prune.ahead": [2], "prune.scope": "2:4", "prune.rewind": "3it"},
    {"prune.until_fails": True, "prune.rounds": 8, "run.tolerance": 2},
]


@pytest.mark.parametrize(
    ("score", "settings"),
    [
        (score, settings)
        for score in ("path_length", "snip", "random")
        for settings in SEARCHES
        if score != "snip"
        or not settings.keys() & {f"prune.{key}" for key in ("every", "finetune", "mask_iterations", "mask_stop")}
    ],
)
def test_every_search_that_is_stopped_goes_on_to_the_same_bytes(
    settings: dict[str, Any], score: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Search, tmp_path: Path,
) -> None:  # fmt: skip
    recipe = make_recipe({**settings, "prune.score": score})
    whole = run_search(recipe, make_task("normed"), tmp_path / "whole", SCORES[score])
    for _ in range(60):
        try:
            found = run_search(recipe, make_task("normed"), tmp_path / "cut", SCORES[score], stopping(25))
        except Enough:
            continue
        break
    assert found == whole
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert all(check.passed is not False for check in verify.of_run(RunDir(tmp_path / "whole")))
