"""The shipped recipes: trained for real, a few iterations each; counts against those made by hand."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ticketfind import TicketfindError, catalog, layers, load_ticket, nets

SIZES = {"train": 24, "test": 12}


def images(size: int, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Random bytes, and labels 0 to 9 in turn."""
    generator = np.random.default_rng(size)
    return generator.integers(0, 256, (size, *shape), dtype=np.uint8), np.arange(size, dtype=np.uint8) % 10


def mnist_format(folder: Path) -> Path:
    """A folder of IDX files, 28x28."""
    folder.mkdir()
    for name, size in (("train", SIZES["train"]), ("t10k", SIZES["test"])):
        x, y = images(size, (28, 28))
        with gzip.open(folder / f"{name}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 0x803, size, 28, 28) + x.tobytes())
        with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 0x801, size) + y.tobytes())
    return folder


def cifar_shaped(file: Path) -> Path:
    """An .npz of 3x32x32 images."""
    arrays = {}
    for part, size in SIZES.items():
        arrays[f"x_{part}"], arrays[f"y_{part}"] = images(size, (3, 32, 32))
    np.savez(file, **arrays)
    return file


@pytest.mark.parametrize("name", layers.shipped())
def test_every_shipped_recipe_finds_its_tickets(name: str, command: Callable[..., Any], tmp_path: Path) -> None:
    """Two iterations a round, one round, a batch of four; everything else is the recipe's own."""
    recipe = layers.from_layers(layers.find_layer(name))
    data: list[object] = []
    if recipe.data.spec is None:
        is_mnist = recipe.model.spec == "lenet-300-100"
        data = ["--data", mnist_format(tmp_path / "mnist") if is_mnist else cifar_shaped(tmp_path / "cifar.npz")]
    small = {
        "train.iterations": 2, "train.batch_size": 4, "train.warmup": min(int(recipe.train.warmup), 1),
        "train.eval_every": 2, "data.validation": 4, "prune.rounds": 1, "run.replicates": 1, "run.tolerance": 100,
        "prune.rewind": min(int(recipe.prune.rewind), 1),
    }  # fmt: skip
    settings = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    found = command("search", name, *data, *settings, "--json").json
    assert [each["round"] for each in found["rounds"]] == [0, 1]
    ticket = load_ticket(found["ticket"])
    assert ticket.about.recipe["name"] == name and ticket.about.iteration == small["prune.rewind"]
    for parameter, mask in ticket.masks.items():
        if recipe.prune.scope == "layer":
            glob = [g for g in recipe.prune.fraction if g == "*" or parameter.startswith(g.rstrip("*."))][-1]
            gone = round(mask.numel() * recipe.prune.fraction[glob])
            assert mask.numel() - int(mask.sum()) == gone, parameter
        else:
            assert "shortcut" not in parameter and not parameter.startswith("fc.")
    if recipe.prune.scope == "global":
        assert ticket.remaining == pytest.approx(0.8, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "iterations", "trainings"),
    [
        ("lenet-300-100", 28 * 28 * 300 + 300 + 300 * 100 + 100 + 1010, 5 * 19 * 50_000, 95),
        ("digits", 64 * 300 + 300 + 300 * 100 + 100 + 1010, 5 * 19 * 1000, 95),
        ("resnet-20", 272_474, 5 * (30_000 + 18 * 29_500), 95),
        ("resnet-20-warmup", 272_474, 5 * 19 * 30_000, 95),
    ],
)
def test_costs_by_hand(name: str, parameters: int, iterations: int, trainings: int) -> None:
    found = catalog.entry(layers.shipped_file(name))
    assert (found.parameters, found.iterations, found.trainings) == (parameters, iterations, trainings)
    assert found.examples == iterations * found.recipe.train.batch_size
    assert found.seconds is None and found.about.endswith(".") and "#" not in found.about


def test_time_is_measured_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "step_seconds", lambda task, how: [9.0, 0.5, 0.1, 0.2])
    assert catalog.entry(layers.shipped_file("digits"), timed=True).seconds == pytest.approx(95_000 * 0.2)
    monkeypatch.setattr(catalog, "step_seconds", lambda task, how: pytest.fail("measured"))
    catalog.entry(layers.shipped_file("digits"))


def test_a_step_on_random_images(monkeypatch: pytest.MonkeyPatch) -> None:
    found = catalog.entry(layers.shipped_file("lenet-300-100"), timed=True)
    assert found.step is not None and 0 < found.step < 10 and found.shape == (1, 28, 28)


@pytest.mark.parametrize("name", nets.NETS)
def test_the_default_shape_is_what_a_network_takes(name: str) -> None:
    shape = nets.default_shape(name)
    assert nets.NETS[name]().eval()(torch.zeros(1, *shape)).shape == (1, 10)


def test_a_printed_recipe_is_its_file(command: Callable[..., Any], tmp_path: Path) -> None:
    ran = command("recipes", "vgg-19")
    assert ran.code == 0 and ran.out == layers.shipped()["vgg-19"].read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(ran.out)
    assert layers.read_layer(mine) == layers.find_layer("vgg-19")


def test_the_list_names_all(command: Callable[..., Any]) -> None:
    out = command("recipes").out
    assert all(f"\n{name} " in out for name in layers.shipped())
    found = command("recipes", "--json").json["recipes"]
    assert [each["name"] for each in found] == [*layers.shipped()] == sorted(layers.shipped())
    assert {each["step_seconds"] for each in found} == {None}


def test_an_unknown_name(command: Callable[..., Any]) -> None:
    ran = command("recipes", "resnet20")
    assert ran.code == 1 and "expected one of conv-2" in ran.err and "resnet-20" in ran.err
    with pytest.raises(TicketfindError):
        layers.shipped_file("nope")
