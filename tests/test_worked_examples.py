"""The examples of docs/examples, run small, as a user runs them."""

import json
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ticketfind import cli, load_ticket, specs

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """run("search", ...) -> its --json object; in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> Any:
        monkeypatch.setattr(sys, "argv", ["ticketfind", *map(str, arguments), "--json"])
        capfd.readouterr()
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code, capfd.readouterr().err
        return json.loads(capfd.readouterr().out)

    return call


def small(name: str, **changes: Any) -> list[str]:
    """The search that an example's main program makes, with other values of some options."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    names = {"__file__": str(EXAMPLES / f"{name}.py"), "OLD": "old.pt"}
    settings: list[str] = eval(source[source.index("SETTINGS = [") + 11 :].partition("]  # fmt: skip")[0] + "]", names)
    return [*settings, *(str(part) for key, value in changes.items() for part in (f"--{key.replace('_', '-')}", value))]


def test_every_example_is_explained() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"({path.name})" in text and str(Path.home()) not in path.read_text(encoding="utf-8")


def test_a_loop_of_ones_own(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = EXAMPLES / "own_loop.py"
    monkeypatch.setitem(specs.load_object(f"{trainer}:train", "trainer").__globals__, "STEPS", 100)
    found = run("search", "--model", f"{trainer}:Net", "--trainer", f"{trainer}:train", "--rewind", "50it",
                "--rounds", 1, "--replicates", 2, "--out", "run")  # fmt: skip
    assert found["dense"]["accuracy_end"]["mean"] > 0.6, "it learns: three classes"
    assert all(step % 50 == 0 for step in found["dense"]["early_stop"]["values"])
    assert list(run("eval", "run", "--round", 1)["arms"]) == ["dense", "ticket", "reinit", "random"]


def test_distributed_training_by_torchrun(run: Any, tmp_path: Path) -> None:
    """Two processes that hold the same mask end with the same weights; the search rewinds to what they wrote."""
    command = (
        f"'{sys.executable}' -m torch.distributed.run --standalone --nproc-per-node 2 '{EXAMPLES / 'distributed.py'}'"
        " --init {init} --mask {mask} --seed {seed} --first {first} --rewind {rewind} --out {out}"
        " --steps 20 --every-rank"
    )
    found = run("search", "--model", EXAMPLES / "distributed.py:Net", "--rounds", 1, "--rewind", "5it",
                "--tolerance", 100, "--train-command", command, "--out", "run")  # fmt: skip
    assert found["winner"]["round"] == 1
    ticket = load_ticket("run/ticket.safetensors")
    rewound = load_file("run/arms/round-0-replicate-0/rewind.safetensors")
    assert ticket.about.iteration == 5 and all(torch.equal(ticket.init[name], rewound[name]) for name in rewound)
    for number in range(2):
        folder = tmp_path / f"run/arms/round-{number}-replicate-0"
        ranks = [load_file(folder / f"rank-{rank}.safetensors") for rank in range(2)]
        final = load_file(folder / "final.safetensors")
        learned = [name for name in final if not name.startswith("norm.running") and "num_batches" not in name]
        assert len(learned) == 6
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in learned), "the processes agree"
        assert all(torch.equal(ranks[0][name], final[name]) for name in final)
    assert all(not final[name][~mask].any() and mask.sum() < mask.numel() for name, mask in ticket.masks.items())
    assert all(not torch.equal(final[name], rewound[name]) for name in ticket.masks), "it has trained"


def test_text(run: Any) -> None:
    asked = small("text", iterations=20, rewind="5it", rounds=1, replicates=1)
    found = run("search", *asked, "--data-arg", "train=600", "--data-arg", "test=200", "--set", "train.eval_every=10")
    assert found["run"] == "runs/text" and found["rounds"][1]["remaining"] == pytest.approx(0.5, abs=1e-3)
    ticket = load_ticket("runs/text/ticket.safetensors") if found["winner"] else None
    masks = load_file("runs/text/masks/01-0.safetensors") if ticket is None else ticket.masks
    assert not [name for name in masks if "embedding" in name or "decoder" in name], "a tied embedding stays whole"
    assert "encoder.layers.0.self_attn.in_proj_weight" in masks
    start = load_file("runs/text/init/0.safetensors")
    assert torch.equal(start["embedding.weight"], start["decoder.weight"])


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed: nobody to speak the words")
def test_speech(run: Any, tmp_path: Path) -> None:
    asked = small("speech", iterations=60, rewind="5it", rounds=1, replicates=1)
    found = run("search", *asked, "--data-arg", "count=16", "--data-arg", f"folder={tmp_path / 'said'}")
    assert found["dense"]["accuracy_end"]["mean"] > 0.25, "one of eight by chance"
    assert len([*(tmp_path / "said").glob("*.wav")]) == 8 * (16 + 4 + 4)
    masks = load_file("runs/speech/masks/01-0.safetensors")
    assert masks.keys() == {"convs.0.weight", "convs.1.weight", "convs.2.weight", "head.weight"}


