"""`--checkpoint` and `--trained`: a ticket from two checkpoint files, against a few lines of numpy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ticketfind import load_ticket, models

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=10):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 3)
    def forward(self, x): return self.b(torch.relu(self.norm(self.a(x))))

def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    inputs = torch.randn(3, 8, generator=generator)[labels] + torch.randn(90, 8, generator=generator)
    return (inputs[:50], labels[:50]), (inputs[50:], labels[50:])
"""
WORDS = ["--model", "net.py:Net", "--data", "net.py:data", "--iterations", "6", "--batch-size", "10"]
WORDS += ["--engine", "eager", "--set", "train.eval_every=6", "--json"]


@pytest.fixture
def files(tmp_path):
    """net.py, init.pt (bfloat16, with an optimizer's state) and trained.safetensors; the states as a model has them."""
    (tmp_path / "net.py").write_text(NET)
    source = models.source(f"{tmp_path}/net.py:Net", {})
    init, trained = (models.state_of(source.new(seed)) for seed in (11, 12))
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in init.items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    wrapped = {f"module.{name}": value for name, value in half.items()}
    torch.save({"state_dict": wrapped, "optimizer": optimizer, "epoch": 3}, tmp_path / "init.pt")
    save_file(trained, tmp_path / "trained.safetensors")
    return {name: value.to(init[name].dtype) for name, value in half.items()}, trained


FROM_TWO = ["--checkpoint", "init.pt", "--trained", "trained.safetensors"]


def magnitude(trained, fraction, scope):
    """Masks by |w| of the trained weights, in numpy."""
    names = ["a.weight", "b.weight"]
    weights = {name: np.abs(trained[name].numpy()) for name in names}
    kept = {}
    for group in [names] if scope == "global" else [[name] for name in names]:
        flat = np.concatenate([weights[name].ravel() for name in group])
        pruned = np.argsort(flat)[: round(flat.size * fraction)]
        mask = np.ones(flat.size, bool)
        mask[pruned] = False
        for name in group:
            size = weights[name].size
            kept[name], mask = mask[:size].reshape(weights[name].shape), mask[size:]
    return kept


