"""The ticket file with and without ticketfind, and tickets in other people's training loops."""

import copy
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import ticketfind
from ticketfind import TicketfindError
from ticketfind.arms import Task
from ticketfind.ticket import Ticket, load_ticket, pack_bits, unpack_bits, write_as

FORMS = ["ticket", "compact", "dense", "torch-prune"]


class Mixed(nn.Module):
    """[b, 12] -> [b, 4] through a convolution, BatchNorm, attention and a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x.unsqueeze(1)))).transpose(1, 2)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.fc(x.mean(1))


@pytest.fixture
def task(make_task: Callable[..., Task]) -> Task:
    return make_task(Mixed)


@pytest.fixture
def ticket(task: Task, make_ticket: Callable[..., Ticket]) -> Ticket:
    """With BatchNorm statistics that differ from a fresh network's."""
    made = make_ticket(task, seed=4, iteration=7)
    made.init["norm.running_mean"].normal_(generator=torch.Generator().manual_seed(2))
    made.init["norm.num_batches_tracked"].fill_(7)
    return made


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def model_like(task: Task) -> Any:
    """A network of the same architecture with other weights; small ones, from which no optimizer diverges."""
    model, generator = copy.deepcopy(task.model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


# ---------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("layout", ["full", "compact"])
def test_round_trip(layout: str, ticket: Ticket, tmp_path: Path) -> None:
    ticket.save(tmp_path / "t.safetensors", layout=layout)
    read = ticketfind.load_ticket(tmp_path / "t.safetensors")
    assert read.about == ticket.about
    assert same(read.masks, ticket.masks)
    assert read.remaining == ticket.remaining
    assert same(read.weights(), ticket.weights())
    assert read.complete is (layout == "full")
    assert same(read.init, ticket.init) is (layout == "full")
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_plain_safetensors_suffices(ticket: Ticket, tmp_path: Path) -> None:
    """Every name and type as the documentation says, in a process that has never heard of ticketfind."""
    ticket.save(tmp_path / "ticket.safetensors")
    t = load_file(tmp_path / "ticket.safetensors")
    assert t.keys() == {f"init/{name}" for name in ticket.init} | {f"mask/{name}" for name in ticket.masks}
    for name, mask in ticket.masks.items():
        assert t[f"mask/{name}"].dtype == torch.bool and torch.equal(t[f"mask/{name}"], mask)
    for name, value in ticket.init.items():
        assert torch.equal(t[f"init/{name}"], value), name
    with safe_open(tmp_path / "ticket.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["ticketfind"]
    about = json.loads(metadata["ticketfind"])
    assert (about["format"], about["layout"], about["round"], about["replicate"]) == (1, "full", 3, 1)
    assert about["remaining"] == ticket.remaining
    script = (
        "import sys; from safetensors.torch import load_file; t = load_file(sys.argv[1]);"
        "w = t['init/fc.weight'] * t['mask/fc.weight'];"
        "print(float((w != 0).sum()), 'ticketfind' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "ticket.safetensors"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == [f"{float(ticket.masks['fc.weight'].sum())}", "False"]


def test_a_compact_file_is_unpacked_by_numpy(ticket: Ticket, tmp_path: Path) -> None:
    ticket.save(tmp_path / "c.safetensors", layout="compact")
    t = load_file(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["ticketfind"])
    assert about["layout"] == "compact"
    for name, mask in ticket.masks.items():
        shape = about["shapes"][name]
        assert shape == list(mask.shape)
        bits = np.unpackbits(t[f"mask/{name}"].numpy(), count=mask.numel()).reshape(shape).astype(bool)
        assert np.array_equal(bits, mask.numpy()), name
        assert np.array_equal(t[f"init/{name}"].numpy(), ticket.init[name].numpy()[bits]), name
    for name in ticket.init.keys() - ticket.masks.keys():
        assert torch.equal(t[f"init/{name}"], ticket.init[name])


def test_a_sparse_compact_file_is_much_smaller(
    make_task: Callable[..., Task], make_ticket: Callable[..., Ticket], tmp_path: Path
) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(300, 300)

    made = make_ticket(make_task(Wide), keep=0.03)
    sizes = {}
    for layout in ("full", "compact"):
        made.save(tmp_path / layout, layout=layout)
        sizes[layout] = (tmp_path / layout).stat().st_size
    assert sizes["full"] > 300 * 300 * 5 > 10 * sizes["compact"]


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 3), (2, 3, 5), (7, 9), (1, 1)])
def test_bits_are_packed_as_numpy_packs_them(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_bits(mask)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy().flatten()))
    assert torch.equal(unpack_bits(packed, shape), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["full", "compact"])
