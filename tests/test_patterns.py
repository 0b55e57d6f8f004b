"""N:M patterns against a brute force in numpy, torch's own 2:4 format, and a search from end to end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import nn

from ticketfind import TicketfindError, contents, experiments, layers, masks, patterns, prunable, verify
from ticketfind.rundir import RunDir


def by_hand(scores: np.ndarray, kept: np.ndarray, keep: int, block: int) -> np.ndarray:
    """Block after block in plain loops: the highest of those that are still there, the first among equals."""
    new = np.zeros_like(kept)
    outputs, inputs, *kernel = scores.shape
    for output in range(outputs):
        for place in np.ndindex(*kernel):
            for first in range(0, inputs, block):
                there = [i for i in range(first, first + block) if kept[(output, i, *place)]]
                there.sort(key=lambda i: -scores[(output, i, *place)])
                for i in there[:keep]:
                    new[(output, i, *place)] = True
    return new


@settings(deadline=None)
@given(
    outputs=st.integers(1, 4),
    blocks=st.integers(1, 3),
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 3)]),
    kernel=st.lists(st.integers(1, 3), max_size=2),
    rounds=st.sampled_from([None, 1, 2, 9]),
    levels=st.sampled_from([1, 3, 10**6]),  # distinct scores: all equal, many ties, hardly any
    seed=st.integers(0, 2**32 - 1),
)
def test_prune_is_the_brute_force_round_after_round(outputs, blocks, pattern, kernel, rounds, levels, seed):
    (keep, block), rng = pattern, np.random.default_rng(seed)
    shape = (outputs, blocks * block, *kernel)
    groups = masks.make_groups(["w"], {"*": 0.2}, f"{keep}:{block}", rounds)
    kept = masks.dense({"w": shape})
    counts = [masks.count(kept)]
    for step in groups[0].steps[1:]:
        scores = rng.integers(0, levels, shape).astype(np.float32)
        expected = by_hand(scores, kept["w"].numpy(), step, block)
        new = masks.prune(kept, {"w": torch.from_numpy(scores)}, groups)
        np.testing.assert_array_equal(new["w"].numpy(), expected)
        assert masks.nested_in(new["w"], kept["w"]) and patterns.kept_in_each(new["w"], block) == step
        kept = new
        counts.append(masks.count(kept))
    assert masks.plan({"w": int(np.prod(shape))}, groups, rounds, None) == counts
    assert counts[-1] * block == counts[0] * keep
    assert torch.equal(masks.prune(kept, {"w": torch.from_numpy(scores)}, groups)["w"], kept["w"])  # no further


@pytest.mark.parametrize(
    ("pattern", "rounds", "expected"),
    [
        ((2, 4), None, (4, 3, 2)),
        ((2, 4), 18, (4, 3, 2)),
        ((2, 4), 1, (4, 2)),
        ((1, 4), 2, (4, 3, 1)),
        ((1, 8), 3, (8, 6, 4, 1)),
    ],
)
def test_weights_kept_in_each_block_round_by_round(pattern, rounds, expected):
    assert patterns.steps(*pattern, rounds) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_semi_structured_format_holds_the_weight(dtype: torch.dtype) -> None:
    """The conversion that `torch.sparse.to_sparse_semi_structured` makes, which a CPU can do; the rest wants a GPU."""
    made = pytest.importorskip("torch.sparse._semi_structured_conversions")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    groups = masks.make_groups(["w"], {"*": 0.2}, "2:4", 1)
    mask = masks.prune(masks.dense({"w": weight.shape}), {"w": weight.float().abs()}, groups)["w"]
    values, places = made.sparse_semi_structured_from_dense_cutlass(weight * mask)
    assert values.shape == (64, 64)
    assert torch.equal(made.sparse_semi_structured_to_dense_cutlass(values, places), weight * mask)
    values, places = made.sparse_semi_structured_from_dense_cutlass(weight)
    assert not torch.equal(made.sparse_semi_structured_to_dense_cutlass(values, places), weight)  # it would tell


def test_a_random_mask_and_one_by_magnitude_have_the_pattern_too() -> None:
    shapes = {"fc": (8, 16), "conv": (6, 8, 3, 3), "whole": (4, 4)}
    groups = masks.make_groups([*shapes], {"*": 0.2, "whole": 0}, "2:4")
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ticket = masks.prune(masks.dense(shapes), {name: w.abs() for name, w in weights.items()}, groups)
    drawn = masks.random_like(ticket, seed=3, groups=groups)
    assert drawn["whole"].all()
    for name in ("fc", "conv"):
        assert patterns.kept_in_each(drawn[name], 4) == 3 and not torch.equal(drawn[name], ticket[name])
        assert patterns.kept_in_each(masks.random_like(ticket, seed=3)[name], 4) is None
    again = masks.magnitude_like(ticket, weights, groups)
    assert all(torch.equal(again[name], ticket[name]) for name in shapes)
    hits = torch.stack([masks.random_like(ticket, seed=s, groups=groups)["fc"].float() for s in range(800)]).mean(0)
    assert (hits - 0.75).abs().max() < 5 * (0.75 * 0.25 / 800) ** 0.5  # every place is as likely


def test_what_cannot_be_divided_is_left_whole(command: Callable[..., Any]) -> None:
    found = prunable.candidates(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(6, 4)), block=4)
    assert {c.name: c.is_left_whole for c in found if c.name.endswith("weight")} == {
        "0.weight": True, "1.weight": False, "2.weight": True,
    }  # fmt: skip
    bias = prunable.candidates(nn.Linear(4, 8), only=["bias"], block=4)[1]
    assert bias.is_left_whole and bias.reason == "left whole: it has one dimension, and none of inputs"
    shown = command("inspect", "conv-2", "--scope", "2:4", "--json").json
    first = shown["tensors"]["conv1.weight"]
    assert first["pruned"] is False and first["reason"] == "left whole: its number of inputs, 3, is no multiple of 4"
    assert [round["remaining"] for round in shown["rounds"]] == [1, 0.75, 0.5]
    dry = command(
        "search", "--model", "conv-2", "--data", "digits", "--scope", "2:4", "--set", "data.validation=200", "--dry-run"
    )
    said = " ".join(dry.out.split())
    assert "conv1.weight is left whole: its number of inputs, 1, is no multiple of 4" in said and "scope: '2:4'" in said


def test_a_recipe_may_say_it_without_quotes(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("prune: {scope: 2:4, rounds: 0x2}\nrun: {seed: 12}\n", encoding="utf-8")
    recipe = layers.from_layers(layers.read_layer(file))
    assert (recipe.prune.scope, recipe.prune.rounds, recipe.run.seed) == ("2:4", 2, 12)
    assert layers.parse_value("2:4") == "2:4" and layers.parse_value("-17") == -17
    assert isinstance(layers.parse_value("12"), int)
    file.write_text(layers.to_yaml(recipe), encoding="utf-8")
    assert layers.from_layers(layers.read_layer(file)) == recipe


@pytest.mark.parametrize("scope", ["4:4", "5:4", "0:4", "2:4:6", "tensor", 124, "2:400"])
def test_other_patterns_are_refused(scope: object) -> None:
    with pytest.raises(TicketfindError, match=r"prune.scope: expected one of layer, global, or N:M"):
        layers.from_layers({"prune": {"scope": scope}})


def test_a_share_left_and_a_pattern_contradict_each_other() -> None:
    asked = layers.from_layers({"prune": {"scope": "2:4", "until": 0.7}})
    with pytest.raises(TicketfindError, match=r"prune.until: expected null with scope 2:4, .* found 0.7"):
        asked.resolved(train_size=100, validation=10, device="cpu")


@pytest.mark.parametrize(
    "words",
    [
        ["--scope", "2:4", "--prune", "0.5"],
        ["--scope", "2:4", "--set", "prune.fraction=0.5"],
        ["two-four.yaml", "--prune", "0.5"],
        ["--scope", "1:4", "--prune", "*=0.5", "--prune", "fc3.*=0.1"],
    ],
)
def test_shares_given_beside_a_pattern_are_refused(words: list[str], command: Callable[..., Any]) -> None:
    Path("two-four.yaml").write_text("prune: {scope: 2:4}\n", encoding="utf-8")
    refused = command("search", *words, "--dry-run")
    assert refused.code == 2 and not refused.out
    assert "prune.fraction: expected none beside scope" in refused.err and "0.5" in refused.err
    assert refused.err.count("error:") == 1


def test_shares_of_recipes_beside_a_pattern_are_passed_over(command: Callable[..., Any]) -> None:
    """Shipped ones silently, a user's with a line; a share of 0 has a say and can be given."""
    Path("mine.yaml").write_text("prune: {fraction: 0.5}\n", encoding="utf-8")
    shipped, whole, mine, layerwise = (
        command("search", *words, "--dry-run", "--json")
        for words in (
            ["digits", "--scope", "2:4"],
            ["--scope", "2:4", "--prune", "*=0.2", "--prune", "fc3.*=0"],
            ["mine.yaml", "--scope", "2:4"],
            ["mine.yaml", "--rounds", "2"],
        )
    )
    said = "mine.yaml: prune.fraction has no say beside scope 2:4"
    assert said in " ".join(mine.err.split())
    assert all("no say" not in ran.err for ran in (shipped, whole, layerwise))
    rounds = [[each["remaining"] for each in ran.json["rounds"]] for ran in (shipped, mine, layerwise)]
    assert rounds[:2] == [[1, 0.75, 0.5]] * 2 and rounds[2][1] == pytest.approx(0.5, abs=1e-3)
    kept = 64 * 300 + 300 * 100
    assert whole.json["rounds"][2]["remaining"] == pytest.approx((kept / 2 + 1000) / (kept + 1000))


