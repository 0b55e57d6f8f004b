"""Disks that are full, read-only or gone: a clear line, what was whole stays whole, and the same command goes on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ticketfind import TicketfindError, cli, tensorfile
from ticketfind import contents as contents_of_runs
from ticketfind.arms import Task
from ticketfind.recipe import Recipe
from ticketfind.rundir import RunDir

SEARCH = [
    "search", "--iterations", "150", "--rounds", "3", "--replicates", "2",
    "--set", "train.eval_every=50", "--engine", "eager", "--device", "cpu",
]  # fmt: skip


def contents(out: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found.pop(".lock", None)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)
        patch.setattr(sys, "argv", ["ticketfind", *SEARCH, "--out", str(out)])
        torch.set_num_threads(1)  # as `one_thread` has it in every test
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
    return contents(out)


@pytest.fixture
def search(command: Callable[..., Any]) -> Callable[[Path], Any]:
    """search(out) -> exit code, stdout and stderr."""
    return lambda out: command(*SEARCH, "--out", out)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here: that takes Linux and root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@pytest.mark.parametrize("left", [20, 650])
def test_a_disk_that_fills_up(
    left: int, mount: Path, undisturbed: dict[str, bytes], search: Callable[[Path], Any]
) -> None:
    """With room for `left` KiB: nothing, or some rounds."""
    filler = mount / "filler"
    filler.write_bytes(bytes(1024 * (1024 - left)))
    done = search(mount / "run")
    assert done.code == 1
    (line,) = done.err.strip().splitlines()
    assert line.startswith(f"error: {mount / 'run'}") and "No space left on device" in line
    for name, content in contents(mount / "run").items():  # whole, all of it, but for what is kept of a training
        assert name.startswith("state/") or undisturbed[name].startswith(content), name
        assert name in ("log.jsonl", "recipe.yaml") or name.startswith("state/") or undisturbed[name] == content, name
    assert not list((mount / "run").rglob(".*.tmp"))
    filler.unlink()
    remount(mount, "size=8m")
    done = search(mount / "run")
    assert done.code == 0, done.err
    ours = contents(mount / "run")
    assert ours.keys() == undisturbed.keys()
    assert all(ours[name] == undisturbed[name] for name in ours)


def test_a_disk_that_is_read_only(
    mount: Path, undisturbed: dict[str, bytes], search: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is so from the start, and where it has become so since the search was stopped."""
    remount(mount, "size=8m")
    remount(mount, "ro")
    refuses(search, mount / "run")
    remount(mount, "rw")
    with monkeypatch.context() as patch:
        append = RunDir.append

        def append_and_stop(run: RunDir, entry: Any) -> None:
            append(run, entry)
            signal.raise_signal(signal.SIGTERM)

        patch.setattr(RunDir, "append", append_and_stop)
        assert search(mount / "run").code == 143
    remount(mount, "ro")
    refuses(search, mount / "run")
    remount(mount, "rw")
    assert search(mount / "run").code == 0
    assert contents(mount / "run") == undisturbed


def refuses(search: Callable[[Path], Any], out: Path) -> None:
    before = contents(out)
    done = search(out)
    assert done.code == 1 and "Read-only file system" in done.err and "Traceback" not in done.err
    assert contents(out) == before


