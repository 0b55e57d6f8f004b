"""Snapshots in files: seldom enough, whole or absent, and of no harm where they cannot be written or read."""

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ticketfind import TicketfindError, files, snapshots, tensorfile, train
from ticketfind.arms import Arm, Outcome, Task
from ticketfind.course import Failed, Snapshot
from ticketfind.devices import EAGER, Way
from ticketfind.recipe import Recipe, Train
from ticketfind.snapshots import Snapshots
from ticketfind.train import fit


def arms_of(*replicates: int, round: int = 0, first: int = 0) -> list[Arm]:
    """In name only."""
    return [Arm(f"round {round}, replicate {r}", {}, {}, r, first, round, r) for r in replicates]


ARMS = arms_of(0, 1)


def taken(at: int = 7) -> Snapshot:
    return Snapshot({"training/0": torch.arange(5.0) + at}, {"at": at})


def at_of(found: Snapshot | None) -> int | None:
    """The iteration of a snapshot that is whole."""
    if found is None:
        return None
    at = found.facts["at"]
    assert isinstance(at, int) and torch.equal(found.tensors["training/0"], torch.arange(5.0) + at)
    return at


# -------------------------------------------------------------------------------------------- how often


class Clock:
    """Time stands still but for what a test lets pass."""

    def __init__(self) -> None:
        self.now, self.of_thread = 1000.0, 0.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.of_thread


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(snapshots, "time", clock)
    return clock


def offered(kept: Snapshots, at: int, cost: Callable[[], None] = lambda: None) -> bool:
    """Whether a snapshot that is offered is taken."""
    was_taken = False

    def take() -> Snapshot:
        nonlocal was_taken
        was_taken = True
        cost()
        return taken(at)

    kept.offer(ARMS, take)
    kept.settle()
    return was_taken


def test_one_interval_passes_from_one_snapshot_to_the_next(clock: Clock, tmp_path: Path) -> None:
    """Counted from where the arms begin; the last one counts."""
    kept = Snapshots(tmp_path, 60)
    assert kept.find(ARMS) is None
    when = []
    for second in range(200):
        if offered(kept, second):
            when.append(second)
        clock.now += 1
    assert when == [60, 120, 180]
    assert at_of(Snapshots(tmp_path, 60).find(ARMS)) == 180
    assert [path.name for path in tmp_path.iterdir()] == ["00-0.safetensors"]


@pytest.mark.parametrize(("taking", "writing"), [(3.0, 0.0), (0.0, 3.0), (1.0, 2.0)])
def test_what_is_expensive_is_done_more_seldom(taking: float, writing: float, clock: Clock, tmp_path: Path) -> None:
    """3 s each, of taking it and of writing it: once in 300 s, which is 1 % of the time."""
    kept = Snapshots(tmp_path, 60)
    kept.find(ARMS)
    clock.of_thread = writing

    def cost() -> None:
        clock.now += taking

    when = []
    for _ in range(1000):
        before = clock.now - 1000
        if offered(kept, 0, cost):
            when.append(before)
        clock.now += 1
    assert when == [60, 360, 660, 960]


def test_without_an_interval_there_is_one_only_when_it_is_asked_for(clock: Clock, tmp_path: Path) -> None:
    kept = Snapshots(tmp_path, None)
    kept.find(ARMS)
    for _ in range(5):
        clock.now += 1e6
        assert not offered(kept, 0)
    assert not [*tmp_path.iterdir()]
    kept.offer(ARMS, lambda: taken(3), now=True)
    assert at_of(Snapshots(tmp_path, None).find(ARMS)) == 3


def test_one_that_is_asked_for_is_on_disk_at_once_and_goes_over_the_last(clock: Clock, tmp_path: Path) -> None:
    kept = Snapshots(tmp_path, 60)
    kept.find(ARMS)
    for at in (1, 2, 3):
        kept.offer(ARMS, lambda at=at: taken(at), now=True)  # type: ignore[misc]
        assert at_of(Snapshots(tmp_path, 60).find(ARMS)) == at


