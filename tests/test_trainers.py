"""Trainings that are not ticketfind's: functions against its own engine, programs, and every way that they fail."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import ticketfind
from ticketfind import TicketfindError, cli, commands, supervise, trainers
from ticketfind.arms import Arm, Outcome, Task, Trainer, Work
from ticketfind.batches import Order
from ticketfind.recipe import Recipe, Train
from ticketfind.results import Round
from ticketfind.signals import Stopped

posix = pytest.mark.skipif(os.name != "posix", reason="commands need Linux or macOS")

# an arm's training in numpy: no PyTorch, and quickly started
PROGRAM = """
import json, os, subprocess, sys, time
import numpy as np
from safetensors.numpy import load_file, save_file
init, mask, out, seed, first, rewind, mode = sys.argv[1:8]
if os.path.exists("fail"):
    sys.exit("ValueError: out of luck at once")
with open(out + "/../started.txt", "a") as file:
    file.write(os.path.basename(out) + "\\n")
weights, masks = load_file(init), load_file(mask)
draw = np.random.default_rng(int(seed))
for step in range(int(first), 10):
    for name, weight in weights.items():
        if weight.dtype == np.float32:
            weight += 0.1 * draw.standard_normal(weight.shape, dtype=np.float32) * masks.get(name, 1)
    if step + 1 == int(rewind):
        save_file(weights, out + "/rewind.safetensors")
metrics = {"accuracy": 0.5 + int(seed) / 100, "validation_loss": 1.0, "test_size": 100}
if mode == "fail" and masks:
    print("reading data ...", flush=True)
    sys.stdout.buffer.write("caf\\u00e9\\n".encode("latin-1"))
    sys.exit("ValueError: out of luck")
save_file(weights, out + "/final.safetensors")
with open(out + "/metrics.json", "w") as file:
    json.dump(metrics, file)
"""


NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))

def small():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 2))
"""


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return found


def gone(pids: list[int]) -> bool:
    return not any(map(alive, pids))


@pytest.fixture
def train_one(
    make_task: Callable[..., Task], make_train: Callable[..., Train], tmp_path: Path
) -> Callable[..., Outcome]:
    """train_one(trainer, net="mlp", keep_at=..., first=0, pruned=True, seed=3, **keys of Work) -> the outcome of one
    arm."""

    def train(
        trainer: Trainer,
        net: Any = "mlp",
        *,
        first: int = 0,
        keep_at: int | None = None,
        pruned: bool = True,
        seed: int = 3,
        **work: Any,
    ) -> Outcome:
        task = make_task(net)
        start = task.start(3)
        name = next(name for name, value in start.items() if value.ndim == 2)
        masks = {name: torch.arange(start[name].numel()).view(start[name].shape) % 3 > 0} if pruned else {}
        arm = Arm("round 1, replicate 0", start, masks, seed, first, 1, 0)
        settings = {
            "how": make_train(),
            "keep_at": keep_at,
            "tick": lambda n: None,
            "folder": tmp_path / "arms",
            **work,
        }
        return trainer(task, arm, Work(**settings))

    return train


# ------------------------------------------------------------------------------------------- functions


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, fused=True)


@pytest.mark.parametrize("rewind", ["0it", "5it", "lr"])
def test_a_plain_loop_gives_ticketfinds_own_run_to_the_bit(
    rewind: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Callable[..., list[Round]], tmp_path: Path,
) -> None:  # fmt: skip
    task = make_task("normed")
    recipe = make_recipe(
        {"prune.rewind": rewind, "train.schedule": "constant", "train.warmup": 0, "train.eval_every": 12}
    )
    told = []

    def loop(model: nn.Module, hold: Any, arm: Arm) -> dict[str, Any]:
        assert task.data is not None
        told.append((arm.round, arm.replicate, arm.seed, arm.first))
        optimizer = sgd(model)
        hold(optimizer)
        for inputs, targets in task.data.train.batches(Order(arm.seed, 16, arm.first, 12)):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        model.eval()
        inputs, targets = task.data.test.batch(torch.arange(len(task.data.test)))
        return {"accuracy": (model(inputs).argmax(1) == targets).double().mean(), "test_size": len(targets)}

    own = run_search(recipe, task, tmp_path / "own")
    theirs = run_search(recipe, replace(task, trainer=trainers.by_function(loop)), tmp_path / "theirs")
    first = 5 if rewind == "5it" else 0
    assert told == [(round, r, 5 + r, first if round else 0) for round in range(4) for r in range(2)]
    assert [r.stats.accuracy_end for r in own] == [r.stats.accuracy_end for r in theirs]
    files = [p.relative_to(tmp_path / "own") for p in sorted((tmp_path / "own").rglob("*.safetensors"))]
    assert len(files) == 6 + (8 if rewind == "lr" else 2) + 2 + 1
    for file in (file for file in files if file.name != "ticket.safetensors"):
        ours, others = load_file(tmp_path / "own" / file), load_file(tmp_path / "theirs" / file)
        assert ours.keys() == others.keys() and all(torch.equal(ours[k], others[k]) for k in ours), file


