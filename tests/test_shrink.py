"""Smaller networks: the outputs of the masked one, units that were emptied and no others, and the file."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ticketfind import TicketfindError, load_shrunk, prunable, speed
from ticketfind.lanes import put
from ticketfind.nets import NETS
from ticketfind.shrink import Shrunk, save, shrink

pytest.importorskip("torch_pruning")


def trained_looking(model: nn.Module, seed: int = 0) -> nn.Module:
    """Biases, statistics and scales that are not what they start as."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise.abs() + 0.5 if "var" in name or ("bn" in name and "weight" in name) else 0.3 * noise)
    return model.eval()


def sparse(model: nn.Module, keep: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [c for c in prunable.candidates(model) if c.pruned]
    return {c.name: torch.rand(c.shape, generator=generator) < keep for c in found}


def shrunk(model: nn.Module, masks: dict[str, Tensor], shape: tuple[int, ...]) -> tuple[Shrunk, nn.Module]:
    """The smaller network, checked against the masked one on inputs that it was not made with."""
    inputs = torch.randn(40, *shape, generator=torch.Generator().manual_seed(9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = shrink(model, masks, inputs[:8])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain = copy.deepcopy(model)
    put(plain, before, masks)
    expected = plain.eval()(inputs)
    with torch.no_grad():
        torch.testing.assert_close(small.model(inputs), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(small.model.double()(inputs.double()), plain.double()(inputs.double()))
    small.model.float()
    return small, plain.float()


def sizes(model: nn.Module) -> dict[str, int]:
    kinds = (nn.Linear, nn.Conv2d)
    return {name: len(layer.weight) for name, layer in model.named_modules() if isinstance(layer, kinds)}


def test_lenet_by_hand() -> None:
    """Unit 3 of fc1 is not read; unit 5 gets nothing; unit 7 is read by a unit of fc2 alone that is not read itself."""
    model = trained_looking(NETS["lenet-300-100"](input_shape=(1, 4, 4)))
    masks = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in model.named_parameters() if w.ndim > 1}
    masks["fc2.weight"][:, 3] = False
    masks["fc1.weight"][5] = False
    masks["fc3.weight"][:, 11] = False
    masks["fc2.weight"][:, 7] = False
    masks["fc2.weight"][11, 7] = True
    small, _ = shrunk(model, masks, (1, 4, 4))
    assert small.kept == {
        "fc1": [unit for unit in range(300) if unit not in (3, 5, 7)],
        "fc2": [unit for unit in range(100) if unit != 11],
    }
    assert sizes(small.model) == {"fc1": 297, "fc2": 99, "fc3": 10} and not small.notes
    assert (small.model.fc1.out_features, small.model.fc2.in_features) == (297, 297)
    kept = small.kept["fc1"]
    torch.testing.assert_close(small.model.fc1.weight, model.fc1.weight[kept], rtol=0, atol=0)
    constant = model.fc2.weight[:, 5] * model.fc1.bias[5].clamp(min=0)
    torch.testing.assert_close(small.model.fc2.bias, (model.fc2.bias + constant)[small.kept["fc2"]])


@pytest.mark.parametrize(
    ("name", "keep", "shape"),
    [("lenet-300-100", 0.01, (1, 8, 8)), ("conv-2", 0.003, (1, 8, 8)), ("resnet-20", 0.01, (1, 8, 8))],
)
@pytest.mark.parametrize("as_it_starts", [True, False])
def test_outputs_are_those_of_the_masked_network(
    name: str, keep: float, shape: tuple[int, ...], as_it_starts: bool
) -> None:
    torch.manual_seed(0)
    model = NETS[name](input_shape=shape)
    if not as_it_starts:
        trained_looking(model)
    small, plain = shrunk(model, sparse(model, keep), shape)
    assert small.kept and speed.parameters(small.model) < speed.parameters(plain)
    x = torch.zeros(1, *shape)
    assert speed.multiply_adds(small.model, x) < speed.multiply_adds(plain, x)


def test_no_unit_is_left_that_could_go() -> None:
    """Against what masks alone say: each unit that is left is read, and something reaches it."""
    model = NETS["lenet-300-100"](input_shape=(1, 8, 8))  # biases are zero: a unit without inputs is zero
    small, _ = shrunk(model, sparse(model, 0.01), (1, 8, 8))
    for maker, reader in (("fc1", "fc2"), ("fc2", "fc3")):
        assert (small.model.get_parameter(f"{maker}.weight") != 0).any(1).all()
        assert (small.model.get_parameter(f"{reader}.weight") != 0).any(0).all()


class Padded(nn.Module):
    def __init__(self, padding: int, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 3, 3, padding=padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(self.conv1(x)).sigmoid()).mean((2, 3))


@pytest.mark.parametrize(("padding", "bias", "goes"), [(0, True, True), (1, True, False), (0, False, False)])
def test_a_constant_channel_goes_where_a_bias_can_hold_it(padding: int, bias: bool, goes: bool) -> None:
    """sigmoid(BatchNorm(bias)): a zero border around it is no constant, and without a bias there is no place for it."""
    model = trained_looking(Padded(padding, bias))
    masks = {"conv1.weight": torch.ones(4, 1, 3, 3, dtype=torch.bool)}
    masks["conv1.weight"][2] = False
    small, _ = shrunk(model, masks, (1, 9, 9))
    assert small.kept == ({"conv1": [0, 1, 3]} if goes else {})


def test_a_residual_channel_goes_only_with_all_its_layers() -> None:
    torch.manual_seed(0)
    model = NETS["resnet-20"](input_shape=(1, 8, 8))
    masks = {c.name: torch.ones(c.shape, dtype=torch.bool) for c in prunable.candidates(model) if c.pruned}
    masks["blocks.0.conv2.weight"][3] = False  # the stream still carries it
    masks["blocks.0.conv1.weight"][4] = False  # inside a block: BatchNorm makes zero of it, and ReLU
    small, _ = shrunk(model, masks, (1, 8, 8))
    assert small.kept == {"blocks.0.conv1": [c for c in range(16) if c != 4]}
    for name in ("conv", "blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv2"):
        masks[f"{name}.weight"][3] = False
    small, _ = shrunk(model, masks, (1, 8, 8))
    assert len(small.kept["conv"]) == len(small.kept["blocks.2.conv2"]) == 15 and not small.notes


def test_what_torch_pruning_gets_wrong_is_left_alone() -> None:
    """A network that wants its sizes, and units that are outputs."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).view(-1, 2, 4).relu().view(-1, 8))

    masks = {"fc1.weight": torch.ones(8, 6, dtype=torch.bool), "fc2.weight": torch.ones(3, 8, dtype=torch.bool)}
    masks["fc2.weight"][:, 2] = False
    masks["fc1.weight"][5] = False
    masks["fc2.weight"][1] = False  # an output
    small, _ = shrunk(Heads(), masks, (6,))
    assert not small.kept and len(small.notes) <= 1


def test_the_file_and_its_way_back(tmp_path: Path) -> None:
    model = trained_looking(NETS["resnet-20"](input_shape=(1, 8, 8)))
    small, plain = shrunk(model, sparse(model, 0.01), (1, 8, 8))
    save(small, tmp_path / "s.safetensors", force=False)
    again = NETS["resnet-20"](input_shape=(1, 8, 8))
    load_shrunk(tmp_path / "s.safetensors", again)
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(again.eval()(x), plain(x), rtol=1e-4, atol=1e-5)
    again.train()(x).sum().backward()  # it trains, too
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in load_file(tmp_path / "s.safetensors").items()
    }
    save(small, tmp_path / "s.safetensors", force=False)  # the same again is no conflict
    small.model.fc.bias.data += 1
    with pytest.raises(TicketfindError, match="exists with other content"):
        save(small, tmp_path / "s.safetensors", force=False)
    with pytest.raises(TicketfindError, match="is of another network than the model"):
        load_shrunk(tmp_path / "s.safetensors", NETS["lenet-300-100"]())
    save_file(small.model.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(TicketfindError, match="expected a file written by ticketfind export --shrink"):
        load_shrunk(tmp_path / "plain.safetensors", again)


def test_the_command(command: Callable[..., Any], tmp_path: Path) -> None:
    search = ["search", "--set", "train.iterations=20", "--replicates", "1", "--tolerance", "100", "-q"]
    assert command(*search, "--rounds", "1", "--prune", "0.99", "--out", "run").code == 0
    found = command("export", "run", "--shrink", "--json").json
    assert found["format"] == "shrunk" and found["file"] == "run-shrunk.safetensors"
    units = {name: layer["after"] for name, layer in found["layers"].items()}
    state = load_file("run-shrunk.safetensors")
    assert units == {name: len(state[f"{name}.weight"]) for name in ("fc1", "fc2", "fc3")} and units["fc2"] < 100
    after = sum(value.numel() for value in state.values())
    assert found["parameters"] == {"before": 50_610, "after": after}
    weights = sum(value.numel() for value in state.values() if value.ndim > 1)
    assert found["multiply_adds"] == {"before": 50_200, "after": weights}
    assert found["latency"].keys() == {"1", "60"}
    shown = command("export", "run", "--shrink", "--force")
    assert "units removed" in shown.out and "of the multiply-adds" in shown.out
    assert command("export", "run", "--shrink", "--format", "dense").code == 2
    assert command("export", "run", "--data", "digits").code == 2
    command(*search, "--rounds", "1", "--prune", "0.1", "--out", "mild")
    shown = " ".join(command("export", "mild", "--shrink").out.split())
    assert "no unit is empty, so nothing was removed and nothing is gained" in shown


def test_latencies_tell_a_slow_network() -> None:
    small, large = nn.Linear(8, 8), nn.Sequential(*[nn.Linear(800, 800) for _ in range(4)])
    slow, fast = speed.compared(large, large, [torch.zeros(1, 800)]).latency[1]
    assert min(slow.low, fast.low) > 0
    (quick,) = speed.latencies([small], torch.zeros(1, 8), seconds=0.1)
    assert quick.is_below(slow) and quick.low <= quick.median <= quick.high
    assert not slow.is_below(quick)
    assert json.dumps(speed.multiply_adds(large, torch.zeros(2, 800))) == str(2 * 4 * 800 * 800)
