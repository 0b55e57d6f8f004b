"""Valid files of every kind that ticketfind reads, small, as bytes: what tests/fuzz.py mutates."""

import functools
import gzip
import io
import json
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save
from torch import Tensor

from ticketfind import layers
from ticketfind.recipe import Recipe
from ticketfind.ticket import Provenance, Ticket


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _tickets(layout: str) -> list[bytes]:
    mask = {"fc.weight": _draw(4, 3) > 0, "out.weight": _draw(2, 4) > -1}
    init = {"fc.weight": _draw(4, 3), "out.weight": _draw(2, 4), "tied.weight": _draw(4, 3), "fc.bias": _draw(4)}
    init |= {"bn.count": torch.tensor(3), "attention": torch.full((2, 2), -torch.inf)}
    spread = {"mean": 0.9, "sd": 0.01, "values": [0.89, 0.91]}
    stats = {"accuracy_early": spread, "accuracy_end": spread, "early_stop": spread, "replicates": 2}
    about = Provenance(
        recipe=Recipe().plain(), round=1, replicate=0, iteration=10, sigma={"fc.weight": 0.1, "out.weight": 0.2},
        aliases={"tied.weight": "fc.weight"}, claims={"dense": stats, "ticket": stats}, versions={"torch": "2.6"},
        checkpoint_dtype="bfloat16",
    )  # fmt: skip
    half = Ticket({"fc.weight": mask["fc.weight"]}, {k: v.bfloat16() for k, v in init.items()}, about)
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, ticket in enumerate((Ticket(mask, init, about), half)):
            ticket.save(Path(folder) / str(number), layout=layout)
            found.append((Path(folder) / str(number)).read_bytes())
    return found


def _state() -> dict[str, Tensor]:
    return OrderedDict({"fc.weight": _draw(4, 3), "fc.bias": _draw(4), "n.count": torch.tensor(7)})


class Payload:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("/tmp/ticketfind-fuzz-was-here", "w"))


def _torch(*, old: bool) -> list[bytes]:
    whole = {
        "epoch": 3, "state_dict": {f"module.{name}": value for name, value in _state().items()}, "ema": {"net": _state()},  # noqa: E501
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "half": _draw(3).bfloat16(), "view": _draw(4, 4).t()[1:],
    }  # fmt: skip
    found = []
    for value in (
        _state(),
        whole,
        {**_state(), "p": torch.nn.Parameter(_draw(2))},
        {"model": _state(), "x": Payload()},
    ):
        file = io.BytesIO()
        torch.save(value, file, _use_new_zipfile_serialization=not old)
        found.append(file.getvalue())
    return found if not old else [*found, pickle.dumps({"a": 1})]


def _arrays() -> dict[str, np.ndarray]:
    images = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
    return {
        "x_train": images,
        "y_train": np.arange(6) % 2,
        "x_test": images[:2],
        "y_test": np.array([[0], [1]], np.int8),
    }


def _npz() -> list[bytes]:
    found = []
    numbers = {name: value.astype(">f4" if name[0] == "x" else "<i4") for name, value in _arrays().items()}
    objects = {**_arrays(), "y_test": np.array([Payload(), None], dtype=object)}
    for arrays, save_npz in (
        (_arrays(), np.savez),
        (_arrays(), np.savez_compressed),
        (numbers, np.savez),
        (objects, np.savez),
    ):
        file = io.BytesIO()
        save_npz(file, **arrays)
        found.append(file.getvalue())
    return found


