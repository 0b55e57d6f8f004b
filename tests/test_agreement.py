"""How much masks agree: of two tickets, of runs, and where output layers differ; against files and numpy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ticketfind import TicketfindError, masks
from ticketfind.agreement import between, difference
from ticketfind.arms import Task
from ticketfind.rundir import RunDir
from ticketfind.tensorfile import read_tensors
from ticketfind.ticket import Ticket, load_ticket


def test_difference(make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]) -> None:
    task = make_task("normed")
    a, other = make_ticket(task, seed=0), make_ticket(task, seed=1)
    equal = difference(a, make_ticket(task, seed=0))
    assert equal.same_masks and equal.same_init and equal.total.jaccard == 1 and equal.total.agreement == 1
    found = difference(a, other)
    assert not found.same_masks and not found.same_init
    both = sum(int((a.masks[name] & other.masks[name]).sum()) for name in a.masks)
    assert found.total.kept_both == both
    assert (found.total.size, found.total.kept_a) == (256, masks.count(a.masks))
    assert abs(found.total.agreement) < 0.2  # independent masks


@pytest.mark.parametrize("changed", ["norm.running_var", "norm.num_batches_tracked", "fc2.bias", "fc1.weight"])
def test_difference_sees_any_bit_of_the_initial_weights(
    changed: str, make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]
) -> None:
    task = make_task("normed")
    a, b = make_ticket(task), make_ticket(task)
    b.init[changed].view(-1)[:1].add_(1)
    found = difference(a, b)
    assert found.same_masks and not found.same_init


def test_of_a_compact_ticket_only_what_both_keep_is_compared(
    make_task: Callable[..., Task], make_ticket: Callable[..., Ticket], tmp_path: Path
) -> None:
    """Under either name of a tied weight."""
    full = make_ticket(make_task("tied"))
    assert full.about.aliases
    full.save(tmp_path / "c.safetensors", layout="compact")
    compact = load_ticket(tmp_path / "c.safetensors")
    assert difference(full, compact).is_none and difference(compact, full).is_none
    ((alias, name),) = full.about.aliases.items()
    kept = full.masks[name].flatten().nonzero()[0]
    for key in (name, alias):
        full.init[key].view(-1)[kept] += 1
    found = difference(full, compact)
    assert found.same_masks and not found.same_init and not found.is_none


def test_tickets_of_different_networks_are_not_compared(
    make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]
) -> None:
    with pytest.raises(TicketfindError, match=r"masks of different networks: fc3\.weight only in .*--skip"):
        difference(make_ticket(make_task()), make_ticket(make_task("normed")))


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's, from the definition: observed and expected agreement of two raters."""
    observed = float(np.mean(a == b))
    expected = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return float((observed - expected) / (1 - expected))


def test_an_output_layer_for_other_classes_is_left_out(
    make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]
) -> None:
    a, b = make_ticket(make_task()), make_ticket(make_task(), seed=1)
    name = [*a.masks][-1]
    head = [key for key in a.init if key.split(".")[0] == name.split(".")[0]]
    for key in head:
        b.init[key] = torch.zeros(7, *a.init[key].shape[1:])
    b.masks[name] = torch.ones(b.init[name].shape, dtype=torch.bool)
    found = difference(a, b)
    assert found.left_out == tuple(head) and name not in found.tensors and not found.is_none
    assert found.tensors.keys() == a.masks.keys() - {name}


def test_replicates_pair_by_pair(command: Callable[..., Any]) -> None:
    """Two runs from the same initial weights, one of them with other data orders: by hand from the files."""
    small = ["search", "--iterations", "30", "--rounds", "2", "--set", "train.eval_every=10", "-q"]
    assert command(*small, "--replicates", "3", "--out", "a").code == 0
    assert command(*small, "--replicates", "2", "--out", "b", "--checkpoint", "a/init/0.safetensors").code == 0
    a, b = RunDir(Path("a")), RunDir(Path("b"))

    def mask(run: RunDir, replicate: int) -> np.ndarray:
        tensors, _ = read_tensors(run.mask_file(2, replicate), "mask")
        return tensors["fc1.weight"].numpy()

    def weights(run: RunDir, replicate: int) -> np.ndarray:
        return read_tensors(run.start_file(replicate, None), "start")[0]["fc1.weight"].numpy()

    assert np.array_equal(weights(b, 1), weights(a, 0)) and not np.array_equal(weights(a, 1), weights(a, 0))
    assert np.array_equal(mask(b, 0), mask(a, 0)), "the same weights and the same order: the same search"
    assert not np.array_equal(mask(b, 1), mask(a, 0))

    within = command("diff", "a", "a", "--round", "2", "--json").json["replicates"]
    assert within["same_init"] is None and within["other_init"]["pairs"] == 3
    assert abs(within["other_init"]["mean"]) < 0.1, "other initial weights: hardly more than chance"
    orders = command("diff", "b", "b", "--round", "2", "--json").json["replicates"]
    assert orders["other_init"] is None and orders["same_init"]["pairs"] == 1
    across = command("diff", "a", "b", "--round", "2", "--json").json["replicates"]
    assert (across["same_init"]["pairs"], across["other_init"]["pairs"]) == (2, 4)
    assert across["same_init"]["values"] == [1.0, orders["same_init"]["mean"]]
    assert orders["same_init"]["mean"] > 0.3
    best = {
        name: min(
            (line["validation_loss"], line["replicate"]) for line in RunDir(Path(name)).log() if line["round"] == 2
        )[1]
        for name in ("a", "b")
    }
    sides = command("diff", "a", "b", "--round", "2", "--json").json
    assert {key: sides[key] for key in best} == {
        name: {"path": name, "round": 2, "replicate": replicate} for name, replicate in best.items()
    }
    assert command("export", "a", "--round", "1", "--replicate", "1", "--out", "a1.safetensors").code == 0
    shown = command("diff", "a1.safetensors", "b/ticket.safetensors")
    winner = load_ticket("b/ticket.safetensors").about
    assert shown.out.startswith(
        "A: a1.safetensors, round 1, replicate 1\n"
        f"B: b/ticket.safetensors, round {winner.round}, replicate {winner.replicate}\n"
    )
    shown = command("diff", "a", "b", "--round", "2")
    assert shown.out.startswith(f"A: a, round 2, replicate {best['a']}\nB: b, round 2, replicate {best['b']}\n")
    assert "same initial weights" in shown.out and "other initial weights" in shown.out
    assert command("diff", "a", "b", "--round", "2", "--replicate", "0", "--json").json["replicates"] == {
        "same_init": None,
        "other_init": None,
    }


def test_pairs_agree_as_two_raters_do(make_task: Callable[..., Task], make_ticket: Callable[..., Ticket]) -> None:
    """With one tensor, whose expected overlap needs no sum over tensors."""
    task = make_task()
    tickets = [make_ticket(task, seed=seed) for seed in range(3)]
    for ticket in tickets:
        for name in [*ticket.masks][1:]:
            del ticket.masks[name]
    found = between(tickets)
    pairs = [(0, 1), (0, 2), (1, 2)]
    flat = [next(iter(ticket.masks.values())).numpy().ravel() for ticket in tickets]
    assert [o.agreement for o in found.other_init] == pytest.approx([kappa(flat[i], flat[j]) for i, j in pairs])
    assert between(tickets[:1], [tickets[0]]).same_init[0].agreement == 1
