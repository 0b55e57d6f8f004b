"""What evaluations train, draw and say: against the search itself, against numpy, against figures made by hand."""

import copy
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ticketfind import TicketfindError, contents, experiments, masks, results
from ticketfind.arms import Arm, Outcome, Task
from ticketfind.batches import Split
from ticketfind.devices import EAGER, Way
from ticketfind.experiments import Design, Evaluation, default_trials, noisy, unseen_seed
from ticketfind.recipe import Recipe, Run, Train
from ticketfind.rundir import RunDir
from ticketfind.ticket import Ticket, load_ticket
from ticketfind.train import fit
from ticketfind.verdict import verdict

WAYS = [
    "eager",
    pytest.param("processes", marks=pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")),
]


def evaluate(tickets: list[Ticket], task: Task, how: Train, *, seeds: Any, **more: Any) -> Evaluation:
    """`tickets`, one or as many as seeds, each trained as often as there are seeds for it."""
    asked = {name: more.pop(name) for name in ("noise", "weight_noise", "extras", "trained") if name in more}
    design = Design(tickets=tickets, trials=len(seeds) // len(tickets), **asked)
    return experiments.evaluate(design, task, how, first_seed=seeds[0], **more)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Wide(nn.Module):
    """[b, 12] -> [b, 4], with enough weights for statistics; the layers' scales differ."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 900), nn.Linear(900, 60), nn.Linear(60, 4)
        nn.init.normal_(self.fc1.weight, std=1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


# ----------------------------------------------------------------------------- against the search itself


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("net", "rewind"), [("mlp", "0it"), ("normed", "5it"), ("normed", "lr"), ("tied", "0it")])
def test_the_tickets_arm_is_the_searchs_round_again(
    net: str, rewind: str, way: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Callable[..., list[results.Round]], tmp_path: Path,
) -> None:  # fmt: skip
    """On the run's own seeds every figure comes out the same; the dense arm is round 0."""
    recipe = make_recipe({"prune.rewind": rewind, "run.engine": way})
    rounds = run_search(recipe, make_task(net), tmp_path / "run")
    tickets = contents.tickets(RunDir(tmp_path / "run"), 2)
    found = evaluate(tickets, make_task(net), recipe.train, seeds=[5, 6], way=Way(way, at_once=8))
    assert found.arms["ticket"] == rounds[2].stats
    assert found.remaining == rounds[2].remaining
    assert found.arms["dense"] == rounds[0].stats
    assert list(found.arms) == ["dense", "ticket", "reinit", "random"]
    assert [note.split(":")[0] for note in found.notes if "chance level" not in note] == (
        ["dense and random start from a fresh initialization"] if rewind == "lr" else []
    )


def test_a_file_gives_what_the_run_gives(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Callable[..., list[results.Round]], tmp_path: Path,
) -> None:  # fmt: skip
    """Noise, fresh weights and random masks are drawn alike for a ticket in memory and one that was exported."""
    recipe = make_recipe({"run.replicates": 1})
    run_search(recipe, make_task(), tmp_path / "run")
    ticket = contents.load(RunDir(tmp_path / "run"), 3, 0)
    ticket.save(tmp_path / "t.safetensors")
    from_run, from_file = (
        evaluate([each], make_task(), recipe.train, seeds=[5, 6], way=EAGER, noise=[1.0])
        for each in (ticket, load_ticket(tmp_path / "t.safetensors"))
    )
    assert from_run == from_file


# ------------------------------------------------------------------------------------------- the arms


def test_what_each_arm_starts_from(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket],
    trained_arms: dict[str, Arm],
) -> None:  # fmt: skip
    task = make_task("normed")
    tickets = [make_ticket(task, seed=seed, iteration=4) for seed in (7, 8)]
    ticks, total = list[int](), list[int]()
    found = evaluate(
        tickets, task, make_train(), seeds=[7, 8], way=EAGER, noise=[0.5, 2.0], tick=ticks.append, begin=total.append
    )
    noisy_ones = ["noise=0.5", "dense noise=0.5", "noise=2", "dense noise=2"]
    assert list(found.arms) == ["dense", "ticket", *noisy_ones, "reinit", "random"]
    assert all(stats.replicates == 2 for stats in found.arms.values())
    assert len(trained_arms) == Design(tickets=tickets, trials=1, noise=[0.5, 2.0]).trainings == 16
    assert sum(ticks) == 2 * (4 * 8 + 4 * 12)  # from iteration 4 but for fresh weights, which know no training
    assert total == [sum(ticks)]
    for ticket, seed in zip(tickets, (7, 8), strict=True):
        arms = {name: trained_arms[f"{name}, seed {seed}"] for name in found.arms}
        assert {arm.seed for arm in arms.values()} == {seed}
        assert [arms[name].first for name in found.arms] == [0, 4, 4, 0, 4, 0, 0, 4]
        assert all(arms[name].masks == {} for name in arms if name.startswith("dense"))
        assert same(arms["dense"].start, task.fresh(ticket.first_seed)), "the whole training, as round 0"
        assert all(same(arms[name].start, ticket.init) for name in ("ticket", "random"))
        for name in ("ticket", "noise=0.5", "noise=2", "reinit"):
            assert same(arms[name].masks, ticket.masks), name
        fresh, drawn = arms["reinit"].start, arms["random"].masks
        assert fresh.keys() == ticket.init.keys()
        for name, mask in ticket.masks.items():
            survivors = (fresh[name] == ticket.init[name])[mask]
            assert not survivors.any()
            assert fresh[name].std() == pytest.approx(float(ticket.init[name].std()), rel=0.2)
            assert drawn[name].sum() == mask.sum() and not torch.equal(drawn[name], mask)
    for name in ("reinit", "random"):
        one, other = (trained_arms[f"{name}, seed {seed}"] for seed in (7, 8))
        assert not torch.equal(one.start["fc1.weight"], other.start["fc1.weight"])
        assert name == "reinit" or not torch.equal(one.masks["fc1.weight"], other.masks["fc1.weight"])


def test_one_ticket_is_tried_with_every_seed(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket],
    trained_arms: dict[str, Arm],
) -> None:  # fmt: skip
    task = make_task()
    ticket = make_ticket(task)
    found = evaluate([ticket], task, make_train(), seeds=range(3), way=EAGER, noise=[1.0])
    assert all(stats.replicates == 3 for stats in found.arms.values())
    for seed in range(3):
        assert same(trained_arms[f"ticket, seed {seed}"].start, ticket.init)
    draws = [trained_arms[f"{kind}, seed {seed}"] for kind in ("noise=1", "reinit") for seed in range(3)]
    assert len({float(arm.start["fc1.weight"].sum()) for arm in draws}) == 6
    drawn = [trained_arms[f"random, seed {seed}"].masks["fc1.weight"] for seed in range(3)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


def test_all_arms_are_trained_together(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls = []

    def spy(arms: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        calls.append(len(arms))
        return fit(arms, *args, **kwargs)

    monkeypatch.setattr(experiments, "fit", spy)
    task = make_task()
    evaluate([make_ticket(task)], task, make_train(iterations=2), seeds=range(2), way=EAGER, noise=[0.5])
    assert calls == [12]


# ---------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("level", [0.5, 1.0, 3.0])
def test_noise_has_the_standard_deviation_asked_for_layer_by_layer(
    level: float, make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]
) -> None:
    """Empirically, within four standard errors; biases and everything else unmasked stay as they are."""
    ticket = make_ticket(make_task(Wide))
    state = noisy(ticket, level, seed=3, weights=ticket.init)
    assert len({round(sigma, 3) for sigma in ticket.about.sigma.values()}) == 3
    for name, value in state.items():
        added = (value - ticket.init[name]).double().numpy()
        if name in ticket.masks:
            expected = level * float(np.std(ticket.init[name].double().numpy()))
            assert added.std() == pytest.approx(expected, rel=4 / (2 * added.size) ** 0.5), name
            assert abs(added.mean()) < 4 * expected / added.size**0.5, name
            correlation = np.corrcoef(added.flatten(), ticket.init[name].numpy().flatten())[0, 1]
            assert abs(correlation) < 4 / added.size**0.5, name
        else:
            assert torch.equal(value, ticket.init[name]), name


def test_noise_uses_the_sigma_of_the_initialization_not_of_the_rewind_point(
    make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]
) -> None:
    ticket = make_ticket(make_task(Wide))
    about = dataclasses.replace(ticket.about, sigma={**ticket.about.sigma, "fc2.weight": 10.0})
    state = noisy(dataclasses.replace(ticket, about=about), 1.0, seed=0, weights=ticket.init)
    assert float((state["fc2.weight"] - ticket.init["fc2.weight"]).std()) == pytest.approx(10.0, rel=0.02)


def test_levels_scale_one_draw_and_seeds_draw_anew(
    make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]
) -> None:
    ticket = make_ticket(make_task(Wide))
    one, twice, other = (
        noisy(ticket, level, seed, weights=ticket.init)["fc1.weight"] - ticket.init["fc1.weight"]
        for level, seed in ((1.0, 0), (2.0, 0), (1.0, 1))
    )
    torch.testing.assert_close(2 * one, twice, rtol=1e-4, atol=1e-5)
    assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.04