def test_weights_keep_their_type_and_bits(layout: str, dtype: torch.dtype, ticket: Ticket, tmp_path: Path) -> None:
    init = {name: value.to(dtype) if value.is_floating_point() else value for name, value in ticket.init.items()}
    dataclasses.replace(ticket, init=init).save(tmp_path / "t", layout=layout)
    read = load_ticket(tmp_path / "t")
    assert same(read.weights(), dataclasses.replace(ticket, init=init).weights())


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_pruned_may_be_any_number(number: float, ticket: Ticket, tmp_path: Path) -> None:
    """A search's rewind point is kept whole; what a mask takes away reaches no network."""
    for name, mask in ticket.masks.items():
        ticket.init[name].masked_fill_(~mask, number)
    ticket.save(tmp_path / "t")
    for name, value in load_ticket(tmp_path / "t").weights().items():
        mask = ticket.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, ticket.init[name].where(mask, 0.0)), name


def test_a_compact_ticket_is_not_passed_off_as_a_full_one(ticket: Ticket, tmp_path: Path) -> None:
    ticket.save(tmp_path / "c", layout="compact")
    with pytest.raises(TicketfindError, match="compact ticket has lost the pruned initial weights"):
        load_ticket(tmp_path / "c").save(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    load_ticket(tmp_path / "c").save(tmp_path / "again", layout="compact")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "c").read_bytes()


# ------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("layout", ["full", "compact"])
def test_a_file_cut_anywhere_is_refused(
    layout: str, make_task: Callable[..., Task], make_ticket: Callable[..., Ticket], tmp_path: Path
) -> None:
    file = tmp_path / "t.safetensors"
    make_ticket(make_task()).save(file, layout=layout)
    whole = file.read_bytes()
    for cut in sorted({*range(64), *range(64, len(whole), 97), len(whole) - 1}):
        file.write_bytes(whole[:cut])
        with pytest.raises(TicketfindError, match=r"t\.safetensors: expected a safetensors file"):
            load_ticket(file)


def test_a_file_with_any_byte_changed_is_refused_or_read(
    make_task: Callable[..., Task], make_ticket: Callable[..., Ticket], tmp_path: Path
) -> None:
    """Damage in the header is an error of ours or changes a name or number; never another exception."""
    file = tmp_path / "t.safetensors"
    make_ticket(make_task()).save(file, layout="compact")
    whole = bytearray(file.read_bytes())
    header = int.from_bytes(whole[:8], "little") + 8
    refused = 0
    for place in range(0, header, 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 + place % 127
        file.write_bytes(damaged)
        try:
            load_ticket(file).weights()
        except TicketfindError:
            refused += 1
    assert refused > header / 3 / 2


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no such file"),
        (b"", "expected a safetensors file"),
        (b"PK\x03\x04 a torch file, say", "expected a safetensors file"),
        (b"\xff" * 100, "expected a safetensors file"),
    ],
)
def test_files_that_are_no_tickets(content: bytes | None, text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TicketfindError, match=rf"mine\.safetensors: {text}"):
        load_ticket(file)


def test_a_folder_is_no_ticket(tmp_path: Path) -> None:
    with pytest.raises(TicketfindError, match="no such file"):
        load_ticket(tmp_path)


def test_a_checkpoint_is_no_ticket(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        TicketfindError, match="expected a ticket, found a safetensors file without ticketfind metadata"
    ):
        load_ticket(tmp_path / "model.safetensors")


GOOD: dict[str, Any] = {
    "format": 1, "layout": "full", "recipe": {}, "round": 1, "replicate": 0, "iteration": 0, "sigma": {"w": 1.0},
    "aliases": {}, "claims": {}, "versions": {},
}  # fmt: skip
TENSORS = {"init/w": torch.arange(6.0).view(2, 3), "mask/w": torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.bool)}


