"""The run directory: a log that survives crashes, directories that are never mixed up."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ticketfind import TicketfindError, files, rundir
from ticketfind.recipe import Recipe, RecipeError
from ticketfind.rundir import RunDir


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder: path -> content (None for a folder)."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_paths_are_those_of_the_documentation() -> None:
    run = RunDir(Path("runs/digits"))
    found = [
        run.recipe_file, run.start_file(0), run.start_file(2, 7), run.mask_file(7, 0), run.mask_file(12, 3),
        run.ticket_file,
    ]  # fmt: skip
    assert [str(path.relative_to("runs/digits")) for path in found] == [
        "recipe.yaml", "init/0.safetensors", "init/07-2.safetensors", "masks/07-0.safetensors",
        "masks/12-3.safetensors", "ticket.safetensors",
    ]  # fmt: skip


def test_masks_of_many_rounds_and_replicates_are_found(tmp_path: Path) -> None:
    run, there = RunDir(tmp_path), {(1, 0), (7, 12), (99, 3), (100, 101)}
    run.mask_file(1, 0).parent.mkdir()
    for round, replicate in there:
        run.mask_file(round, replicate).touch()
    run.mask_file(1, 0).with_name("notes.safetensors").touch()
    assert run.masks() == there


def test_an_evaluation_never_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "20260101T000000")
    names = []
    for _ in range(3):
        file = RunDir(tmp_path).new_eval_file(7)
        file.parent.mkdir(exist_ok=True)
        file.touch()
        names.append(file.name)
    assert names == ["07-20260101T000000.json", "07-20260101T000000-2.json", "07-20260101T000000-3.json"]


def test_a_second_search_in_a_directory_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    holder = "import sys, time\nfrom pathlib import Path\nfrom ticketfind.rundir import RunDir, sole_writer\n"
    holder += "with sole_writer(RunDir(Path(sys.argv[1]))):\n    print('held', flush=True)\n    time.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", holder, str(run.path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(TicketfindError, match="another search is at work here"), rundir.sole_writer(run):
            pytest.fail("two writers")
        process.kill()
    with rundir.sole_writer(run):
        assert run.lock_file.exists()


# ---------------------------------------------------------------------------------------------- the log


LINES = [
    {"round": 0, "replicate": 0, "accuracy_early": 0.1 + 0.2, "curve": {"iteration": [1, 2]}},
    {"round": 0, "replicate": 1, "accuracy_early": 1e-17, "name": "Größe \u2028 next"},
    {"round": 1, "replicate": 0, "accuracy_early": 1.0},
]


@pytest.fixture
def run() -> RunDir:
    run = RunDir(Path("run"))
    run.path.mkdir()
    for line in LINES:
        run.append(line)
    return run


def test_the_log_gives_back_what_was_put_in(run: RunDir) -> None:
    assert run.log() == LINES
    assert [json.loads(line) for line in (run.path / "log.jsonl").read_text().strip().split("\n")] == LINES
    assert RunDir(Path("nowhere")).log() == []


def test_a_crash_at_any_byte_of_the_last_line_loses_that_line_alone(run: RunDir) -> None:
    """Read and appended to, the log means the same: a line without its end was never written."""
    file = run.path / "log.jsonl"
    whole = file.read_bytes()
    before = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(before, len(whole)):
        file.write_bytes(whole[:cut])
        assert run.log() == LINES[:2], cut
        run.append(LINES[2])
        assert file.read_bytes() == whole, cut


@pytest.mark.parametrize("damage", [b"not json\n", b"[1, 2]\n", b'{"round": 0}\n', b'{"round": "0", "replicate": 0}\n'])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_damaged_line_is_named(place: int, damage: bytes, run: RunDir) -> None:
    file = run.path / "log.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:place], damage, *lines[place:]]))
    with pytest.raises(TicketfindError, match=rf"log\.jsonl, line {place + 1}: expected a JSON object"):
        run.log()


def test_a_log_that_cannot_be_written_is_an_error_of_ours() -> None:
    with pytest.raises(TicketfindError, match=r"gone/log\.jsonl: cannot write: No such file"):
        RunDir(Path("gone")).append(LINES[0])


def test_a_new_log_is_on_disk_with_its_name(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(rundir.files, "sync_entries", synced.append)
    run.log_file.unlink(missing_ok=True)
    for replicate in (0, 1):
        run.append({"round": 0, "replicate": replicate})
    assert synced == [run.path], "once: when it was new"


def test_a_log_that_cannot_be_read_is_an_error_of_ours(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(run.log_file))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(TicketfindError, match=r"log\.jsonl: cannot read: Permission denied"):
        run.log()


def test_a_number_that_json_has_not_is_refused_and_nothing_written(run: RunDir) -> None:
    before = tree(run.path)
    with pytest.raises(ValueError, match="JSON"):
        run.append({"round": 2, "replicate": 0, "accuracy_early": float("nan")})
    assert tree(run.path) == before


def test_finish(run: RunDir) -> None:
    assert not run.is_finished
    run.finish()
    assert run.is_finished


# -------------------------------------------------------------------------------------- which directory


def test_a_run_begun_holds_the_recipe_and_is_found_as_the_latest(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    with pytest.raises(TicketfindError, match="no run found"):
        rundir.latest()
    run = rundir.claim(recipe, None)
    rundir.begin(run, recipe)
    rundir.make_latest(run)
    assert run.path == Path("runs/tiny")
    assert run.recipe() == recipe
    assert rundir.latest() == run
    assert {path.name for path in Path("runs").iterdir()} == {"tiny", "latest"}  # no temporary names


def test_a_run_elsewhere_is_the_latest_too(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    for path in (Path("deep/down/here"), tmp_path / "absolute"):
        rundir.begin(RunDir(path), make_recipe())
        rundir.make_latest(RunDir(path))
        assert rundir.latest().recipe() == make_recipe()
        assert rundir.latest().path.resolve() == path.resolve()


def test_beginning_again_changes_nothing(make_recipe: Callable[..., Recipe]) -> None:
    run = RunDir(Path("run"))
    rundir.begin(run, make_recipe())
    run.recipe_file.write_text(run.recipe_file.read_text() + "# the user's comment\n")
    before = tree(run.path)
    rundir.begin(run, make_recipe())
    assert tree(run.path) == before


def killed_as_it_began(run: RunDir) -> None:
    """What is left of a search that was killed while it wrote its recipe."""
    with rundir.sole_writer(run), files.whole(run.recipe_file) as half:
        pass
    run.recipe_file.rename(half)


@pytest.mark.parametrize("prepare", ["absent", "empty folder", "killed"])
def test_claim_takes_a_free_place_and_touches_nothing(
    prepare: str, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    for path in (Path("out"), Path("runs/tiny")):
        if prepare == "empty folder":
            path.mkdir(parents=True)
        elif prepare == "killed":
            killed_as_it_began(RunDir(path))
    before = tree(tmp_path)
    assert rundir.claim(make_recipe(), Path("out")).path == Path("out")
    assert rundir.claim(make_recipe(), None).path == Path("runs/tiny")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["file", "folder with files"])
def test_claim_refuses_what_is_not_a_run(name: str, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    Path("file").write_text("precious")
    Path("folder with files").mkdir()
    Path("folder with files/thesis.tex").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TicketfindError, match=f"^{name}: expected a run directory, an empty folder or nothing"):
        rundir.claim(make_recipe(), Path(name))
    assert tree(tmp_path) == before


def test_claim_names_every_key_in_which_the_recipes_differ(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    rundir.begin(RunDir(Path("out")), make_recipe())
    before = tree(tmp_path)
    other = make_recipe({"train.lr": 0.5, "prune.rounds": 4})
    with pytest.raises(TicketfindError) as caught:
        rundir.claim(other, Path("out"))
    assert "train.lr: 0.05 there, 0.5 here" in str(caught.value)
    assert "prune.rounds: 3 there, 4 here" in str(caught.value)
    assert "seed" not in str(caught.value)
    assert tree(tmp_path) == before


def test_claim_goes_on_with_an_equal_recipe(make_recipe: Callable[..., Recipe]) -> None:
    rundir.begin(RunDir(Path("out")), make_recipe())
    assert rundir.claim(make_recipe(), Path("out")).path == Path("out")


@pytest.mark.parametrize("text", ["train: {lr: fast}", "{", "just words"])
def test_a_damaged_recipe_is_an_error_that_names_the_file(text: str, make_recipe: Callable[..., Recipe]) -> None:
    Path("out").mkdir()
    Path("out/recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"out/recipe\.yaml"):
        rundir.claim(make_recipe(), Path("out"))


def test_names_count_up_past_other_recipes_and_rubbish(make_recipe: Callable[..., Recipe]) -> None:
    first, second, third = make_recipe(), make_recipe({"train.lr": 0.5}), make_recipe({"train.lr": 0.6})
    rundir.begin(rundir.claim(first, None), first)
    rundir.begin(rundir.claim(second, None), second)
    Path("runs/tiny-3").mkdir()
    Path("runs/tiny-3/recipe.yaml").write_text("{")
    Path("runs/tiny-4").write_text("a file")
    assert [rundir.claim(recipe, None).path.name for recipe in (first, second, third)] == ["tiny", "tiny-2", "tiny-5"]
    for key, value, name in (("replicates", 3, "tiny-5"), ("tolerance", 1, "tiny-5"), ("snapshot", 5, "tiny")):
        assert rundir.claim(make_recipe({f"run.{key}": value}), None).path.name == name, key


def test_forgetting_removes_a_run_without_a_finished_training_only(make_recipe: Callable[..., Recipe]) -> None:
    run = RunDir(Path("run"))
    rundir.begin(run, make_recipe())
    run.append(LINES[0])
    before = tree(run.path)
    rundir.forget_unstarted(run)
    assert tree(run.path) == before
    (run.path / "log.jsonl").unlink()
    run.state_folder.mkdir()  # of a snapshot that there was no room for
    rundir.forget_unstarted(run)
    assert not run.path.exists()


def test_a_snapshot_of_the_first_training_is_something_to_go_on_from(make_recipe: Callable[..., Recipe]) -> None:
    """As a search leaves it whose data cannot be read any more in the midst of it: nothing is in the log yet."""
    run = RunDir(Path("run"))
    rundir.begin(run, make_recipe())
    run.state_folder.mkdir()
    (run.state_folder / "00-0.safetensors").write_bytes(b"hours of work")
    before = tree(run.path)
    rundir.forget_unstarted(run)
    assert tree(run.path) == before


def test_a_commands_link_to_a_folder_is_a_file_of_its_own(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = RunDir(Path("run"))
    rundir.begin(run, make_recipe())
    folder = run.arms_folder / "round-0-replicate-0"
    folder.mkdir(parents=True)
    (folder / "checkpoints").symlink_to(tmp_path, target_is_directory=True)
    rundir.forget_unstarted(run)
    assert (folder / "checkpoints").is_symlink() and run.recipe_file.exists()


def test_a_folder_without_a_recipe_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(TicketfindError, match=r"expected a run directory, found no recipe\.yaml in it"):
        RunDir(tmp_path).recipe()