def test_no_noise_is_the_ticket(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    task = make_task("normed")
    ticket = make_ticket(task)
    assert same(noisy(ticket, 0.0, seed=3, weights=ticket.init), ticket.init)
    found = evaluate([ticket], task, make_train(), seeds=[0, 1], way=EAGER, noise=[0.0])
    assert found.arms["noise=0"] == found.arms["ticket"]


def test_noise_reaches_tied_weights(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    task = make_task("tied")
    found = evaluate([make_ticket(task)], task, make_train(), seeds=[0, 1], way=EAGER, noise=[0.0, 5.0])
    assert found.arms["noise=5"] != found.arms["noise=0"]


@pytest.mark.parametrize("sigma", [{}, {"fc1.weight": "large"}, {"fc1.weight": None}])
def test_noise_needs_sigma(
    sigma: dict[str, Any], make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]
) -> None:
    ticket = make_ticket(make_task())
    broken = dataclasses.replace(ticket, about=dataclasses.replace(ticket.about, sigma=sigma))
    with pytest.raises(TicketfindError, match=r"sigma: expected a number for fc1\.weight"):
        noisy(broken, 0.5, seed=0, weights=broken.init)


def test_noise_on_trained_weights_is_measured_and_not_trained(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket],
    trained_arms: dict[str, Arm],
) -> None:  # fmt: skip
    """Against a training and an evaluation by hand."""
    task, how = make_task(), make_train()
    ticket = make_ticket(task)
    found = evaluate([ticket], task, how, seeds=[3, 4], way=EAGER, weight_noise=[0.0, 2.0])
    assert found.arms["weight-noise=0"].accuracy_early == found.arms["ticket"].accuracy_end
    assert found.arms["dense weight-noise=0"].accuracy_early == found.arms["dense"].accuracy_end
    assert len(trained_arms) == 8
    assert task.data is not None
    expected = []
    for seed in (3, 4):
        ((_, outcome),) = fit([trained_arms[f"ticket, seed {seed}"]], task, how, way=EAGER)
        assert isinstance(outcome, Outcome)
        model = copy.deepcopy(task.model)
        state = noisy(ticket, 2.0, seed, outcome.final)
        model.load_state_dict({n: v * ticket.masks[n] if n in ticket.masks else v for n, v in state.items()})
        inputs, targets = task.data.test.inputs, task.data.test.targets
        expected.append(float((model.eval()(inputs).argmax(1) == targets).float().mean()))
    assert found.arms["weight-noise=2"].accuracy_early.values == pytest.approx(expected)