def test_the_training_goes_on_while_one_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And offers no other until that is done, but waits where one is asked for."""
    may_end, order = threading.Event(), []

    def slowly(path: Path, tensors: Any, metadata: Any, **more: Any) -> None:
        assert may_end.wait(10)
        order.append(int(tensors["training/0"][0]))
        tensorfile.save_tensors(path, tensors, metadata, **more)

    monkeypatch.setattr(snapshots, "save_tensors", slowly)
    monkeypatch.setattr(snapshots, "SHARE", 1e9)
    kept = Snapshots(tmp_path, 1e-9)
    kept.find(ARMS)
    for at in (1, 2, 3):
        kept.offer(ARMS, lambda at=at: taken(at))  # type: ignore[misc]
    assert order == []
    timer = threading.Timer(0.05, may_end.set)
    timer.start()
    kept.offer(ARMS, lambda: taken(4), now=True)
    timer.join()
    assert order == [1, 4] and at_of(kept.find(ARMS)) == 4


# ------------------------------------------------------------------------------------- what cannot be kept


def disk_full(tensors: Any, path: Path, metadata: Any) -> None:
    """Half a file, and then nothing more."""
    save_file(tensors, path, metadata)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("now", [False, True])
def test_a_full_disk_is_told_and_the_last_whole_snapshot_stays(
    now: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Told when the next one is due or asked for, or where the training ends."""
    monkeypatch.setattr(snapshots, "SHARE", 1e9)
    kept = Snapshots(tmp_path, 1e-9)
    kept.find(ARMS)
    kept.offer(ARMS, lambda: taken(5), now=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "save_file", disk_full)
        with pytest.raises(TicketfindError, match=r"00-0\.safetensors: cannot write: No space left on device"):
            kept.offer(ARMS, lambda: taken(6), now=now)
            kept.settle()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert at_of(Snapshots(tmp_path, None).find(ARMS)) == 5
    kept.offer(ARMS, lambda: taken(7), now=True)  # there is space again
    assert at_of(Snapshots(tmp_path, None).find(ARMS)) == 7


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    kept = Snapshots(tmp_path / "state", None)
    with pytest.raises(TicketfindError, match=r"state/00-0\.safetensors: cannot write: "):
        kept.offer(ARMS, taken, now=True)
    assert (tmp_path / "state").read_text() == "in the way"


def test_nothing_is_written_where_the_folder_is_no_place_to_write_to(tmp_path: Path) -> None:
    def check() -> None:
        raise TicketfindError("it has gone")

    kept = Snapshots(tmp_path / "state", None, check)
    with pytest.raises(TicketfindError, match=r"^it has gone$"):
        kept.offer(ARMS, lambda: pytest.fail("taken all the same"), now=True)
    assert not (tmp_path / "state").exists()


def test_a_training_whose_snapshots_cannot_be_written_says_so(
    make_task: Callable[..., Task], make_train: Callable[..., Train], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tensorfile, "save_file", disk_full)
    task = make_task()
    arm = Arm("arm", task.start(0), {}, 0)
    with pytest.raises(TicketfindError, match=r"00-0\.safetensors: cannot write: No space left on device"):
        [*fit([arm], task, make_train(), snapshots=Snapshots(tmp_path, 1e-9))]
    assert not [*tmp_path.iterdir()]


# ---------------------------------------------------------------------------------------- finding them


@pytest.mark.parametrize("others", [arms_of(0), arms_of(1), arms_of(0, 2), arms_of(0, 1, 2), arms_of(0, 1, round=1)])
def test_a_snapshot_of_other_arms_is_none_of_these(others: list[Arm], tmp_path: Path) -> None:
    kept = Snapshots(tmp_path, None)
    kept.offer(ARMS, taken, now=True)
    assert Snapshots(tmp_path, None).find(others) is None
    assert at_of(Snapshots(tmp_path, None).find(ARMS)) == 7


