"""Every command as a user types it: results, --json, exit codes, one-line errors, what is (not) written."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ticketfind import cli, load_ticket

SMALL = [
    "--iterations",
    "40",
    "--rounds",
    "2",
    "--replicates",
    "2",
    "--set",
    "train.eval_every=20",
    "--engine",
    "eager",
]
MODEL_PY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10, width=16):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)
    def forward(self, x):
        return self.head(self.body(x))

class Nothing:
    pass
"""


class Ran:
    """What a command left: exit code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict:
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1, "one line on stdout, and nothing else"
        return json.loads(self.out)


@pytest.fixture
def run(tmp_path, monkeypatch, capfd) -> Iterator:
    """run("search", ...) in this process, in an empty folder, as the console script would."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["ticketfind", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return Ran(code, *capfd.readouterr())

    return call


@pytest.fixture
def searched(run):
    """A folder with a finished small run."""
    assert run("search", *SMALL).code == 0
    return run


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------- the main job


def test_the_whole_job(run, tmp_path):
    found = run("search", *SMALL, "--json").json
    assert set(found) == {"run", "dense", "rounds", "winner", "ticket", "seconds"}
    assert found["run"] == "runs/digits"
    assert [r["round"] for r in found["rounds"]] == [0, 1, 2]
    # 50,200 weights lose round(0.2 n) in fc1 and fc2 and round(0.1 n) in fc3, twice
    assert found["rounds"][2]["remaining"] == pytest.approx((12288 + 19200 + 810) / 50200)
    for r in found["rounds"]:
        assert r["replicates"] == 2 and len(r["accuracy_early"]["values"]) == 2
        assert 0 < r["accuracy_early"]["mean"] <= 1 and r["early_stop"]["mean"] in (20, 30, 40)

    judged = run(
        "eval", "--noise", "0.5", "--noise", "2", "--round", "2", "--trials", "1", "--seed", "0", "--json"
    ).json
    assert list(judged["arms"]) == [
        "dense", "ticket", "noise=0.5", "dense noise=0.5", "noise=2", "dense noise=2", "reinit", "random",
    ]  # fmt: skip
    assert judged["verdict"].startswith(("winning", "matching but not special", "not matching", "inconclusive"))
    # the same weights, masks, data order and seeds: with its seeds the evaluation repeats it to the bit
    assert judged["arms"]["ticket"]["accuracy_end"]["values"] == found["rounds"][2]["accuracy_end"]["values"]
    assert judged["arms"]["dense"]["accuracy_end"]["values"] == found["dense"]["accuracy_end"]["values"]
    (kept,) = Path("runs/digits/evals").glob("*.json")
    assert json.loads(kept.read_text())["arms"] == judged["arms"]

    for form in ("ticket", "compact", "dense", "torch-prune"):
        wrote = run("export", "--round", "1", "--replicate", "1", "--format", form, "--json").json
        assert wrote["file"] == f"digits-{form}.safetensors" and wrote["bytes"] == Path(wrote["file"]).stat().st_size
    ticket, compact = load_ticket("digits-ticket.safetensors"), load_ticket("digits-compact.safetensors")
    dense = load_file("digits-dense.safetensors")
    for name, mask in ticket.masks.items():
        assert torch.equal(mask, compact.masks[name])
        assert torch.equal(dense[name], ticket.init[name] * mask)
    assert Path("digits-compact.safetensors").stat().st_size < Path("digits-ticket.safetensors").stat().st_size

    same = run("diff", "digits-ticket.safetensors", "digits-compact.safetensors", "--json").json
    assert same["same_masks"] and same["total"]["agreement"] == 1
    between = run("diff", "runs/digits", "digits-ticket.safetensors", "--round", "2", "--json")
    assert between.code == 1 and "--round and --replicate are for run directories" in between.err

    assert run("inspect", "--json").json["finished"] is True
    assert run("inspect", "digits-ticket.safetensors", "--json").json["tensors"]["fc1.weight"]["kept"] == 15360
    parameters = run("inspect", "lenet-300-100", "--data", "digits", "--set", "data.validation=200", "--json").json
    assert parameters["prunable"] == 50200 and parameters["tensors"]["fc1.bias"]["reason"] == "bias"
    assert not list(tmp_path.rglob("*.tmp"))


def test_people_read_tables(searched):
    shown = searched("search", *SMALL).out
    assert "finished" in shown and "at early stop" in shown and shown.count("\n    ") >= 2
    for words in (("inspect",), ("inspect", "lenet-300-100"), ("eval", "--round", "1"), ("export", "--round", "1")):
        done = searched(*words)
        assert done.code == 0 and done.out and not done.err, words
    assert searched("export", "--round", "1", "-q").out.count("\n") == 1


