"""The loop that people write for Fashion-MNIST against ticketfind's: python tests/benchmarks/plain.py FOLDER [BLOCKS]

FOLDER holds the IDX files, plain or .gz. LeNet-300-100, batch 60, Adam, a mask on 20 % of the weights, in fp32:
"images" is torchvision's data set with ToTensor, a DataLoader without workers, torch.nn.utils.prune and torch.optim;
"tensors" the same with a TensorDataset; "ours" one arm of ticketfind's, eagerly. Then the matrix products of such a
step alone, and ours without a mask. In turn, BLOCKS times (5); minimum, median, maximum and ratios of medians.
"""

import gzip
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from ticketfind import assemble, bench, layers

STEPS = 300


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
    recipe, task = assemble.assemble(asked)
    how = recipe.train
    tensors, dense, ours = bench.cases(task, how, ways=[], arms=[])
    with tempfile.TemporaryDirectory() as root:
        raw_copy(folder, Path(root))
        images = datasets.FashionMNIST(root, train=True, transform=transforms.ToTensor())
        runs = {
            "images": bench.plain_loop(
                task, lambda: DataLoader(images, how.batch_size, shuffle=True), how, bench.mask_of(task)
            ),
            "tensors": tensors.run,
            "ours": ours.run,
            "ours, no mask": dense.run,
            "products": products(how.batch_size),
        }
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for block in range(blocks + 1):
            for name, run in runs.items():
                began = time.perf_counter()
                run(STEPS)
                if block:  # the first warms up
                    taken[name].append(1000 * (time.perf_counter() - began) / STEPS)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {blocks} blocks of {STEPS} iterations")
    middle = {name: statistics.median(ms) for name, ms in taken.items()}
    for name, ms in taken.items():
        spread = f"{min(ms):.3f} / {middle[name]:.3f} / {max(ms):.3f}"
        print(f"{name:14} {spread} ms; over ours {middle[name] / middle['ours']:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
