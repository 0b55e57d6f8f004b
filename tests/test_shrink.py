"""Smaller networks: the outputs of the masked one, units that were emptied and no others, and the file."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from ticketfind import TicketfindError, load_shrunk, prunable, speed
from ticketfind.lanes import put
from ticketfind.nets import NETS
from ticketfind.shrink import Shrunk, save, shrink
from ticketfind.tensorfile import read_metadata

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


class Small(nn.Module):
    """Three layers; `between` is what happens to the second one's outputs."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.fc3(self.between(self.fc2(self.fc1(x).relu())))


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(layer.weight.shape, dtype=torch.bool) for name, layer in links(model)}


def links(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


@pytest.mark.parametrize(
    "mixing",
    [
        nn.LayerNorm(8, elementwise_affine=False),
        nn.Softmax(-1),
        lambda h: h - h.mean(1, keepdim=True),
        lambda h: h / h.abs().amax(1, keepdim=True),
        lambda h: h.relu().view(-1, 2, 4).flip(2).flatten(1),  # and a network that wants its sizes
    ],
)
def test_what_mixes_units_keeps_them_and_all_that_they_read(mixing: Callable[[Tensor], Tensor]) -> None:
    """Unit 3 of fc2 is read by nobody in fc3, and alone reads unit 2 of fc1; what mixes the units reads it."""
    torch.manual_seed(0)
    model = trained_looking(Small(mixing))
    masks = whole(model)
    masks["fc3.weight"][:, 3] = False
    masks["fc2.weight"][:, 2] = False
    masks["fc2.weight"][3, 2] = True
    masks["fc3.weight"][1] = False  # an output
    small, _ = shrunk(model, masks, (6,))
    assert not small.kept and len(small.notes) == 1 and small.notes[0].startswith("fc2: 1 emptied unit is left alone: ")


def test_what_is_rarely_the_largest_is_mixed_in_all_the_same() -> None:
    """Few examples may not show that a unit is read: so it is tried with other values."""
    model = Small(lambda h: h / h.amax(1, keepdim=True).clamp(min=2))
    masks = whole(model)
    masks["fc3.weight"][:, 3] = False
    model.fc2.bias.data[3] = -5
    model.fc2.weight.data *= 0.1
    small = shrink(model, masks, torch.randn(8, 6))
    assert not small.kept and "the outputs would change" in small.notes[0]


def test_what_is_constant_in_the_examples_alone_stays() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x) + x[:, 3:4])

    masks = whole(model := Skip())
    masks["fc1.weight"][3] = False
    examples = torch.randn(8, 6)
    examples[:, 3] = 0  # as the corners of handwritten digits are
    assert not shrink(model, masks, examples).kept