def steps(model: nn.Module, optimizer: Any, count: int = 12) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()


def after(work: Callable[[nn.Module, Any, Any], Any], metrics: Any = None) -> Callable[..., Any]:
    """A trainer that trains as it should and then does `work`."""

    def train(model: nn.Module, hold: Any, arm: Arm) -> Any:
        optimizer = sgd(model)
        hold(optimizer)
        steps(model, optimizer)
        returned = work(model, hold, optimizer)
        return returned if metrics is None else metrics

    return train


def told(**metrics: Any) -> Callable[..., Any]:
    return after(lambda *_: {"accuracy": 0.5, **metrics})


@torch.no_grad()
def spoil(model: nn.Module, value: float) -> None:
    model.fc1.weight[0, 0] = value


def unheld(model: nn.Module, hold: Any, arm: Arm) -> dict[str, float]:
    steps(model, sgd(model))
    return {"accuracy": 0.5}


def another(model: nn.Module, hold: Any, arm: Arm) -> dict[str, float]:
    hold(sgd(nn.Linear(2, 2)))
    return {"accuracy": 0.5}


def idle(model: nn.Module, hold: Any, arm: Arm) -> dict[str, float]:
    hold(sgd(model))
    return {"accuracy": 0.5}


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "no hold": (unheld, "expected the trainer to call hold(optimizer) before it trains, found no call"),
    "another model": (another, "expected an optimizer of the model's parameters"),
    "no step": (idle, "expected steps of the optimizer that is held, found none"),
    "no optimizer": (after(lambda m, hold, o: hold(m)), "expected a torch.optim.Optimizer, found Mlp"),
    "nothing": (after(lambda *_: None), "metrics: expected a dict with accuracy (of the test set), found None"),
    "no accuracy": (after(lambda *_: {"loss": 1}), "with accuracy (of the test set), found loss"),
    "NaN": (told(accuracy=float("nan")), "metrics: accuracy: expected a finite number, found nan"),
    "text": (told(accuracy="0.9"), "metrics: accuracy: expected a finite number, found '0.9'"),
    "bool": (told(accuracy=True), "expected a finite number, found True"),
    "many": (told(accuracy=torch.ones(2)), "expected a finite number, found tensor([1., 1.])"),
    "huge": (told(early_stop=10**400), "metrics: early_stop: expected a whole number from 0"),
    "no test": (told(test_size=0), "metrics: test_size: expected a whole number from 1, found 0"),
    "half": (told(early_stop=2.5), "metrics: early_stop: expected a whole number from 0, found 2.5"),
    "NaN weights": (after(lambda m, *_: spoil(m, float("nan")), {"accuracy": 0.5}), "fc1.weight is not finite"),
    "revived": (after(lambda m, *_: spoil(m, 1.0), {"accuracy": 0.5}), "expected pruned weights to be zero after"),
    "exit": (after(lambda *_: sys.exit(3)), "the trainer ended the program: sys.exit(3)"),
    "renamed": (
        after(lambda m, *_: nn.utils.parametrizations.weight_norm(m.fc1), {"accuracy": 0.5}),
        "the trained model: expected the names and shapes that the training started with, found fc1.weight (none)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_functions_are_named(name: str, train_one: Callable[..., Outcome]) -> None:
    function, text = FAULTS[name]
    with pytest.raises(TicketfindError) as found:
        train_one(trainers.by_function(function))
    assert str(found.value).startswith("round 1, replicate 0: ") and text in str(found.value)


def test_an_error_in_a_function_names_the_training(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Any, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no\nluck")

    with pytest.raises(TicketfindError, match=r"^round 0, replicate 0: training failed: ValueError: no luck$"):
        run_search(make_recipe(), make_task(trainer=trainers.by_function(fail)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_of_any_kind(train_one: Callable[..., Outcome]) -> None:
    found = train_one(trainers.by_function(told(accuracy=torch.tensor(0.25), note="x", early_stop=None)))
    assert (found.measured.accuracy_early, found.measured.early_stop) == (0.25, 12)
    assert found.measured.validation_loss is None and found.test_size is None
    kinds = {"accuracy_early": np.float32(0.5), "early_stop": np.int64(7), "test_size": torch.tensor(9.0)}
    found = train_one(trainers.by_function(told(accuracy=1, **kinds)))
    assert (found.measured.accuracy_early, found.measured.early_stop, found.test_size) == (0.5, 7, 9)
    assert found.measured.accuracy_end == 1.0


def test_weights_of_another_type_come_back_in_their_own(train_one: Callable[..., Outcome]) -> None:
    found = train_one(trainers.by_function(after(lambda m, *_: m.half(), {"accuracy": 0.5})))
    assert {value.dtype for value in found.final.values()} == {torch.float32}


def test_steps_are_iterations_however_many_optimizers(train_one: Callable[..., Outcome]) -> None:
    at: dict[int, torch.Tensor] = {}
    ticks: list[int] = []

    def train(model: nn.Module, hold: Any, arm: Arm) -> dict[str, float]:
        parts = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model.fc1, model.fc2)]
        for step in range(arm.first, 9):
            for part in parts:
                hold(part)  # again at every step: it counts once
            model(torch.randn(4, 12)).square().mean().backward()
            for part in parts:
                part.step()
            at[step + 1] = model.fc2.weight.detach().clone()
        last = torch.optim.Adam(model.fc3.parameters())  # a second phase
        hold(last)
        steps(model, last, 3)
        at[12] = model.fc3.weight.detach().clone()
        return {"accuracy": 0.5}

    for first, keep_at in ((0, 4), (0, 12), (2, 6)):
        ticks.clear()
        found = train_one(trainers.by_function(train), first=first, keep_at=keep_at, tick=ticks.append)
        assert found.kept is not None
        assert torch.equal(found.kept["fc3.weight" if keep_at == 12 else "fc2.weight"], at[keep_at])
        assert found.measured.early_stop == 12 and sum(ticks) == 12 - first
    with pytest.raises(TicketfindError, match=r"prune.rewind: expected 13 optimizer steps under hold.*, found 12"):
        train_one(trainers.by_function(train), keep_at=13)


def test_random_draws_follow_from_the_arms_seed_and_disturb_nothing(train_one: Callable[..., Outcome]) -> None:
    import random

    drawn = []

    def train(model: nn.Module, hold: Any, arm: Arm) -> Any:
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return told(accuracy=0.5)(model, hold, arm)

    def stop_gradients(*_: Any) -> dict[str, float]:
        torch.set_grad_enabled(False)
        return {"accuracy": 0.5}

    before = random.getstate(), torch.get_rng_state()
    for seed in (3, 3, 4):
        train_one(trainers.by_function(train), seed=seed)
    first, again, other = drawn
    assert first == again and not set(first) & set(other), "each replicate draws its own"
    train_one(trainers.by_function(after(stop_gradients)))
    assert torch.is_grad_enabled()
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_a_function_is_given_a_model_that_is_ready_for_training(train_one: Callable[..., Outcome]) -> None:
    """Whatever the maker of the network left it in: dropout and BatchNorm are as in ticketfind's own training."""

    class Evaluated(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 4))
            self.eval()

    modes = []

    def train(model: nn.Module, hold: Any, arm: Arm) -> Any:
        modes.extend(module.training for module in model.modules())
        return told(accuracy=0.5)(model, hold, arm)

    train_one(trainers.by_function(train), Evaluated)
    assert modes == [True] * 5


def test_a_signal_is_heeded_between_two_steps(train_one: Callable[..., Outcome]) -> None:
    def stop(count: int) -> None:
        raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        train_one(trainers.by_function(told()), tick=stop)


def test_hold_is_a_public_name(make_task: Callable[..., Task]) -> None:
    model = make_task().model
    masks = {"fc1.weight": torch.zeros(16, 12, dtype=torch.bool)}
    optimizer = torch.optim.Adam(model.parameters())
    release = ticketfind.hold(model, optimizer, masks)
    steps(model, optimizer, 2)
    assert not model.get_parameter("fc1.weight").any() and "hold" in ticketfind.__all__
    release()
    steps(model, optimizer, 1)
    assert model.get_parameter("fc1.weight").any()


# -------------------------------------------------------------------------------------------- commands


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., str]:
    """program(mode) -> a command that trains an arm."""
    (tmp_path / "program.py").write_text(PROGRAM)
    return lambda mode="": (
        f"'{sys.executable}' '{tmp_path / 'program.py'}'"
        f" {{init}} {{mask}} {{out}} {{seed}} {{first}} {{rewind}} '{mode}'"
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """run("search", ...) -> (exit code, stdout, stderr), in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)

    def call(*arguments: Any) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["ticketfind", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capfd.readouterr())

    return call


def as_json(ran: tuple[Any, str, str]) -> Any:
    code, out, err = ran
    assert code == 0, err
    return json.loads(out)


def python(source: str) -> str:
    """A command that runs a line of Python; what is in braces is doubled."""
    return f"'{sys.executable}' -c '{source.replace('{', '{{').replace('}', '}}')}' {{out}}"


@posix
def test_a_program_trains_whole_searches_and_evaluations(run: Any, program: Callable[..., str], tmp_path: Path) -> None:
    asked = [
        "search",
        "--model",
        "net.py:net",
        "--data",
        "digits",
        "--set",
        "name=own",
        "--rounds",
        2,
        "--rewind",
        "3it",
    ]
    asked += [
        "--replicates",
        2,
        "--prune",
        "0.5",
        "--train-command",
        program(),
        "--json",
        "--set",
        "train.batch_size=32",
    ]
    found = as_json(run(*asked))
    assert [r["accuracy_end"]["values"] for r in found["rounds"]] == [[0.5, 0.51]] * 3 and found["winner"]["round"] == 2
    masks, ran = load_file("runs/own/masks/02-1.safetensors"), tmp_path / "runs/own/arms"
    final = load_file(ran / "round-2-replicate-1/final.safetensors")
    assert all(not final[name][~mask].any() and final[name][mask].all() for name, mask in masks.items())
    kept, rewound = load_file("runs/own/init/1.safetensors"), load_file(ran / "round-0-replicate-1/rewind.safetensors")
    assert all(torch.equal(kept[name], rewound[name]) for name in kept)
    assert not list(ran.rglob("init.safetensors")), "the run has them already"
    started = ran / "started.txt"
    assert sorted(started.read_text().split()) == [f"round-{i}-replicate-{r}" for i in range(3) for r in range(2)]

    # killed right after a command's end, or between two trainings: what has finished is not run again
    log = Path("runs/own/log.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    for left in (6, 5, 3):
        log.write_text("".join(lines[:left]))
        Path("runs/own/finished").unlink()
        again = as_json(run(*asked))
        assert again["rounds"] == found["rounds"] and started.read_text().count("\n") == 6
        assert log.read_text() == "".join(lines)

    # the controls are trained by it too, from a run and from a file
    judged = as_json(run("eval", "--round", 2, "--trials", 1, "--seed", 0, "--json"))
    assert list(judged["arms"]) == ["dense", "ticket", "reinit", "random"]
    assert judged["arms"]["random"]["accuracy_end"]["values"] == [0.5, 0.51]
    code, _, err = run("eval", "runs/own/ticket.safetensors", "--trials", 1)
    assert code == 1 and "names code (model.spec: net.py:net, train.command: " in err and "--trust" in err
    given = ["eval", "runs/own/ticket.safetensors", "--trials", 1, "--json"]
    found = as_json(run(*given, "--model", "net.py:net", "--set", f"train.command={program()}"))
    assert list(found["arms"]) == ["dense", "ticket", "reinit", "random"]


@posix
@pytest.mark.parametrize("rewind", ["0it", "lr"])
def test_a_program_trains_without_data(rewind: str, run: Any, program: Callable[..., str]) -> None:
    found = as_json(
        run("search", "--model", "net.py:net", "--rounds", 1, "--rewind", rewind, "--tolerance", 1, "--json",
            "--train-command", program(), "--out", "run"),
    )  # fmt: skip
    assert found["winner"]["remaining"] == pytest.approx(0.8, abs=1e-3)


@posix
def test_what_failed_is_run_again_and_nothing_else(run: Any, program: Callable[..., str]) -> None:
    asked = ["search", "--model", "net.py:net", "--rounds", 1, "--replicates", 2, "--out", "run", "--train-command"]
    asked.append(program())
    plan = as_json(run(*asked, "--set", "prune.rounds=2", "--dry-run", "--json"))
    assert plan["iterations"] == 6 and plan["disk"] > 4 * 1480 * 2 * 3, "what the programs leave is counted"
    Path("fail").touch()
    assert run(*asked)[0] == 1 and not Path("run").exists(), "a search that fails at once leaves nothing"
    Path("fail").unlink()
    code, _, err = run(*asked[:-1], program("fail"))
    assert code == 1 and "round 1, replicate 0: the command" in err and "ended with exit code 1" in err
    assert "reading data ..." in err and "caf\N{REPLACEMENT CHARACTER}" in err and "ValueError: out of luck" in err
    started = Path("run/arms/started.txt")
    assert len(started.read_text().split()) == 3
    assert "out of luck" in Path("run/arms/round-1-replicate-0/log.txt").read_text(errors="replace")
    Path("program.py").write_text(PROGRAM.replace('mode == "fail"', "False"))  # the program is mended
    assert run(*asked[:-1], program("fail"))[0] == 0
    assert started.read_text().split()[3:] == ["round-1-replicate-0", "round-1-replicate-1"]


@posix
@pytest.mark.parametrize("own", ["checkpoints/1.pt", "logs/log.txt", "final.safetensors"])
def test_what_a_command_has_written_before_it_fails_is_kept(own: str, run: Any) -> None:
    """In the first training too, where a search that fails leaves nothing else."""
    asked = ["search", "--model", "net.py:net", "--rounds", 1, "--replicates", 2, "--out", "run", "--train-command"]
    asked.append(f"'{sys.executable}' half.py {{out}}/{own}")
    program = "import pathlib, sys; file = pathlib.Path(sys.argv[1]); "
    Path("half.py").write_text(program + "file.parent.mkdir(exist_ok=True); file.write_text('hours'); sys.exit(3)")
    assert "ended with exit code 3" in run(*asked)[2]
    assert (Path("run/arms/round-0-replicate-0") / own).read_text() == "hours"
    Path("half.py").write_text(program + "sys.exit(4 if file.exists() else 5)")
    assert f"ended with exit code {5 if own == 'final.safetensors' else 4}" in run(*asked)[2], "a result is made anew"


def test_tied_weights_are_masked_under_every_name(train_one: Callable[..., Outcome], tmp_path: Path) -> None:
    program = tmp_path / "tied.py"
    program.write_text(
        PROGRAM.split("draw =")[0]
        + "gone = ~masks['encode.weight']\n"
        + "assert not weights['encode.weight'][gone].any() and not weights['decode.weight'][gone].any()\n"
        + "del weights['decode.weight']\n"  # as safetensors' save_model leaves it out
        + "save_file({'module.' + name: value for name, value in weights.items()}, out + '/final.safetensors')\n"
        + "open(out + '/metrics.json', 'w').write('{\"accuracy\": 0.5}')\n"
    )
    command = f"'{sys.executable}' '{program}' {{init}} {{mask}} {{out}} 0 0 0 0"
    found = train_one(commands.by_command(command), "tied")
    assert torch.equal(found.final["encode.weight"], found.final["decode.weight"])


GOOD = PROGRAM.replace("sys.argv[1:8]", '(*sys.argv[1:4], "3", "0", "0", "")')
BAD_PROGRAMS: dict[str, tuple[str, str]] = {
    "no final weights": (GOOD + "os.remove(out + '/final.safetensors')", "final.safetensors, a state dict, found no"),
    "no metrics": (GOOD + "os.remove(out + '/metrics.json')", "metrics.json, an object with accuracy: FileNot"),
    "no JSON": (GOOD + "open(out + '/metrics.json', 'w').write('NaN,')", "an object with accuracy: JSONDecodeError"),
    "no object": (GOOD + "open(out + '/metrics.json', 'w').write('[1]')", "metrics: expected a dict with accuracy"),
    "not finite": (GOOD.replace("0.5 +", "float('nan') +"), "metrics: accuracy: expected a finite number, found nan"),
    "a shape": (GOOD.replace("save_file(weights, out + '/f", "") + "weights['fc1.weight'] = weights['fc1.weight'][1:]\n"
                "save_file(weights, out + '/final.safetensors')",
                "found fc1.weight (15, 12) in place of (16, 12)"),
    "a name": (GOOD + "del weights['fc3.bias']\nsave_file(weights, out + '/final.safetensors')",
               "found fc3.bias (none)"),
    "no tensors": (GOOD + "open(out + '/final.safetensors', 'w').write('x')", "expected a safetensors file"),
    "NaN weights": (GOOD + "weights['fc2.bias'] *= float('nan')\nsave_file(weights, out + '/final.safetensors')",
                    "fc2.bias is not finite after the training"),
    "revived": (GOOD.replace("masks.get(name, 1)", "1"), "expected pruned weights to be zero after the training"),
    "a signal": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL; it printed nothing"),
    "an exit code": ("import sys\nsys.exit(7)", "ended with exit code 7; it printed nothing"),
    "much output": (
        "print('ValueError: the cause')\nfor i in range(60000):\n    print('w' * 40, i)\nprint('x' * 10**6)\n"
        "print('ImportError: another')\nprint(*range(300), sep='\\n')\n"
        "print('10%\\r20%\\r\\n\\n')\nraise SystemExit(1)",
        "the last that it printed:\n  ImportError: another\n  ...\n  281\n",
    ),
}  # fmt: skip


@posix
@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_faults_of_programs_are_named(name: str, train_one: Callable[..., Outcome], tmp_path: Path) -> None:
    source, text = BAD_PROGRAMS[name]
    (tmp_path / "bad.py").write_text(source)
    command = f"'{sys.executable}' '{tmp_path / 'bad.py'}' {{init}} {{mask}} {{out}}"
    with pytest.raises(TicketfindError) as found:
        train_one(commands.by_command(command))
    assert str(found.value).startswith("round 1, replicate 0: ") or name == "no tensors"
    assert text in str(found.value) and len(str(found.value)) < 8000
    assert name != "much output" or str(found.value).endswith("299\n  20%")
    code = tmp_path / "arms/round-1-replicate-0/exit-code"
    assert not code.exists() or code.read_text() != "0\n", "it is run again once it is mended"


@posix
def test_a_missing_rewind_point(train_one: Callable[..., Outcome], program: Callable[..., str], tmp_path: Path) -> None:
    assert train_one(commands.by_command(program()), keep_at=10).kept is not None
    with pytest.raises(TicketfindError, match=r"expected the command to write .*rewind.safetensors"):
        train_one(commands.by_command(program()), keep_at=11, folder=tmp_path / "elsewhere")


@posix
@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("train {init} {ot}", "found {ot} (braces that stand for themselves are doubled)"),
        ("train {init}", "expected {out} and others of init, mask, out, .*, found {init}"),
        ("train", "found none"),
        ("train {} {out}", "found {}"),
        ("train {out.name}", "found {out.name}"),
        ("train '{out}", "No closing quotation"),
        ("train {out", "expected '}'"),
        ("train {out} {seed:zz}", "format"),
        ("train {out} {seed:{x}}", "'x'"),
    ],
)
def test_commands_that_cannot_be_filled_in(command: str, text: str) -> None:
    with pytest.raises(TicketfindError, match=r"train\.command: expected") as found:
        commands.by_command(command)
    assert text.split(".*")[0] in str(found.value) and text.split(".*")[-1] in str(found.value)


@posix
def test_programs_that_are_not_there(train_one: Callable[..., Outcome], tmp_path: Path) -> None:
    with pytest.raises(TicketfindError, match=r"found none called A=1 \(no shell reads the command; sh -c"):
        train_one(commands.by_command("A=1 python {out}"))
    script = tmp_path / "script"
    script.write_text("no program")
    script.chmod(0o755)
    with pytest.raises(TicketfindError, match=r"(?s)exit code 127; .*cannot run .*script: Exec format error"):
        train_one(commands.by_command(f"{script} {{out}}"))


@posix
def test_braces_and_numbers_in_a_command(train_one: Callable[..., Outcome], tmp_path: Path) -> None:
    with pytest.raises(TicketfindError, match="exit code 1") as found:
        train_one(
            commands.by_command(
                f"'{sys.executable}' -c 'import sys; sys.exit(str(sys.argv))' {{out}} {{seed:04}} {{{{x}}}}"
            )
        )
    assert f"'{tmp_path}/arms/round-1-replicate-0', '0003', '{{x}}'" in str(found.value)


@posix
@pytest.mark.parametrize(("first", "keep_at"), [(5, None), (0, 7)], ids=["goes on from 5", "is rewound to 7"])
def test_a_command_is_told_what_to_train(
    first: int, keep_at: int | None, train_one: Callable[..., Outcome], tmp_path: Path
) -> None:
    """And the rest of a training that begins late counts as so many iterations."""
    program = tmp_path / "tell.py"
    rewound = "save_file(weights, out + '/rewind.safetensors')\n"
    program.write_text(GOOD + rewound + "open(out + '/told', 'w').write(' '.join(sys.argv[4:]))\n")
    fields = "{init} {mask} {out} {seed} {first} {rewind} {round} {replicate} {iterations} {device}"
    ticks: list[int] = []
    trainer = commands.by_command(f"'{sys.executable}' '{program}' {fields}")
    train_one(trainer, first=first, keep_at=keep_at, seed=4, tick=ticks.append)
    told = (tmp_path / "arms/round-1-replicate-0/told").read_text()
    assert told == f"4 {first} {keep_at or 0} 1 0 12 cpu"
    assert sum(ticks) == 12 - first


@posix
def test_what_a_failed_attempt_has_written_is_not_the_next_ones(
    train_one: Callable[..., Outcome], program: Callable[..., str], tmp_path: Path
) -> None:
    names = ("final.safetensors", "rewind.safetensors", "metrics.json")
    train_one(commands.by_command(program()), keep_at=10, folder=tmp_path / "whole")
    whole = tmp_path / "whole/round-1-replicate-0"

    def attempt(written: tuple[str, ...], end: str) -> str:
        copies = "".join(f'shutil.copy("{whole / name}", sys.argv[1]); ' for name in written)
        with pytest.raises(TicketfindError) as found:
            train_one(commands.by_command(python(f"import os, shutil, sys; {copies}{end}")), keep_at=10)
        return str(found.value)

    assert "ended with exit code 3" in attempt(names, "sys.exit(3)")
    for name in names:
        written = tuple(other for other in names if other != name)
        assert re.search(f"expected the command to write .*{name}", attempt(written, "sys.exit(0)"))
    assert "ended with exit code 3" in attempt(names, "sys.exit(3)")
    assert "was killed, and its supervisor" in attempt((), "os.kill(os.getppid(), 9)"), "it left no exit code"


# what leaves everything behind: a child, and one in a session of its own
SPAWN = (
    "import os, subprocess, sys, time; "
    'children = [subprocess.Popen(["sleep", "300"], start_new_session=own) for own in (False, True)]; '
    'file = open(sys.argv[1] + "/pids.tmp", "w"); print(os.getpid(), *(c.pid for c in children), file=file); '
    "file.close(); "
    'os.rename(sys.argv[1] + "/pids.tmp", sys.argv[1] + "/pids"); '
)


@posix
def test_a_stop_ends_all_that_the_command_has_started(train_one: Callable[..., Outcome], tmp_path: Path) -> None:
    pids = tmp_path / "arms/round-1-replicate-0/pids"

    def stop_once_it_runs(count: int) -> None:
        if pids.exists():
            assert all(map(alive, map(int, pids.read_text().split())))
            raise Stopped(signal.SIGINT)

    with pytest.raises(Stopped):
        train_one(commands.by_command(python(SPAWN + "time.sleep(300)")), tick=stop_once_it_runs)
    assert gone([*map(int, pids.read_text().split())])
    assert not (pids.parent / "exit-code").exists(), "it has not finished"


@posix
def test_what_a_failed_command_leaves_running_is_ended(train_one: Callable[..., Outcome], tmp_path: Path) -> None:
    with pytest.raises(TicketfindError, match="exit code 5"):
        train_one(commands.by_command(python(SPAWN + "sys.exit(5)")))
    assert gone([*map(int, (tmp_path / "arms/round-1-replicate-0/pids").read_text().split())])


@posix
def test_what_does_not_heed_a_signal_is_killed(tmp_path: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SPAWN + "time.sleep(300)"
    run = (
        f"import sys, pathlib; sys.path.insert(0, {str(Path(supervise.__file__).parent)!r}); import supervise; "
        "supervise.GRACE = 0.3; supervise.main(pathlib.Path(sys.argv[1]), sys.argv[2:])"
    )
    words = [sys.executable, "-I", "-c", run, str(tmp_path / "code"), sys.executable, "-c", stubborn, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as supervisor:
        wait_for((tmp_path / "pids").exists)
        supervisor.send_signal(signal.SIGTERM)  # not for it to heed
        pids = [*map(int, (tmp_path / "pids").read_text().split())]
        assert supervisor.poll() is None and alive(pids[0])
        assert supervisor.stdin is not None
        supervisor.stdin.close()
        supervisor.wait(20)
    assert gone(pids) and not (tmp_path / "code").exists()


@posix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ticketfind_stopped_or_killed(
    number: signal.Signals, run: Any, program: Callable[..., str], tmp_path: Path
) -> None:
    """In the middle of a second training: nothing is left running, and the same command goes on there."""
    (tmp_path / "spawn.py").write_text(
        "import sys\nsys.argv[1:] = sys.argv[3:]\n" + SPAWN.replace("; ", "\n").replace("\nfile.close", "; file.close")
        + "\ntime.sleep(300)\n"
    )  # fmt: skip
    (tmp_path / "choose.sh").write_text(
        f'case "$3" in *round-1*) [ -e go ] || exec {sys.executable} spawn.py "$@";; esac\n'
        f'exec {sys.executable} program.py "$@"\n'
    )
    command = "sh choose.sh {init} {mask} {out} {seed} {first} {rewind} -"
    asked = ["search", "--model", "net.py:net", "--rounds", "1", "--tolerance", "1", "--train-command", command]
    asked += ["--out", "run"]
    pids = tmp_path / "run/arms/round-1-replicate-0/pids"
    with subprocess.Popen([sys.executable, "-m", "ticketfind", *asked], stderr=subprocess.PIPE, text=True) as search:
        wait_for(pids.exists, 300)
        search.send_signal(number)
        _, err = search.communicate(timeout=120)
    assert search.returncode == (130 if number == signal.SIGINT else -number), err
    if number == signal.SIGKILL:
        wait_for(lambda: gone([*map(int, pids.read_text().split())]), 10)
    assert gone([*map(int, pids.read_text().split())])
    (tmp_path / "go").touch()
    code, _, err = run(*asked)
    assert code == 0, err
    assert (tmp_path / "run/arms/started.txt").read_text().split() == ["round-0-replicate-0", "round-1-replicate-0"]


# ---------------------------------------------------------------------------------- the command line

LOOP = """
from pathlib import Path
import torch
Path("imported").touch()

def train(model, hold, arm):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    hold(optimizer)
    generator = torch.Generator().manual_seed(arm.seed)
    x = torch.randn(40, 12, generator=generator)
    y = (x[:, 0] > 0).long()
    for step in range(arm.first, 15):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with Path("arms.txt").open("a") as file:
        print(arm.name, arm.round, arm.replicate, arm.first, sep="|", file=file)
    return {"accuracy": (model(x).argmax(1) == y).double().mean(), "test_size": 40}

def net():
    return torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

def data():
    x = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    return (x, (x[:, 0] > 0).long()), (x[:30], (x[:30, 0] > 0).long())
"""


@pytest.mark.parametrize("data", [[], ["--data", "loop.py:data"]], ids=["no data", "data"])
def test_a_function_from_the_command_line(data: list[str], run: Any, tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    asked = ["search", "--model", "loop.py:net", "--trainer", "loop.py:train", *data, "--rounds", 2]
    asked += ["--rewind", "5it", "--replicates", 2, "--json", "--out", "run"]
    found = as_json(run(*asked))
    assert found["dense"]["replicates"] == 2 and found["dense"]["early_stop"]["values"] == [15, 15]
    arms = Path("arms.txt")
    assert [line.split("|")[1:] for line in arms.read_text().splitlines()] == [
        [str(i), str(r), "5" if i else "0"] for i in range(3) for r in range(2)
    ]
    finished = load_file("run/ticket.safetensors") if found["winner"] else None
    (tmp_path / "run/finished").unlink()
    log = tmp_path / "run/log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    arms.unlink()
    assert {**as_json(run(*asked)), "seconds": 0} == {**found, "seconds": 0}
    assert len(arms.read_text().splitlines()) == 3, "it goes on with what is not in the log"
    if finished is not None:
        assert all(torch.equal(v, finished[k]) for k, v in load_file("run/ticket.safetensors").items())
    arms.unlink()
    assert list(as_json(run("eval", "run", "--round", 1, "--trials", 1, "--seed", 0, "--json"))["arms"]) == [
        "dense",
        "ticket",
        "reinit",
        "random",
    ]
    names = [line.split("|")[0] for line in arms.read_text().splitlines()]
    assert names[:4] == ["dense, seed 0", "dense, seed 1", "ticket, seed 0", "ticket, seed 1"]


def test_a_ticket_file_runs_no_trainer_unless_it_is_trusted(run: Any, tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    ran = run("search", "--model", "net.py:small", 
              "--trainer", "loop.py:train", "--rounds", 1, "--tolerance", 100, "--out", "run")  # fmt: skip
    assert ran[0] == 0, ran[2]
    (tmp_path / "imported").unlink()
    loaded = [n for n, module in sys.modules.items() if getattr(module, "__file__", None) == str(tmp_path / "loop.py")]
    for name in loaded:
        del sys.modules[name]
    ticket = ["eval", "run/ticket.safetensors", "--trials", 1, "--model", "net.py:small"]
    code, _, err = run(*ticket)
    assert code == 1 and "names code (train.trainer: loop.py:train)" in err and not (tmp_path / "imported").exists()
    assert run("inspect", "run/ticket.safetensors")[0] == 0 and not (tmp_path / "imported").exists()
    assert run(*ticket, "--set", "train.trainer=loop.py:train")[0] == 0 and (tmp_path / "imported").exists()
    assert run(*ticket, "--trust")[0] == 0


def test_an_empty_mask_file_can_be_read(tmp_path: Path) -> None:
    save_file({}, tmp_path / "mask.safetensors")
    assert load_file(tmp_path / "mask.safetensors") == {}