def accuracy(tmp_path, state):
    source = models.source(f"{tmp_path}/net.py:Net", {})
    net = source.new(0).eval()
    net.load_state_dict(state)
    from ticketfind.specs import load_object

    _, (inputs, labels) = load_object(f"{tmp_path}/net.py:data", "data")()
    with torch.no_grad():
        return float((net(inputs).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("replicates", [1, 3])
def test_one_shot_trains_nothing(files, command, tmp_path, scope, replicates):
    init, trained = files
    words = ["search", *WORDS, *FROM_TWO, "--rounds", "1", "--prune", "0.6", "--scope", scope]
    words += ["--replicates", str(replicates), "--out", "run"]
    plan = command(*words, "--dry-run").json
    assert plan["iterations"] == 0 and [entry["iterations"] for entry in plan["rounds"]] == [0, 0]
    found = command(*words).json
    assert [entry["round"] for entry in found["rounds"]] == [0] and found["winner"] is None
    assert found["dense"]["accuracy_end"]["values"] == pytest.approx([accuracy(tmp_path, trained)] * replicates)
    ticket = load_ticket(found["ticket"])
    for name, expected in magnitude(trained, 0.6, scope).items():
        np.testing.assert_array_equal(ticket.masks[name].numpy(), expected)
    assert ticket.init.keys() == init.keys()
    assert all(torch.equal(ticket.init[name], value) for name, value in init.items())
    assert (ticket.about.checkpoint_dtype, ticket.about.iteration, ticket.about.round) == ("bfloat16", 0, 1)

    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert command(*words).json["ticket"] == found["ticket"]  # again: finished, nothing changes
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_every_command_takes_a_one_shot_run(files, command):
    words = ["search", *WORDS, *FROM_TWO, "--rounds", "1", "--replicates", "2", "--out", "run"]
    done = command(*[word for word in words if word != "--json"])
    assert "drawn from trained weights and not trained itself: run/ticket.safetensors" in done.out
    assert "ticketfind eval run trains it" in done.out
    assert "finished; a ticket drawn from trained weights" in command("inspect", "run").out
    assert command("inspect", "run/ticket.safetensors", "--json").json["round"] == 1
    for form in ("ticket", "compact", "dense", "torch-prune"):
        assert command("export", "run", "--format", form, "-o", f"{form}.safetensors", "--json").json["format"] == form
    assert (
        load_file("dense.safetensors")["a.weight"].eq(0).sum()
        == (~load_ticket("ticket.safetensors").masks["a.weight"]).sum()
    )
    assert command("export", "run", "--round", "1", "--replicate", "1", "-o", "second.safetensors").code == 0
    assert command("diff", "run", "ticket.safetensors", "--exit-code").code == 0
    assert command("diff", "run", "second.safetensors", "--exit-code").code == 0  # every replicate starts alike
    judged = command("eval", "run", "--noise", "1", "--json").json
    assert {"dense", "ticket", "noise=1", "random"} <= set(judged["arms"])
    assert judged["arms"]["ticket"]["replicates"] == 2
    refused = command("export", "run", "--round", "2")
    assert refused.code == 1 and "round: expected" in refused.err and refused.err.count("\n") == 1


def test_trained_weights_are_measured_in_the_precision_asked_for(files, command):
    """As the rounds are that they are compared with; the loss shows bfloat16, the accuracy need not."""
    for precision in ("fp32", "bf16"):
        words = ["search", *WORDS, *FROM_TWO, "--rounds", "1", "--precision", precision]
        assert command(*words, "--out", precision).code == 0
    losses = [json.loads(Path(name, "log.jsonl").read_text().splitlines()[0]) for name in ("fp32", "bf16")]
    exact, rounded = (line["validation_loss"] for line in losses)
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.05)


def test_masks_of_trained_weights_that_are_trained_on(files, command):
    """Round 0 takes no iteration, but what comes of it is trained on between the masks."""
    words = ["search", *WORDS, *FROM_TWO, "--rounds", "3", "--prune", "0.3", "--replicates", "2"]
    words += ["--ahead", "3", "--finetune", "2it"]
    plan, found = command(*words, "--dry-run").json, command(*words, "--out", "run").json
    assert plan["iterations"] == 2 * (sum(entry["iterations"] for entry in plan["rounds"]) + 2 * 2)
    assert [entry["round"] for entry in found["rounds"]] == [0, 1, 2, 3]
    assert command("verify", "run").code == 0


def test_further_rounds_are_trained_from_the_checkpoint(files, command):
    init, trained = files
    words = ["search", *WORDS, *FROM_TWO, "--rounds", "2", "--prune", "0.5", "--scope", "layer", "--out", "run"]
    found = command(*words, "--tolerance", "100").json
    assert [entry["early_stop"]["mean"] for entry in found["rounds"]][1:] == [6, 6]
    first = load_file("run/masks/01-0.safetensors")
    for name, expected in magnitude(trained, 0.5, "layer").items():
        np.testing.assert_array_equal(first[name].numpy(), expected)
    start = load_file("run/init/0.safetensors")
    assert all(torch.equal(start[name], value) for name, value in init.items())


def test_an_interrupted_search_goes_on(files, command):
    words = ["search", *WORDS, *FROM_TWO, "--rounds", "1", "--replicates", "2", "--out"]
    assert command(*words, "whole").code == command(*words, "cut").code == 0
    lines = Path("cut/log.jsonl").read_text().splitlines(keepends=True)
    Path("cut/log.jsonl").write_text(lines[0])
    for name in ("finished", "ticket.safetensors", "masks/01-1.safetensors"):
        Path("cut", name).unlink()
    assert command(*words, "cut").code == 0
    for path in Path("whole").rglob("*"):
        if path.is_file():
            assert (Path("cut") / path.relative_to("whole")).read_bytes() == path.read_bytes(), path


def test_learning_rate_rewinding_needs_no_first_checkpoint(files, command):
    _, trained = files
    words = ["search", *WORDS, "--trained", "trained.safetensors", "--rewind", "lr", "--rounds", "1", "--out", "run"]
    ticket = load_ticket(command(*words, "--replicates", "1").json["ticket"])
    assert all(torch.equal(ticket.init[name], value) for name, value in trained.items())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--trained", "trained.safetensors"], 2, "model.trained: expected with model.checkpoint, the weights that"),
        ([*FROM_TWO, "--rewind", "3it"], 2, "prune.rewind: expected 0it or lr, as model.trained shows no iteration"),
        (["--checkpoint", "init.pt", "--trained", "gone.pt"], 1, "checkpoint gone.pt: no such file"),
        (["--checkpoint", "init.pt", "--trained", "wide.pt"], 1, "a.weight (10, 8) in the model, (12, 8) in the file"),
        (["--checkpoint", "init.pt", "--checkpoint-key", "ema"], 1, "found state_dict"),
        (["--checkpoint", "init.pt", "--checkpoint-key", "optimizer.state.0"], 1, "missing: a.weight"),
        (["--checkpoint", "."], 1, "expected one .safetensors.index.json or one .safetensors in the folder"),
        (["--checkpoint", "init.pt", "--allow-mismatch", "head.*"], 1, "'head.*' matches nothing"),
        (["--checkpoint-key", "ema"], 2, "model.checkpoint_key: expected null without model.checkpoint"),
        (["--checkpoint", "page.pth"], 1, "found a file that begins with b'<!DOCTYPE html>"),
        (["--checkpoint", "cut.pt"], 1, "expected a torch checkpoint; reading it failed"),
        (["--checkpoint", "nan.pt"], 1, "does not fit the model; NaN: b.bias"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(files, command, tmp_path, words, code, message):
    init, _ = files
    torch.save(models.source(f"{tmp_path}/net.py:Net", {"width": 12}).new(0).state_dict(), tmp_path / "wide.pt")
    torch.save({**init, "b.bias": torch.full((3,), torch.nan)}, tmp_path / "nan.pt")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><title>404")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "init.pt").read_bytes()[:900])
    save_file(init, tmp_path / "other.safetensors")
    before = {*tmp_path.rglob("*")}
    done = command("search", *WORDS, *words)
    assert done.code == code and message in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and not done.out
    assert {path for path in {*tmp_path.rglob("*")} - before if "__pycache__" not in str(path)} == set()


def test_another_head_starts_fresh_in_each_replicate(files, command, tmp_path):
    init, _ = files
    torch.save({**init, "b.weight": torch.ones(7, 10), "b.bias": torch.ones(7), "extra": torch.ones(1)}, "old.pt")
    words = ["search", *WORDS, "--checkpoint", "old.pt", "--allow-mismatch", "b.*", "--allow-mismatch", "extra"]
    assert command(*words, "--rounds", "1", "--replicates", "2", "--out", "run").code == 0
    starts = [load_file(f"run/init/{replicate}.safetensors") for replicate in (0, 1)]
    for start in starts:
        assert all(torch.equal(start[name], value) for name, value in init.items() if not name.startswith("b."))
    assert not torch.equal(starts[0]["b.weight"], starts[1]["b.weight"])


def test_a_sharded_folder_is_a_checkpoint(files, command, tmp_path):
    init, _ = files
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(init)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: init[name] for name in names if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert command("search", *WORDS, "--checkpoint", "shards", "--rounds", "1", "--out", "run").code == 0
    start = load_file("run/init/0.safetensors")
    assert all(torch.equal(start[name], value) for name, value in init.items())
