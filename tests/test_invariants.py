"""What must always hold is broken on purpose, in each way in which it can be: it is noticed, named and kept."""

import contextlib
import hashlib
import itertools
import json
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_arm import OPTIMIZERS
from safetensors.torch import load_file
from torch import Tensor

from ticketfind import TicketfindError, engine, invariants, keeping, lanes, masks
from ticketfind.arms import Task
from ticketfind.digests import digest
from ticketfind.invariants import Violated, is_same, of_pruning, of_start, of_training
from ticketfind.recipe import Recipe

Search = Callable[..., Any]
linux = pytest.mark.skipif(sys.platform != "linux", reason="arms side by side need Linux")
processes = pytest.param("processes", marks=linux)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------- the checks alone


def test_a_start_is_the_rewind_point_under_the_mask_bit_for_bit() -> None:
    mask = {"w": torch.tensor([[True, False], [False, True]])}
    start = {"w": torch.tensor([[1.0, 2.0], [3.0, -0.0]]), "b": torch.tensor([math.nan, 1e-45])}
    found = {"w": torch.tensor([[1.0, 0.0], [0.0, -0.0]]), "b": start["b"].clone()}
    assert of_start(found, start, mask) == []
    for name, place, value in (
        ("w", (0, 0), math.nextafter(1.0, 2.0) + 1e-7),
        ("w", (0, 1), -0.0),
        ("w", (1, 0), 3.0),
        ("w", (1, 1), 0.0),
        ("b", (0,), 0.0),
        ("b", (1,), 0.0),
    ):
        changed = {key: tensor.clone() for key, tensor in found.items()}
        changed[name][place] = value
        assert of_start(changed, start, mask) == [f"{name} does not begin at the rewind point"]
    assert of_start({"w": found["w"].double()}, start, mask) == []  # in the model's type
    assert of_start({"w": found["w"].flatten()}, start, mask) == ["w does not begin at the rewind point"]


def test_pruned_weights_are_exactly_zero_after_a_training() -> None:
    mask = {"w": torch.tensor([True, False, False]), "v": torch.tensor([False])}
    assert of_training({"w": torch.tensor([0.0, 0.0, -0.0]), "v": torch.zeros(1), "b": torch.ones(3)}, mask) == []
    for bad in (1e-45, math.nan, math.inf):
        found = of_training({"w": torch.tensor([1.0, 0.0, bad]), "v": torch.zeros(1)}, mask)
        assert found == ["w has pruned weights that are not zero"], bad


def test_a_pruning_brings_nothing_back_and_keeps_as_many_as_planned() -> None:
    old = {"w": torch.tensor([True, True, False]), "v": torch.tensor([True, True])}
    new = {"w": torch.tensor([True, False, False]), "v": torch.tensor([True, False])}
    assert of_pruning(new, old, 2) == []
    assert of_pruning(new, old, 3) == ["2 weights are kept, 3 were planned"]
    grown = {**new, "w": torch.tensor([False, False, True])}
    assert of_pruning(grown, old, 2) == ["w has a pruned weight that came back"]
    assert of_pruning(grown, old, 1) == ["w has a pruned weight that came back", "2 weights are kept, 1 were planned"]


ODD = [
    torch.tensor([math.nan, -0.0, math.inf, 1e-45]),
    torch.tensor(2.5),
    torch.zeros(0, 3),
    torch.tensor([True, False]),
    torch.arange(6, dtype=torch.int64).view(2, 3).t(),
    torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)[:, ::2],
    torch.tensor([1 + 2j]),
]


def test_equal_is_bit_for_bit() -> None:
    for one, other in itertools.product(ODD, ODD):
        assert is_same(one, other.clone()) is (one is other)
    assert not is_same(torch.tensor(0.0), torch.tensor(-0.0))
    payload = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)  # another NaN
    assert is_same(payload, payload.clone()) and not is_same(payload, torch.tensor([math.nan]))


def test_digests_are_those_of_numpy_and_tell_every_bit() -> None:
    state = {"b.weight": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), "a": torch.tensor([True])}
    by_hand = hashlib.sha256()
    by_hand.update(b"a\nbool\n[1]\n" + np.array([True]).tobytes())
    by_hand.update(b"b.weight\nfloat32\n[2, 3]\n" + state["b.weight"].numpy().astype("<f4").tobytes())
    assert digest(state) == by_hand.hexdigest() == digest(dict(reversed(state.items())))
    assert digest({**state, "b.weight": state["b.weight"].t().contiguous().t()}) == digest(state)
    weight = state["b.weight"]
    others: list[dict[str, Tensor]] = [
        {**state, "b.weight": weight.view(3, 2)},
        {**state, "b.weight": weight.double()},
        {**state, "b.weight": weight.view(torch.int32)},
        {**state, "a": torch.tensor([1], dtype=torch.uint8)},
        {"a": state["a"], "c.weight": weight},
        {"a": state["a"]},
        {},
    ]
    for place in range(6):
        changed = weight.clone().flatten()
        changed[place] = float(np.nextafter(changed[place].numpy(), np.float32(9)))
        others.append({**state, "b.weight": changed.view(2, 3)})
    found = [digest(other) for other in [state, *others]]
    assert len({*found}) == len(found)
    assert len({digest({"x": odd}) for odd in ODD}) == len(ODD)