# ---------------------------------------------------------------------------------------- from end to end


@pytest.fixture
def run(
    tmp_path: Path, make_recipe: Callable[..., Any], make_task: Callable[..., Any], run_search: Callable[..., Any]
) -> RunDir:
    """A search by 2:4 with a tensor that stays whole."""
    recipe = make_recipe({"prune.scope": "2:4", "prune.fraction": {"*": 0.2, "fc3.*": 0}, "prune.rounds": 9})
    run_search(recipe, make_task(), tmp_path / "run")
    return RunDir(tmp_path / "run")


def test_a_search_verified(run: RunDir, tmp_path: Path) -> None:
    rounds = contents.finished_rounds(run)
    found = [load_file(run.mask_file(number, 0)) for number in (1, 2)]
    size = sum(mask.numel() for mask in found[0].values())
    whole = found[0]["fc3.weight"].numel()
    assert [round.remaining for round in rounds] == [1] + [(whole + (size - whole) * s) / size for s in (0.75, 0.5)]
    for mask, keep in zip(found, (3, 2), strict=True):
        for name in ("fc1.weight", "fc2.weight"):
            assert (mask[name].view(-1, 4).sum(1) == keep).all()
        assert mask["fc3.weight"].all()
    checks = verify.of_run(run)
    assert all(check.passed for check in checks), checks
    (blocks,) = [check for check in checks if check.what == "masks are blocks of 4"]
    assert blocks.found == "2:4, 2 masks"


