"""The search against a few lines of plain PyTorch and numpy; stopped anywhere, it ends in the same bytes."""

import copy
import itertools
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ticketfind import TicketfindError, contents, keeping, results
from ticketfind import plan as planning
from ticketfind import search as searching
from ticketfind.arms import Arm, Task
from ticketfind.batches import Order
from ticketfind.devices import EAGER
from ticketfind.recipe import Recipe
from ticketfind.rundir import RunDir
from ticketfind.scores import SCORES, by_function
from ticketfind.ticket import load_ticket
from ticketfind.train import fit

SHAPES = {"fc1.weight": (16, 12), "fc2.weight": (12, 16), "fc3.weight": (4, 12)}
SIZES = {"fc1.weight": 192, "fc2.weight": 192, "fc3.weight": 48}
Search = Callable[..., list[results.Round]]

linux = pytest.mark.skipif(sys.platform != "linux", reason="arms side by side need Linux")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def highest(scores: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """The pruning of one tensor in numpy: exactly n - round(n * p) of those left, the highest, ties by index."""
    flat = np.where(mask.numpy().flatten(), scores.numpy().flatten(), -np.inf)
    n = int(mask.sum())
    kept = np.argsort(-flat, kind="stable")[: n - round(n * fraction)]
    new = np.zeros(flat.size, dtype=bool)
    new[kept] = True
    return torch.from_numpy(new.reshape(tuple(mask.shape)))


def chance_notes(rounds: list[results.Round]) -> list[str]:
    """Of 60 test examples in four classes: what is not above 25 % by two standard errors, where that begins."""
    accuracies = [float(np.mean(round.stats.accuracy_early.values)) for round in rounds]
    low = [accuracy <= 0.25 + 2 * np.sqrt(0.25 * 0.75 / 60) for accuracy in accuracies]
    return [
        f"round {number}: an accuracy of {100 * accuracies[number]:.1f}% is at chance level (always giving the most"
        " frequent label has 25.0%): "
        + ("nothing is learned any more" if number else "the dense network has learned nothing")
        for number, is_low in enumerate(low)
        if is_low and not (number and low[number - 1])
    ]


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


# ---------------------------------------------------------------------------------------- the algorithm


@pytest.mark.parametrize("rewind", ["0it", "4it", "lr"])
def test_the_search_is_the_papers_algorithm_in_plain_pytorch(
    rewind: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    """Train, prune the smallest, rewind, again: masks of every round, of both replicates, BatchNorm included."""
    task = make_task("normed")
    fractions = {"*": 0.3, "fc2.*": 0.15}
    recipe = make_recipe(
        {
            "prune.rewind": rewind,
            "prune.fraction": fractions,
            "train.schedule": "constant",
            "train.warmup": 0,
            "train.weight_decay": 0,
        }
    )
    run_search(recipe, task, tmp_path / "run")

    for replicate in range(2):
        seed = 5 + replicate
        model = copy.deepcopy(task.model)
        start, first = task.start(seed), 0
        kept = {"fc1.weight": torch.ones(16, 12, dtype=torch.bool), "fc2.weight": torch.ones(4, 16, dtype=torch.bool)}
        for round in range(4):
            for name, mask in kept.items() if round else ():
                assert torch.equal(load_file(tmp_path / f"run/masks/{round:02}-{replicate}.safetensors")[name], mask)
            model.load_state_dict(start)
            weights = {name: model.get_parameter(name) for name in kept}
            for name, mask in kept.items():
                weights[name].data *= mask
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            model.train()
            for iteration in range(first, 12):
                if round == 0 and iteration == 4 and rewind == "4it":
                    start = copy.deepcopy(model.state_dict())
                inputs, targets = next(iter(task.data.train.batches(Order(seed, 16, iteration, 12))))
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                for name, mask in kept.items():
                    weights[name].grad *= mask
                optimizer.step()
                for name, mask in kept.items():
                    weights[name].data *= mask
            if rewind == "lr":
                start = copy.deepcopy(model.state_dict())
            if rewind == "4it":
                first = 4
            kept = {
                name: highest(weights[name].detach().abs(), mask, 0.15 if name == "fc2.weight" else 0.3)
                for name, mask in kept.items()
            }


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_nesting_and_the_log(
    scope: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    watch: Mock, tmp_path: Path,
) -> None:  # fmt: skip
    recipe = make_recipe({"prune.scope": scope, "prune.fraction": {"*": 0.3, "fc3.*": 0.11}, "prune.rounds": 4})
    rounds = run_search(recipe, make_task(), tmp_path / "run")

    groups = [["fc1.weight"], ["fc2.weight"], ["fc3.weight"]]
    if scope == "global":
        groups = [["fc1.weight", "fc2.weight"], ["fc3.weight"]]
    left = [sum(SIZES[name] for name in group) for group in groups]
    before = [{name: torch.ones(SHAPES[name], dtype=torch.bool) for name in SIZES} for _ in range(2)]
    log = log_of(tmp_path / "run")
    assert [(line["round"], line["replicate"]) for line in log] == [(r, i) for r in range(5) for i in range(2)]
    for number, (round, line) in enumerate(zip(rounds, log[::2], strict=True)):
        if number:
            left = [n - int(np.rint(n * p)) for n, p in zip(left, [0.3] * (len(left) - 1) + [0.11], strict=True)]
        assert round.round == number and round.remaining == sum(left) / 432 == line["remaining"]
        for replicate in range(2) if number else ():
            masks = load_file(tmp_path / f"run/masks/{number:02}-{replicate}.safetensors")
            assert masks.keys() == SIZES.keys()
            assert [sum(int(masks[name].sum()) for name in group) for group in groups] == left
            assert all(bool((masks[name] <= before[replicate][name]).all()) for name in SIZES)  # nested
            entry = log[2 * number + replicate]
            assert entry["kept"] == sum(left)
            assert entry["kept_per_tensor"] == {name: int(mask.sum()) for name, mask in masks.items()}
            before[replicate] = masks
    assert not all(torch.equal(before[0][name], before[1][name]) for name in SIZES)  # replicates are independent
    for line in log:
        curve = line["curve"]
        assert curve["iteration"] == [3, 6, 9, 12]
        best = int(np.argmin(curve["validation_loss"]))
        assert line["early_stop"] == curve["iteration"][best]
        assert line["validation_loss"] == curve["validation_loss"][best]
        assert line["accuracy_early"] == curve["test_accuracy"][best]
        assert line["accuracy_end"] == curve["test_accuracy"][-1]
        assert line["test_size"] == 60
    assert watch.begin.call_args.args == (5 * 2 * 12, 0)
    assert sum(call.args[0] for call in watch.tick.call_args_list) == 5 * 2 * 12
    assert [call.args[0] for call in watch.round.call_args_list] == rounds
    assert [call.args[0] for call in watch.note.call_args_list] == chance_notes(rounds)


def test_one_shot(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    rounds = run_search(make_recipe({"prune.rounds": 1, "prune.fraction": 0.9}), make_task(), tmp_path / "run")
    assert len(rounds) == 2
    masks = load_file(tmp_path / "run/masks/01-0.safetensors")
    assert [int(mask.sum()) for mask in masks.values()] == [192 - 173, 192 - 173, 48 - 43]
    assert not (tmp_path / "run/masks/02-0.safetensors").exists()


@pytest.mark.parametrize(("until", "expected"), [(0.5, 2), (0.49, 3), (0.1, 7)])
def test_until_ends_with_the_first_round_at_or_below(
    until: float, expected: int, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Search, tmp_path: Path,
) -> None:  # fmt: skip
    """0.7 ** r: 0.7, 0.49, 0.343, ...; the counts round, 211 of 432 are left after two rounds."""
    recipe = make_recipe({"prune.until": until, "prune.rounds": None, "run.replicates": 1})
    rounds = run_search(recipe, make_task(), tmp_path / "run")
    assert len(rounds) - 1 == expected
    assert rounds[-1].remaining <= until < rounds[-2].remaining


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "magnitude": lambda trained, initial: trained.abs(),
    "movement": lambda trained, initial: (trained - initial).abs(),
    "magnitude_increase": lambda trained, initial: trained.abs() - initial.abs(),
    "large_init": lambda trained, initial: initial.abs(),
}


@pytest.mark.parametrize(
    ("name", "rewind"), [*((name, "0it") for name in FORMULAS), ("movement", "5it"), ("movement", "lr")]
)
def test_scores(
    name: str, rewind: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    spied: dict[str, tuple[Arm, Any]], tmp_path: Path,
) -> None:  # fmt: skip
    """Of what was trained and, where they ask for it, the weights of the rewind point; of iteration 0 with lr."""
    recipe = make_recipe({"prune.score": name, "prune.rewind": rewind})
    run_search(recipe, make_task(), tmp_path / "run", score=SCORES[name])
    for round, replicate in ((0, 0), (0, 1), (2, 0), (2, 1)):
        start = load_file(tmp_path / f"run/init/{'00-' if rewind == 'lr' else ''}{replicate}.safetensors")
        arm, outcome = spied[f"round {round}, replicate {replicate}"]
        found = load_file(tmp_path / f"run/masks/{round + 1:02}-{replicate}.safetensors")
        for parameter, mask in found.items():
            old = arm.masks.get(parameter, torch.ones_like(mask))
            scores = FORMULAS[name](outcome.final[parameter], start[parameter])
            assert torch.equal(mask, highest(scores, old, 0.3)), parameter


def test_the_random_score_is_drawn_anew_for_each_replicate_and_repeatable(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    recipe = make_recipe({"prune.score": "random"})
    for name in ("one", "other"):
        run_search(recipe, make_task(), tmp_path / name, score=SCORES["random"])
    assert tree(tmp_path / "one") == tree(tmp_path / "other")
    a, b = (load_file(tmp_path / f"one/masks/01-{replicate}.safetensors")["fc1.weight"] for replicate in range(2))
    both = int((a & b).sum())
    assert int(a.sum()) == int(b.sum()) == 192 - 58
    assert 75 < both < 112  # 134 * 134 / 192 = 93.5 by chance, standard deviation 3.1


def test_a_score_that_is_not_finite_ends_the_search(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    with pytest.raises(TicketfindError, match=r"score of fc1\.weight: expected finite numbers"):
        endless = by_function(lambda t, i: {n: w / 0 for n, w in t.items()})
        run_search(make_recipe(), make_task(), tmp_path / "run", endless)


# --------------------------------------------------------------------------------------------- rewinding


@pytest.mark.parametrize("way", ["eager", pytest.param("processes", marks=linux)])
@pytest.mark.parametrize(("rewind", "k"), [("0it", 0), ("5it", 5), ("6it", 6)])
def test_survivors_start_from_the_bits_of_iteration_k(
    rewind: str, k: int, way: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Search, spied: dict[str, tuple[Arm, Any]], tmp_path: Path,
) -> None:  # fmt: skip
    """Weights, running statistics and num_batches_tracked, each replicate its own, in every round."""
    task = make_task("normed")
    recipe = make_recipe({"prune.rewind": rewind, "run.engine": way})
    run_search(recipe, task, tmp_path / "run")
    expected = []
    for replicate in range(2):
        start = task.start(5 + replicate)
        if k:  # an independent dense training that ends at k; the learning rates up to there are the same
            ((_, outcome),) = fit([Arm("short", start, {}, 5 + replicate)], task, recipe.train, way=EAGER, keep_at=k)
            assert outcome.kept is not None
            start = outcome.kept
        expected.append(start)
        assert int(start["norm.num_batches_tracked"]) == k
    assert not torch.equal(expected[0]["fc1.weight"], expected[1]["fc1.weight"])
    assert torch.equal(expected[0]["norm.running_mean"], expected[1]["norm.running_mean"]) is (k == 0)
    for replicate in range(2):
        assert same(load_file(tmp_path / f"run/init/{replicate}.safetensors"), expected[replicate])
        for round in range(1, 4):
            arm, outcome = spied[f"round {round}, replicate {replicate}"]
            assert same(arm.start, expected[replicate])
            assert (arm.first, arm.seed) == (k, 5 + replicate)
            assert same(arm.masks, load_file(tmp_path / f"run/masks/{round:02}-{replicate}.safetensors"))
            assert all(bool((outcome.final[name][~mask] == 0).all()) for name, mask in arm.masks.items())
            assert int(outcome.final["norm.num_batches_tracked"]) == 12
    assert {path.name for path in (tmp_path / "run/init").iterdir()} == {"0.safetensors", "1.safetensors"}


def test_learning_rate_rewinding_goes_on_from_the_trained_weights(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    spied: dict[str, tuple[Arm, Any]], tmp_path: Path,
) -> None:  # fmt: skip
    """Each round starts from the last one's final weights and buffers, with the schedule from its beginning."""
    run_search(make_recipe({"prune.rewind": "lr"}), make_task("normed"), tmp_path / "run")
    for replicate in range(2):
        for round in range(1, 4):
            arm, _ = spied[f"round {round}, replicate {replicate}"]
            _, before = spied[f"round {round - 1}, replicate {replicate}"]
            assert same(arm.start, before.final)
            assert same(load_file(tmp_path / f"run/init/{round:02}-{replicate}.safetensors"), before.final)
            assert arm.first == 0
            assert int(arm.start["norm.num_batches_tracked"]) == 12 * round


@pytest.mark.parametrize(("rewind", "iteration"), [("0it", 0), ("5it", 5), ("lr", 0)])
def test_sigma_is_that_of_the_initialization_wherever_the_tickets_start(
    rewind: str, iteration: int, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Search, tmp_path: Path,
) -> None:  # fmt: skip
    task = make_task()
    run_search(make_recipe({"prune.rewind": rewind}), task, tmp_path / "run")
    for ticket in contents.tickets(RunDir(tmp_path / "run"), 2):
        initial = task.start(5 + ticket.about.replicate)
        expected = {name: float(np.std(initial[name].double().numpy())) for name in ticket.masks}
        assert ticket.about.sigma == pytest.approx(expected) and ticket.about.iteration == iteration


def test_a_checkpoint_is_iteration_zero(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    """Given weights are where every replicate starts and goes back to; sigma is theirs."""
    given = {"fc1.weight": torch.randn(16, 12, generator=torch.Generator().manual_seed(0)) * 0.37}
    task = make_task(given=given)
    run_search(make_recipe(), task, tmp_path / "run")
    for replicate in range(2):
        start = load_file(tmp_path / f"run/init/{replicate}.safetensors")
        assert torch.equal(start["fc1.weight"], given["fc1.weight"])
        assert torch.equal(start["fc2.weight"], task.fresh(5 + replicate)["fc2.weight"])
    sigma = load_ticket(tmp_path / "run/ticket.safetensors").about.sigma
    assert sigma["fc1.weight"] == pytest.approx(float(np.std(given["fc1.weight"].double().numpy())))


def test_rewinding_to_the_training_that_is_restarted(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    """From the kept state at k, the dense training ends in the bits of the one that was never stopped."""
    task = make_task("normed")
    recipe = make_recipe({"prune.rewind": "5it", "train.momentum": 0})
    run_search(recipe, task, tmp_path / "run")
    kept = load_file(tmp_path / "run/init/0.safetensors")
    arms = [Arm("whole", task.start(5), {}, 5), Arm("rest", kept, {}, 5, first=5)]
    (_, whole), (_, rest) = fit(arms, task, recipe.train, way=EAGER)
    assert same(whole.final, rest.final)


# ------------------------------------------------------------------------------------------------ resume


class Stop(KeyboardInterrupt):
    pass


def stopping(*, after_round: int | None = None, after_iterations: int | None = None) -> Mock:
    """A watch that interrupts once, as Ctrl-C does."""
    watch = Mock(spec_set=["begin", "tick", "skip", "round", "note"])
    left = after_iterations

    def tick(iterations: int) -> None:
        nonlocal left
        if left is not None:
            left -= iterations
            if left < 0:
                raise Stop

    def round(finished: results.Round) -> None:
        if finished.round == after_round:
            raise Stop

    watch.tick.side_effect = tick
    watch.round.side_effect = round
    return watch


def ticks(watch: Mock) -> int:
    """Iterations that a watch was told of."""
    return sum(call.args[0] for call in watch.tick.call_args_list)


@pytest.mark.parametrize(
    ("where", "rewind", "way"),
    [
        *itertools.product(
            [{"after_round": 0}, {"after_round": 2}, {"after_round": 3}, {"after_iterations": 30}],
            ["0it", "5it", "lr"],
            ["eager"],
        ),
        pytest.param({"after_round": 0}, "5it", "processes", marks=linux),
        pytest.param({"after_iterations": 30}, "lr", "processes", marks=linux),
    ],
)
def test_a_search_that_was_stopped_ends_in_the_same_bytes(
    where: dict[str, int], rewind: str, way: str, make_task: Callable[..., Task],
    make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path,
) -> None:  # fmt: skip
    """Every file of the run: masks, weights, log, ticket, recipe."""
    recipe = make_recipe({"prune.rewind": rewind, "run.engine": way})
    run_search(recipe, make_task("normed"), tmp_path / "whole")
    first = stopping(**where)
    with pytest.raises(Stop):
        run_search(recipe, make_task("normed"), tmp_path / "stopped", watch=first)
    lines = len(log_of(tmp_path / "stopped"))
    assert not (tmp_path / "stopped/finished").exists()
    again = stopping()
    rounds = run_search(recipe, make_task("normed"), tmp_path / "stopped", watch=again)
    assert tree(tmp_path / "stopped") == tree(tmp_path / "whole")
    assert [call.args[0] for call in again.round.call_args_list] == rounds
    dense_and_pruned = [12, 12] + [12 - (5 if rewind == "5it" else 0)] * 6
    total, done = again.begin.call_args.args
    assert total == sum(dense_and_pruned) == done + ticks(again)
    assert done == ticks(first) if way == "eager" else done >= sum(dense_and_pruned[:lines])
    assert ("after_round" in where and lines == 2 * where["after_round"] + 2) or 0 < lines < 8
    assert [path for path in tree(tmp_path / "stopped") if path.startswith("state")] == []


def test_a_search_stopped_again_and_again_ends_in_the_same_bytes(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    """A process that never lives longer than a third of a training gets there, and does nothing twice."""
    run_search(make_recipe(), make_task("normed"), tmp_path / "whole")
    done = [0]
    while not (tmp_path / "run/finished").exists():
        watch = stopping(after_iterations=3)
        with suppress(Stop):
            run_search(make_recipe(), make_task("normed"), tmp_path / "run", watch=watch)
        assert watch.begin.call_args.args == (8 * 12, done[-1])
        done.append(done[-1] + ticks(watch))
    assert done[-1] == 8 * 12 and len(done) >= 8 * 12 / 7
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")


@pytest.mark.parametrize("way", ["eager", "stacked"])
@pytest.mark.parametrize("crash", ["before the log line", "in the log line", "before the mask", "before the ticket"])
def test_a_search_that_crashed_ends_in_the_same_bytes(
    crash: str, way: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """Between two replicates that are trained together, too: they are trained together again."""
    recipe = make_recipe({"prune.rewind": "lr", "run.engine": way, "run.arms_at_once": 2})
    run_search(recipe, make_task(), tmp_path / "whole")
    appended = 0

    def append(run: RunDir, entry: dict[str, Any]) -> None:
        nonlocal appended
        appended += 1
        if appended == 4:
            if crash == "in the log line":
                with (run.path / "log.jsonl").open("a") as log:
                    log.write(json.dumps(entry)[:-20])
            raise Stop
        original(run, entry)

    def save(path: Path, *args: Any, **more: Any) -> None:
        if path.match("masks/02-1.*"):
            raise Stop
        saved(path, *args, **more)

    def finish(run: RunDir) -> None:
        (run.path / "ticket.safetensors").unlink()
        raise Stop

    original, saved = RunDir.append, keeping.save_tensors
    with monkeypatch.context() as patch:
        if crash == "before the mask":
            patch.setattr(keeping, "save_tensors", save)
        elif crash == "before the ticket":
            patch.setattr(RunDir, "finish", finish)
        else:
            patch.setattr(RunDir, "append", append)
        with pytest.raises(Stop):
            run_search(recipe, make_task(), tmp_path / "crashed")
    run_search(recipe, make_task(), tmp_path / "crashed")
    assert tree(tmp_path / "crashed") == tree(tmp_path / "whole")


@linux
def test_the_way_leaves_the_same_files_but_for_its_own_name(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    for way in ("eager", "processes"):
        run_search(make_recipe({"run.engine": way}), make_task("normed"), tmp_path / way)
    eager, processes = tree(tmp_path / "eager"), tree(tmp_path / "processes")
    assert eager.keys() == processes.keys()
    assert {name for name in eager if eager[name] != processes[name]} == {"recipe.yaml", "ticket.safetensors"}


def test_a_first_training_that_fails_leaves_nothing(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    with pytest.raises(
        TicketfindError,
        match="every replicate failed; the last: round 0, replicate 1: the loss is not finite at iteration",
    ):
        run_search(make_recipe({"train.lr": 1e30}), make_task(), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs/latest").is_symlink()


def test_a_later_training_that_fails_leaves_the_finished_ones(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    poisoned = False

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        assert not poisoned, "no more"
        return F.cross_entropy(outputs, targets)

    def round(finished: results.Round) -> None:
        nonlocal poisoned
        poisoned = finished.round == 1

    watch = stopping()
    watch.round.side_effect = round
    with pytest.raises(TicketfindError, match=r"^round 2, replicate 0: training failed: .*no more"):
        run_search(make_recipe(), make_task(loss=loss), tmp_path / "run", watch=watch)
    assert len(log_of(tmp_path / "run")) == 4
    run_search(make_recipe(), make_task(), tmp_path / "run")
    run_search(make_recipe(), make_task(), tmp_path / "whole")
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")


# -------------------------------------------------------------------------------------------- collapse


def spare_all_but_fc2(trained: Any, initial: Any) -> dict[str, Tensor]:
    """Under one ranking, the second layer goes first."""
    return {name: w.abs() + (0 if name == "fc2.weight" else 100) for name, w in trained.items()}


class Shortcut(nn.Module):
    """[b, 12] -> [b, 4], with 432 weights as the mlp; connected without fc2."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        return self.fc3(x + F.relu(self.fc2(x)))


COLLAPSE = {"prune.scope": "global", "prune.fraction": 0.5, "prune.rounds": 1}


def test_an_emptied_layer_that_disconnects_is_an_error_at_once(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, watch: Mock, tmp_path: Path
) -> None:
    with pytest.raises(TicketfindError) as caught:
        run_search(make_recipe(COLLAPSE), make_task(), tmp_path / "run", by_function(spare_all_but_fc2))
    assert str(caught.value).startswith(
        "round 1, replicate 0: no weight is left in fc2.weight, and the output no longer depends on the input"
    )
    assert "allow_collapse=true" in str(caught.value)
    assert len(log_of(tmp_path / "run")) == 2  # the dense trainings are kept, round 1 was never begun
    assert sum(call.args[0] for call in watch.tick.call_args_list) == 24


@pytest.mark.parametrize(("net", "allowed"), [("mlp", True), (Shortcut, False)])
def test_an_emptied_layer_is_reported_where_it_is_allowed_or_harmless(
    net: Any, allowed: bool, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Search, watch: Mock, tmp_path: Path,
) -> None:  # fmt: skip
    recipe = make_recipe({**COLLAPSE, "prune.allow_collapse": allowed})
    rounds = run_search(recipe, make_task(net), tmp_path / "run", by_function(spare_all_but_fc2))
    assert len(rounds) == 2
    assert [call.args[0] for call in watch.note.call_args_list] == [
        *(f"round 1, replicate {replicate}: no weight is left in fc2.weight" for replicate in range(2)),
        *chance_notes(rounds),
    ]
    assert len(chance_notes(rounds)) == (net == "mlp")
    assert not load_file(tmp_path / "run/masks/01-0.safetensors")["fc2.weight"].any()
    if net == "mlp":  # a constant output is right as often as its class is there
        assert rounds[1].stats.accuracy_end.values == (0.25, 0.25)


# --------------------------------------------------------------------------------- what a run holds


@pytest.fixture
def finished(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> tuple[RunDir, list[results.Round], Task]:
    task = make_task("normed")
    rounds = run_search(make_recipe({"prune.rewind": "5it"}), task, tmp_path / "run")
    return RunDir(tmp_path / "run"), rounds, task


def test_the_ticket_is_the_sparsest_matching_round(finished: tuple[RunDir, list[results.Round], Task]) -> None:
    """With a tolerance of 100 points that is the last; of its replicates the one of the lowest validation loss."""
    run, rounds, task = finished
    losses = [line["validation_loss"] for line in run.log() if line["round"] == 3]
    best = int(np.argmin(losses))
    ticket = load_ticket(run.ticket_file)
    assert same(ticket.masks, load_file(run.mask_file(3, best)))
    assert same(ticket.init, load_file(run.start_file(best)))
    about = ticket.about
    assert (about.round, about.replicate, about.iteration) == (3, best, 5)
    assert about.recipe == run.recipe().plain()
    assert about.claims == json.loads(json.dumps({"dense": rounds[0].stats.json(), "ticket": rounds[3].stats.json()}))
    initial = task.start(5 + best)  # sigma is that of the initialization, not of the rewind point
    assert about.sigma == {
        name: pytest.approx(float(np.std(initial[name].double().numpy()))) for name in ("fc1.weight", "fc2.weight")
    }
    assert about.versions["torch"] == torch.__version__


def test_no_round_matches(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    """Nothing but chance is left of a network without weights: no ticket, and the run is finished all the same."""
    recipe = make_recipe({**COLLAPSE, "prune.allow_collapse": True, "run.tolerance": 0, "train.lr": 0.2})
    rounds = run_search(recipe, make_task(), tmp_path / "run", by_function(spare_all_but_fc2))
    assert rounds[0].stats.accuracy_early.mean > 0.4
    assert [round.matching for round in rounds] == [True, False]
    run = RunDir(tmp_path / "run")
    assert run.is_finished and not run.ticket_file.exists()
    with pytest.raises(TicketfindError, match="expected a winner, found no matching one in 2 finished rounds"):
        contents.chosen(run, None)


def test_tickets_are_one_for_each_replicate(finished: tuple[RunDir, list[results.Round], Task]) -> None:
    run, _, _ = finished
    found = contents.tickets(run, 2)
    assert [(ticket.about.round, ticket.about.replicate) for ticket in found] == [(2, 0), (2, 1)]
    for replicate, ticket in enumerate(found):
        assert same(ticket.masks, load_file(run.mask_file(2, replicate)))
        assert same(ticket.init, load_file(run.start_file(replicate)))
        assert ticket.first_seed == 5 + replicate


def test_learning_rate_rewound_tickets_start_where_their_round_did(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    run_search(make_recipe({"prune.rewind": "lr"}), make_task(), tmp_path / "run")
    run = RunDir(tmp_path / "run")
    for round in (1, 3):
        ticket = contents.load(run, round, 1)
        assert same(ticket.init, load_file(tmp_path / f"run/init/{round:02}-1.safetensors"))
        assert ticket.about.iteration == 0


@pytest.mark.parametrize(
    ("round", "replicate", "text"),
    [
        (0, 0, "round: expected 1 to 3.*found 0"),
        (4, 0, "round: expected 1 to 3.*found 4"),
        (1, 2, "replicate: expected one of 0, 1, found 2"),
        (1, -1, "replicate: expected one of 0, 1, found -1"),
    ],
)
def test_rounds_and_replicates_that_a_run_does_not_hold(
    round: int, replicate: int, text: str, finished: tuple[RunDir, list[results.Round], Task]
) -> None:
    with pytest.raises(TicketfindError, match=text):
        contents.load(finished[0], round, replicate)


def test_a_file_of_the_run_that_is_damaged_is_named(finished: tuple[RunDir, list[results.Round], Task]) -> None:
    run, _, _ = finished
    file = run.mask_file(2, 1)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(TicketfindError, match=r"mask .*masks/02-1\.safetensors: expected a safetensors file"):
        contents.load(run, 2, 1)


# ---------------------------------------------------------------------------------------------- the plan


def test_the_plan_is_what_the_search_does(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search, tmp_path: Path
) -> None:
    task, recipe = make_task("normed"), make_recipe({"prune.rewind": "5it"})
    plan = planning.make_plan(recipe, task.model)
    rounds = run_search(recipe, task, tmp_path / "run")
    assert [kept / plan.kept[0] for kept in plan.kept] == [round.remaining for round in rounds]
    assert plan.iterations == [12, 7, 7, 7]
    assert plan.shapes == {"fc1.weight": (16, 12), "fc2.weight": (4, 16)}
    files = sum(len(content) for name, content in tree(tmp_path / "run").items() if name.endswith("safetensors"))
    assert plan.disk < files < plan.disk + 10 * 4096  # headers and buffers come on top


@pytest.mark.parametrize(
    "settings",
    [
        {"prune.rewind": "lr"},
        {"prune.every": 3},
        {"prune.ahead": [2], "prune.finetune": 4},
        {"prune.mask_iterations": 5, "prune.rewind": "lr"},
        {"prune.mask_iterations": 5, "prune.rewind": "4it", "prune.ahead": [2, 1], "prune.rounds": 5},
    ],
)
def test_the_plan_counts_what_every_kind_of_search_does(
    settings: dict[str, Any], make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    watch: Mock, tmp_path: Path,
) -> None:  # fmt: skip
    task, recipe = make_task(), make_recipe(settings)
    plan = planning.make_plan(recipe, task.model)
    run_search(recipe, task, tmp_path / "run")
    assert sum(call.args[0] for call in watch.tick.call_args_list) == 2 * plan.total
    held = [tensor for file in (tmp_path / "run").rglob("*.safetensors") for tensor in load_file(file).values()]
    assert plan.disk == sum(tensor.numel() * tensor.element_size() for tensor in held)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"prune.skip": ["*.weight"]}, "expected a parameter to prune, found none"),
        ({"prune.fraction": 0.001}, "expected to prune a weight in the first round, found that it prunes none"),
        ({"prune.fraction": {"conv*": 0.2}}, r"prune\.fraction: 'conv\*' matches no"),
        ({"prune.only": ["head.*"]}, r"prune\.only: 'head\.\*' matches no"),
    ],
)
def test_a_search_that_would_prune_nothing_is_refused(
    settings: dict[str, Any], text: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(TicketfindError, match=text):
        planning.make_plan(make_recipe(settings), make_task().model)


def test_memory_counts_the_trainings_that_run_at_once(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe]
) -> None:
    model = make_task().model
    one, four, many = (
        planning.make_plan(make_recipe({"run.arms_at_once": most, "run.replicates": replicates}), model).memory
        for most, replicates in ((1, 50), (4, 50), (9, 4))
    )
    parameters = sum(p.numel() for p in model.parameters())
    assert one == 4 * (3 * parameters + 432)  # weights, gradients, momentum; masks as numbers
    assert four == many == 4 * one
