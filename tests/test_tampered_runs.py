"""`verify` of runs that were changed by hand where a search would not notice: each change is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ticketfind import contents, verify
from ticketfind.arms import Task
from ticketfind.recipe import Recipe
from ticketfind.results import Round
from ticketfind.rundir import RunDir
from ticketfind.ticket import load_ticket

COUNTS, NESTED = "weights kept are as planned", "masks are nested, round by round"
BEGAN, WINNER = "every round began at the rewind point", "the ticket is the run's winner"
OTHER_WEIGHTS = "the training began with other weights than the rewind point under the mask"


def failed(checks: list[verify.Check]) -> dict[str, str]:
    return {check.what: check.found for check in checks if check.passed is False}


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def tensors_of(file: Path) -> dict[str, Tensor]:
    """In memory: the file may be written over."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def change(file: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Write a safetensors file again, its metadata kept, with other tensors."""
    metadata, tensors = metadata_of(file), tensors_of(file)
    edit(tensors)
    save_file(tensors, file, metadata)


def about(file: Path) -> dict[str, Any]:
    """What a ticket's file says of it."""
    return json.loads(metadata_of(file)["ticketfind"])  # type: ignore[no-any-return]


def say(file: Path, said: dict[str, Any]) -> None:
    """Write a ticket's file again, its tensors kept, with other metadata."""
    save_file(tensors_of(file), file, {"ticketfind": json.dumps(said)})


def change_log(run: RunDir, round: int, replicate: int, **other: Any) -> None:
    lines = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    for line in lines:
        if (line["round"], line["replicate"]) == (round, replicate):
            line.update(other)
    run.log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def revive(mask: dict[str, Tensor]) -> None:
    flat = mask["fc1.weight"].view(-1)
    flat[int((~flat).nonzero()[0])] = True


@pytest.fixture
def run(
    run_search: Callable[..., list[Round]], make_recipe: Callable[..., Recipe], make_task: Callable[..., Task],
    tmp_path: Path,
) -> RunDir:  # fmt: skip
    run_search(make_recipe(), make_task("normed"), tmp_path / "run")
    return RunDir(tmp_path / "run")


def test_a_mask_that_was_drawn_and_not_trained_yet(run: RunDir) -> None:
    """Of a search that was stopped between rounds; the round that would begin under it is the dearest yet."""
    run.log_file.write_text("".join(run.log_file.read_text().splitlines(keepends=True)[:4]))
    run.ticket_file.unlink()
    run.finished_file.unlink()
    assert not failed(verify.of_run(run))
    change(run.mask_file(2, 1), revive)
    found = failed(verify.of_run(run))
    assert found.keys() == {COUNTS, NESTED}
    assert all(text.startswith("round 2, replicate 1: ") for text in found.values())


@pytest.mark.parametrize("key", ["kept", "kept_per_tensor", "remaining"])
@pytest.mark.parametrize("round", [0, 2])
def test_counts_of_every_round(key: str, round: int, run: RunDir) -> None:
    change_log(run, round, 1, **{key: {"fc1.weight": 3} if key == "kept_per_tensor" else 3})
    assert failed(verify.of_run(run))[COUNTS].startswith(f"round {round}, replicate 1: the log says")


@pytest.mark.parametrize("settings", [{}, {"prune.every": 4}], ids=["from the dense training", "on another's way"])
def test_counts_of_the_dense_round_by_where_its_first_mask_comes_from(
    settings: dict[str, Any], run_search: Callable[..., list[Round]], make_recipe: Callable[..., Recipe],
    make_task: Callable[..., Task], tmp_path: Path,
) -> None:  # fmt: skip
    """The mask is there once its training is in the log, and tells the sizes: or it has gone. One that is drawn on the
    way of another training may be still to come."""
    run_search(make_recipe(settings), make_task("normed"), tmp_path / "run")
    run = RunDir(tmp_path / "run")
    log = run.log_file.read_text().splitlines(keepends=True)
    change_log(run, 0, 1, kept=255)
    assert failed(verify.of_run(run))[COUNTS].startswith("round 0, replicate 1: the log says 255 weights")
    run.log_file.write_text("".join(log[:2]))
    for file in (run.ticket_file, run.finished_file, *(run.mask_file(round, r) for round, r in run.masks())):
        file.unlink()
    (counts,) = [check for check in verify.of_run(run) if check.what == COUNTS]
    if settings:
        assert counts.passed is None and "2 not checked: no mask is drawn yet" in counts.found
    else:
        assert counts.passed is False and counts.found.startswith("round 0, replicate 0: mask ")


