"""A ticket on data with other classes: what it starts from, against its file and plain PyTorch; what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ticketfind import TicketfindError, contents, experiments, masks, transfer
from ticketfind.arms import Arm, Task
from ticketfind.experiments import Design
from ticketfind.recipe import Train
from ticketfind.rundir import RunDir
from ticketfind.ticket import Ticket

DIGITS = Path(transfer.__file__).with_name("digits.npz")
SEARCH = ["search", "--iterations", "20", "--rounds", "2", "--replicates", "2", "--set", "train.eval_every=10", "-q"]


def parities(path: Path) -> None:
    """The digits as five classes: 0 and 5, 1 and 6, and so on."""
    with np.load(DIGITS) as digits:
        arrays = {key: digits[key] for key in digits.files}
    np.savez(path, **{key: value % 5 if key.startswith("y") else value for key, value in arrays.items()})


def test_a_digits_ticket_on_five_classes(
    command: Callable[..., Any], trained_arms: dict[str, Arm], tmp_path: Path
) -> None:
    """Each arm starts as the few lines below make it from the ticket's file; the rest of the answer follows."""
    assert command(*SEARCH).code == 0
    assert command("export", "--round", "2", "--replicate", "1", "-o", "t.safetensors").code == 0
    parities(tmp_path / "five.npz")
    found = command("eval", "t.safetensors", "--data", "five.npz", "--trials", "2", "--seed", "7", "--json").json
    assert found["data"] == "five.npz" and list(found["arms"]) == ["dense", "ticket", "reinit", "random"]
    assert any(note.endswith("fc3.weight, fc3.bias start afresh and keep all their weights") for note in found["notes"])
    kept = 12288 + 19200 + 500  # 0.8² of fc1 and fc2, and the whole of the new head
    assert found["remaining"] == pytest.approx(kept / (19200 + 30000 + 500))

    file = load_file("t.safetensors")
    x = torch.rand(3, 64)
    for seed in (7, 8):
        arm, random = trained_arms[f"ticket, seed {seed}"], trained_arms[f"random, seed {seed}"]
        net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 5))
        with torch.no_grad():
            for layer, name in ((net[0], "fc1"), (net[2], "fc2")):
                layer.weight.copy_(file[f"init/{name}.weight"] * file[f"mask/{name}.weight"])
                layer.bias.copy_(file[f"init/{name}.bias"])
            net[4].weight.copy_(arm.start["fc3.weight"])
            net[4].bias.copy_(arm.start["fc3.bias"])
            w = masks.masked(arm.start, arm.masks)
            hidden = (x @ w["fc1.weight"].T + w["fc1.bias"]).relu()
            outputs = (hidden @ w["fc2.weight"].T + w["fc2.bias"]).relu() @ w["fc3.weight"].T + w["fc3.bias"]
            torch.testing.assert_close(outputs, net(x))
        assert arm.masks["fc3.weight"].shape == (5, 100) and arm.masks["fc3.weight"].all()
        assert float(arm.start["fc3.weight"].std()) == pytest.approx((2 / 105) ** 0.5, rel=0.1)  # Glorot
        assert torch.equal(arm.start["fc3.weight"], trained_arms[f"dense, seed {seed}"].start["fc3.weight"])
        for name, mask in arm.masks.items():
            assert random.masks[name].sum() == mask.sum()
        assert not torch.equal(random.masks["fc1.weight"], arm.masks["fc1.weight"])
        assert torch.equal(trained_arms[f"reinit, seed {seed}"].masks["fc3.weight"], arm.masks["fc3.weight"])


