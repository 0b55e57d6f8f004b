"""`inspect MODEL`: the dry look before a search, against the search's own plan and figures worked out by hand."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from ticketfind import forks, models

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=10):
        super().__init__()
        self.embed, self.a, self.norm = nn.Embedding(4, 8), nn.Linear(8, width), nn.LayerNorm(width)
        self.lazy = nn.LazyLinear(3)
    def forward(self, x): return self.lazy(self.norm(self.a(self.embed(x)).mean(1)))

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3)
    def forward(self, x): return self.norm(self.a(x.float()))

class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.lazy = nn.Linear(10, 3)
        self.a.requires_grad_(False)

def data():
    inputs = torch.randint(0, 4, (60, 5), generator=torch.Generator().manual_seed(0))
    return (inputs[:50], inputs[:50, 0] % 3), (inputs[50:], inputs[50:, 0] % 3)
"""
LENGTH = ["--data", "net.py:data", "--iterations", "20", "--batch-size", "5", "--rounds", "2", "--prune", "0.5"]


@pytest.fixture(autouse=True)
def net_py(tmp_path):
    (tmp_path / "net.py").write_text(NET)


def test_every_parameter_its_shape_and_why(command):
    found = command("inspect", "net.py:Frozen", "--json").json
    assert found["tensors"] == {
        "embed.weight": {"shape": [4, 8], "pruned": False, "reason": "embedding"},
        "a.weight": {"shape": [10, 8], "pruned": False, "reason": "frozen"},
        "a.bias": {"shape": [10], "pruned": False, "reason": "frozen"},
        "norm.weight": {"shape": [10], "pruned": False, "reason": "normalization"},
        "norm.bias": {"shape": [10], "pruned": False, "reason": "bias"},
        "lazy.weight": {"shape": [3, 10], "pruned": True, "reason": "Linear weight"},
        "lazy.bias": {"shape": [3], "pruned": False, "reason": "bias"},
    }
    assert (found["parameters"], found["prunable"]) == (4 * 8 + 90 + 20 + 33, 30)
    shown = command("inspect", "net.py:Frozen").out
    assert "a.weight      10x8   whole   frozen\n" in shown
    assert not any(line.endswith(" ") for line in shown.splitlines())


def test_with_data_it_is_what_a_search_would_do(command):
    words = [*LENGTH, "--replicates", "3", "--engine", "eager", "--skip", "lazy.*", "--set", "prune.rewind=4it"]
    found = command("inspect", "net.py:Net", *words, "--json").json
    planned = command("search", "--model", "net.py:Net", *words, "--dry-run", "--json").json
    for key in ("rounds", "iterations", "parameters", "prunable", "memory", "disk"):
        assert found[key] == planned[key], key
    assert [entry["kept"] for entry in found["rounds"]] == [80, 40, 20]
    assert found["iterations"] == 3 * (20 + 16 + 16) and found["replicates"] == 3
    parameters = 32 + 90 + 20 + 33
    assert found["memory"] == 4 * (4 * parameters + 80)  # weights, gradients, two of adamw; the mask
    assert found["data_bytes"] == 60 * (5 * 8 + 8)
    assert min(found["first_step_seconds"], found["step_seconds"]) > 0


@pytest.mark.skipif(sys.platform != "linux" or forks.cores() < 2, reason="side by side needs Linux and two cores")
def test_memory_grows_with_the_trainings_at_once(command):
    one, many = (
        command("inspect", "net.py:Net", *LENGTH, "--replicates", str(n), "--engine", way, "--json").json["memory"]
        for n, way in ((4, "eager"), (4, "processes"))
    )
    assert many == 4 * one


def test_a_checkpoint_is_read(command, tmp_path):
    example = torch.zeros(2, 5, dtype=torch.long)
    state = models.state_of(models.source("net.py:Net", {}, example=example, outputs=3).new(3))
    save_file(state, "w.safetensors")
    assert command("inspect", "net.py:Net", *LENGTH, "--checkpoint", "w.safetensors", "--json").json["iterations"] == 60
    refused = command("inspect", "net.py:Net", *LENGTH, "--model-arg", "width=9", "--checkpoint", "w.safetensors")
    assert refused.code == 1 and "a.weight (9, 8) in the model, (10, 8) in the file" in refused.err


def test_two_checkpoints_leave_nothing_to_train(command):
    frozen = models.source("net.py:Frozen", {}).new(0)
    torch.save(frozen.state_dict(), "w.pt")
    words = ["net.py:Frozen", *LENGTH, "--rounds", "1", "--checkpoint", "w.pt", "--set", "model.trained=w.pt"]
    assert command("inspect", *words, "--json").json["iterations"] == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["net.py"], 1, "module:factory or file.py:factory"),
        (["net.py:Net"], 1, "lazy.weight takes its size from the first inputs, and there are none; give --data"),
        (["net.py:Frozen", "--skip", "nothing.*"], 1, "prune.skip: 'nothing.*' matches nothing; there are embed."),
        (["net.py:Frozen", "--prune", "zz*=0.3"], 1, "prune.fraction: 'zz*' matches nothing"),
        (["resnet19"], 1, "did you mean resnet"),
        (["net.py:Net", *LENGTH, "--batch-size", "70"], 2, "at most the 45 training examples, found 70"),
        (["net.py:Net", *LENGTH, "--checkpoint", "none.pt"], 1, "none.pt: expected named tensors, found nothing"),
        (["gone.safetensors"], 1, "ticket gone.safetensors: no such file"),
        (["net.py:Frozen", "--set", "train.no=3"], 2, "train.no: unknown key"),
    ],
)
def test_faults_are_one_line(command, words, code, message):
    torch.save({}, "none.pt")
    done = command("inspect", *words)
    assert done.code == code and message in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and not done.out


def test_a_model_with_nothing_to_prune_is_shown_all_the_same(command):
    words = ["inspect", "torch.nn:LayerNorm", "--model-arg", "normalized_shape=5"]
    found = command(*words, "--json").json
    assert (found["prunable"], found["rounds"]) == (0, [])
    assert "0 of 10 parameters can be pruned" in command(*words).out


def test_a_step_that_fails_is_one_line(command):
    """BatchNorm refuses a single example, in training only."""
    ran = command("inspect", "net.py:Norm", *LENGTH, "--batch-size", "1")
    assert ran.code == 1
    assert ran.err.startswith("error: the first steps: training failed: ValueError: Expected more than 1 value")


def test_a_training_of_ones_own_is_not_timed(command, tmp_path):
    (tmp_path / "loop.py").write_text("def train(model, hold, arm): raise AssertionError")
    ran = command("inspect", "net.py:Net", *LENGTH, "--set", "train.trainer=loop.py:train", "--json")
    assert (ran.code, ran.json["step_seconds"], ran.json["iterations"]) == (0, None, 60)