def write_raw(file: Path, about: Any, tensors: dict[str, Tensor] = TENSORS) -> Path:
    save_file(tensors, file, {"ticketfind": about if isinstance(about, str) else json.dumps(about)})
    return file


def test_a_file_made_by_hand_from_the_documentation_is_read(tmp_path: Path) -> None:
    read = load_ticket(write_raw(tmp_path / "t", GOOD))
    assert torch.equal(read.weights()["w"], torch.tensor([[0.0, 0, 0], [0, 4, 5]]))
    assert read.remaining == 0.5


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ("{", "expected JSON in the ticketfind metadata"),
        ("[" * 100_000, "expected JSON in the ticketfind metadata"),
        ("[]", "expected a format number"),
        ("null", "expected a format number"),
        ({"format": "1"}, "expected a format number"),
        ({**GOOD, "format": 2}, r"ticket format 2 is newer than this ticketfind reads \(1\); upgrade"),
        ({**GOOD, "layout": "sparse"}, "layout: expected full or compact, found 'sparse'"),
        ({**GOOD, "layout": ["full"]}, "layout: expected full or compact"),
        ({**GOOD, "layout": "compact"}, "metadata shapes: expected one for each mask"),
        *[({**GOOD, key: "x"}, f"metadata {key}: expected (dict|int), found str") for key in list(GOOD)[2:]],
        *[
            ({k: v for k, v in GOOD.items() if k != key}, f"metadata {key}: expected (dict|int), found NoneType")
            for key in list(GOOD)[2:]
        ],
        ({**GOOD, "aliases": {"v": ["w"]}}, r"metadata aliases: expected v to be tied to a mask, found \['w'\]"),
        ({**GOOD, "aliases": {"v": "w"}}, "metadata aliases: expected v to be tied to a mask, found 'w'"),
    ],
)
def test_garbage_in_the_metadata(about: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(TicketfindError, match=text):
        load_ticket(write_raw(tmp_path / "t", about))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mask/w": torch.ones(2, 3)}, r"mask/w: expected bool, found torch\.float32"),
        ({"mask/w": torch.ones(3, 2, dtype=torch.bool)}, r"init/w: expected the mask's shape \(3, 2\), found \(2, 3\)"),
        ({"init/w": None}, r"init/w: expected the mask's shape \(2, 3\), found none"),
        ({"mask/w": None}, "expected masks .* found none: not a ticket"),
        (
            {"mask/w": torch.ones(0, 3, dtype=torch.bool), "init/w": torch.ones(0, 3)},
            "expected masks .* found none: not a ticket",
        ),
    ],
)
def test_tensors_that_do_not_fit_each_other(change: dict[str, Tensor | None], text: str, tmp_path: Path) -> None:
    tensors = {name: value for name, value in {**TENSORS, **change}.items() if value is not None}
    with pytest.raises(TicketfindError, match=text):
        load_ticket(write_raw(tmp_path / "t", GOOD, tensors))


@pytest.mark.parametrize(
    ("shapes", "change", "text"),
    [
        ({"w": [2, 3]}, {}, None),
        ({"w": [3, 2]}, {}, None),
        ({"w": [2, 4]}, {"mask/w": torch.tensor([0xFF], dtype=torch.uint8)}, "expected 8 surviving weights, found 3"),
        ({"w": [2, 3]}, {"mask/w": torch.tensor([0xFC], dtype=torch.uint8)}, "expected 6 surviving weights, found 3"),
        ({"w": [3, 3]}, {}, "mask/w: expected 2 bytes"),
        ({"w": [2, 3]}, {"mask/w": torch.tensor([[0x8C]], dtype=torch.uint8)}, "mask/w: expected 1 bytes"),
        ({"w": [2, 3]}, {"mask/w": torch.tensor([1.0])}, "mask/w: expected 1 bytes"),
        ({"w": [2, 3]}, {"init/w": None}, "mask/w: expected 1 bytes and init/w"),
        ({"w": [-2, -3]}, {}, "metadata shapes: w: expected whole numbers"),
        ({"w": [True, 6]}, {}, "metadata shapes: w: expected whole numbers"),
        ({"w": "2x3"}, {}, "metadata shapes: w: expected whole numbers"),
        ({"v": [2, 3]}, {}, "metadata shapes: expected one for each mask"),
        ([2, 3], {}, "metadata shapes: expected one for each mask"),
    ],
)
def test_compact_files_that_do_not_add_up(
    shapes: Any, change: dict[str, Tensor | None], text: str | None, tmp_path: Path
) -> None:
    packed = {"mask/w": torch.tensor([0x8C], dtype=torch.uint8), "init/w": torch.tensor([1.0, 2.0, 3.0]), **change}
    tensors = {name: value for name, value in packed.items() if value is not None}
    file = write_raw(tmp_path / "t", {**GOOD, "layout": "compact", "shapes": shapes}, tensors)
    if text is None:
        assert load_ticket(file).weights()["w"].flatten().tolist() == [1.0, 0, 0, 0, 2.0, 3.0]
    else:
        with pytest.raises(TicketfindError, match=text):
            load_ticket(file)