@pytest.mark.parametrize("kind", ["tuple", "logits", "names", "object"])
def test_every_output_stays_not_the_predictions_alone(kind: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            features = self.fc2(self.fc1(x).relu()).relu()
            out = self.fc3(features)
            return {
                "tuple": (out, [features]), "logits": {"logits": out, "features": features},
                "names": {"a": out, "b": features}, "object": SimpleNamespace(logits=out, features=features),
            }[kind]  # fmt: skip

    masks = whole(model := Two())
    masks["fc3.weight"][:, 3] = False
    masks["fc2.weight"][:, 2] = False
    small = shrink(model, masks, torch.randn(8, 6))
    assert small.kept == {"fc1": [0, 1, 3, 4, 5, 6, 7]}
    assert speed.compared(model.eval(), small.model, [torch.zeros(1, 6)]).multiply_adds[0] == 48 + 64 + 24


def test_layers_that_are_joined_lose_units_each() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.d((torch.cat([self.a(x), self.b(x)], 1) + self.c(x)).relu())

    torch.manual_seed(0)
    masks = whole(model := trained_looking(Joined()))
    masks["d.weight"][:, [1, 2, 9, 13]] = False
    small, _ = shrunk(model, masks, (6,))
    lost = {name: {*range(small.before[name])} - {*kept} for name, kept in small.kept.items()}
    assert lost == {"a": {1, 2}, "b": {1, 5}, "c": {1, 2, 9, 13}} and not small.notes


class Padding(nn.Conv2d):
    """Pads in its forward pass, as timm's Conv2dSame does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (1, 1, 1, 1)))


def test_padding_that_a_layer_does_not_tell_of() -> None:
    model = Padded(0)
    model.conv2 = Padding(4, 3, 3)
    trained_looking(model)
    masks = {"conv1.weight": torch.ones(4, 1, 3, 3, dtype=torch.bool)}
    masks["conv1.weight"][2] = False
    small, _ = shrunk(model, masks, (1, 9, 9))
    assert not small.kept and small.notes == ["conv1: 1 emptied unit is left alone: the outputs would change"]


@pytest.mark.parametrize("frozen", [("fc1",), ("fc1", "fc2", "fc3")])
def test_frozen_layers_are_followed_and_stay_frozen(frozen: tuple[str, ...]) -> None:
    masks = whole(model := trained_looking(Small()))
    masks["fc3.weight"][:, 3] = False
    masks["fc2.weight"][:, 2] = False
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    small, _ = shrunk(model, masks, (6,))
    assert sizes(small.model) == {"fc1": 7, "fc2": 7, "fc3": 3}
    assert {name for name, p in small.model.named_parameters() if not p.requires_grad} == {
        f"{name}.{kind}" for name in frozen for kind in ("weight", "bias")
    }


def test_other_kinds_of_layers_stay_and_do_not_keep_the_rest_from_shrinking() -> None:
    """Attention, weight_norm, BatchNorm without weights, a buffer that is not kept, a layer that is not called."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.fc1, self.norm = nn.Linear(8, 12), nn.BatchNorm1d(12, affine=False)
            self.fc2 = nn.utils.parametrizations.weight_norm(nn.Linear(12, 6))
            self.fc3, self.fc4, self.unused = nn.Linear(6, 10), nn.Linear(10, 3), nn.Linear(3, 3)
            self.register_buffer("scale", torch.full((1,), 0.7), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc2(self.norm(self.fc1(self.encoder(x).mean(1))).relu())
            return self.fc4(input=self.fc3(h * self.scale).relu())

    torch.manual_seed(0)
    masks = whole(model := trained_looking(Mixed()))
    masks = {name: mask for name, mask in masks.items() if name.startswith(("encoder.linear", "fc1", "fc3", "fc4"))}
    masks["encoder.linear2.weight"][:, :4] = False
    masks["fc4.weight"][:, 3] = False
    masks["fc3.weight"][5] = False
    small, _ = shrunk(model, masks, (5, 8))
    assert {name: len(kept) for name, kept in small.kept.items()} == {"encoder.linear1": 12, "fc3": 8}

    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 3))
    masks = whole(trained_looking(model))
    masks["3.weight"][:, 3] = False
    small, _ = shrunk(model, masks, (6,))
    assert small.model[1].num_features == len(small.model[1].running_mean) == 7


