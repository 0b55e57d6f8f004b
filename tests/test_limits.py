"""How many arms are trained at once changes no number; what is advised where memory runs short does fit."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ticketfind import TicketfindError, forks, memory
from ticketfind.memory import Need, what_fits


@pytest.mark.skipif(not forks.possible(), reason="arms side by side need Linux and a second core")
def test_one_at_a_time_is_all_at_once(command: Callable[..., Any], tmp_path: Path) -> None:
    """Masks, weights and figures, to the last byte; what was asked for alone differs, in recipe and ticket."""
    words = [
        "search", "--iterations", "30", "--rounds", "2", "--replicates", "3", "--set", "train.eval_every=10",
        "--device", "cpu", "--engine", "processes",
    ]  # fmt: skip
    found = []
    for name, more in (("together", ()), ("single", ("--arms-at-once", "1"))):
        assert command(*words, *more, "--out", tmp_path / name).code == 0
        files = [file for file in (tmp_path / name).rglob("*.*") if file.is_file()]
        found.append({str(file.relative_to(tmp_path / name)): file.read_bytes() for file in files})
    one, all_ = found
    assert one.keys() == all_.keys() and "masks/02-2.safetensors" in one
    assert {name for name in one if one[name] != all_[name]} == {"recipe.yaml", "ticket.safetensors"}
    tickets = [load_file(tmp_path / name / "ticket.safetensors") for name in ("together", "single")]
    assert tickets[0].keys() == tickets[1].keys()
    assert all(torch.equal(value, tickets[1][name]) for name, value in tickets[0].items())


needs = st.builds(
    Need,
    fixed=st.integers(1, 2**42),
    per_example=st.one_of(st.floats(0, 1), st.floats(0, 2**34), st.integers(0, 2**34).map(float)),
)


@given(needs, st.integers(1, 50), st.integers(1, 5000), st.floats(-(2.0**30), 2.0**43))
def test_what_is_said_to_fit_fits(need: Need, arms: int, batch_size: int, there: float) -> None:
    """By the estimate as it is documented: fixed, and twice what is kept for each example, for each arm."""

    def takes(arms: int, batch_size: int) -> float:
        return arms * (need.fixed + 2 * need.per_example * batch_size)

    said = what_fits(need, arms, batch_size, there)
    if found := re.search(r"--arms-at-once (\d+)", said):
        advised = int(found[1])
        assert 1 <= advised < arms
        assert (takes(advised, batch_size) <= there and "would" in said) or takes(arms, batch_size) <= there
        assert advised == arms - 1 or takes(advised + 1, batch_size) > there * (1 - 1e-9), (
            "as many as there is room for"
        )
    elif found := re.search(r"--batch-size (\d+)", said):
        advised = int(found[1])
        assert 1 <= advised < batch_size
        assert takes(1, advised) <= there * (1 + 1e-9), "one arm, as all that is advised comes before"
        assert arms == 1 or takes(1, batch_size) > there
    else:
        assert "smaller model" in said
        assert batch_size == 1 or takes(1, 1) > there or need.per_example < 1


@pytest.mark.parametrize(
    ("arms", "batch_size", "text"),
    [
        (3, 60, "--arms-at-once 2 may fit"),
        (1, 60, "--batch-size 30"),
        (1, 2, "--batch-size 1"),
        (1, 1, "smaller model"),
    ],
)
def test_advice_where_nothing_is_known(arms: int, batch_size: int, text: str) -> None:
    assert text in what_fits(None, arms, batch_size, 1e9)


def test_a_batch_of_one_is_not_advised_to_itself() -> None:
    need = Need(fixed=100, per_example=10.0)
    assert "--batch-size" not in what_fits(need, 1, 1, 1e6)
    assert "--batch-size" not in what_fits(need, 1, 1, 110.0)
    assert "--batch-size 1 would fit" in what_fits(need, 1, 2, 120.0)


@given(needs, st.integers(1, 9), st.integers(1, 500), st.floats(0, 2.0**43))
def test_a_search_is_refused_where_half_of_the_estimate_is_too_much(
    need: Need, arms: int, batch_size: int, there: float
) -> None:
    half = arms * (need.fixed + 2 * need.per_example * batch_size) / 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free", lambda device: there)
        if half * (1 - 1e-9) > there:
            with pytest.raises(TicketfindError, match=r"^memory: "):
                memory.check(need, arms, batch_size, torch.device("cpu"))
        elif half * (1 + 1e-9) < there:
            memory.check(need, arms, batch_size, torch.device("cpu"))