def test_a_checkpoint_of_another_task(run: Any) -> None:
    specs.load_object(f"{EXAMPLES / 'transfer.py'}:train_elsewhere", "example")("old.pt", iterations=20)
    found = run("search", *small("transfer", iterations=20, rounds=1, replicates=2))
    assert found["rounds"][1]["remaining"] == pytest.approx(0.7, abs=1e-3)
    saved = torch.load("old.pt", weights_only=True)["model"]["state_dict"]
    starts = [load_file(f"runs/transfer/init/{replicate}.safetensors") for replicate in range(2)]
    for name, value in starts[0].items():
        if name.startswith("head."):
            assert value.shape[0] == 4 and saved[f"module.{name}"].shape[0] == 6
            assert name.endswith("bias") or not torch.equal(value, starts[1][name]), "a head of its own"
        else:
            assert torch.equal(value, saved[f"module.{name}"]) and torch.equal(value, starts[1][name])


def has_graph() -> bool:
    return find_spec("orangecontrib") is not None and find_spec("orangecontrib.network") is not None


@pytest.mark.skipif(not has_graph(), reason="orange3-network is not installed: no graph")
def test_a_graph(run: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("search", *small("graph", iterations=80, rounds=2, replicates=2))
    assert found["dense"]["accuracy_early"]["mean"] > 0.5, "one of twelve by chance"
    masks = load_file("runs/graph/masks/02-0.safetensors")
    assert masks.keys() == {"edge_weight", "node.weight", "head.weight"}
    edges = masks["edge_weight"].numel()
    once = edges - round(edges * 0.2)
    assert int(masks["edge_weight"].sum()) == once - round(once * 0.2), "edges have a fraction of their own"
    assert (load_file("runs/graph/init/0.safetensors")["edge_weight"] == 1).all()

    graph = specs.load_object(f"{EXAMPLES / 'graph.py'}:explain", "example")
    monkeypatch.setattr(sys, "argv", ["graph.py", "--explain", "runs/graph"])
    graph("runs/graph")
    said = capfd.readouterr().out
    shares = [100 * load_file(f"runs/graph/masks/02-{r}.safetensors")["edge_weight"].float().mean() for r in range(2)]
    assert f"all edges   {edges} {sum(shares) / 2:6.1f}" in said
    kept = torch.stack([load_file(f"runs/graph/masks/02-{r}.safetensors")["edge_weight"] for r in range(2)])
    assert f"left out by all 2: {int((~kept).all(0).sum())} edges, such as " in said
    assert graph("runs/none") == "runs/none: expected a run of this example with masks of round 1, found none"
    smaller = run("export", "runs/graph", "--round", 2, "--shrink")
    assert smaller["multiply_adds"]["before"] == 1239 * 32 * 12, "what edges carry is no matrix product"


@pytest.mark.skipif(not has_graph(), reason="orange3-network is not installed: no graph")
def test_a_graph_convolution_is_the_product_of_dense_matrices() -> None:
    load = lambda name: specs.load_object(f"{EXAMPLES / 'graph.py'}:{name}", "example")  # noqa: E731
    network, (edges, names, _) = load("Network")(dropout=0), load("artists")()
    with torch.no_grad():
        network.edge_weight.uniform_()
    n = len(names)
    weight = torch.zeros(n, n, dtype=torch.float64)
    weight[edges[0], edges[1]] = weight[edges[1], edges[0]] = network.edge_weight.detach().double()
    joined = torch.zeros(n, n, dtype=torch.float64)
    joined[edges[0], edges[1]] = joined[edges[1], edges[0]] = 1
    scale = (joined + torch.eye(n)).sum(1).rsqrt()  # Kipf & Welling: D^-1/2 (A + I) D^-1/2
    a = scale[:, None] * (weight + torch.eye(n)) * scale
    one, two = network.double().node, network.head
    expected = a @ ((a @ one.weight.T + one.bias).relu() @ two.weight.T + two.bias)
    nodes = torch.tensor([5, 0, 1238])
    torch.testing.assert_close(network(nodes), expected[nodes])