def test_queries_and_keys_which_attention_reads_are_no_emptied_units() -> None:
    """Of a projection as vision transformers have it torch-pruning sees the values alone being read."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind()
            attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            return self.fc2(self.fc1(x + self.proj(attended)).relu())

    torch.manual_seed(0)
    masks = whole(model := trained_looking(Block()))
    masks["fc2.weight"][:, 5] = False
    small, _ = shrunk(model, masks, (5, 8))
    assert {name: len(kept) for name, kept in small.kept.items()} == {"fc1": 15}
    assert small.notes == []


def test_weights_stay_of_their_type() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    masks = {name: torch.ones(model.get_parameter(name).shape, dtype=torch.bool) for name in ("0.weight", "2.weight")}
    masks["2.weight"][:, 3] = False
    small = shrink(model, masks, torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert {name: len(kept) for name, kept in small.kept.items()} == {"0": 7}
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}


def test_what_training_reads_stays() -> None:
    class Helped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.helper = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            h = self.fc1(x).relu()
            return (self.fc2(h), self.helper(h)) if self.training else self.fc2(h)

    masks = whole(model := Helped())
    masks["fc2.weight"][:, 3] = False
    small, _ = shrunk(model, masks, (6,))
    assert not small.kept and small.notes == ["fc1: 1 emptied unit is left alone: it is used in training"]


def test_a_network_that_is_not_for_float64_is_refused_in_a_line() -> None:
    with pytest.raises(TicketfindError, match=r"^model: expected one that computes in float64 too, .*") as raised:
        shrink(model := Small(lambda h: h.float()), whole(model), torch.randn(4, 6))
    assert "\n" not in str(raised.value)


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


def test_files_of_other_networks_and_damaged_ones_leave_the_model_as_it_is(tmp_path: Path) -> None:
    model = trained_looking(Small())
    masks = whole(model)
    masks["fc3.weight"][:, 3] = False
    small, _ = shrunk(model, masks, (6,))
    save(small, file := tmp_path / "s.safetensors", force=False)
    state = load_file(file)
    about = {"format": 1, "layers": {"fc2": {"of": 8, "kept": [0, 1, 2, 4, 5, 6, 7]}}}
    assert json.loads(read_metadata(file, "file")["ticketfind_shrunk"]) == about

    def fault(text: str, changed: dict[str, Tensor] | None = None, said: Any = about) -> None:
        save_file(
            {**state, **(changed or {})},
            bad := tmp_path / "bad.safetensors",
            {"ticketfind_shrunk": said if isinstance(said, str) else json.dumps(said)},
        )
        again = Small()
        before = copy.deepcopy(again.state_dict())
        with pytest.raises(TicketfindError, match=text):
            load_shrunk(bad, again)
        assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())

    fault("expected format 1, found 2; a newer ticketfind", said={**about, "format": 2})
    fault("expected layers with of and kept", said="{")
    fault("expected layers with of and kept", said={"format": 1, "layers": ["fc2"]})
    fault("fc2: expected in kept rising numbers", said={"format": 1, "layers": {"fc2": {"of": 8, "kept": [0, 0]}}})
    fault("fc2: expected in kept rising numbers", said={"format": 1, "layers": {"fc2": {"of": 8, "kept": [8]}}})
    fault("fc2.bias: expected .8., .* found .7.: is of another network", said={"format": 1, "layers": {}})
    fault("fc1.weight: expected .8, 6., .* found .9, 6.", {"fc1.weight": torch.zeros(9, 6)})
    fault("fc3.weight: expected .3, 8., .* found .2, 7.", {"fc3.weight": torch.zeros(2, 7)})
    fault("fc1.bias: expected numbers, found NaN", {"fc1.bias": torch.full((8,), torch.nan)})
    fault("fc1.bias: expected torch.float32, found torch.int64", {"fc1.bias": torch.zeros(8, dtype=torch.int64)})
    fault("extra only in one of them", {"extra": torch.zeros(1)})
    load_shrunk(file, half := Small().half())
    load_shrunk(file, half)  # what is that size already fits, too
    assert half.fc2.weight.dtype == torch.float16 and half.fc2.weight.shape == (7, 8)


def test_multiply_adds_are_those_of_a_count_by_hand() -> None:
    n, d, f = 5, 16, 32
    x = torch.randn(1, n, d)

    class First(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    attention = n * d * 4 * d + 2 * n * n * d
    layer = nn.TransformerEncoderLayer(d, 2, f, batch_first=True)
    assert speed.multiply_adds(nn.TransformerEncoder(layer, 2).eval(), x) == 2 * (attention + 2 * n * d * f)
    assert speed.multiply_adds(First(nn.LSTM(d, f, batch_first=True)), x) == n * 4 * f * (d + f)
    assert speed.multiply_adds(First(nn.GRU(d, f, batch_first=True)), x) == n * 3 * f * (d + f)
    images = torch.randn(2, 8, 9, 9)
    assert speed.multiply_adds(nn.Conv2d(8, 8, 3, groups=8), images) == 2 * 8 * 49 * 9
    assert speed.multiply_adds(nn.ConvTranspose2d(8, 4, 3), images) == 2 * 8 * 81 * 4 * 9

    class Read(nn.Module):
        """A weight's view is a module's input."""

        def __init__(self) -> None:
            super().__init__()
            self.node, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.node.weight.T)[x]

    assert speed.multiply_adds(model := Read(), torch.zeros(1, dtype=torch.int64)) == 6 * 8 * 3
    assert torch.backends.mha.get_fastpath_enabled() and model.node.weight.requires_grad


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
    assert found["latency"].keys() == {"1", "60"} and found["device"] == "cpu"
    shown = command("export", "run", "--shrink", "--force")
    assert "units removed" in shown.out and "of the multiply-adds" in shown.out
    assert command("export", "run", "--shrink", "--format", "dense").code == 2
    assert command("export", "run", "--data", "digits").code == 2
    command(*search, "--rounds", "1", "--prune", "0.1", "--out", "mild")
    shown = " ".join(command("export", "mild", "--shrink").out.split())
    assert "no empty unit was found that can go, so nothing was removed and nothing is gained" in shown


def test_latencies_tell_a_slow_network() -> None:
    small, large = nn.Linear(8, 8), nn.Sequential(*[nn.Linear(800, 800) for _ in range(4)])
    slow, fast = speed.compared(large, large, [torch.zeros(1, 800)]).latency[1]
    assert min(slow.low, fast.low) > 0
    (quick,) = speed.latencies([small], torch.zeros(1, 8), seconds=0.1)
    assert quick.is_below(slow) and quick.low <= quick.median <= quick.high
    assert not slow.is_below(quick)
    assert json.dumps(speed.multiply_adds(large, torch.zeros(2, 800))) == str(2 * 4 * 800 * 800)
