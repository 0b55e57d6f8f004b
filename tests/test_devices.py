"""Which way is taken where, and what is promised of devices, precisions and memory."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ticketfind import TicketfindError, devices, forks, memory
from ticketfind.devices import Way
from ticketfind.layers import from_layers
from ticketfind.nets import NETS
from ticketfind.outputs import cross_entropy
from ticketfind.recipe import Train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the latter as a name only


@pytest.mark.parametrize(
    ("requested", "device", "arms", "parameters", "possible", "expected"),
    [
        ("auto", CPU, 5, 1000, True, "processes"),
        ("auto", CPU, 1, 1000, True, "eager"),
        ("auto", CPU, 5, 1000, False, "eager"),
        ("auto", CPU, 5, devices.SMALL_MODEL + 1, True, "eager"),
        ("auto", CUDA, 5, 1000, True, "graph"),
        ("auto", CUDA, 1, 10**9, True, "graph"),
        ("eager", CPU, 5, 1000, True, "eager"),
        ("processes", CPU, 1, 10**9, True, "processes"),
        ("stacked", CPU, 5, 10**9, True, "stacked"),
        ("compile", CPU, 5, 1000, True, "compile"),
        ("graph", CUDA, 5, 1000, True, "graph"),
    ],
)
def test_choose(
    requested: str, device: torch.device, arms: int, parameters: int, possible: bool, expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(forks, "possible", lambda: possible)
    assert devices.choose(requested, device, arms=arms, parameters=parameters) == expected


def test_auto_compiles_where_that_saves_more_time_than_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "COMPILE_SAVES", {"cpu": 1e-3, "cuda": 0.0})
    enough = int(devices.COMPILE_SECONDS / 1e-3)
    for steps, expected in ((enough - 1, "eager"), (enough + 1, "compile")):
        assert devices.choose("auto", CPU, arms=1, parameters=1, steps=steps) == expected
    assert devices.choose("auto", CUDA, arms=1, parameters=1, steps=10**12) == "graph"


@pytest.mark.parametrize(
    ("requested", "device", "forking", "own", "text"),
    [
        (
            "processes",
            CUDA,
            True,
            True,
            "several CPU cores and resident data, found device cuda",
        ),
        ("processes", CPU, False, True, "found data that is streamed, or a training of your own"),
        ("graph", CPU, True, True, "graph needs a CUDA device, found cpu"),
        ("stacked", CPU, False, False, "expected auto or eager for a training of your own, found stacked"),
    ],
)
def test_choose_refuses_what_is_not_possible(
    requested: str, device: torch.device, forking: bool, own: bool, text: str
) -> None:
    with pytest.raises(TicketfindError, match=rf"^run\.engine: .*{text}"):
        devices.choose(requested, device, arms=5, parameters=1, forks=forking, own=own)


def test_a_training_of_ones_own_is_eager_everywhere() -> None:
    for device in (CPU, CUDA):
        assert devices.choose("auto", device, arms=5, parameters=1, forks=False, own=False) == "eager"


@pytest.mark.parametrize(
    ("way", "asked", "arms", "bytes_each", "expected"),
    [
        ("eager", None, 5, 1, 1),
        ("compile", 3, 5, 1, 1),
        ("processes", None, 50, 1, 8),  # two cores, four each
        ("processes", 3, 50, 1, 3),
        ("stacked", None, 5, 30, 3),  # half of 200 bytes
        ("graph", None, 2, 30, 2),
        ("graph", None, 5, 1000, 1),  # one has to fit
        ("stacked", 4, 5, 1000, 4),  # as asked
        ("stacked", None, 1, 1, 1),
    ],
)
def test_how_many_arms_at_once(
    way: str, asked: int | None, arms: int, bytes_each: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "cores", lambda: 2)
    monkeypatch.setattr(memory, "total", lambda device: 200.0)
    assert devices.most_at_once(way, asked, arms, CPU, lambda: bytes_each) == expected


@pytest.mark.parametrize(("optimizer", "moments"), [("sgd", 0), ("adam", 2)])
def test_the_memory_that_is_needed_is_what_a_step_holds(
    optimizer: str, moments: int, make_train: Callable[..., Train]
) -> None:
    """Weights, gradients, masks, moments; twice what the backward pass keeps, of which no parameter is a part."""
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 4))
    batch = torch.randn(16, 12), torch.zeros(16, dtype=torch.int64)
    parameters = 13 * 64 + 65 * 4
    inputs, hidden, scores, targets, weight = 16 * 12 * 4, 16 * 64 * 4, 16 * 4 * 4, 16 * 8, 4  # of the loss: its count
    found = memory.need_of(model, make_train(optimizer=optimizer), cross_entropy, batch).of(16)
    expected = 4 * parameters * (3 + moments) + 2 * (inputs + hidden + scores + targets + weight)
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("net", "way", "device", "precision", "expected"),
    [
        ("resnet-20", "eager", CPU, "fp32", True),
        ("conv-2", "processes", CPU, "fp32", True),
        ("vgg-19", "eager", CPU, "fp32", False),
        ("lenet-300-100", "eager", CPU, "fp32", False),
        ("resnet-20", "stacked", CPU, "fp32", False),
        ("vgg-19", "graph", CUDA, "bf16", True),
        ("vgg-19", "graph", CUDA, "fp32", False),
    ],
)
def test_channels_last_by_rule(net: str, way: str, device: torch.device, precision: str, expected: bool) -> None:
    with torch.device("meta"):
        model = NETS[net]() if net != "vgg-19" else nn.Sequential(nn.Conv2d(3, 512, 3))
    assert devices.is_faster_with_channels_last(model, way, device, precision) is expected


def test_tf32_needs_cuda() -> None:
    with pytest.raises(TicketfindError, match=r"run\.precision: tf32 needs a CUDA device, found cpu"):
        devices.check_precision("tf32", CPU)
    for precision, device in (("fp32", CPU), ("bf16", CPU), ("tf32", CUDA)):
        devices.check_precision(precision, device)


def error_of_products() -> float:
    """Of the largest entry, against float64."""
    generator = torch.Generator().manual_seed(7)
    a, b = torch.randn(60, 784, generator=generator), torch.randn(784, 300, generator=generator)
    exact = a.double() @ b.double()
    return float((a @ b - exact).abs().max() / exact.abs().max())


def test_fp32_is_fp32_whatever_the_processor_does_with_faster_products() -> None:
    """One thread and a large layer, where oneDNN's products would be taken: only where their error is fp32's."""
    torch.set_num_threads(1)
    with devices.arithmetic(Way(), CPU, nn.Linear(784, 300)):
        assert error_of_products() < 2e-6
        assert (torch.get_float32_matmul_precision() == "medium") == devices.onednn_keeps_fp32()
    with devices.arithmetic(Way(), CPU, nn.Linear(64, 300)):
        assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("medium")
    try:
        assert (error_of_products() < 2e-6) == devices.onednn_keeps_fp32()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_was_set_before_is_set_again() -> None:
    torch.set_num_threads(1)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), devices.arithmetic(Way(), CPU, nn.Linear(784, 300)):
        _ = 1 / 0
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_denormal_numbers_count_as_zero_inside_and_not_outside() -> None:
    tiny = torch.full((64,), 1e-38)
    with devices.no_denormals():
        assert bool((tiny / 10 == 0).all())
        with devices.no_denormals():
            pass
        assert bool((tiny / 10 == 0).all())
    assert bool((tiny / 10 > 0).all())


def test_a_way_is_what_a_resolved_recipe_says() -> None:
    run = from_layers({"run": {"engine": "graph", "arms_at_once": 3, "precision": "bf16", "channels_last": True}}).run
    assert Way.of(run) == Way("graph", 3, "bf16", True)
    assert Way.of(from_layers({"run": {"engine": "eager"}}).run) == Way("eager", 1, "fp32", False)