def test_a_disk_that_goes_away(
    tmp_path: Path, undisturbed: dict[str, bytes], search: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is moved away under the search; put back, it goes on."""
    out, away = tmp_path / "run", tmp_path / "away"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [sys.executable, "-m", "ticketfind", *SEARCH, "--out", str(out)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        wait_for(out / "log.jsonl", lines=2)
        out.rename(away)
        assert process.wait(300) == 1
        assert process.stderr is not None
        told = process.stderr.read()
    assert "the run directory has gone while the search was at work" in told and "Traceback" not in told
    assert not out.exists() or not any(out.rglob("*.safetensors")), "nothing is begun anew in its place"
    shutil.rmtree(out, ignore_errors=True)
    away.rename(out)
    assert search(out).code == 0
    assert contents(out) == undisturbed


LOST = [
    (contents_of_runs, "finished_rounds", (1, 3, 4)),
    (tensorfile, "save_file", (1, 3, 6, 11)),
    (RunDir, "append", (1, 2, 5)),
    (RunDir, "log", (2, 3)),
    (RunDir, "finish", (1,)),
]
"""Where a search reads or writes its folder, and at which calls that goes away."""
WHOLE: dict[str, bytes] = {}
"""What that search leaves if nothing happens."""


@pytest.mark.parametrize(("where", "name", "number"), [(*each, n) for *each, calls in LOST for n in calls])
def test_a_folder_that_goes_away_at_any_moment(
    where: Any, name: str, number: int, make_task: Callable[..., Task], make_recipe: Callable[..., Recipe],
    run_search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """One line that says which folder, and nothing is begun anew in its place."""
    out, calls, function = tmp_path / "run", [0], getattr(where, name)

    def leave(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            out.rename(tmp_path / "away")
        return function(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, leave)
        with pytest.raises(TicketfindError, match=f"^{out}: the run directory has gone while the search was at work"):
            run_search(make_recipe(), make_task(), out)
    assert calls[0] >= number and not out.exists()
    (tmp_path / "away").rename(out)
    run_search(make_recipe(), make_task(), out)
    if not WHOLE:
        run_search(make_recipe(), make_task(), tmp_path / "whole")
        WHOLE.update(contents(tmp_path / "whole"))
    assert contents(out) == WHOLE


def test_a_log_that_goes_away_is_missed(
    make_task: Callable[..., Task], make_recipe: Callable[..., Recipe], run_search: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    out, finished_rounds = tmp_path / "run", contents_of_runs.finished_rounds

    def lose(*arguments: Any) -> Any:
        (out / "log.jsonl").unlink(missing_ok=True)
        return finished_rounds(*arguments)

    monkeypatch.setattr(contents_of_runs, "finished_rounds", lose)
    with pytest.raises(TicketfindError, match=r"log\.jsonl: expected all of round 0, found less: lines .* have gone"):
        run_search(make_recipe(), make_task(), out)


@pytest.mark.parametrize(
    "arguments",
    [["search", "--out", "LONG"], ["inspect", "LONG.safetensors"], ["report", "LONG"], ["eval", "LONG"],
     ["export", "LONG"], ["verify", "LONG"], ["diff", "LONG", "LONG"], ["search", "LONG.yaml"],
     ["search", "--data", "LONG", "--model", "lenet-300-100"], ["search", "--checkpoint", "LONG"],
     ["stability", "LONG"], ["search", "--model", "LONG.py:net", "--data", "digits"]],
    ids=lambda words: "-".join(words[:2]),
)  # fmt: skip
def test_a_name_that_is_too_long_is_one_line(arguments: list[str], command: Callable[..., Any]) -> None:
    ran = command(*(word.replace("LONG", "x" * 300) for word in arguments))
    assert ran.code in (1, 2) and "Traceback" not in ran.err
    assert len(ran.err.splitlines()) == 1 and "error: " in ran.err and "x" * 60 in ran.err, ran.err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="takes root, who may cease to be it")
@pytest.mark.parametrize("name", ["search --out", "inspect", "report", "eval", "verify", "export"])
def test_a_place_that_may_not_be_read_is_one_line(name: str, command: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    modes = {folder: folder.stat().st_mode for folder in (tmp_path, *tmp_path.parents[:2])}
    for folder, mode in modes.items():
        folder.chmod(mode | 0o055)
    os.seteuid(65534)
    try:
        ran = command(*name.split(), tmp_path / "closed" / "run")
    finally:
        os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)
    assert ran.code == 1 and ran.err.count("\n") == 1 and "Permission denied" in ran.err, ran.err


def wait_for(log: Path, *, lines: int) -> None:
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_bytes().count(b"\n") >= lines):
        assert time.monotonic() < deadline
        time.sleep(0.005)
