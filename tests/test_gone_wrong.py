"""Numbers gone wrong in a search: a replicate that fails stops alone; deep networks that are cut off are noticed."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ticketfind import TicketfindError, contents, forks, masks, prunable
from ticketfind.arms import Task
from ticketfind.connection import is_disconnected
from ticketfind.recipe import Recipe
from ticketfind.results import Round
from ticketfind.rundir import RunDir

MakeTask = Callable[..., Task]
MakeRecipe = Callable[..., Recipe]
Search = Callable[..., list[Round]]

linux = pytest.mark.skipif(sys.platform != "linux", reason="arms side by side need Linux")


class Stop(KeyboardInterrupt):
    pass


def spoiling(run: Path, after: int, *replicates: int, stop_after: int | None = None) -> Mock:
    """A watch that, after a round, makes the rewind points of some replicates such that nothing trains from them."""
    watch = Mock(spec_set=["begin", "tick", "skip", "round", "note"])

    def round(finished: Round) -> None:
        for replicate in replicates if finished.round == after else ():
            file = run / f"init/{replicate}.safetensors"
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
            save_file({name: value * 1e30 for name, value in load_file(file).items()}, file, metadata)
        if finished.round == stop_after:
            raise Stop

    watch.round.side_effect = round
    return watch


def files_of(run: Path, replicates: set[int]) -> dict[str, Any]:
    """What a run holds of some replicates: files byte by byte, lines of the log."""
    found: dict[str, Any] = {
        str(file.relative_to(run)): file.read_bytes()
        for folder in ("init", "masks")
        for file in (run / folder).iterdir()
        if int(file.stem.split("-")[-1]) in replicates
    }
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return found | {
        f"log {n}": line for n, line in enumerate(line for line in lines if line["replicate"] in replicates)
    }


@pytest.mark.parametrize("way", ["eager", pytest.param("processes", marks=linux)])
def test_a_replicate_that_fails_stops_alone(
    way: str, make_task: MakeTask, make_recipe: MakeRecipe, run_search: Search, tmp_path: Path
) -> None:
    """The files of the others are those of a search in which nothing fails, to the last byte."""
    recipe = make_recipe({"run.replicates": 3, "run.engine": way})
    run_search(recipe, make_task(), tmp_path / "whole")
    watch = spoiling(tmp_path / "run", 1, 1)
    rounds = run_search(recipe, make_task(), tmp_path / "run", watch=watch)

    assert [round.replicates for round in rounds] == [(0, 1, 2), (0, 1, 2), (0, 2), (0, 2)]
    assert [[*round.failed] for round in rounds] == [[], [], [1], []]
    reason = rounds[2].failed[1]
    assert reason.startswith("round 2, replicate 1: the loss is not finite at iteration 0; try a lower learning rate")
    assert f"{reason}; it ends here, and the other replicates go on" in [c.args[0] for c in watch.note.call_args_list]
    assert files_of(tmp_path / "run", {0, 2}) == files_of(tmp_path / "whole", {0, 2})
    assert not (tmp_path / "run/masks/03-1.safetensors").exists()
    assert [ticket.about.replicate for ticket in contents.tickets(RunDir(tmp_path / "run"), 3)] == [0, 2]


@pytest.mark.parametrize("way", ["eager", "stacked"])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_search_with_a_failed_replicate_goes_on(
    stop_after: int, way: str, make_task: MakeTask, make_recipe: MakeRecipe, run_search: Search, tmp_path: Path
) -> None:
    """Stopped before or after the replicate failed, and started again: as if it had never been stopped."""
    recipe = make_recipe({"run.replicates": 3, "run.engine": way, "run.arms_at_once": 3})
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    rounds = run_search(recipe, make_task(), whole, watch=spoiling(whole, 1, 1))
    with pytest.raises(Stop):
        run_search(recipe, make_task(), stopped, watch=spoiling(stopped, 1, 1, stop_after=stop_after))
    assert run_search(recipe, make_task(), stopped) == rounds
    assert files_of(stopped, {0, 1, 2}) == files_of(whole, {0, 1, 2})
    assert (stopped / "ticket.safetensors").read_bytes() == (whole / "ticket.safetensors").read_bytes()


def test_a_search_whose_replicates_have_all_failed_ends_with_the_rounds_before(
    make_task: MakeTask, make_recipe: MakeRecipe, run_search: Search, tmp_path: Path
) -> None:
    watch = spoiling(tmp_path / "run", 1, 0, 1)
    rounds = run_search(make_recipe(), make_task(), tmp_path / "run", watch=watch)
    assert [round.round for round in rounds] == [0, 1]
    assert watch.note.call_args.args == (
        "no replicate is left after round 2: the search ends with the rounds before it",
    )
    assert RunDir(tmp_path / "run").is_finished
    assert contents.chosen(RunDir(tmp_path / "run"), None).round == 1


def deep(layer: Callable[[], list[nn.Module]], count: int) -> nn.Sequential:
    layers = [part for _ in range(count) for part in (nn.Linear(48, 48), *layer())]
    return nn.Sequential(nn.Linear(12, 48), *layers, nn.Linear(48, 4))


@pytest.mark.parametrize(
    "net",
    [
        lambda: deep(lambda: [nn.ReLU()], 80),
        lambda: deep(lambda: [nn.LayerNorm(48), nn.ReLU()], 30),
        lambda: deep(lambda: [nn.Sigmoid()], 5),
        lambda: deep(lambda: [nn.Tanh()], 5),
    ],
    ids=["relu", "layer norm", "sigmoid", "tanh"],
)
def test_a_deep_network_that_is_cut_off_is_noticed(net: Callable[[], nn.Module], make_task: MakeTask) -> None:
    """Wherever it is cut: weights that are tried must neither overflow nor saturate on the way."""
    task = make_task(net)
    whole = masks.dense({c.name: c.shape for c in prunable.candidates(task.model) if c.pruned})
    names = [*whole]
    assert not is_disconnected(task, task.start(0), whole)
    for name in (names[0], names[len(names) // 2], names[-1]):
        cut: dict[str, Tensor] = {**whole, name: torch.zeros_like(whole[name])}
        assert is_disconnected(task, task.start(0), cut), name


@linux
def test_a_process_that_cannot_keep_what_it_has_done_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    """Stopped while its disk is full: told by the error, not by a traceback of the process."""

    def train(_: int, tick: forks.Tick) -> None:
        try:
            while True:
                tick(1)
                time.sleep(0.01)
        except BaseException as stop:
            raise TicketfindError("cannot write: no space left") from stop

    def tick(iterations: int) -> None:
        if iterations:
            raise Stop

    with pytest.raises(TicketfindError, match="no space left") as caught:
        [*forks.side_by_side(2, 2, train, tick)]
    assert isinstance(caught.value.__cause__, Stop)
    assert capfd.readouterr().err == ""
