"""What evaluations train, draw and say: against the search itself, against numpy, against figures made by hand."""

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
from ticketfind.devices import EAGER, Way
from ticketfind.experiments import Evaluation, arm_count, difference, evaluate, noisy, verdict
from ticketfind.recipe import Recipe, Train
from ticketfind.results import Measured, Stats
from ticketfind.rundir import RunDir
from ticketfind.ticket import Ticket, load_ticket
from ticketfind.train import Arm, Task, fit

WAYS = [
    "eager",
    pytest.param("processes", marks=pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")),
]


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


@pytest.fixture
def trained_arms(monkeypatch: pytest.MonkeyPatch) -> dict[str, Arm]:
    """The arms of an evaluation, by name."""
    seen: dict[str, Arm] = {}

    def spy(arms: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        seen.update({arm.name: arm for arm in arms})
        return fit(arms, *args, **kwargs)

    monkeypatch.setattr(experiments, "fit", spy)
    return seen


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
    ticks: list[int] = []
    found = evaluate(tickets, task, make_train(), seeds=[7, 8], way=EAGER, noise=[0.5, 2.0], tick=ticks.append)
    assert list(found.arms) == ["dense", "ticket", "noise=0.5", "noise=2", "reinit", "random"]
    assert all(stats.replicates == 2 for stats in found.arms.values())
    assert len(trained_arms) == arm_count(2, [0.5, 2.0]) == 12
    assert sum(ticks) == 2 * (4 * 8 + 2 * 12)  # from iteration 4 but for fresh weights, which know no training
    for ticket, seed in zip(tickets, (7, 8), strict=True):
        arms = {name: trained_arms[f"{name}, seed {seed}"] for name in found.arms}
        assert {arm.seed for arm in arms.values()} == {seed}
        assert [arms[name].first for name in found.arms] == [0, 4, 4, 4, 0, 4]
        assert arms["dense"].masks == {}
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
    assert calls == [10]


# ---------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("level", [0.5, 1.0, 3.0])
def test_noise_has_the_standard_deviation_asked_for_layer_by_layer(
    level: float, make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]
) -> None:
    """Empirically, within four standard errors; biases and everything else unmasked stay as they are."""
    ticket = make_ticket(make_task(Wide))
    state = noisy(ticket, level, seed=3)
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
    state = noisy(dataclasses.replace(ticket, about=about), 1.0, seed=0)
    assert float((state["fc2.weight"] - ticket.init["fc2.weight"]).std()) == pytest.approx(10.0, rel=0.02)


def test_levels_scale_one_draw_and_seeds_draw_anew(
    make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]
) -> None:
    ticket = make_ticket(make_task(Wide))
    one, twice, other = (
        noisy(ticket, level, seed)["fc1.weight"] - ticket.init["fc1.weight"]
        for level, seed in ((1.0, 0), (2.0, 0), (1.0, 1))
    )
    torch.testing.assert_close(2 * one, twice, rtol=1e-4, atol=1e-5)
    assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.04


def test_no_noise_is_the_ticket(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    task = make_task("normed")
    ticket = make_ticket(task)
    assert same(noisy(ticket, 0.0, seed=3), ticket.init)
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
        noisy(broken, 0.5, seed=0)


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
    assert found.verdict.startswith(("inconclusive", "not matching"))


def test_reinit_of_a_checkpoint_is_the_factorys_own_initialization(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket],
    trained_arms: dict[str, Arm],
) -> None:  # fmt: skip
    plain = make_task()
    task = make_task(given={name: torch.full_like(value, 0.1) for name, value in plain.fresh(0).items()})
    evaluate([make_ticket(task)], task, make_train(), seeds=[0], way=EAGER)
    assert bool((trained_arms["ticket, seed 0"].start["fc1.weight"] == 0.1).all())
    assert trained_arms["reinit, seed 0"].start["fc1.weight"].std() > 0.05


