"""`verify`: what is as it was written passes; each thing that is changed is found, and named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats

from ticketfind import TicketfindError, contents, masks, results, retraining, verify
from ticketfind.arms import Arm, Outcome, Task
from ticketfind.recipe import Recipe, Train
from ticketfind.results import Measured, Round
from ticketfind.rundir import RunDir
from ticketfind.ticket import Ticket, load_ticket

Search = Callable[..., list[Round]]
MakeTask = Callable[..., Task]
MakeRecipe = Callable[..., Recipe]


def failed(checks: list[verify.Check]) -> dict[str, str]:
    return {check.what: check.found for check in checks if check.passed is False}


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Write a safetensors file again, its metadata kept, with other tensors."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata)


@pytest.fixture
def run(run_search: Search, make_recipe: MakeRecipe, make_task: MakeTask, tmp_path: Path) -> RunDir:
    run_search(make_recipe(), make_task("normed"), tmp_path / "run")
    return RunDir(tmp_path / "run")


@pytest.mark.parametrize("net", ["mlp", "normed", "tied"])
@pytest.mark.parametrize("rewind", ["0it", "5it", "lr"])
def test_a_search_leaves_what_passes(
    rewind: str, net: str, run_search: Search, make_recipe: MakeRecipe, make_task: MakeTask, tmp_path: Path
) -> None:
    run_search(make_recipe({"prune.rewind": rewind}), make_task(net), tmp_path / "run")
    checks = verify.of_run(RunDir(tmp_path / "run"))
    assert not failed(checks) and len(checks) >= 8
    began = next(check for check in checks if "rewind point" in check.what)
    assert began.passed and ("2 not checked" in began.found) == (rewind == "5it"), "two dense trainings begin earlier"


@pytest.mark.parametrize("layout", ["full", "compact"])
def test_a_ticket_of_either_layout_passes(layout: str, run: RunDir, tmp_path: Path) -> None:
    load_ticket(run.ticket_file).save(tmp_path / "t", layout=layout)
    assert not failed(verify.of_ticket(tmp_path / "t"))


@pytest.mark.parametrize("layout", ["full", "compact"])
@pytest.mark.parametrize("part", ["mask/fc1.weight", "init/fc1.weight", "init/fc2.bias"])
def test_a_bit_of_a_ticket(part: str, layout: str, run: RunDir, tmp_path: Path) -> None:
    """In the middle of the tensor's bytes; a compact mask that fits its weights no more is refused as it is read."""
    file = tmp_path / "t"
    load_ticket(run.ticket_file).save(file, layout=layout)

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        if tensors[part].dtype == torch.bool:
            tensors[part].view(-1)[3] ^= True
        else:
            tensors[part].view(-1).view(torch.uint8)[0] ^= 1

    change(file, flip)
    section = part.split("/")[0]
    try:
        found = failed(verify.of_ticket(file))
    except TicketfindError as error:
        assert layout == "compact" and section == "mask" and "surviving weights" in str(error)
    else:
        assert section in found["contents are as they were written"]


def test_a_file_without_hashes_is_said_to_be_one(run: RunDir, tmp_path: Path) -> None:
    tensors = load_file(run.ticket_file)
    with safe_open(run.ticket_file, framework="pt") as opened:
        about = json.loads(opened.metadata()["ticketfind"])
    del about["sha256"]
    save_file(tensors, tmp_path / "t", {"ticketfind": json.dumps(about)})
    (integrity, *_) = verify.of_ticket(tmp_path / "t")
    assert integrity.passed is None and "earlier version" in integrity.found


def test_a_weight_that_came_back(run: RunDir) -> None:
    def revive(mask: dict[str, torch.Tensor]) -> None:
        flat = mask["fc1.weight"].view(-1)
        flat[int((~flat).nonzero()[0])] = True

    change(run.mask_file(2, 1), revive)
    found = failed(verify.of_run(run))
    assert "round 2, replicate 1: fc1.weight keeps weights" in found["masks are nested, round by round"]
    assert "round 2, replicate 1" in found["weights kept are as planned"]
    assert "round 2, replicate 1" in found["every round began at the rewind point"]


def test_another_rewind_point(run: RunDir) -> None:
    change(run.start_file(0), lambda state: state["fc2.bias"].add_(1))
    assert "replicate 0" in failed(verify.of_run(run))["every round began at the rewind point"]


@pytest.mark.parametrize("key", ["kept", "kept_per_tensor"])
def test_counts_in_the_log(key: str, run: RunDir) -> None:
    lines = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    line = next(line for line in lines if line["round"] == 3)
    line[key] = line[key] + 1 if key == "kept" else {name: n + 1 for name, n in line[key].items()}
    run.log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "round 3" in failed(verify.of_run(run))["weights kept are as planned"]


def test_a_missing_mask(run: RunDir) -> None:
    run.mask_file(2, 0).unlink()
    assert "no such file" in failed(verify.of_run(run))["masks are nested, round by round"]


def test_the_ticket_of_another_round(run: RunDir) -> None:
    contents.load(run, 1, 0).save(run.ticket_file)
    found = failed(verify.of_run(run))
    assert found == {"the ticket is the run's winner": "not as in the run: its round or replicate"}