# --------------------------------------------------------------------------------------- apply and hold


@pytest.mark.parametrize("layout", ["full", "compact"])
def test_apply_puts_in_weights_and_buffers(layout: str, task: Task, ticket: Ticket, tmp_path: Path) -> None:
    ticket.save(tmp_path / "t", layout=layout)
    model = model_like(task)
    load_ticket(tmp_path / "t").apply(model)
    for name, value in model.state_dict().items():
        expected = ticket.init[name] * ticket.masks[name] if name in ticket.masks else ticket.init[name]
        assert torch.equal(value, expected), name
    assert all(parameter.requires_grad for parameter in model.parameters())


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 5, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.extra = nn.Linear(8, 4)


def test_a_ticket_of_another_network_is_refused_and_the_model_left_alone(ticket: Ticket) -> None:
    model = Other()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TicketfindError) as caught:
        ticket.apply(model)
    text = str(caught.value)
    assert text.startswith("the ticket does not fit the model: ")
    assert "extra.weight is not in the ticket" in text and "fc.weight is not in the model" not in text
    assert text.endswith(" and 4 more")  # the first five of 2 not in the ticket, 6 not in the model, 1 of other shape
    assert same(dict(model.state_dict()), before)
    reshaped = nn.Module()
    reshaped.fc = nn.Linear(3, 2)
    two = Ticket({}, {"fc.weight": torch.zeros(2, 4), "fc.bias": torch.zeros(2), "old": torch.zeros(1)}, ticket.about)
    with pytest.raises(TicketfindError) as caught:
        two.check_fits(reshaped)
    assert str(caught.value) == (
        "the ticket does not fit the model: old is not in the model;"
        " fc.weight has shape (2, 4) in the ticket, (2, 3) in the model"
    )


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, count: int) -> None:
    """A training loop that knows nothing of tickets."""
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(task.data.train.inputs), task.data.train.targets).backward()
        optimizer.step()