def test_each_group_of_arms_and_each_round_has_a_file_of_its_own_until_all_are_cleared(tmp_path: Path) -> None:
    kept = Snapshots(tmp_path / "state", None)
    kept.clear(0)  # nothing there yet
    assert kept.done(0, range(5)) == 0
    for number, (arms, at) in enumerate(
        [(arms_of(0, 1), 5), (arms_of(2), 9), (arms_of(2, 3, 4, round=12, first=4), 10)], 1
    ):
        kept.offer(arms, lambda at=at: taken(at), now=True)  # type: ignore[misc]
        assert len([*(tmp_path / "state").iterdir()]) == number
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert names == ["00-0.safetensors", "00-2.safetensors", "12-2.safetensors"]
    assert kept.done(0, range(5)) == 2 * 5 + 9  # of all arms
    assert [kept.done(12, [r]) for r in range(4)] == [0, 0, 3 * (10 - 4), 0]  # from the iteration at which they began
    kept.clear(0)
    assert kept.done(0, range(5)) == 0 and kept.done(12, [2]) == 18
    kept.clear(12)
    assert not (tmp_path / "state").exists() and kept.done(12, [2]) == 0


# ------------------------------------------------------------------------- snapshots that are of no use


class Halt(BaseException):
    pass


def stopped(arms: list[Arm], task: Task, how: Train, folder: Path, way: Way = EAGER) -> Path:
    """The file that a training leaves that is stopped after six of twelve iterations."""
    done = 0

    def tick(iterations: int) -> None:
        nonlocal done
        done += iterations
        if done >= 6 * len(arms):
            raise Halt

    with pytest.raises(Halt):
        [*fit(arms, task, how, way=way, tick=tick, snapshots=Snapshots(folder, None))]
    (file,) = folder.iterdir()
    return file


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """The snapshot after `change` of its tensors, and of what it says."""
    tensors: dict[str, Any] = load_file(file)
    about = json.loads(tensorfile.read_tensors(file, "snapshot")[1]["snapshot"])
    change(tensors, about)
    save_file(tensors, file, {"snapshot": json.dumps(about)})


