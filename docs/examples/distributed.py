"""A plain DistributedDataParallel program that trains one arm of a search: --train-command 'torchrun ...'.

    ticketfind search --model docs/examples/distributed.py:Net --rounds 4 --replicates 3 --train-command \
        'torchrun --standalone --nproc-per-node 2 docs/examples/distributed.py \
         --init {init} --mask {mask} --seed {seed} --first {first} --rewind {rewind} --out {out}'

Files are all that it shares with ticketfind: weights and masks come in, trained weights and metrics go out. The lines
that a program of your own needs beside its usual ones are marked with <<<.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ticketfind import hold

BATCH = 64  # on each process


class Net(nn.Module):
    """[b, 20] -> [b, 4]."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(20, 100)
        self.norm = nn.BatchNorm1d(100)
        self.head = nn.Linear(100, 4)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.hidden(x))))


def examples(count, seed):
    """Inputs [count, 20]; the class [count] is told by the signs of two products of inputs."""
    inputs = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))
    return inputs, 2 * (inputs[:, 0] * inputs[:, 1] > 0).long() + (inputs[:, 2] * inputs[:, 3] > 0).long()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--init", required=True)
    parser.add_argument("--mask", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="step to start at")
    parser.add_argument("--rewind", type=int, default=0, help="step whose weights are written too")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every-rank", action="store_true", help="each process writes its weights, to be compared")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Net()
    model.load_state_dict(load_file(args.init))  # <<< pruned weights are zero in it
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    hold(ddp.module, optimizer, load_file(args.mask))  # <<< and stay so
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - (args.first + done) / args.steps)

    inputs, targets = examples(6000, seed=0)
    for step in range(args.first, args.steps):
        generator = torch.Generator().manual_seed(args.seed * args.steps + step)
        batch = torch.randint(len(inputs), (ranks, BATCH), generator=generator)[rank]  # each process its own part
        optimizer.zero_grad()
        F.cross_entropy(ddp(inputs[batch]), targets[batch]).backward()
        optimizer.step()
        schedule.step()
        if step + 1 == args.rewind and rank == 0:
            save_file(model.state_dict(), args.out / "rewind.safetensors")  # <<< the weights to rewind to

    if args.every_rank:
        save_file(model.state_dict(), args.out / f"rank-{rank}.safetensors")
    if rank == 0:
        model.eval()
        with torch.no_grad():
            inputs, targets = examples(2000, seed=1)
            accuracy = (model(inputs).argmax(1) == targets).double().mean().item()
        save_file(model.state_dict(), args.out / "final.safetensors")  # <<<
        (args.out / "metrics.json").write_text(json.dumps({"accuracy": accuracy, "test_size": len(targets)}))  # <<<
    dist.barrier()  # no process leaves while another is still at work
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
