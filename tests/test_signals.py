"""A search that is stopped: exit code and message, and the same command ends with the bytes of one never stopped."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ticketfind import course, forks, scores, signals, tensorfile, terminal

SEARCH = [
    "search", "--iterations", "400", "--rounds", "2", "--replicates", "2", "--set", "train.eval_every=200",
    "--set", "run.snapshot=null", "--device", "cpu", "--engine",
]  # fmt: skip
SIDE_BY_SIDE = "arms side by side need Linux and a second core"
ENGINES = ["eager", pytest.param("processes", marks=pytest.mark.skipif(not forks.possible(), reason=SIDE_BY_SIDE))]
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def on_call(patch: pytest.MonkeyPatch, where: Any, name: str, number: int, do: Callable[[], None]) -> None:
    """Have the `number`-th call of a function begin with `do`."""
    function, calls = getattr(where, name), [0]

    def called(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            do()
        return function(*arguments, **keywords)

    patch.setattr(where, name, called)


def on_progress(patch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Have the first word of iterations done begin with `do`: whoever trains has begun."""
    tick, told = terminal.Progress.tick, []

    def ticked(self: terminal.Progress, iterations: int) -> None:
        if iterations and not told:
            told.append(iterations)
            do()
        tick(self, iterations)

    patch.setattr(terminal.Progress, "tick", ticked)


MOMENTS: dict[str, tuple[Any, str, int]] = {
    "evaluation": (course.Drawn, "so_far", 2),
    "pruning": (scores, "scored", 1),
    "write": (tensorfile, "save_file", 3),
}
"""Functions that are called then in a search, and at which call it is stopped."""


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[str, bytes]]:
    """What SEARCH leaves if nothing stops it, by engine; the first test that wants it searches."""
    return {}


@pytest.mark.parametrize(
    ("moment", "name", "engine"),
    [
        ("training", "SIGINT", "eager"),
        ("training", "SIGTERM", "processes"),
        ("training", "SIGHUP", "processes"),
        ("evaluation", "SIGHUP", "eager"),
        ("pruning", "SIGTERM", "eager"),
        ("write", "SIGINT", "eager"),
    ],
)
def test_a_search_that_is_stopped_goes_on_to_the_same_bytes(
    moment: str, name: str, engine: str, undisturbed: dict[str, dict[str, bytes]], command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    if engine == "processes" and not forks.possible():
        pytest.skip(SIDE_BY_SIDE)
    out = tmp_path / "run"
    if engine not in undisturbed:
        assert command(*SEARCH, engine, "--out", tmp_path / "whole").code == 0
        undisturbed[engine] = contents(tmp_path / "whole")
    with monkeypatch.context() as patch:

        def stop() -> None:
            signal.raise_signal(signal.Signals[name])

        if moment == "training":
            on_progress(patch, stop)
        else:
            on_call(patch, *MOMENTS[moment], stop)
        ran = command(*SEARCH, engine, "--out", out)
    assert ran.code == CODES[name], ran
    told = f"stopped; what is done is kept in {out}, and the same command goes on from there"
    assert told in " ".join(ran.out.split())
    assert not (out / "finished").exists() and "Traceback" not in ran.err
    assert not [*out.rglob(".*.tmp")]
    if moment != "pruning":  # of the one training, at the next iteration of the other
        assert [*(out / "state").iterdir()], "the training under way is kept"
    assert command(*SEARCH, engine, "--out", out).code == 0
    assert contents(out) == undisturbed[engine]


def test_a_training_that_cannot_go_on_is_not_said_to_be_kept(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those for a mask alone begin anew."""
    on_progress(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    ran = command(*SEARCH, "eager", "--mask-stop", "0.9", "--out", tmp_path / "run")
    told = f"stopped; trainings that are done are kept in {tmp_path / 'run'}, and the same command goes on from there"
    assert ran.code == 130 and told in " ".join(ran.out.split())


@pytest.mark.parametrize("engine", ENGINES)
def test_what_could_not_be_kept_is_not_said_to_be(
    engine: str, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped with a full disk: the exit code of the stop, and the truth."""
    save = tensorfile.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if path.parent.name == "state":
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(tensorfile, "save_file", full)
    on_progress(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    ran = command(*SEARCH, engine, "--out", tmp_path / "run")
    told = " ".join(ran.out.split())
    assert ran.code == 130 and "Traceback" not in ran.err
    assert f"stopped; {tmp_path / 'run'}/state/00-" in told and "cannot write: No space left on device" in told
    assert "what is done is kept" not in told and "what was kept before that is in" in told


# ------------------------------------------------------------------------------------------------ at once, or not


def test_a_signal_is_at_once_but_in_a_training() -> None:
    signals.install()
    for name, code in CODES.items():
        with pytest.raises(signals.Stopped) as caught:
            signal.raise_signal(signal.Signals[name])
        assert caught.value.exit_code == code
        with signals.training():
            signals.heed()
            signal.raise_signal(signal.Signals[name])
            with pytest.raises(signals.Stopped) as caught:
                signals.heed()
            assert caught.value.exit_code == code
            with pytest.raises(signals.Stopped):  # whoever does not want to wait
                signal.raise_signal(signal.SIGINT)
        signals.heed()


def test_a_terminal_that_is_closed_hangs_up_more_than_once() -> None:
    """The kernel says so, and the shell: there is time for a snapshot all the same."""
    signals.install()
    with signals.training():
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert signals.noted().exit_code == 129  # type: ignore[union-attr]


def test_nohup_is_heeded() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.install()
    signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    with pytest.raises(signals.Stopped):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.skipif(sys.platform != "linux", reason="what a closed terminal does differs")
def test_a_search_outlives_its_terminal_by_a_snapshot(tmp_path: Path) -> None:
    """A real terminal, closed while the search draws on it."""
    out = tmp_path / "run"
    words = ["search", "--iterations", "100000", "--set", "train.eval_every=1000", "--replicates", "2"]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, *words, "--out", str(out)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    seen = b""
    while b"it/s" not in seen:
        seen += os.read(master, 4096)
    os.close(master)
    assert process.wait(timeout=120) == 129
    deadline = time.monotonic() + 10
    while not [*out.glob("state/00-*.safetensors")]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from ticketfind.cli import main
main()
"""


def test_a_progress_line_on_a_terminal_that_has_gone_hides_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def stop(self) -> None:
            raise OSError(5, "Input/output error")

    with pytest.raises(ValueError, match="the reason"), terminal.Progress(terminal.Screen(), "training") as progress:
        progress._live = Gone()  # type: ignore[assignment]
        raise ValueError("the reason")