def test_against_a_native_ticket(command: Callable[..., Any], tmp_path: Path) -> None:
    """Of a run the round nearest in density is trained beside it; on its own data it does what its search did."""
    assert command(*SEARCH).code == 0
    parities(tmp_path / "five.npz")
    native = command(*SEARCH, "digits", "--data", "five.npz", "--out", "native", "--json").json
    asked = ["--round", "2", "--trials", "1", "--seed", "0", "--against", "native", "--json"]
    found = command("eval", "runs/digits", "--data", "five.npz", *asked).json
    assert list(found["arms"]) == ["dense", "ticket", "against", "reinit", "random"]
    assert found["against"] == pytest.approx(native["rounds"][2]["remaining"]) and found["against"] < found["remaining"]
    assert found["arms"]["against"]["accuracy_end"]["values"] == native["rounds"][2]["accuracy_end"]["values"]
    (compared,) = (c for c in found["comparisons"] if (c["arm"], c["other"]) == ("ticket", "against"))
    difference = found["arms"]["ticket"]["accuracy_early"]["mean"] - found["arms"]["against"]["accuracy_early"]["mean"]
    assert compared["difference"] == pytest.approx(difference) and len(compared["interval"]) == 2
    assert found["notes"][0] == "against: native, round 2, 64.2 % of the weights, 2 of them"
    assert not Path("runs/digits/evals").exists(), "of other data: not to be taken for the run's own"
    assert contents.nearest_round(RunDir(Path("native")), 0.79) == 1


def test_a_round_without_weights_is_nearest_to_no_weights_alone(command: Callable[..., Any]) -> None:
    words = [*SEARCH, "--prune", "0.999", "--set", "prune.allow_collapse=true", "--tolerance", "100"]
    assert command(*words, "--out", "emptied").code == 0
    run = RunDir(Path("emptied"))
    assert [round.remaining for round in contents.finished_rounds(run)][2] == 0
    assert [contents.nearest_round(run, remaining) for remaining in (0.8, 1e-6, 0.0)] == [1, 1, 2]
    asked = ["--round", "2", "--trials", "1", "--json", "--against", "emptied"]
    found = command("eval", "emptied", *asked).json
    assert found["against"] == found["remaining"] == 0
    assert len([*Path("emptied/evals").iterdir()]) == 1
    assert command("report", "emptied", "-q").code == 0


def test_data_of_as_many_classes_change_nothing(
    command: Callable[..., Any], trained_arms: dict[str, Arm], tmp_path: Path
) -> None:
    assert command(*SEARCH).code == 0
    with np.load(DIGITS) as digits:
        np.savez(tmp_path / "ten.npz", **{key: (9 - v if key[0] == "y" else v) for key, v in digits.items()})
    assert command("eval", "--round", "2", "--trials", "1", "--seed", "0", "--data", "ten.npz", "-q").code == 0
    for replicate in (0, 1):
        ticket = contents.load(RunDir(Path("runs/digits")), 2, replicate)
        arm = trained_arms[f"ticket, seed {replicate}"]
        assert all(torch.equal(arm.start[name], value) for name, value in ticket.init.items())
        assert all(torch.equal(arm.masks[name], mask) for name, mask in ticket.masks.items())


def test_one_line_where_the_inputs_have_another_shape(command: Callable[..., Any], tmp_path: Path) -> None:
    assert command(*SEARCH).code == 0
    images = np.random.default_rng(0).random((300, 1, 9, 9), dtype=np.float32)
    np.savez(
        tmp_path / "larger.npz", x_train=images, y_train=np.arange(300) % 5, x_test=images, y_test=np.arange(300) % 5
    )
    ran = command("eval", "--round", "2", "--data", "larger.npz", "--set", "data.validation=50", "-q")
    assert ran.code == 1 and ran.err.count("\n") == 1
    assert "fc1.weight has shape (300, 64) in the ticket, (300, 81) in the model" in ran.err


