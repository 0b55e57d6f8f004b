"""A fingerprint of tensors: equal exactly where names, types, shapes and every bit are."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex over the tensors in order of their names: name, type, shape, bytes (little-endian) of each."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        kind = str(value.dtype).removeprefix("torch.")
        found.update(f"{name}\n{kind}\n{list(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
