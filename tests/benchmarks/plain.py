"""The loop that people write for Fashion-MNIST against ticketfind's: python tests/benchmarks/plain.py FOLDER [BLOCKS]

FOLDER holds the IDX files, plain or .gz. LeNet-300-100, batch 60, Adam, a mask on 20 % of the weights, in fp32:
"images" is torchvision's data set with ToTensor, a DataLoader without workers, torch.nn.utils.prune and torch.optim;
"tensors" the same with a TensorDataset; "ours" one arm of ticketfind's, eagerly. Then the matrix products of such a
step alone, and ours without a mask and compiled. In turn, BLOCKS times (5); minimum, median, maximum, and the median of
the blocks' ratios.
"""

import gzip
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from ticketfind import assemble, bench, devices, layers

SECONDS = 2.0


def raw_copy(folder: Path, root: Path) -> None:
    """The files as torchvision wants them."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in folder.glob("*ubyte*"):
        data = file.read_bytes()
        (raw / file.name.removesuffix(".gz")).write_bytes(gzip.decompress(data) if file.suffix == ".gz" else data)


def products(batch: int) -> Callable[[int], None]:
    """The matrix products of a step: forward, for the weights, and for the inputs of all layers but the first."""
    sizes = [(784, 300), (300, 100), (100, 10)]
    tensors = [(torch.rand(batch, i), torch.rand(o, i), torch.rand(batch, o)) for i, o in sizes]

    def run(iterations: int) -> None:
        for _ in range(iterations):
            for number, (x, weight, gradient) in enumerate(tensors):
                _ = x @ weight.t(), gradient.t() @ x
                _ = gradient @ weight if number else None

    return run


def main(folder: Path, blocks: int) -> None:
    """Print a row for each."""
    asked = layers.from_layers(
        layers.find_layer("lenet-300-100"), {"data": {"spec": str(folder)}, "run": {"replicates": 1}}
    )
    with devices.no_denormals(), tempfile.TemporaryDirectory() as root:
        recipe, task = assemble.assemble(asked)
        how, kept = recipe.train, bench.mask_of(task)
        raw_copy(folder, Path(root))
        images = datasets.FashionMNIST(root, train=True, transform=transforms.ToTensor())
        loop = bench.plain_loop(task, lambda: DataLoader(images, how.batch_size, shuffle=True), how, kept)
        tensors, dense, ours, *compiled = bench.cases(task, how, base=devices.EAGER, ways=["compile"], arms=[])
        cases = {
            "ours": ours,
            "images": bench.Case("plain", "plain", 1, loop),
            "tensors": tensors,
            "ours, no mask": dense,
            "ours, compiled": compiled[0],
            "products": bench.Case("products", "plain", 1, products(how.batch_size)),
        }
        timings = bench.measure([*cases.values()], blocks=blocks, seconds=SECONDS)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {blocks} blocks of {SECONDS} s")
    for name, timing in zip(cases, timings, strict=True):
        spread = f"{min(timing.ms):.3f} / {timing.median:.3f} / {max(timing.ms):.3f}"
        print(f"{name:14} {spread} ms; over ours {timing.over(timings[0]):.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