@pytest.mark.parametrize(
    "other", [["--data-arg", "sort=true"], ["--set", "data.validation=100"], ["--set", "train.lr=0.01"]], ids=str
)
def test_a_run_keeps_evaluations_of_its_own_data_and_settings_only(
    command: Callable[..., Any], tmp_path: Path, other: list[str]
) -> None:
    """The report puts what is kept side by side; what a device or a tolerance is may differ."""
    (tmp_path / "load.py").write_text(
        "import torch\n"
        "def load(sort=False):\n"
        "    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))\n"
        "    y = (x[:, 0] > 0).long()\n"
        "    return (x, y), (x[:100], y[:100].sort().values if sort else y[:100])\n"
    )
    data = ["--data", "load.py:load", "--set", "data.validation=50"]
    assert command(*SEARCH, "--model", "lenet-300-100", *data, "--out", "run").code == 0
    asked = ["eval", "run", "--round", "2", "--trials", "1"]
    refused = command(*asked, *other)
    assert refused.code == 0 and not Path("run/evals").exists()
    key = {"--data-arg": "data.args"}.get(other[0]) or other[1].split("=")[0]
    assert f"not kept in run, whose settings are others: {key}: " in " ".join(refused.out.split())
    assert command(*asked, "--tolerance", "3", "--device", "cpu", "--engine", "eager", "-q").code == 0
    assert len([*Path("run/evals").iterdir()]) == 1


def test_no_more_tickets_beside_it_than_trainings(command: Callable[..., Any]) -> None:
    assert command(*SEARCH).code == 0 and command(*SEARCH, "digits", "--out", "three", "--replicates", "3").code == 0
    asked = ["eval", "runs/digits", "--round", "2", "--against", "three", "--trials"]
    for trials, says in ((1, "2 of them"), (2, "3 of them")):
        assert command(*asked, trials, "--json").json["notes"][0].endswith(says)


def test_notes_and_faults_say_when_they_are_of_the_other_ticket(command: Callable[..., Any], tmp_path: Path) -> None:
    assert command(*SEARCH).code == 0
    parities(tmp_path / "five.npz")
    assert command(*SEARCH, "digits", "--data", "five.npz", "--out", "five").code == 0
    asked = ["eval", "five", "--round", "2", "--trials", "1", "--against"]
    notes = command(*asked, "runs/digits", "--json").json["notes"]
    assert "against: found on other classes; fc3.weight, fc3.bias start afresh and keep all their weights" in notes
    assert not any("these data" in note for note in notes)
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    assert command(*SEARCH, "--model", "net.py:net", "--data", "digits", "--out", "small").code == 0
    refused = command(*asked, "small", "-q")
    assert refused.code == 1 and refused.err.startswith("error: against: the ticket does not fit the model: ")


# ------------------------------------------------------------------------------------------ the pure function


def shaped(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("_", "."): torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("wanted", "head"),
    [
        (shaped(a_weight=(8, 4), a_bias=(8,), h_weight=(3, 8), h_bias=(3,)), []),
        (shaped(a_weight=(8, 4), a_bias=(8,), h_weight=(5, 8), h_bias=(5,)), ["h.weight", "h.bias"]),
        (shaped(a_weight=(9, 4), a_bias=(9,), h_weight=(5, 9), h_bias=(5,)), []),  # a wider network
        (shaped(a_weight=(8, 6), a_bias=(8,), h_weight=(5, 8), h_bias=(5,)), []),  # other inputs
        (shaped(a_weight=(8, 4), a_bias=(8,), h_weight=(5, 8, 1), h_bias=(5,)), []),
        (shaped(a_weight=(8, 4), a_bias=(8,), h_weight=(5, 8)), []),
    ],
)
def test_what_counts_as_a_head(wanted: dict[str, Tensor], head: list[str]) -> None:
    assert transfer.head(shaped(a_weight=(8, 4), a_bias=(8,), h_weight=(3, 8), h_bias=(3,)), wanted) == head