def test_a_mask_with_the_right_count_and_another_pattern(run: RunDir) -> None:
    masks_there = load_file(file := run.mask_file(2, 1))
    before = load_file(run.mask_file(1, 1))["fc1.weight"].view(-1, 4)
    blocks = masks_there["fc1.weight"].view(-1, 4)
    blocks[0], blocks[1] = before[0], before[1] & (before[1].cumsum(0) == 1)  # three and one, nested as they should be
    save_file(masks_there, file)
    (failed,) = [check for check in verify.of_run(run) if check.what == "weights kept are as planned"]
    assert failed.found == "round 2, replicate 1: fc1.weight: not 2:4, or not as many of each block as this round has"
    ticket = contents.load(run, 2, 1)
    ticket.save(run.path / "odd.safetensors")
    (failed,) = [check for check in verify.of_ticket(run.path / "odd.safetensors") if check.passed is False]
    assert failed.found == "not 2:4: fc1.weight"


def test_a_ticket_that_keeps_fewer_than_its_pattern_says(run: RunDir) -> None:
    ticket = contents.load(run, 2, 0)
    blocks = ticket.masks["fc2.weight"].view(-1, 4)
    blocks &= blocks.cumsum(1) == 1  # the first of each two
    ticket.save(file := run.path / "fewer.safetensors")
    (failed,) = [check for check in verify.of_ticket(file) if check.passed is False]
    assert (failed.what, failed.found) == ("masks are blocks of 4", "not 2:4: fc2.weight")


def test_an_evaluation_draws_its_random_mask_by_the_pattern(
    run: RunDir, make_task: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, drawn = run.recipe(), []
    tickets = contents.tickets(run, 2)
    fit = experiments.fit

    def watched(arms: Any, *args: Any, **keys: Any) -> Any:
        drawn.extend(arm.masks for arm in arms if arm.name.startswith("random"))
        return fit(arms, *args, **keys)

    monkeypatch.setattr(experiments, "fit", watched)
    groups = masks.make_groups([*tickets[0].masks], recipe.prune.fraction, recipe.prune.scope)
    experiments.evaluate(
        experiments.Design(tickets=tickets, trials=1), make_task(), recipe.train, first_seed=9, groups=groups
    )
    assert len(drawn) == 2
    for mask in drawn:
        assert patterns.kept_in_each(mask["fc1.weight"], 4) == 2 and mask["fc3.weight"].all()