def test_noise_on_trained_weights_is_measured_in_the_precision_of_the_trainings(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own, precisions = experiments.judge, []

    def judge(*args: Any, precision: str) -> Any:
        precisions.append(precision)
        return own(*args, precision=precision)

    monkeypatch.setattr(experiments, "judge", judge)
    task = make_task()
    way = Way(precision="bf16")
    evaluate([make_ticket(task)], task, make_train(), seeds=[3], way=way, weight_noise=[1.0])
    assert precisions == ["bf16", "bf16"]  # the ticket, the dense network


# -------------------------------------------------------------------------------------- further controls


def test_noise_on_trained_weights_reaches_tied_ones(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    """Under both names, as a network of plain PyTorch with the same weights says."""
    task, how = make_task("tied"), make_train(iterations=150, eval_every=150, lr=0.3)
    ticket = make_ticket(task, keep=0.6)
    found = evaluate([ticket], task, how, seeds=[4], way=EAGER, weight_noise=[0.7])
    arm = Arm("again", ticket.init, ticket.masks, 4)
    ((_, outcome),) = fit([arm], task, how)
    assert isinstance(outcome, Outcome) and task.data is not None and isinstance(task.data.test, Split)
    state = masks.masked(noisy(ticket, 0.7, 4, outcome.final), ticket.masks)
    state["decode.weight"] = state["encode.weight"]
    model = copy.deepcopy(task.model)
    model.load_state_dict(state)
    test = task.data.test
    right = model(test.inputs).argmax(1) == test.targets
    assert found.arms["weight-noise=0.7"].accuracy_end.mean == pytest.approx(float(right.float().mean()))
    assert found.arms["weight-noise=0.7"].accuracy_end.mean != found.arms["ticket"].accuracy_end.mean


@pytest.mark.parametrize("iteration", [0, 4])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_drawn_at_once_keep_the_highest_magnitudes(
    scope: str, iteration: int, make_task: Callable[..., Task], make_train: Callable[..., Train],
    make_ticket: Callable[..., Ticket], trained_arms: dict[str, Arm],
) -> None:  # fmt: skip
    """Of the trained weights, or of those of iteration 0 wherever the ticket starts."""
    task = make_task()
    ticket = make_ticket(task, iteration=iteration)
    initial = task.fresh(ticket.first_seed) if iteration else ticket.init
    trained = {name: torch.randn_like(value) for name, value in ticket.init.items()}
    groups = masks.make_groups([*ticket.masks], {"*": 0.2}, scope)
    extras = ["one-shot", "init-magnitude"]
    found = evaluate(
        [ticket], task, make_train(), seeds=[0, 1], way=EAGER, extras=extras, trained=[trained], groups=groups
    )
    assert list(found.arms) == ["dense", "ticket", "reinit", "random", *extras]
    for kind, weights in (("one-shot", trained), ("init-magnitude", initial)):
        arm = trained_arms[f"{kind}, seed 1"]
        assert same(arm.start, ticket.init) and arm.first == iteration
        assert masks.count(arm.masks) == masks.count(ticket.masks)
        for names in [[*ticket.masks]] if scope == "global" else [[name] for name in ticket.masks]:
            kept = np.concatenate([arm.masks[name].numpy().ravel() for name in names])
            ranks = np.concatenate([weights[name].abs().numpy().ravel() for name in names])
            assert kept.sum() == sum(int(ticket.masks[name].sum()) for name in names)
            assert ranks[kept].min() >= ranks[~kept].max()


def test_each_replicate_is_pruned_at_once_by_its_own_trained_weights(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket],
    trained_arms: dict[str, Arm],
) -> None:  # fmt: skip
    task = make_task()
    tickets = [make_ticket(task, seed=seed) for seed in (7, 8)]
    trained = [{name: torch.randn_like(value) for name, value in ticket.init.items()} for ticket in tickets]
    groups = masks.make_groups([*tickets[0].masks], {"*": 0.2}, "layer")
    settings: dict[str, Any] = {"extras": ["one-shot"], "trained": trained, "groups": groups}
    evaluate(tickets, task, make_train(iterations=2), seeds=range(4), way=EAGER, **settings)
    for seed in range(4):
        for name, kept in trained_arms[f"one-shot, seed {seed}"].masks.items():
            ranks = trained[seed % 2][name].abs()
            assert kept.sum() == tickets[seed % 2].masks[name].sum() and ranks[kept].min() >= ranks[~kept].max()


def test_one_shot_needs_the_dense_networks_trained_weights(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    task = make_task()
    found = evaluate([make_ticket(task)], task, make_train(), seeds=[0, 1], way=EAGER, extras=["one-shot"])
    assert "one-shot" not in found.arms
    assert "one-shot is left out: the dense network's trained weights are in a run, not in a ticket file" in found.notes


# ------------------------------------------------------------------------------------ trials and replicates


@pytest.mark.parametrize(("tickets", "is_run", "trials"), [(5, True, 2), (3, True, 4), (1, True, 1), (1, False, 10)])
def test_ten_trainings_of_each_arm_are_the_rule(tickets: int, is_run: bool, trials: int) -> None:
    assert default_trials(tickets, is_run) == trials


def test_the_first_trial_has_a_data_order_that_the_search_has_not_seen() -> None:
    assert unseen_seed(Run(seed=7, replicates=3)) == 10


def test_trials_of_one_replicate_count_as_one(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    """Ten trainings of two tickets are two observations: the means over each ticket's trials."""
    task = make_task()
    tickets = [make_ticket(task, seed=seed) for seed in (7, 8)]
    found = evaluate(tickets, task, make_train(), seeds=range(6), way=EAGER)
    assert found.trials == 3
    for kind in ("ticket", "random"):
        assert found.arms[kind].replicates == 2
    single = [evaluate([ticket], task, make_train(), seeds=range(6), way=EAGER) for ticket in tickets]
    for number, one in enumerate(single):
        own = one.arms["ticket"].accuracy_early.values[number::2]  # the seeds that this ticket was trained with
        assert found.arms["ticket"].accuracy_early.values[number] == pytest.approx(float(np.mean(own)))


# ---------------------------------------------------------------------------------------- left out arms


def test_a_model_whose_weights_ignore_the_seed_has_no_reinit(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    plain = make_task()
    weights = plain.fresh(0)
    task = make_task(fresh=lambda seed: dict(weights))
    found = evaluate([make_ticket(task)], task, make_train(), seeds=[0, 1], way=EAGER)
    assert list(found.arms) == ["dense", "ticket", "random"]
    assert found.notes[0] == "reinit is left out: the model's factory gives the same weights whatever the seed"
    assert found.verdict.text.startswith(("inconclusive", "not matching"))


def test_reinit_of_a_checkpoint_is_the_factorys_own_initialization(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket],
    trained_arms: dict[str, Arm],
) -> None:  # fmt: skip
    plain = make_task()
    task = make_task(given={name: torch.full_like(value, 0.1) for name, value in plain.fresh(0).items()})
    evaluate([make_ticket(task)], task, make_train(), seeds=[0], way=EAGER)
    assert bool((trained_arms["ticket, seed 0"].start["fc1.weight"] == 0.1).all())
    assert trained_arms["reinit, seed 0"].start["fc1.weight"].std() > 0.05


@pytest.mark.parametrize(
    ("model", "checkpoint"),
    [
        ({"checkpoint": None, "args": {"pretrained": False}}, False),
        ({"checkpoint": "net.pt"}, True),
        ({"checkpoint": None, "args": {"pretrained": True}}, True),
    ],
)
def test_dense_and_random_of_a_compact_ticket(
    model: dict[str, Any], checkpoint: bool, make_task: Callable[..., Task], make_train: Callable[..., Train],
    make_ticket: Callable[..., Ticket], tmp_path: Path,
) -> None:  # fmt: skip
    """They start afresh, or are left out where the weights were a checkpoint's; the others are the full ticket's."""
    task = make_task("normed")
    ticket = make_ticket(task)
    ticket.about.recipe["model"] = model
    ticket.save(tmp_path / "c", layout="compact")
    settings: dict[str, Any] = {"seeds": [0, 1], "way": EAGER, "noise": [0.5]}
    compact = evaluate([load_ticket(tmp_path / "c")], task, make_train(), **settings)
    full = evaluate([ticket], task, make_train(), **settings)
    own = ("ticket", "noise=0.5", "reinit")
    assert {name: compact.arms[name] for name in own} == {name: full.arms[name] for name in own}
    assert compact.arms.keys() - own == (set() if checkpoint else {"dense", "dense noise=0.5", "random"})
    how = "are left out" if checkpoint else "start from a fresh initialization"
    assert compact.notes == (f"dense and random {how}: a compact ticket no longer holds the pruned initial weights",)
    assert compact.verdict.text.startswith("inconclusive") or not checkpoint
    assert compact.remaining == full.remaining


# --------------------------------------------------------------------------------------------- bad input


def test_a_ticket_of_another_network_is_refused_before_any_training(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    ticks: list[int] = []
    with pytest.raises(TicketfindError, match=r"the ticket does not fit the model: norm\.weight is not in the ticket"):
        evaluate([make_ticket(make_task())], make_task("normed"), make_train(), seeds=[0], way=EAGER, tick=ticks.append)
    assert not ticks


@pytest.mark.parametrize("iteration", [12, 1000, -1])
def test_an_iteration_outside_the_training_is_refused(
    iteration: int, make_task: Callable[..., Task], make_train: Callable[..., Train],
    make_ticket: Callable[..., Ticket],
) -> None:  # fmt: skip
    ticket = make_ticket(make_task(), iteration=iteration)
    with pytest.raises(TicketfindError, match=f"iteration: expected 0 to 11, .* found {iteration}"):
        evaluate([ticket], make_task(), make_train(), seeds=[0], way=EAGER)


# --------------------------------------------------------------------------------------------- the verdict


def test_an_evaluation_says_what_its_figures_say(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    task = make_task()
    found = evaluate([make_ticket(task)], task, make_train(), seeds=[0, 1], way=EAGER, tolerance=100)
    assert isinstance(found, Evaluation)
    assert found.verdict == verdict(found.arms, found.remaining, tolerance=100, test_size=60)
    assert found.verdict.text.startswith(("winning", "matching but not special"))


def test_a_ticket_that_fails_to_train_is_left_out_and_counted(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    """One of three replicates starts from weights that nothing trains from: unequal replicates, and no "winning"."""
    task = make_task()
    tickets = [make_ticket(task, seed=seed) for seed in range(3)]
    huge = {name: value * 1e30 for name, value in tickets[1].init.items()}
    tickets[1] = dataclasses.replace(tickets[1], init=huge)
    ticked, skipped, total = list[int](), list[int](), list[int]()
    found = evaluate(
        tickets, task, make_train(), seeds=[0, 1, 2], way=EAGER, tolerance=1000, begin=total.append,
        tick=ticked.append, skip=skipped.append,
    )  # fmt: skip
    assert total == [sum(ticked) + sum(skipped)] == [3 * 4 * 12] and sum(skipped)
    assert {name: stats.replicates for name, stats in found.arms.items()} == {
        "dense": 2, "ticket": 2, "reinit": 3, "random": 2,
    }  # fmt: skip
    assert found.verdict.text.startswith("inconclusive") and "1 of its trainings failed" in found.verdict.text
    assert any(note.startswith("ticket, seed 1: the loss is not finite") for note in found.notes)


def test_of_failures_those_of_the_ticket_are_counted(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    """Behind a rewind point the dense networks start elsewhere, and none of them fails."""
    task = make_task()
    tickets = [make_ticket(task, seed=seed, iteration=4) for seed in range(3)]
    tickets[1] = dataclasses.replace(tickets[1], init={n: value * 1e30 for n, value in tickets[1].init.items()})
    found = evaluate(tickets, task, make_train(), seeds=[0, 1, 2], way=EAGER, tolerance=1000)
    assert (found.arms["dense"].replicates, found.arms["ticket"].replicates) == (3, 2)
    assert found.verdict.text.startswith("inconclusive") and "1 of its trainings failed" in found.verdict.text