@pytest.mark.parametrize("checkpoint", [None, "net.pt"])
def test_dense_and_random_of_a_compact_ticket(
    checkpoint: str | None, make_task: Callable[..., Task], make_train: Callable[..., Train],
    make_ticket: Callable[..., Ticket], tmp_path: Path,
) -> None:  # fmt: skip
    """They start afresh, or are left out where the weights were a checkpoint's; the others are the full ticket's."""
    task = make_task("normed")
    ticket = make_ticket(task)
    ticket.about.recipe["model"] = {"checkpoint": checkpoint}
    ticket.save(tmp_path / "c", layout="compact")
    settings: dict[str, Any] = {"seeds": [0, 1], "way": EAGER, "noise": [0.5]}
    compact = evaluate([load_ticket(tmp_path / "c")], task, make_train(), **settings)
    full = evaluate([ticket], task, make_train(), **settings)
    own = ("ticket", "noise=0.5", "reinit")
    assert {name: compact.arms[name] for name in own} == {name: full.arms[name] for name in own}
    assert compact.arms.keys() - own == (set() if checkpoint else {"dense", "random"})
    how = "are left out" if checkpoint else "start from a fresh initialization"
    assert compact.notes == (f"dense and random {how}: a compact ticket no longer holds the pruned initial weights",)
    assert compact.verdict.startswith("inconclusive") or not checkpoint
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


def stats(*accuracies: float) -> Stats:
    return Stats.of(
        [Measured(early_stop=10, accuracy_early=a, accuracy_end=0.123, validation_loss=0.5) for a in accuracies]
    )


DENSE = stats(0.970, 0.975, 0.980)  # sd 0.005
HIGH = stats(0.969, 0.971, 0.973)
LOW = stats(0.90, 0.91, 0.92)


@pytest.mark.parametrize(
    ("arms", "tolerance", "expected"),
    [
        pytest.param({"dense": DENSE, "ticket": HIGH, "reinit": LOW, "random": LOW}, None, "winning", id="both below"),
        pytest.param(
            {"dense": DENSE, "ticket": HIGH, "reinit": HIGH, "random": LOW},
            None,
            "matching but not special",
            id="reinit matches too",
        ),
        pytest.param(
            {"dense": DENSE, "ticket": HIGH, "reinit": LOW, "random": DENSE},
            None,
            "matching but not special",
            id="random matches too",
        ),
        pytest.param({"dense": DENSE, "ticket": LOW, "reinit": LOW, "random": LOW}, None, "not matching", id="low"),
        pytest.param(
            {"dense": DENSE, "ticket": LOW, "reinit": LOW, "random": LOW},
            10,
            "matching but not special",
            id="a wide tolerance",
        ),
        pytest.param(
            {"dense": DENSE, "ticket": HIGH, "reinit": LOW, "random": LOW}, 0.1, "not matching", id="a narrow tolerance"
        ),
        pytest.param(
            {"dense": DENSE, "ticket": HIGH, "reinit": LOW, "random": stats(0.90, 0.97, 0.96)},
            None,
            "inconclusive",
            id="random is below, but scatters",
        ),
        pytest.param({"dense": DENSE, "ticket": HIGH, "random": LOW}, None, "inconclusive", id="no reinit"),
        pytest.param({"ticket": HIGH, "reinit": LOW}, None, "inconclusive", id="no dense"),
        pytest.param(
            {name: stats(0.97) for name in ("dense", "ticket", "reinit", "random")},
            None,
            "inconclusive",
            id="one trial",
        ),
        pytest.param(
            {"dense": stats(0.97), "ticket": stats(0.5), "reinit": stats(0.5), "random": stats(0.5)},
            None,
            "not matching",
            id="one trial, far below",
        ),
    ],
)
def test_verdicts(arms: dict[str, Stats], tolerance: float | None, expected: str) -> None:
    assert verdict(arms, 0.05, tolerance=tolerance, test_size=400).startswith(f"{expected}: ")