def _idx() -> list[bytes]:
    images = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 4]) + bytes(range(48))
    return [
        images,
        bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(9),
        bytes([0, 0, 13, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(24),
    ]


def _log() -> list[bytes]:
    curve = {key: [0.5, 0.25] for key in ("train_loss", "validation_loss", "validation_accuracy", "test_accuracy")}
    lines = [
        {
            "round": round, "replicate": replicate, "kept": 10, "remaining": 0.8**round, "began": "ab" * 32,
            "early_stop": 5, "accuracy_early": 0.9, "accuracy_end": 0.91, "validation_loss": 0.3 + replicate,
            "test_size": 100, "kept_per_tensor": {"fc.weight": 10}, "curve": {"iteration": [5, 10], **curve},
        }
        for round in range(3)
        for replicate in range(2)
    ]  # fmt: skip
    failed = {"round": 1, "replicate": 1, "failed": "its loss is nan at iteration 6", "iteration": 6}
    return [
        "".join(json.dumps(line) + "\n" for line in chosen).encode()
        for chosen in (lines, [*lines[:3], failed, lines[4]])
    ]


def _recipes() -> list[bytes]:
    own = {**Recipe().plain(), "name": "mine"}
    texts = [layers.to_yaml(layers.from_layers(own)), *(path.read_text() for path in layers.shipped().values())]
    anchored = {"mean": (same := [0.5, 0.5, 0.5]), "std": same}
    return [text.encode() for text in (*texts, yaml.safe_dump({"data": {"args": anchored}, "train": {"lr": 1e-3}}))]


def _index() -> list[bytes]:
    return [
        json.dumps({"metadata": {"total_size": 1}, "weight_map": {"fc.weight": "w-1.safetensors"}}, indent=1).encode()
    ]


def _snapshot() -> list[bytes]:
    point = {
        "iteration": 5,
        "train_loss": 0.5,
        "validation_loss": 0.4,
        "validation_accuracy": 0.9,
        "test_accuracy": 0.8,
    }
    facts = {
        "at": 10, "began": ["ab" * 32] * 2, "points": [[point], [{**point, "train_loss": None}]],
        "failed": [None, {"iteration": 6, "reason": "nan"}],
        "drawn": {"python": [3, list(range(20)), None], "numpy": ["MT19937", list(range(20)), 16, 0, 0.0]},
    }  # fmt: skip
    tensors = {
        "training/0": _draw(3),
        "losses": torch.zeros(2, 2, dtype=torch.float64),
        "drawn/cpu": torch.get_rng_state(),
    }
    tensors |= {f"kept/{arm}/fc.weight": _draw(4, 3) for arm in range(2)}
    return [save(tensors, {"snapshot": json.dumps({"replicates": [0, 1], "done": 20, "facts": facts})})]


def _shrunken() -> list[bytes]:
    """Of fuzz.Net: two of six units are left, and all of them."""
    found = []
    for lost, width in (({"0": {"of": 6, "kept": [1, 4]}}, 2), ({}, 6)):
        state = {"0.weight": _draw(width, 4), "0.bias": _draw(width), "3.weight": _draw(2, width), "3.bias": _draw(2)}
        state |= {f"1.{name}": _draw(width) for name in ("weight", "bias", "running_mean", "running_var")}
        about = {"ticketfind_shrunk": json.dumps({"format": 1, "layers": lost})}
        found.append(save({**state, "1.num_batches_tracked": torch.tensor(3)}, about))
    return found


KINDS: dict[str, Callable[[], list[bytes]]] = {
    "ticket": lambda: _tickets("full"),
    "compact": lambda: _tickets("compact"),
    "weights": lambda: [save(_state()), save({f"model.{k}": v.half() if v.ndim else v for k, v in _state().items()})],
    "index": _index,
    "torch": lambda: _torch(old=False),
    "torch old": lambda: _torch(old=True),
    "recipe": _recipes,
    "idx": _idx,
    "idx.gz": lambda: [gzip.compress(data, mtime=0) for data in _idx()],
    "npz": _npz,
    "arrays": lambda: [save({name: torch.from_numpy(value) for name, value in _arrays().items()})],
    "log": _log,
    "snapshot": _snapshot,
    "shrunken": _shrunken,
}  # fmt: skip
KINDS = {kind: functools.cache(make) for kind, make in KINDS.items()}
"""What makes the valid files of a kind; some of torch and .npz hold a pickle that would run code."""
