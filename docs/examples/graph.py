"""A ticket in a graph: a graph network whose edges are weights too, and are pruned with the others.

    pip install --no-deps orange3-network              # for the graph that it ships; nothing of it is imported
    python docs/examples/graph.py                      # searches with the settings at the end of this file
    python docs/examples/graph.py --explain runs/graph 6 # which edges and nodes the masks of round 6 have left out

1,239 music artists of last.fm (2010), each joined to the five that are most similar to it there. What is to be told is
an artist's most frequent tag, from its place in the graph alone. No package was found that ships a graph of papers and
citations; one in the same form (`artists` below) can be put in its place.
"""

import csv
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 12

# ------------------------------------------------------------------------------------------------ the data


def artists():
    """Edges [2, e], each once, and for each of n nodes its name and its class; -1 for one of the rarer tags."""
    found = find_spec("orangecontrib.network") if find_spec("orangecontrib") else None
    if found is None:
        raise RuntimeError("the graph is missing: pip install --no-deps orange3-network")
    folder = Path(found.submodule_search_locations[0]) / "networks"
    with (folder / "lastfm.tab").open(encoding="utf-8", errors="replace") as file:
        rows = list(csv.reader(file, delimiter="\t"))[3:]  # below names, kinds and roles of the columns
    common = [tag for tag, _ in Counter(row[-1] for row in rows).most_common(CLASSES)]
    lines = (folder / "lastfm.net").read_text(encoding="utf-8").partition("*edges")[2].strip().splitlines()
    edges = torch.tensor([[int(node) - 1 for node in line.split()[:2]] for line in lines]).T
    classes = torch.tensor([common.index(row[-1]) if row[-1] in common else -1 for row in rows])
    return edges, [row[0] for row in rows], classes


def labeled(seed=0):
    """(train, validation, test), for --data: numbers of nodes and their classes; half, a fifth, the rest."""
    _, _, classes = artists()
    known = (classes >= 0).nonzero()[:, 0]
    known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
    parts = known.split([len(known) // 2, len(known) // 5, len(known) - len(known) // 2 - len(known) // 5])
    return tuple((nodes, classes[nodes]) for nodes in parts)


# ----------------------------------------------------------------------------------------------- the model


class Network(nn.Module):
    """Numbers of nodes [b] -> [b, classes]: two graph convolutions (Kipf & Welling 2016) over the whole graph.

    `edge_weight` [e] starts at one; an edge that is pruned carries nothing. What a node tells itself is no edge and
    stays. The norms are those of the whole graph, whatever is pruned.
    """

    def __init__(self, num_classes=CLASSES, width=32, dropout=0.5):
        super().__init__()
        edges, names, _ = artists()
        degree = torch.bincount(edges.flatten(), minlength=len(names)) + 1.0
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("norm", (degree[edges[0]] * degree[edges[1]]).rsqrt(), persistent=False)
        self.register_buffer("own", 1 / degree[:, None], persistent=False)
        self.edge_weight = nn.Parameter(torch.ones(edges.shape[1]))
        self.node = nn.Linear(len(names), width)  # a node's input is its number, one-hot: the weight's columns
        self.head = nn.Linear(width, num_classes)
        self.dropout = nn.Dropout(dropout)

    def spread(self, h):
        """What the neighbors of each node say, and it itself: [n, width] -> [n, width]."""
        weight = (self.edge_weight * self.norm)[:, None]
        a, b = self.edges
        return (self.own * h).index_add(0, a, weight * h[b]).index_add(0, b, weight * h[a])

    def forward(self, nodes):
        h = F.relu(self.spread(self.dropout(self.node.weight.T)) + self.node.bias)
        return self.spread(self.head(self.dropout(h)))[nodes]


# ---------------------------------------------------------------------------------- what has been left out


def explain(run):
    """By kind of edge and node, which share the masks of a round (the last, or as told) have kept; all replicates."""
    from safetensors.torch import load_file

    edges, names, classes = artists()
    number = (
        int(sys.argv[3]) if len(sys.argv) > 3 else max((int(f.name[:2]) for f in Path(run).glob("masks/*")), default=1)
    )
    files = sorted(Path(run).glob(f"masks/{number:02}-*.safetensors"))
    if not files:
        return f"{run}: expected a run of this example with masks of round {number}, found none"
    kept = torch.stack([load_file(file)["edge_weight"] for file in files]).float()  # [replicates, e]
    degree = torch.bincount(edges.flatten(), minlength=len(classes))
    ends = classes[edges]
    train = torch.zeros(len(classes), dtype=torch.bool)
    train[labeled()[0][0]] = True
    hub = degree[edges].max(0).values
    kinds = {
        "all edges": torch.ones_like(hub, dtype=torch.bool),
        "within a class": (ends[0] == ends[1]) & (ends[0] >= 0),
        "between classes": (ends[0] != ends[1]) & (ends.min(0).values >= 0),
        "to one of a rarer tag": (ends.min(0).values < 0) & (ends.max(0).values >= 0),
        "among rarer tags": ends.max(0).values < 0,
        "touches a training node": train[edges].any(0),
        "two steps or more from one": ~train[edges].any(0),
        "busier end has 5 or fewer": hub <= 5,
        "6 to 10": (hub > 5) & (hub <= 10),
        "11 or more (hubs)": hub > 10,
    }
    print(f"round {number}, {len(files)} replicates; edges kept, in percent: mean (lowest to highest)")
    for kind, where in kinds.items():
        shares = 100 * kept[:, where].mean(1)
        print(f"{kind:>28} {int(where.sum()):6} {shares.mean():6.1f} ({shares.min():.1f} to {shares.max():.1f})")
    left = torch.stack([torch.bincount(edges[:, mask > 0].flatten(), minlength=len(classes)) for mask in kept])
    for kind, where in (("training", train), ("other known", (classes >= 0) & ~train), ("rarer tag", classes < 0)):
        alone = 100 * (left[:, where] == 0).float().mean(1)
        spread = f"{alone.mean():6.1f} ({alone.min():.1f} to {alone.max():.1f})"
        print(f"{kind + ' nodes cut off':>28} {int(where.sum()):6} {spread}")
    always = [f"{names[a]} and {names[b]}" for a, b in edges[:, ~kept.bool().any(0)].T.tolist()]
    lone = [names[node] for node in (left == 0).all(0).nonzero()[:, 0].tolist()]
    for what, found in (("edges", always), ("nodes", lone)):
        print(f"left out by all {len(files)}: {len(found)} {what}, such as {'; '.join(found[:4])}")
    return 0


SETTINGS = [
    "--model", f"{__file__}:Network", "--data", f"{__file__}:labeled", "--out", "runs/graph",
    "--prune-only", "edge_weight", "--prune-only", "node.weight", "--prune-only", "head.weight", "--scope", "layer",
    "--prune", "*=0.05", "--prune", "edge_weight=0.2", "--rounds", "8", "--rewind", "0it", "--replicates", "5",
    "--iterations", "600", "--batch-size", "300", "--lr", "0.02",
]  # fmt: skip

if __name__ == "__main__":
    if sys.argv[1:2] == ["--explain"]:
        sys.exit(explain(sys.argv[2] if len(sys.argv) > 2 else "runs/graph"))
    sys.exit(subprocess.call([sys.executable, "-m", "ticketfind", "search", *SETTINGS, *sys.argv[1:]]))