@pytest.mark.parametrize("warm", [0, 10], ids=["from the start", "momentum built up before"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hold_keeps_zeros_in_a_foreign_loop(optimizer: str, warm: int, task: Task, ticket: Ticket) -> None:
    """Warm: the optimizer has momentum for weights that are pruned only later."""
    model = model_like(task)
    torchs = OPTIMIZERS[optimizer](model.parameters())
    steps(model, torchs, task, warm)
    ticket.apply(model)
    release = ticket.hold(model, torchs)
    weights = dict(model.named_parameters())
    for _ in range(5):
        steps(model, torchs, task, 10)
        assert all(torch.equal(weights[name] == 0, ~mask) for name, mask in ticket.masks.items())
    moved = weights["fc.weight"] - ticket.init["fc.weight"]
    assert moved[ticket.masks["fc.weight"]].abs().min() > 0
    release()
    steps(model, torchs, task, 1)
    assert all((weights[name][~mask] != 0).any() for name, mask in ticket.masks.items())


def test_hold_without_apply_prunes_at_once(task: Task, ticket: Ticket) -> None:
    model = model_like(task)
    before = copy.deepcopy(model.state_dict())
    ticket.hold(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] * ticket.masks[name] if name in ticket.masks else before[name]), name


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_held_training_is_training_with_masks(optimizer: str, task: Task, ticket: Ticket) -> None:
    """The survivors go where they would with the masks written into the loop by hand."""
    held, manual = copy.deepcopy(task.model), copy.deepcopy(task.model)
    ticket.apply(held)
    torchs = OPTIMIZERS[optimizer](held.parameters())
    ticket.hold(held, torchs)
    steps(held, torchs, task, 20)
    manual.load_state_dict(ticket.weights())
    torchs = OPTIMIZERS[optimizer](manual.parameters())
    weights = dict(manual.named_parameters())
    manual.train()
    for _ in range(20):
        torchs.zero_grad()
        F.cross_entropy(manual(task.data.train.inputs), task.data.train.targets).backward()
        for name, mask in ticket.masks.items():
            weights[name].grad *= mask
        torchs.step()
        for name, mask in ticket.masks.items():
            weights[name].data *= mask
    for name, value in manual.state_dict().items():
        torch.testing.assert_close(held.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)


def test_an_optimizer_that_looks_at_the_whole_gradient_sees_that_of_the_survivors(task: Task, ticket: Ticket) -> None:
    """As LAMB does, or any that normalizes: pruned weights must not shrink the steps of the others."""

    class Normalized(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter -= 0.5 * parameter.grad / parameter.grad.norm()

    model = model_like(task)
    ticket.apply(model)
    optimizer = Normalized([model.fc.weight], lr=1.0)
    ticket.hold(model, optimizer)
    steps(model, optimizer, task, 1)
    moved = model.fc.weight - ticket.init["fc.weight"] * ticket.masks["fc.weight"]
    assert float(moved.detach().norm()) == pytest.approx(0.5, rel=1e-5)


def test_hold_names_a_parameter_that_is_not_there(ticket: Ticket) -> None:
    model = Other()
    with pytest.raises(
        TicketfindError, match=r"hold: expected a parameter conv\.weight of shape \(8, 1, 3\), found \(8, 1, 5\)"
    ):
        ticket.hold(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.conv = nn.Identity()
    with pytest.raises(TicketfindError, match=r"hold: expected a parameter conv\.weight of .* found none"):
        ticket.hold(model, torch.optim.SGD(model.parameters(), lr=0.1))


# ------------------------------------------------------------------------------------- other formats


def test_the_dense_export_is_the_models_own_state_dict(task: Task, ticket: Ticket, tmp_path: Path) -> None:
    write_as(ticket, tmp_path / "d.safetensors", "dense", force=False)
    exported, applied = model_like(task), model_like(task)
    exported.load_state_dict(load_file(tmp_path / "d.safetensors"), strict=True)
    ticket.apply(applied)
    assert same(dict(exported.state_dict()), dict(applied.state_dict()))
    assert all(torch.equal(exported.get_parameter(name) == 0, ~mask) for name, mask in ticket.masks.items())


def test_the_torch_prune_export_loads_into_a_pruned_module(task: Task, ticket: Ticket, tmp_path: Path) -> None:
    for form in ("dense", "torch-prune"):
        write_as(ticket, tmp_path / form, form, force=False)
    dense, pruned = model_like(task).eval(), model_like(task).eval()
    dense.load_state_dict(load_file(tmp_path / "dense"), strict=True)
    for name in ticket.masks:
        module, _, parameter = name.rpartition(".")
        prune.identity(pruned.get_submodule(module), parameter)
    pruned.load_state_dict(load_file(tmp_path / "torch-prune"), strict=True)
    for hook in pruned.attention.out_proj._forward_pre_hooks.values():
        hook(pruned.attention.out_proj, ())  # attention reads this weight without a call of the module that owns it
    with torch.no_grad():
        outputs = pruned(task.data.test.inputs)
        assert torch.equal(outputs, dense(task.data.test.inputs))
        assert outputs.std() > 0
    assert torch.equal(pruned.fc.weight_orig, ticket.init["fc.weight"])  # pruned initial weights are not lost
    for name in ticket.masks:
        module, _, parameter = name.rpartition(".")
        prune.remove(pruned.get_submodule(module), parameter)
    assert same(dict(pruned.state_dict()), dict(dense.state_dict()))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_else_is_ever_replaced_without_force(form: str, ticket: Ticket, tmp_path: Path) -> None:
    file = tmp_path / "out.safetensors"
    file.write_bytes(b"three years of work")
    with pytest.raises(TicketfindError, match=r"out\.safetensors: exists with other content; .*--force"):
        write_as(ticket, file, form, force=False)
    assert file.read_bytes() == b"three years of work"
    write_as(ticket, file, form, force=True)
    written = file.read_bytes()
    assert b"three years" not in written
    write_as(ticket, file, form, force=False)  # the same content again is no replacement
    assert file.read_bytes() == written
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_is_never_replaced(form: str, force: bool, ticket: Ticket, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/inside").touch()
    with pytest.raises(TicketfindError, match=r"out: (exists with other content|cannot write)"):
        write_as(ticket, tmp_path / "out", form, force=force)
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "inside"}


def test_a_place_that_cannot_be_written_is_an_error_of_ours(ticket: Ticket, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TicketfindError, match=r"file/t\.safetensors: cannot write: "):
        write_as(ticket, tmp_path / "file/t.safetensors", "ticket", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_other(
    ticket: Ticket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out"
    ticket.save(file)
    before = file.read_bytes()

    def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ticketfind.tensorfile.save_file", full_disk)
    with pytest.raises(TicketfindError, match="cannot write: No space left on device"):
        ticket.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_ticket_gives_the_same_bytes(form: str, ticket: Ticket, tmp_path: Path) -> None:
    write_as(ticket, tmp_path / "a", form, force=False)
    ticket.save(tmp_path / "full")
    write_as(load_ticket(tmp_path / "full"), tmp_path / "b", form, force=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --------------------------------------------------------------------------------------- tied weights


@pytest.fixture
def tied(make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]) -> tuple[Task, Ticket]:
    task = make_task("tied")
    return task, make_ticket(task, seed=2)


def test_tied_weights_have_one_mask(tied: tuple[Task, Ticket]) -> None:
    _, ticket = tied
    assert set(ticket.masks) == {"encode.weight", "head.weight"}
    assert ticket.about.aliases == {"decode.weight": "encode.weight"}
    weights = ticket.weights()
    assert torch.equal(weights["decode.weight"], weights["encode.weight"])
    assert torch.equal(weights["decode.weight"] == 0, ~ticket.masks["encode.weight"])


@pytest.mark.parametrize("form", ["ticket", "compact", "dense"])
def test_tied_weights_arrive_pruned_whatever_the_form(form: str, tied: tuple[Task, Ticket], tmp_path: Path) -> None:
    task, ticket = tied
    write_as(ticket, tmp_path / "t", form, force=False)
    model = model_like(task)
    if form == "dense":
        model.load_state_dict(load_file(tmp_path / "t"), strict=True)
    else:
        load_ticket(tmp_path / "t").apply(model)
    expected = ticket.init["encode.weight"] * ticket.masks["encode.weight"]
    assert model.decode.weight is model.encode.weight
    assert torch.equal(model.encode.weight, expected)


def test_tied_weights_are_held(tied: tuple[Task, Ticket]) -> None:
    task, ticket = tied
    model = model_like(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ticket.apply(model)
    ticket.hold(model, optimizer)
    steps(model, optimizer, task, 10)
    assert torch.equal(model.decode.weight == 0, ~ticket.masks["encode.weight"])


def test_tied_weights_in_a_torch_prune_export(tied: tuple[Task, Ticket], tmp_path: Path) -> None:
    """`torch.nn.utils.prune` unties: both modules get the same weight and mask."""
    task, ticket = tied
    write_as(ticket, tmp_path / "t", "torch-prune", force=False)
    pruned, applied = model_like(task).eval(), model_like(task).eval()
    for module in (pruned.encode, pruned.decode, pruned.head):
        prune.identity(module, "weight")
    pruned.load_state_dict(load_file(tmp_path / "t"), strict=True)
    ticket.apply(applied)
    with torch.no_grad():
        assert torch.equal(pruned(task.data.test.inputs), applied(task.data.test.inputs))