def test_sigma_of_the_new_head_and_what_one_shot_needs(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    """Noise goes by the new head's own spread; trained weights are those of a head that is gone."""
    old = make_task()

    class Six(type(old.model)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            last = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)][-1]
            setattr(self, last, nn.Linear(getattr(self, last).in_features, 6))

    ticket, task = make_ticket(old, seed=3), make_task(Six)
    moved = transfer.onto(ticket, task.fresh(3))
    (weight,) = (name for name in ticket.masks if moved.masks[name].shape != ticket.masks[name].shape)
    fresh = task.fresh(3)
    assert moved.about.sigma[weight] == pytest.approx(float(np.std(fresh[weight].numpy())), rel=1e-6)
    assert torch.equal(moved.init[weight], fresh[weight])
    groups = masks.make_groups([*ticket.masks], {"*": 0.2}, "layer")
    design = Design(
        tickets=[ticket], trials=2, extras=["one-shot", "init-magnitude"], trained=[ticket.init], noise=[0.5]
    )
    found = experiments.evaluate(design, task, make_train(), first_seed=0, groups=groups)
    assert "one-shot" not in found.arms and "init-magnitude" in found.arms and "noise=0.5" in found.arms
    assert any(note.startswith("one-shot is left out") for note in found.notes)
    with pytest.raises(TicketfindError, match="does not fit the model"):
        experiments.evaluate(design, make_task("normed"), make_train(), first_seed=0)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_new_head_stays_whole_in_every_arm(
    scope: str, make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket],
    trained_arms: dict[str, Arm],
) -> None:  # fmt: skip
    """Where all layers are ranked together too; the others keep as many weights as they have in the ticket."""
    ticket = make_ticket(make_task())

    class Six(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 6)
            nn.init.normal_(self.fc3.weight, std=1e-6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc3(self.fc2(self.fc1(x).relu()).relu())

    groups = masks.make_groups([*ticket.masks], {"*": 0.2}, scope)
    design = Design(tickets=[ticket], trials=2, extras=["init-magnitude"])
    experiments.evaluate(design, make_task(Six), make_train(), first_seed=0, groups=groups)
    pruned = {name: arm.masks for name, arm in trained_arms.items() if arm.masks}
    assert len(pruned) == 8
    for name, found in pruned.items():
        assert found["fc3.weight"].shape == (6, 12) and found["fc3.weight"].all(), name
        kept = [sum(int(m[n].sum()) for n in ("fc1.weight", "fc2.weight")) for m in (found, ticket.masks)]
        assert kept[0] == kept[1], name


def test_each_replicate_has_a_new_head_of_its_own_initialization(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket],
    trained_arms: dict[str, Arm],
) -> None:  # fmt: skip
    """And the ticket's weights everywhere else, be they masked or not."""

    def two() -> list[Ticket]:
        found = [make_ticket(make_task(Tokens), seed=seed) for seed in (3, 4)]
        return [replace(ticket, about=replace(ticket.about, replicate=r)) for r, ticket in enumerate(found)]

    task = make_task(SixClasses)
    experiments.evaluate(Design(tickets=two(), against=two(), trials=1), task, make_train(iterations=2), first_seed=7)
    for replicate in range(2):
        for kind in ("ticket", "against", "dense", "random"):
            start = trained_arms[f"{kind}, seed {7 + replicate}"].start
            assert torch.equal(start["fc.weight"], task.fresh(replicate)["fc.weight"]), kind
            assert torch.equal(start["table.weight"], two()[replicate].init["table.weight"]), kind


class Tokens(nn.Module):
    """[b, 12] -> [b, 4], a row of its table for each of `tokens`."""

    tokens = 8

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(self.tokens, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.table(x.abs().long().clamp(max=self.tokens - 1)).mean(1))


class MoreTokens(Tokens):
    tokens = 9


class SixClasses(Tokens):
    """[b, 12] -> [b, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)


def test_a_table_of_tokens_is_no_head(
    make_task: Callable[..., Task], make_train: Callable[..., Train], make_ticket: Callable[..., Ticket]
) -> None:
    """Its rows are inputs: with others, what the ticket has learned of them would be gone."""
    design = Design(tickets=[make_ticket(make_task(Tokens))], trials=1)
    with pytest.raises(TicketfindError, match=r"table\.weight has shape \(8, 6\) in the ticket, \(9, 6\) in the model"):
        experiments.evaluate(design, make_task(MoreTokens), make_train(), first_seed=0)