def test_what_is_violated_is_said_in_one_line_and_survives_a_pipe() -> None:
    error = Violated.of("round 1, replicate 0", [f"{name} is wrong" for name in "abcde"])
    assert str(error).startswith("round 1, replicate 0: a is wrong; b is wrong; c is wrong and 2 more; this must never")
    assert "\n" not in str(error) and isinstance(error, TicketfindError)
    again = pickle.loads(pickle.dumps(error))  # as processes report it
    assert isinstance(again, Violated) and str(again) == str(error)


# ------------------------------------------------------------------------------------------ in a search


def restored(run_search: Search, recipe: Recipe, task: Task, tmp_path: Path) -> None:
    """Without what was wrong, the search goes on, and ends as one in which nothing ever was."""
    run_search(recipe, task, tmp_path / "run")
    run_search(recipe, task, tmp_path / "whole")
    found = {name: data for name, data in tree(tmp_path / "run").items() if not name.startswith("violated")}
    assert found == tree(tmp_path / "whole")


def log_of(folder: Path) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["round"], line["replicate"]) for line in lines]


@pytest.mark.parametrize("optimizer", ["sgd", "sgd-momentum-decay"])
@pytest.mark.parametrize("way", ["eager", processes, "stacked"])
def test_an_optimizer_that_revives_pruned_weights_is_noticed(
    way: str, optimizer: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """The first round under a mask; its weights are kept for who has to find out."""
    settings = {f"train.{key}": value for key, value in {"momentum": 0, **OPTIMIZERS[optimizer]}.items()}
    recipe, task = make_recipe({**settings, "run.engine": way, "run.arms_at_once": 2}), make_task("normed")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_mul_", lambda *_: None)  # the masks in the step
        with pytest.raises(Violated) as caught:
            run_search(recipe, task, tmp_path / "run")
    file = tmp_path / "run/violated/01-0.safetensors"
    assert str(caught.value).startswith(
        "round 1, replicate 0: fc1.weight has pruned weights that are not zero; fc2.weight has pruned weights that are"
        f" not zero; its weights and masks are in {file}; this must never be: "
    )
    kept = load_file(file)
    mask, start = load_file(tmp_path / "run/masks/01-0.safetensors"), load_file(tmp_path / "run/init/0.safetensors")
    assert kept.keys() == {
        *(f"mask/{name}" for name in mask), *(f"{part}/{name}" for part in ("start", "final") for name in start)
    }  # fmt: skip
    assert all(torch.equal(kept[f"mask/{name}"], mask[name]) for name in mask)
    assert all(torch.equal(kept[f"start/{name}"], start[name]) for name in start)
    assert bool((kept["final/fc1.weight"][~mask["fc1.weight"]] != 0).any())
    assert log_of(tmp_path / "run") == [(0, 0), (0, 1)]
    restored(run_search, recipe, task, tmp_path)


def without_masks(start: Any, kept: Any) -> dict[str, Tensor]:
    return dict(start)


def moved_a_little(start: Any, kept: Any) -> dict[str, Tensor]:
    changed = masks.masked(start, kept)
    return {**changed, "norm.bias": changed["norm.bias"] + 1e-7}


@pytest.mark.parametrize("way", ["eager", processes, "stacked"])
@pytest.mark.parametrize(
    ("wrong", "name", "round"),
    [(without_masks, "fc1.weight", 1), (moved_a_little, "norm.bias", 0)],
    ids=["no masks", "a bias"],
)
def test_a_training_that_begins_elsewhere_is_noticed_before_its_first_iteration(
    wrong: Callable[..., Any], name: str, round: int, way: str, make_task: Callable[..., Task],
    make_recipe: Callable[..., Recipe], run_search: Search, watch: Any, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    recipe, task = make_recipe({"run.engine": way, "run.arms_at_once": 2}), make_task("normed")
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "masked", wrong)
        with pytest.raises(Violated, match=rf"^round {round}, replicate \d: {name} does not begin at the rewind point"):
            run_search(recipe, task, tmp_path / "run")
    assert sum(call.args[0] for call in watch.tick.call_args_list) == round * 24
    restored(run_search, recipe, task, tmp_path)


def test_a_rehearsal_that_leaves_a_trace_is_noticed(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """Statistics of BatchNorm move in a step, whatever its learning rate."""
    recipe, task = make_recipe({"run.engine": "stacked", "run.arms_at_once": 2}), make_task("normed")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "unchanged", lambda tensors: contextlib.nullcontext())
        with pytest.raises(Violated, match=r"norm\.running_mean does not begin at the rewind point"):
            run_search(recipe, task, tmp_path / "run")
    restored(run_search, recipe, task, tmp_path)


def test_weights_of_another_arm_are_noticed(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """Two arms that are trained as one and mixed up."""
    original = lanes.Stack._state

    def mixed_up(stack: lanes.Stack, arm: int) -> dict[str, Tensor]:
        return original(stack, 1 - arm)

    monkeypatch.setattr(lanes.Stack, "_state", mixed_up)
    recipe = make_recipe({"run.engine": "stacked", "run.arms_at_once": 2})
    with pytest.raises(Violated, match=r"^round 0, replicate 0: .*fc1\.weight does not begin at the rewind point"):
        run_search(recipe, make_task("normed"), tmp_path / "run")


def growing(drawn: dict[str, Tensor], old: dict[str, Tensor]) -> None:
    """A weight that was pruned comes back, and another goes for it."""
    mask, before = drawn["fc2.weight"].view(-1), old["fc2.weight"].view(-1)
    mask[int((~before).nonzero()[0])] = True
    mask[int((mask & before).nonzero()[0])] = False


def one_less(drawn: dict[str, Tensor], old: dict[str, Tensor]) -> None:
    mask = drawn["fc1.weight"].view(-1)
    mask[int(mask.nonzero()[0])] = False


@pytest.mark.parametrize(
    ("wrong", "round", "text"),
    [
        (growing, 2, "fc2.weight has a pruned weight that came back"),
        (one_less, 0, "178 weights are kept, 179 were planned"),
        (one_less, 1, "124 weights are kept, 125 were planned"),
    ],
)
def test_a_pruning_that_is_wrong_is_noticed_and_no_mask_is_left_of_it(
    wrong: Callable[..., None], round: int, text: str, make_task: Callable[..., Task],
    make_recipe: Callable[..., Recipe], run_search: Search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """256 weights, of which 30 % go each round, tensor by tensor. Of two replicates it is the second's."""
    prune, calls = masks.prune, itertools.count()

    def badly(old: dict[str, Tensor], scores: Any, groups: Any, counts: Any) -> dict[str, Tensor]:
        drawn = prune(old, scores, groups, counts)
        if next(calls) == 2 * round + 1:
            drawn = {name: mask.clone() for name, mask in drawn.items()}
            wrong(drawn, old)
        return drawn

    recipe, task = make_recipe({"prune.rounds": 4}), make_task("normed")
    with monkeypatch.context() as patch:
        patch.setattr(masks, "prune", badly)
        with pytest.raises(Violated) as caught:
            run_search(recipe, task, tmp_path / "run")
    file = tmp_path / f"run/violated/{round:02}-1.safetensors"
    assert str(caught.value).startswith(f"round {round}, replicate 1: {text}; its weights and masks are in {file}; ")
    kept = load_file(file)
    assert {name.split("/")[0] for name in kept} == ({"start", "mask", "final"} if round else {"start", "final"})
    assert not (tmp_path / f"run/masks/{round + 1:02}-1.safetensors").exists()
    assert log_of(tmp_path / "run")[-1] == (round, 0)
    restored(run_search, recipe, task, tmp_path)


def test_a_mask_drawn_ahead_is_held_against_the_one_before_it(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """Of the three that the dense training draws at once, the second is wrong."""
    prune, calls = masks.prune, itertools.count()

    def badly(old: dict[str, Tensor], scores: Any, groups: Any, counts: Any) -> dict[str, Tensor]:
        drawn = {name: mask.clone() for name, mask in prune(old, scores, groups, counts).items()}
        if next(calls) == 1:
            growing(drawn, old)
        return drawn

    monkeypatch.setattr(masks, "prune", badly)
    with pytest.raises(Violated, match=r"round 0, replicate 0: fc2\.weight has a pruned weight that came back"):
        run_search(make_recipe({"prune.ahead": [3]}), make_task("normed"), tmp_path / "run")


def test_what_was_violated_in_the_very_first_training_does_not_stand_in_the_way(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """Nothing of the run is left but what was found, and the same command begins again."""
    from ticketfind import rundir

    recipe, task = make_recipe(), make_task("normed")
    with monkeypatch.context() as patch:
        patch.setattr(keeping.invariants, "of_pruning", lambda *_: ["wrong"])
        with pytest.raises(Violated, match="round 0, replicate 0: wrong"):
            run_search(recipe, task, tmp_path / "run")
    assert (tmp_path / "run/violated/00-0.safetensors").exists()
    assert rundir.claim(recipe, tmp_path / "run").path == tmp_path / "run"
    restored(run_search, recipe, task, tmp_path)


def test_the_checks_of_a_search_that_holds_find_nothing(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Search,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """And they are made: of every training, its start, its end and its pruning."""
    calls: dict[str, int] = {}
    for name in ("of_start", "of_training", "of_pruning"):
        original = getattr(invariants, name)

        def counting(*args: Any, name: str = name, original: Any = original) -> list[str]:
            calls[name] = calls.get(name, 0) + 1
            found: list[str] = original(*args)
            assert found == []
            return found

        monkeypatch.setattr(invariants, name, counting)
    for net in ("mlp", "normed", "tied"):
        calls.clear()
        run_search(make_recipe({"prune.rewind": "5it"}), make_task(net), tmp_path / net)
        assert calls == {"of_start": 8, "of_training": 8, "of_pruning": 6}
        assert not (tmp_path / net / "violated").exists()