def without(*keys: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(tensors: dict[str, Any], about: dict[str, Any]) -> None:
        for part in (tensors, about, about["facts"]):
            for key in keys:
                part.pop(key, None)

    return change


def said(**facts: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, about: about["facts"].update(facts)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "noise": lambda file: file.write_bytes(bytes(range(256)) * 20),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "no facts": lambda file: rewritten(file, without("facts")),
    "no generators": lambda file: rewritten(file, without("drawn", "drawn/cpu")),
    "no generator of torch's": lambda file: rewritten(file, without("drawn/cpu")),
    "no losses": lambda file: rewritten(file, without("losses")),
    "a tensor too few": lambda file: rewritten(file, without("training/3")),
    "points that are none": lambda file: rewritten(file, said(points=[[{"iteration": 4}]])),
    "a place that is none": lambda file: rewritten(file, said(at="here")),
    "generators that are none": lambda file: rewritten(file, said(drawn={"python": [3, [1, 2], None], "numpy": [1]})),
}


class Drawing(nn.Module):
    """[b, 12] -> [b, 4], with draws from torch's and numpy's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import numpy

        x = torch.relu(self.fc1(x)) + (float(numpy.random.rand()) if self.training else 0.5)
        return self.fc2(nn.functional.dropout(x, 0.2, self.training))


@pytest.mark.parametrize("way", ["eager", "stacked"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_snapshot_is_noted_and_the_training_begins_anew(
    damage: str, way: str, make_task: Callable[..., Task], make_train: Callable[..., Train],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """And ends in the bits of one that never had a snapshot."""
    monkeypatch.setattr(train, "PAUSE", 0.0)
    task, how = make_task(Drawing), make_train(optimizer="adam", lr=0.01)
    arms = [Arm("round 0, replicate 0", task.start(0), {}, 0)]
    ((_, expected),) = fit(arms, task, how, way=Way(way))
    DAMAGES[damage](stopped(arms, task, how, tmp_path, Way(way)))
    notes: list[str] = []
    ((_, found),) = fit(arms, task, how, way=Way(way), note=notes.append, snapshots=Snapshots(tmp_path, None))
    (note,) = notes
    assert note.startswith("round 0, replicate 0: its snapshot cannot be used and is trained from its start: ")
    assert "\n" not in note
    assert_same(found, expected)


def assert_same(found: Outcome | Failed, expected: Outcome | Failed) -> None:
    assert isinstance(found, Outcome) and isinstance(expected, Outcome)
    assert (found.began, found.points) == (expected.began, expected.points)
    assert all(torch.equal(value, expected.final[name]) for name, value in found.final.items())


@pytest.mark.parametrize("which", ["another network", "another optimizer", "another start", "another mask"])
def test_a_snapshot_of_another_training_is_noted_and_the_training_begins_anew(
    which: str, make_task: Callable[..., Task], make_train: Callable[..., Train], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Of another run, whose file somebody has put here; or of a model or data set that was changed meanwhile."""
    monkeypatch.setattr(train, "PAUSE", 0.0)
    task, how = make_task("normed"), make_train(optimizer="adam", lr=0.01)
    arm = Arm("round 1, replicate 0", task.start(0), {}, 0, round=1)
    other_task = make_task() if which == "another network" else task
    other_how = make_train(optimizer="sgd") if which == "another optimizer" else how
    start = other_task.start(1 if which in ("another start", "another network") else 0)
    kept = {"fc1.weight": torch.ones(16, 12).tril() > 0} if which == "another mask" else {}
    stopped([Arm(arm.name, start, kept, 0, round=1)], other_task, other_how, tmp_path)
    notes: list[str] = []
    ((_, found),) = fit([arm], task, how, note=notes.append, snapshots=Snapshots(tmp_path, None))
    ((_, expected),) = fit([arm], task, how)
    assert_same(found, expected)
    (note,) = notes
    assert note.startswith("round 1, replicate 0: its snapshot cannot be used and is trained from its start: ")


@pytest.mark.parametrize("damage", ["cut short", "noise", "no facts", "a folder"])
def test_a_search_goes_on_where_a_snapshot_is_damaged(
    damage: str, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Callable[..., Any],
    watch: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """In round 1: what it says of the iterations done counts as nothing, and the result is the right one."""
    monkeypatch.setattr(train, "PAUSE", 0.0)
    run_search(make_recipe(), make_task("normed"), tmp_path / "whole")
    left = 2 * 12 + 5

    def tick(iterations: int) -> None:
        nonlocal left
        left -= iterations
        if left < 0:
            raise Halt

    stopping = SimpleNamespace(
        begin=lambda *_: None, tick=tick, skip=lambda n: None, round=lambda r: None, note=lambda text: None
    )
    with pytest.raises(Halt):
        run_search(make_recipe(), make_task("normed"), tmp_path / "run", watch=stopping)
    (file,) = (tmp_path / "run/state").iterdir()
    assert file.name == "01-0.safetensors"
    DAMAGES[damage](file)
    watch.reset_mock()
    run_search(make_recipe(), make_task("normed"), tmp_path / "run")
    notes = [call.args[0] for call in watch.note.call_args_list]
    assert len([note for note in notes if "round 1, replicate 0: its snapshot cannot be used" in note]) == 1
    for name in ("log.jsonl", "masks/03-1.safetensors", "ticket.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "run/state").exists()


def test_what_is_half_written_is_swept_away_when_a_search_begins(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Callable[..., Any], tmp_path: Path
) -> None:
    run_search(make_recipe({"prune.rounds": 1}), make_task("normed"), tmp_path / "run")
    (tmp_path / "run/finished").unlink()
    with files.whole(tmp_path / "run/masks/01-0.safetensors") as half:
        name = half.name
        half.write_bytes((tmp_path / "run/masks/01-0.safetensors").read_bytes())
    for folder in ("", "masks", "init", "state"):
        (tmp_path / "run" / folder).mkdir(exist_ok=True)
        (tmp_path / "run" / folder / name).write_bytes(b"half")
    run_search(make_recipe({"prune.rounds": 1}), make_task("normed"), tmp_path / "run")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".") and path.name != ".lock"]