def test_a_file_is_enough(searched, tmp_path, monkeypatch):
    """Another machine: the ticket file, and no run directory."""
    searched("export", "--round", "2", "-o", "t.safetensors")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "t.safetensors").rename(elsewhere / "t.safetensors")
    monkeypatch.chdir(elsewhere)
    judged = searched("eval", "t.safetensors", "--trials", "2", "--json").json
    assert judged["arms"]["ticket"]["replicates"] == 2
    assert files_in(elsewhere) == {"t.safetensors"}


def test_runs_are_named_and_reused(searched, tmp_path):
    assert "finished" in searched("search", *SMALL).out
    assert searched("search", *SMALL, "--lr", "0.01", "--json").json["run"] == "runs/digits-2"
    assert os.path.realpath("runs/latest") == str(tmp_path / "runs/digits-2")
    before = (tmp_path / "runs/digits/log.jsonl").read_bytes()
    other = searched("search", *SMALL, "--lr", "0.01", "--out", "runs/digits")
    assert other.code == 1 and "train.lr: 0.0012 there, 0.01 here" in other.err
    assert (tmp_path / "runs/digits/log.jsonl").read_bytes() == before


def test_dry_run_trains_and_writes_nothing(run, tmp_path):
    plan = run("search", "--dry-run", "--json").json
    assert plan["prunable"] == 50200 and plan["iterations"] == 19 * 5 * 1000
    assert plan["rounds"][18]["remaining"] == pytest.approx(0.0206, abs=1e-4)
    assert run("search", "--dry-run").code == 0
    assert not files_in(tmp_path)


def test_dry_run_says_how_long_trainings_for_single_masks_are(run):
    """Rounds 3 to 6 draw one mask each; the dense training draws three."""
    words = ["--iterations", "200", "--rounds", "7", "--replicates", "2", "--ahead", "3", "--ahead", "1"]
    words += ["--mask-iterations", "40%", "--dry-run"]
    assert run("search", *words, "--json").json["iterations"] == 2 * (8 * 200 + 4 * 80)
    assert (
        "3,840 iterations in all, 4 rounds trained twice, once for the mask, 80 iterations" in run("search", *words).out
    )


def test_dry_run_says_what_there_is_between_masks(run):
    """Rounds 0 and 4 draw four masks and three: 3 + 2 times 50 iterations for each of 2 replicates."""
    words = ["--iterations", "200", "--rounds", "7", "--replicates", "2", "--ahead", "4", "--finetune", "50"]
    assert run("search", *words, "--dry-run", "--json").json["iterations"] == 2 * (8 * 200 + 5 * 50)
    assert "3,700 iterations in all, 5 times 50 a replicate between masks" in run("search", *words, "--dry-run").out


def test_until_sets_the_rounds(run):
    plan = run("search", "--until", "5%", "--dry-run", "--json").json
    assert plan["rounds"][-1]["remaining"] <= 0.05 < plan["rounds"][-2]["remaining"]


def test_one_shot(run):
    found = run("search", *SMALL, "--rounds", "1", "--prune", "0.9", "--json").json
    assert found["rounds"][1]["remaining"] == pytest.approx(0.1, abs=1e-4)


def test_prune_fractions_by_glob(run):
    plan = run("search", "--prune", "*=0.5", "--prune", "fc3.*=0", "--rounds", "1", "--dry-run", "--json").json
    assert plan["rounds"][1]["kept"] == 9600 + 15000 + 1000


# ------------------------------------------------------------------------------------- models and data


def test_a_users_model_and_checkpoint(run, tmp_path):
    (tmp_path / "net.py").write_text(MODEL_PY)
    sys.path.insert(0, str(tmp_path))
    try:
        import net

        weights = net.Net(width=8).state_dict()
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["net"]
    torch.save({"model": {f"module.{k}": v for k, v in weights.items()}}, "net.pt")
    words = ["search", "--model", "net.py:Net", "--model-arg", "width=8", "--checkpoint", "net.pt", "--data", "digits"]
    words += ["--iterations", "30", "--rounds", "2", "--replicates", "1", "--engine", "eager"]
    found = run(*words, "--json").json
    assert found["run"] == "runs/net.py-Net-digits"
    run("export", "--round", "2", "-o", "t.safetensors")
    ticket = load_ticket("t.safetensors")
    assert ticket.about.iteration == 0, "a checkpoint is rewound to by default"
    assert torch.equal(ticket.init["body.1.weight"], weights["body.1.weight"])
    assert torch.equal(ticket.init["body.2.running_mean"], weights["body.2.running_mean"])

    refused = run("eval", "t.safetensors")
    assert refused.code == 1 and "names code (model.spec: net.py:Net)" in refused.err and "--trust" in refused.err
    assert run("eval", "t.safetensors", "--trials", "1", "--trust").code == 0
    assert run("eval", "t.safetensors", "--trials", "1", "--model", "net.py:Net", "--model-arg", "width=8").code == 0
    assert run("eval", "--round", "2").code == 0, "one's own run is followed"