def test_a_round_beyond_the_plan(run: RunDir) -> None:
    lines = run.log_file.read_text().splitlines(keepends=True)
    more = [json.loads(line) | {"round": 4} for line in lines[-2:]]
    run.log_file.write_text("".join([*lines, *(json.dumps(line) + "\n" for line in more)]))
    for replicate in range(2):
        run.mask_file(4, replicate).write_bytes(run.mask_file(3, replicate).read_bytes())
    assert failed(verify.of_run(run))[COUNTS] == "round 4, replicate 0: 3 rounds are planned"


def test_a_mask_that_is_none(run: RunDir) -> None:
    file = run.mask_file(3, 1)
    change(file, lambda mask: mask.update({name: m.to(torch.int64) for name, m in mask.items()}))
    found = failed(verify.of_run(run))
    assert {COUNTS, NESTED, BEGAN} <= found.keys()
    assert all("expected masks of true and false" in found[what] for what in (COUNTS, NESTED, BEGAN))


@pytest.mark.parametrize("how", ["name", "shape"])
def test_a_mask_of_another_network(how: str, run: RunDir) -> None:
    def other(mask: dict[str, Tensor]) -> None:
        value = mask.pop("fc1.weight")
        mask["fc1.weight" if how == "shape" else "fc9.weight"] = value.T.contiguous() if how == "shape" else value

    for round in (1, 2, 3):
        change(run.mask_file(round, 0), other)
    found = failed(verify.of_run(run))
    assert found[BEGAN] == "round 1, replicate 0: the masks are of another network than the rewind point"


@pytest.mark.parametrize("round", [0, 2])
def test_another_start_of_a_round_whose_weights_are_not_rewound(
    round: int, run_search: Callable[..., list[Round]], make_recipe: Callable[..., Recipe],
    make_task: Callable[..., Task], tmp_path: Path,
) -> None:  # fmt: skip
    """Each has a file of its own to start from, the dense training among them."""
    run_search(make_recipe({"prune.rewind": "lr"}), make_task("normed"), tmp_path / "run")
    run = RunDir(tmp_path / "run")
    change(run.start_file(1, round), lambda state: state["fc2.bias"].add_(1))
    found = failed(verify.of_run(run))
    assert found == {BEGAN: f"round {round}, replicate 1: {OTHER_WEIGHTS}"}


def test_a_mask_that_has_come_or_gone_on_the_way(run: RunDir) -> None:
    change(run.mask_file(2, 1), lambda mask: mask.pop("fc2.weight"))
    found = failed(verify.of_run(run))
    assert found[NESTED] == "round 2, replicate 1: other parameters have masks than in the round before"
    change(run.mask_file(1, 1), lambda mask: mask.pop("fc2.weight"))
    found = failed(verify.of_run(run))
    assert found[NESTED] == "round 3, replicate 1: other parameters have masks than in the round before"


def test_a_ticket_that_is_missing_or_should_not_be_there(run: RunDir) -> None:
    ticket = run.ticket_file.read_bytes()
    run.ticket_file.unlink()
    assert failed(verify.of_run(run)) == {WINNER: "round 3 wins, and ticket.safetensors is missing"}
    run.recipe_file.write_text(run.recipe_file.read_text().replace("tolerance: 100", "tolerance: 0"))
    for replicate in range(2):
        change_log(run, 0, replicate, accuracy_early=1.0)
    assert not failed(verify.of_run(run))
    run.ticket_file.write_bytes(ticket)
    assert failed(verify.of_run(run)) == {WINNER: "no round of the log wins, and there is a ticket"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("iteration", 3),
        ("sigma", {"fc1.weight": 2.0}),
        ("aliases", {"a": "b"}),
        ("claims", {}),
        ("checkpoint_dtype", "BF16"),
    ],
)
def test_what_the_ticket_says_of_itself(key: str, value: Any, run: RunDir) -> None:
    say(run.ticket_file, about(run.ticket_file) | {key: value})
    assert failed(verify.of_run(run)) == {WINNER: f"not as in the run: its {key}"}


def test_the_ticket_of_another_replicate(run: RunDir) -> None:
    """Itself, and the winner under another's number, whose seed its controls would be trained with."""
    text = "not as in the run: its round or replicate"
    winner = load_ticket(run.ticket_file).about.replicate
    contents.load(run, 3, 1 - winner).save(run.ticket_file)
    assert failed(verify.of_run(run)) == {WINNER: text}
    contents.load(run, 3, winner).save(run.ticket_file)
    assert not failed(verify.of_run(run))
    truth = about(run.ticket_file)
    for key, value in (("replicate", 1 - winner), ("round", 2)):
        say(run.ticket_file, truth | {key: value})
        assert failed(verify.of_run(run)) == {WINNER: text}