def test_claims_that_are_not_the_runs(run: RunDir) -> None:
    ticket = load_ticket(run.ticket_file)
    ticket.about.claims["ticket"]["accuracy_early"]["mean"] = 1.0
    ticket.save(run.ticket_file)
    assert failed(verify.of_run(run)) == {"the ticket is the run's winner": "not as in the run: its claims"}


def test_an_unfinished_run(run: RunDir) -> None:
    run.log_file.write_text("".join(run.log_file.read_text().splitlines(keepends=True)[:5]))
    run.ticket_file.unlink()
    run.finished_file.unlink()
    checks = verify.of_run(run)
    assert not failed(checks) and "2 finished rounds, 5 trainings" in checks[0].found


# ------------------------------------------------------------------------------------------------ retraining


def test_the_search_is_repeated_to_the_last_digit(run: RunDir, make_recipe: MakeRecipe, make_task: MakeTask) -> None:
    ticket = load_ticket(run.ticket_file)
    found = retraining.retrain(ticket, make_task("normed"), make_recipe().train)
    rounds = contents.finished_rounds(run)
    own = rounds[ticket.about.round].stats.accuracy_early
    assert found.accuracy == own.values[ticket.about.replicate] and found.is_inside
    t = stats.t.ppf(0.975, 1)
    width = max(t * (own.sd or 0) * (1 + 1 / 2) ** 0.5, 1 / 60)
    if own.sd:
        assert (found.low, found.high) == pytest.approx((own.mean - width, own.mean + width), abs=1e-6)
    assert verify.of_retraining(found).passed


def test_a_claim_that_is_not_reached(run: RunDir, make_recipe: MakeRecipe, make_task: MakeTask) -> None:
    ticket = load_ticket(run.ticket_file)
    claimed = results.Spread.of([0.991, 0.992, 0.993])
    ticket.about.claims["ticket"]["accuracy_early"] = claimed.json() | {"values": [*claimed.values]}
    found = retraining.retrain(ticket, make_task("normed"), make_recipe().train)
    check = verify.of_retraining(found)
    assert check.passed is False and "to be expected from 99.20%" in check.found


@pytest.mark.parametrize(
    ("claimed", "width"),
    [
        ([0.9], stats.norm.ppf(0.975) * (0.9 * 0.1 / 50) ** 0.5),  # a proportion's, over 50 examples
        ([0.9, 0.9, 0.9], stats.norm.ppf(0.975) * (0.9 * 0.1 / 50) ** 0.5),
        ([0.89, 0.91], stats.t.ppf(0.975, 1) * 0.02 / 2**0.5 * 1.5**0.5),
        ([0.8999, 0.9001], 1 / 50),  # never less than one example
        ([1.0], 1 / 50),
    ],
)
def test_what_one_more_training_is_held_against(
    claimed: list[float], width: float, make_task: MakeTask, make_train: Callable[..., Train],
    make_ticket: Callable[..., Ticket],
) -> None:  # fmt: skip
    """The accuracy at early stop, beside what the claimed ones say of it."""

    def train(task: Task, arm: Arm, work: Any) -> Outcome:
        reached = Measured(early_stop=4, accuracy_early=0.88, accuracy_end=0.5, validation_loss=1.0)
        return Outcome(None, (), masks.masked(arm.start, arm.masks), None, reached, 50)

    task = make_task(trainer=train)
    ticket = make_ticket(task)
    ticket.about.claims["ticket"] = {"accuracy_early": {"values": claimed}}
    found = retraining.retrain(ticket, task, make_train())
    mean = sum(claimed) / len(claimed)
    assert found.accuracy == 0.88 and found.claimed.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - width, mean + width), abs=1e-5)
    assert found.is_inside == (abs(0.88 - mean) <= width + 1e-5)


def test_a_ticket_is_trained_again_in_its_searchs_precision(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--iterations", "20", "--rounds", "1", "--replicates", "1", "--precision", "bf16"]
    assert command("search", *small, "--tolerance", "100").code == 0
    own, precisions = retraining.fit, []

    def fit(*args: Any, **more: Any) -> Any:
        precisions.append(more["way"].precision)
        return own(*args, **more)

    monkeypatch.setattr(retraining, "fit", fit)
    assert command("verify", "--retrain").code == 0
    assert precisions == ["bf16"]


def test_the_command(command: Callable[..., Any], tmp_path: Path) -> None:
    """On digits: 0 for what is as it says, 1 and the reason where not; --retrain from the file alone."""
    small = ["--iterations", "60", "--rounds", "2", "--replicates", "2", "--set", "train.eval_every=20"]
    assert command("search", *small, "--tolerance", "50").code == 0
    assert command("verify", "--json").json["verified"]
    command("export", "-o", "t.safetensors")
    done = command("verify", "t.safetensors", "--retrain", "--json").json
    assert done["verified"] and done["checks"][-1]["what"] == "the claimed accuracy is reached again"
    change(tmp_path / "t.safetensors", lambda tensors: tensors["init/fc1.bias"].add_(1))
    done = command("verify", "t.safetensors")
    assert done.code == 1 and "not as it says: contents are as they were written" in done.out
    assert "Traceback" not in done.err