@pytest.mark.parametrize(("below", "expected"), [(0.0049, "winning"), (0.0051, "not matching")])
def test_the_tolerance_is_one_standard_deviation_of_the_dense_replicates(below: float, expected: str) -> None:
    ticket = stats(*(value - below for value in (0.974, 0.975, 0.976)))
    arms = {"dense": DENSE, "ticket": ticket, "reinit": LOW, "random": LOW}
    assert verdict(arms, 0.05, tolerance=None, test_size=400).startswith(expected)


@pytest.mark.parametrize(("distance", "expected"), [(0.0138, "inconclusive"), (0.0140, "winning")])
def test_a_control_is_beaten_by_welchs_test(distance: float, expected: str) -> None:
    """A standard error of 0.005 with 4 degrees of freedom, for which t is 2.776: 0.01388."""
    spread = 0.005 * 3**0.5 / 2**0.5  # sd / sqrt(3) = 0.005 / sqrt(2); two such make 0.005
    ticket = stats(0.975 - spread, 0.975, 0.975 + spread)
    control = stats(*(value - distance for value in (0.975 - spread, 0.975, 0.975 + spread)))
    arms = {"dense": DENSE, "ticket": ticket, "reinit": control, "random": LOW}
    assert verdict(arms, 0.05, tolerance=None, test_size=400).startswith(expected)


def test_no_spread_is_no_certainty() -> None:
    """Two trials that agree to the image: one image more is no victory."""
    arms = {"dense": DENSE, "ticket": stats(0.975, 0.975), "reinit": stats(0.9725, 0.9725), "random": LOW}
    assert verdict(arms, 0.05, tolerance=None, test_size=400).startswith(("inconclusive", "matching"))


def test_a_verdict_gives_the_figures() -> None:
    arms = {"dense": DENSE, "ticket": HIGH, "reinit": LOW, "random": LOW}
    text = verdict(arms, 0.0363, tolerance=None, test_size=400)
    assert "3.63 % of the weights reach 97.10 ± 0.20 %, the dense network 97.50 ± 0.50 %" in text
    assert "reinit 91.00 ± 1.00 %" in text


def test_an_evaluation_says_what_its_figures_say(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    task = make_task()
    found = evaluate([make_ticket(task)], task, make_train(), seeds=[0, 1], way=EAGER, tolerance=100)
    assert isinstance(found, Evaluation)
    assert found.verdict == verdict(found.arms, found.remaining, tolerance=100, test_size=60)
    assert found.verdict.startswith(("winning", "matching but not special"))


# ------------------------------------------------------------------------------------------- difference


def test_difference(make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]) -> None:
    task = make_task("normed")
    a, other = make_ticket(task, seed=0), make_ticket(task, seed=1)
    equal = difference(a, make_ticket(task, seed=0))
    assert equal.same_masks and equal.same_init and equal.total.jaccard == 1 and equal.total.agreement == 1
    found = difference(a, other)
    assert not found.same_masks and not found.same_init
    both = sum(int((a.masks[name] & other.masks[name]).sum()) for name in a.masks)
    assert found.total.kept_both == both
    assert (found.total.size, found.total.kept_a) == (256, masks.count(a.masks))
    assert abs(found.total.agreement) < 0.2  # independent masks


@pytest.mark.parametrize("changed", ["norm.running_var", "norm.num_batches_tracked", "fc2.bias", "fc1.weight"])
def test_difference_sees_any_bit_of_the_initial_weights(
    changed: str, make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]
) -> None:
    task = make_task("normed")
    a, b = make_ticket(task), make_ticket(task)
    b.init[changed].view(-1)[:1].add_(1)
    found = difference(a, b)
    assert found.same_masks and not found.same_init


def test_tickets_of_different_networks_are_not_compared(
    make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]
) -> None:
    with pytest.raises(TicketfindError, match=r"masks of different networks: fc3\.weight only in one of them"):
        difference(make_ticket(make_task()), make_ticket(make_task("normed")))