@pytest.mark.parametrize(("section", "key", "value"), [("run", "seed", 6), ("data", "spec", "digits"), ("run", "x", 1)])
def test_the_recipe_that_a_ticket_has(section: str, key: str, value: Any, run: RunDir) -> None:
    """What it is trained by again; a key that an earlier version had not may be lacking."""
    said = about(run.ticket_file)
    del said["recipe"]["prune"]["finetune"]
    say(run.ticket_file, said)
    assert not failed(verify.of_run(run))
    said["recipe"][section][key] = value
    say(run.ticket_file, said)
    assert failed(verify.of_run(run)) == {WINNER: "not as in the run: its recipe"}


@pytest.mark.parametrize("part", ["init/fc2.bias", "mask/fc1.weight"])
def test_a_ticket_written_anew_with_other_contents(part: str, run: RunDir) -> None:
    """Its hashes and counts are right: only the run knows better. In the mask one weight stands for another."""
    ticket = load_ticket(run.ticket_file)
    if part.startswith("init/"):
        ticket.init["fc2.bias"][0] += 1
    else:
        flat = ticket.masks["fc1.weight"].view(-1)
        kept, gone = int(flat.nonzero()[0]), int((~flat).nonzero()[0])
        flat[kept], flat[gone] = False, True
    ticket.save(run.ticket_file)
    assert failed(verify.of_run(run)) == {WINNER: f"not as in the run: {part}"}


def test_a_ticket_written_anew_with_more_tensors_or_fewer(run: RunDir) -> None:
    """It is whole for itself: a parameter without a mask is one that nobody prunes."""
    for part in ("init/fc2.bias", "mask/fc2.weight", "init/more", "mask/norm.weight"):
        ticket = contents.load(run, 3, load_ticket(run.ticket_file).about.replicate)
        section, name = part.split("/")
        there: dict[str, Tensor] = ticket.init if section == "init" else ticket.masks
        if name in there:
            del there[name]
        else:
            there[name] = torch.ones(3) if section == "init" else torch.ones(16, dtype=torch.bool)
        ticket.save(run.ticket_file)
        assert failed(verify.of_run(run)) == {WINNER: f"not as in the run: {part}"}


@pytest.mark.parametrize("layout", ["full", "compact"])
@pytest.mark.parametrize("said", [0.5, "many", None])
def test_the_weights_remaining_that_a_ticket_says(said: Any, layout: str, run: RunDir, tmp_path: Path) -> None:
    file = tmp_path / "t"
    load_ticket(run.ticket_file).save(file, layout=layout)
    assert not failed(verify.of_ticket(file))
    say(file, about(file) | {"remaining": said})
    assert failed(verify.of_ticket(file)).keys() == {"weights remaining are as it says"}


def test_a_run_in_which_a_replicate_failed_passes(run: RunDir) -> None:
    lines = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    lines = [line for line in lines if (line["round"], line["replicate"]) != (3, 1)]
    lines.append({"round": 3, "replicate": 1, "failed": "the loss is not finite"})
    run.log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    contents.load(run, 3, 0).save(run.ticket_file)
    assert not failed(verify.of_run(run))


# ------------------------------------------------------------------------------------- weights trained elsewhere

NET = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))

def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    inputs = torch.randn(3, 8, generator=generator)[labels] + torch.randn(90, 8, generator=generator)
    return (inputs[:50], labels[:50]), (inputs[50:], labels[50:])
"""


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_from_trained_weights(rounds: int, command: Callable[..., Any], tmp_path: Path) -> None:
    """One-shot, its one mask is drawn and never trained: it is looked at, too."""
    (tmp_path / "net.py").write_text(NET)
    torch.manual_seed(3)
    for name in ("init", "trained"):
        net = torch.nn.Sequential(torch.nn.Linear(8, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3))
        save_file(net.state_dict(), tmp_path / f"{name}.safetensors")
    words = ["--model", "net.py:net", "--data", "net.py:data", "--iterations", 6]
    words += ["--checkpoint", "init.safetensors", "--trained", "trained.safetensors"]
    words += ["--batch-size", 10, "--set", "train.eval_every=6", "--rounds", rounds, "--prune", 0.6, "--tolerance", 90]
    assert command("search", *words, "--replicates", 2, "--out", "run").code == 0
    done = command("verify", "run", "--json").json
    assert done["verified"] and {check["passed"] for check in done["checks"]} >= {True}

    def revive(mask: dict[str, Tensor]) -> None:
        flat = mask["0.weight"].view(-1)
        flat[int((~flat).nonzero()[0])] = True

    change(tmp_path / "run/masks/01-1.safetensors", revive)
    done = command("verify", "run", "--json")
    found = json.loads(done.out)
    assert done.code == 1 and not found["verified"] and "Traceback" not in done.err
    (bad,) = [check for check in found["checks"] if check["what"] == COUNTS]
    assert bad["passed"] is False and bad["found"].startswith("round 1, replicate 1: 45 weights are kept, 44")