def test_a_timm_model_rewinds_its_batch_norms(run):
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 48)
    images = (draw.integers(0, 200, (48, 32, 32)) + 18 * labels[:, None, None]).astype(np.uint8)
    np.savez("d.npz", x_train=images[:36], y_train=labels[:36], x_test=images[36:], y_test=labels[36:])
    words = [
        "search",
        "--model",
        "resnet10t",
        "--data",
        "d.npz",
        "--replicates",
        "2",
        "--engine",
        "eager",
        "--rounds",
        "1",
    ]
    words += ["--iterations", "6", "--batch-size", "8", "--rewind", "2it", "--set", "train.eval_every=3"]
    assert run(*words).code == 0
    starts = [load_file(f"runs/resnet10t-d.npz/init/{replicate}.safetensors") for replicate in (0, 1)]
    for start in starts:
        assert start["bn1.num_batches_tracked"] == 2
        assert start["conv1.0.weight"].shape[1] == 1 and start["fc.weight"].shape[0] == 3
    assert not torch.equal(starts[0]["bn1.running_mean"], starts[1]["bn1.running_mean"])


# ------------------------------------------------------------------------------------------- bad input


BAD = {
    "unknown model": (["search", "--model", "resnet19"], 1, ["resnet19", "resnet18"]),
    "unknown data": (["search", "--data", "nowhere"], 1, ["nowhere", "digits"]),
    "no data": (["search", "--model", "conv-2"], 2, ["data.spec", "--data"]),
    "unknown score": (["search", "--score", "magnitud"], 2, ["prune.score", "magnitude", "'magnitud'"]),
    "unknown recipe": (["search", "digit"], 1, ["digit", "did you mean digits"]),
    "prune 1.5": (["search", "--prune", "1.5"], 2, ["prune.fraction", "between 0 and 1", "1.5"]),
    "prune 0": (["search", "--prune", "0"], 2, ["prune.fraction"]),
    "rounds 0": (["search", "--rounds", "0"], 2, ["prune.rounds", "at least 1", "found 0"]),
    "rewind": (["search", "--rewind", "1000it"], 2, ["prune.rewind", "before the end of the training (1000)"]),
    "two lengths": (["search", "--iterations", "9", "--epochs", "1"], 2, ["--iterations or --epochs"]),
    "no such option": (["search", "--nope"], 2, ["--nope"]),
    "model-arg": (["search", "--model-arg", "width"], 2, ["KEY=VALUE"]),
    "labels outside": (["search", "--model-arg", "num_classes=5"], 1, ["labels 0 to 9", "[2, 5]"]),
    "unknown argument": (["search", "--model-arg", "depth=5"], 1, ["lenet-300-100", "depth"]),
    "non-finite": (["search", *SMALL, "--lr", "1e30"], 1, ["round 0, replicate", "iteration 1", "lower learning rate"]),
    "batch": (["search", "--batch-size", "2000"], 2, ["train.batch_size", "1197", "2000"]),
    "glob": (["search", "--skip", "conv*"], 1, ["prune.skip", "conv*", "fc1.weight"]),
    "nothing left": (["search", "--skip", "*"], 1, ["parameter to prune"]),
    "no run": (["eval"], 1, ["runs/latest", "search"]),
    "no run to export": (["export"], 1, ["runs/latest"]),
    "missing ticket": (["eval", "t.safetensors"], 1, ["t.safetensors", "nothing of that name"]),
    "empty ticket": (["eval", "empty.safetensors"], 1, ["empty.safetensors", "safetensors"]),
    "truncated ticket": (["inspect", "cut.safetensors"], 1, ["cut.safetensors", "safetensors"]),
    "not a ticket": (["export", "plain.safetensors"], 1, ["plain.safetensors", "without ticketfind metadata"]),
    "not safetensors": (["diff", "text.safetensors", "plain.safetensors"], 1, ["text.safetensors"]),
    "factory": (["inspect", "net.py:Nothing"], 1, ["nn.Module", "Nothing"]),
    "missing name": (["inspect", "net.py:Nett"], 1, ["Nett", "did you mean Net"]),
    "missing file": (["inspect", "nett.py:Net"], 1, ["nett.py", "no such file"]),
    "html": (["search", "--checkpoint", "page.pth"], 1, ["page.pth"]),
    "other width": (["search", "--checkpoint", "plain.safetensors"], 1, ["plain.safetensors", "fc1.weight", "(3,)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, run, tmp_path):
    words, code, fragments = BAD[case]
    (tmp_path / "empty.safetensors").touch()
    save_file({"fc1.weight": torch.ones(3)}, "plain.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "plain.safetensors").read_bytes()[:20])
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor at all")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    (tmp_path / "net.py").write_text(MODEL_PY)
    before = files_in(tmp_path)
    done = run(*words)
    assert done.code == code, done.err
    for fragment in fragments:
        assert fragment in done.err
    assert "Traceback" not in done.err
    if code == 1:
        assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert {name for name in files_in(tmp_path) - before if "__pycache__" not in name} <= {"runs"}


def test_every_fault_of_a_recipe_at_once(run, tmp_path):
    (tmp_path / "r.yaml").write_text("train: {lr: fast, iteration: 5}\nprune: {rounds: 0}\nmodle: {}\n")
    done = run("search", "r.yaml", "--score", "no", "--set", "run.seed=-1")
    assert done.code == 2
    for key in ("train.lr", "train.iteration", "prune.rounds", "modle", "prune.score", "run.seed"):
        assert f"error: {key}: " in done.err
    assert "did you mean iterations" in done.err and "did you mean model" in done.err


def test_a_ticket_of_another_network(searched, tmp_path):
    searched("export", "--round", "1", "-o", "t.safetensors")
    done = searched("eval", "t.safetensors", "--model", "conv-2")
    assert done.code == 1 and "does not fit the model" in done.err and "conv1.weight" in done.err
    (tmp_path / "net.py").write_text(MODEL_PY)


def test_export_replaces_nothing_else(searched, tmp_path):
    (tmp_path / "mine.safetensors").write_text("mine")
    done = searched("export", "--round", "1", "-o", "mine.safetensors")
    assert done.code == 1 and "--force" in done.err
    assert (tmp_path / "mine.safetensors").read_text() == "mine"
    assert searched("export", "--round", "1", "-o", "mine.safetensors", "--force").code == 0


def test_diff_exit_codes(searched):
    for replicate in (0, 1):
        searched("export", "--round", "1", "--replicate", str(replicate), "-o", f"{replicate}.safetensors")
    assert searched("diff", "0.safetensors", "0.safetensors", "--exit-code").code == 0
    assert searched("diff", "0.safetensors", "1.safetensors").code == 0
    assert searched("diff", "0.safetensors", "1.safetensors", "--exit-code").code == 1
    assert searched("diff", "0.safetensors", "2.safetensors", "--exit-code").code == 2


# ---------------------------------------------------------------------------------------------- processes


def test_python_m_and_version():
    done = subprocess.run([sys.executable, "-m", "ticketfind", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ticketfind ")


def test_a_search_finds_what_chance_does_not(run):
    """A shortened digits search: the ticket beats a random mask of its density by points, not by luck."""
    words = ["--iterations", "300", "--rounds", "2", "--prune", "0.75", "--replicates", "2"]
    assert run("search", *words, "--set", "train.eval_every=50").code == 0
    arms = run("eval", "--round", "2", "--trials", "2", "--json").json["arms"]
    assert arms["dense"]["accuracy_early"]["mean"] > 0.95
    assert arms["ticket"]["accuracy_early"]["mean"] > arms["random"]["accuracy_early"]["mean"] + 0.02


FACTORY = """
import torch
from pathlib import Path

def noisy(n=60, noise=0.0):
    Path("called").write_text(f"{n} {noise}")
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
    return (x, (x[:, 0] > 0).long()), (x, (x[:, 0] > 0).long())

def net(width=4): return torch.nn.Sequential(torch.nn.Linear(5, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
"""


def test_eval_takes_code_from_the_user_and_arguments_from_the_ticket(command, tmp_path):
    (tmp_path / "d.py").write_text(FACTORY)
    small = ["--iterations", 6, "--batch-size", 8, "--rounds", 1, "--tolerance", 100, "--set", "data.validation=0.2"]
    model = ["--model", "d.py:net", "--model-arg", "width=6"]
    found = command("search", *model, "--data", "d.py:noisy", "--data-arg", "n=40", "--data-arg", "noise=0.5", *small)
    assert found.code == 0, found.err
    ticket = next(Path("runs").glob("*/ticket.safetensors"))
    here = ["--model", "d.py:net", "--data", "d.py:noisy", "--trials", 1]
    assert command("eval", ticket, *here).code == 0
    assert Path("called").read_text() == "40 0.5"
    assert command("eval", ticket, *here, "--data-arg", "n=50").code == 0
    assert Path("called").read_text() == "50 0.0"
    assert command("eval", ticket, "--model", "d.py:net", "--data", "digits", "--trials", 1).code == 1  # its own shape
