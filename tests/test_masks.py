import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from ticketfind import TicketfindError, masks
from ticketfind.masks import Group

# ------------------------------------------------------------------------------------------------ pruning


def reference_prune(kept, scores, fraction, scope):
    """IMP's pruning step in numpy: rank what is left, keep the first n - round(n * p)."""
    new = {}
    for names in [list(kept)] if scope == "global" else [[name] for name in kept]:
        flat = np.concatenate([kept[name].ravel() for name in names])
        alive = np.flatnonzero(flat)
        ranking = np.argsort(-np.concatenate([scores[name].ravel() for name in names])[alive], kind="stable")
        flat = np.zeros(flat.size, bool)
        flat[alive[ranking[: alive.size - round(alive.size * fraction)]]] = True
        ends = np.cumsum([kept[name].size for name in names])[:-1]
        new |= {name: part.reshape(kept[name].shape) for name, part in zip(names, np.split(flat, ends), strict=True)}
    return new


shapes = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4)


@settings(deadline=None)
@given(
    shapes=shapes,
    fraction=st.floats(0.01, 0.99),
    scope=st.sampled_from(["layer", "global"]),
    levels=st.sampled_from([1, 2, 5, 10**6]),  # distinct scores: all equal, many ties, hardly any
    seed=st.integers(0, 2**32 - 1),
)
def test_prune_is_the_reference_round_after_round(shapes, fraction, scope, levels, seed):
    rng = np.random.default_rng(seed)
    shapes = {f"w{i}": tuple(shape) for i, shape in enumerate(shapes)}
    groups = masks.make_groups(list(shapes), {"*": fraction}, scope)
    kept = masks.dense(shapes)
    counts = [masks.count(kept)]
    for _ in range(3):
        scores = {name: rng.integers(0, levels, shape).astype(np.float32) for name, shape in shapes.items()}
        expected = reference_prune({n: m.numpy() for n, m in kept.items()}, scores, fraction, scope)
        new = masks.prune(kept, {name: torch.from_numpy(s) for name, s in scores.items()}, groups)
        for name in shapes:
            np.testing.assert_array_equal(new[name].numpy(), expected[name])
        assert all(masks.nested_in(new[name], kept[name]) for name in new)
        kept = new
        counts.append(masks.count(kept))
    planned = masks.plan({n: int(np.prod(s)) for n, s in shapes.items()}, groups, rounds=3, until=None)
    assert planned == counts[: len(planned)]
    assert set(counts[len(planned) :]) <= {planned[-1]}  # the plan ends where no weight is pruned any more


def test_tensors_outside_the_groups_stay_as_they_are():
    kept = {"a": torch.ones(10, dtype=torch.bool), "b": torch.tensor([True, False])}
    new = masks.prune(kept, {"a": torch.arange(10.0), "b": torch.zeros(2)}, [Group(("a",), 0.3)])
    assert new["a"].tolist() == [False] * 3 + [True] * 7
    assert new["b"].tolist() == [True, False]
    assert kept["a"].all()  # pure: the old masks are untouched


def test_global_scope_takes_from_the_tensor_of_small_scores():
    scores = {"small": torch.full((8,), 0.1), "large": torch.full((8,), 1.0)}
    new = masks.prune(masks.dense({"small": (8,), "large": (8,)}), scores, [Group(("small", "large"), 0.5)])
    assert [int(m.sum()) for m in new.values()] == [0, 8]


# ------------------------------------------------------------------------------------------- plan, groups


def test_plan_of_lenet_shows_the_papers_weights_remaining():
    """The P_m that arXiv 1803.03635v5, figure 3, prints for Lenet-300-100."""
    sizes = {"fc1.weight": 784 * 300, "fc2.weight": 300 * 100, "fc3.weight": 100 * 10}
    groups = masks.make_groups(list(sizes), {"*": 0.2, "fc3.*": 0.1}, "layer")
    percent = [round(100 * kept / 266_200, 1) for kept in masks.plan(sizes, groups, 18, None)]
    assert [percent[r] for r in (0, 3, 7, 12, 15, 18)] == [100.0, 51.3, 21.1, 7.0, 3.6, 1.9]


@pytest.mark.parametrize(
    ("rounds", "until", "expected"),
    [
        (2, None, [100, 80, 64]),
        (None, 0.64, [100, 80, 64]),  # at, not only below
        (None, 0.63, [100, 80, 64, 51]),
        (1, 0.1, [100, 80]),
        (None, 0.01, [100, 80, 64, 51, 41, 33, 26, 21, 17, 14, 11, 9, 7, 6, 5, 4, 3, 2]),  # 0.2 of 2 rounds to none
    ],
)
def test_plan_stops(rounds, until, expected):
    assert masks.plan({"w": 100}, [Group(("w",), 0.2)], rounds, until) == expected


@pytest.mark.parametrize(("size", "percent"), [(100, 29), (430_500, 57), (360, 35), (100, 50)])
def test_plan_stops_at_exactly_the_share_that_was_asked_for(size, percent):
    """In floating point 0.29 * 100 is less than 29, but 29 / 100 is what 0.29 is read as."""
    fraction = (100 - percent) / 100
    assert masks.plan({"w": size}, [Group(("w",), fraction)], None, percent / 100) == [size, size * percent // 100]


def test_plan_counts_whole_tensors_as_remaining():
    assert masks.plan({"w": 10, "whole": 90}, [Group(("w",), 0.5)], 1, None) == [100, 95]


NAMES = ["conv1.weight", "conv2.weight", "fc.weight"]


@pytest.mark.parametrize(
    ("fractions", "scope", "expected"),
    [
        ({"*": 0.2}, "global", [(tuple(NAMES), 0.2)]),
        ({"*": 0.2}, "layer", [((name,), 0.2) for name in NAMES]),
        ({"*": 0.2, "fc*": 0.1}, "global", [(tuple(NAMES[:2]), 0.2), (("fc.weight",), 0.1)]),
        ({"fc*": 0.1, "*": 0.2}, "global", [(tuple(NAMES), 0.2)]),  # the last glob that matches decides
        ({"*": 0.2, "conv*": 0.0}, "layer", [(("fc.weight",), 0.2)]),  # fraction 0: stays whole
        ({"conv2*": 0.3}, "layer", [(("conv2.weight",), 0.3)]),  # no glob: stays whole
    ],
)
def test_groups(fractions, scope, expected):
    assert [(g.names, g.fraction) for g in masks.make_groups(NAMES, fractions, scope)] == expected


# ---------------------------------------------------------------------------------- masks and random masks


@settings(deadline=None, max_examples=30)
@given(shapes=shapes, density=st.floats(0, 1), seed=st.integers(0, 2**63 - 1))
def test_random_masks_keep_as_many_of_each_tensor(shapes, density, seed):
    rng = torch.Generator().manual_seed(seed)
    given_masks = {f"w{i}": torch.rand(shape, generator=rng) < density for i, shape in enumerate(shapes)}
    drawn = masks.random_like(given_masks, seed=seed)
    assert {n: (m.shape, m.dtype, int(m.sum())) for n, m in drawn.items()} == {
        n: (m.shape, torch.bool, int(m.sum())) for n, m in given_masks.items()
    }
    assert all(torch.equal(drawn[name], again) for name, again in masks.random_like(given_masks, seed=seed).items())


def test_random_masks_are_uniform():
    given_masks = {"w": torch.arange(20) < 5}
    hits = torch.stack([masks.random_like(given_masks, seed=seed)["w"].float() for seed in range(800)]).mean(0)
    assert (hits - 0.25).abs().max() < 5 * (0.25 * 0.75 / 800) ** 0.5


def test_random_masks_of_tensors_of_one_shape_are_independent():
    drawn = masks.random_like({name: torch.arange(400) < 200 for name in ("a", "b")}, seed=0)
    assert masks.compare({"w": drawn["a"]}, {"w": drawn["b"]})["w"].agreement == pytest.approx(0, abs=5 / 400**0.5)


def test_counting():
    """Over all weights, not the mean of the tensors' shares."""
    kept = {"a": torch.tensor([True, False, False, False]), "b": torch.ones(3, 2, dtype=torch.bool)}
    assert masks.count(kept) == 7
    assert masks.remaining(kept) == 7 / 10
    whole = masks.dense({"a": (4,), "b": (3, 2)})
    assert all(masks.nested_in(kept[name], whole[name]) for name in kept)
    assert not masks.nested_in(torch.tensor([True, True, False, False]), kept["a"])


def test_masked_weights_are_exactly_zero_whatever_was_there():
    weights = {"w": torch.tensor([float("nan"), -1.0, float("inf"), 2.0]), "bn.running_mean": torch.ones(2)}
    kept = {"w": torch.tensor([False, True, False, True])}
    found = masks.masked(weights, kept)
    assert found["w"].tolist() == [0.0, -1.0, 0.0, 2.0]
    assert found["bn.running_mean"] is weights["bn.running_mean"]
    assert masks.nonzero_outside(kept, weights) == ["w"]
    assert masks.nonzero_outside(kept, found) == []


# ---------------------------------------------------------------------------------------------- comparison


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_overlap_is_jaccard_and_cohens_kappa(pairs):
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    found = masks.compare({"w": torch.tensor(a)}, {"w": torch.tensor(b)})["w"]
    set_a, set_b = set(np.flatnonzero(a)), set(np.flatnonzero(b))
    assert found.jaccard == pytest.approx(len(set_a & set_b) / len(set_a | set_b) if set_a | set_b else 1)
    table = np.array([[np.mean((a == i) & (b == j)) for j in (0, 1)] for i in (0, 1)])
    by_chance = table.sum(0) @ table.sum(1)
    kappa = (np.trace(table) - by_chance) / (1 - by_chance) if by_chance < 1 - 1e-12 else 1
    assert found.agreement == pytest.approx(kappa, abs=1e-9)


def test_overlap_by_hand():
    a = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    b = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    found = masks.compare({"w": a}, {"w": b})["w"]
    assert (found.size, found.kept_a, found.kept_b, found.kept_both) == (10, 3, 3, 2)
    assert found.jaccard == 0.5
    assert found.jaccard_by_chance == pytest.approx(0.9 / 5.1)
    assert found.agreement == pytest.approx((0.8 - 0.58) / (1 - 0.58))


def test_independent_sparse_masks_agree_in_most_places_but_not_beyond_chance():
    """Two masks of 5 % density differ in only 9.5 % of places (2 * 0.05 * 0.95)."""
    a, b = (masks.random_like({"w": torch.arange(100_000) < 5_000}, seed=seed) for seed in (1, 2))
    assert (a["w"] != b["w"]).float().mean() == pytest.approx(0.095, abs=0.001)
    found = masks.compare(a, b)["w"]
    assert found.agreement == pytest.approx(0, abs=0.015)
    assert found.jaccard == pytest.approx(found.jaccard_by_chance, abs=0.004)


def test_total_expects_by_chance_what_each_tensor_does():
    """Equal densities layer by layer agree beyond chance only within layers."""
    a = {"dense": torch.ones(4, dtype=torch.bool), "sparse": torch.tensor([1, 0, 0, 0], dtype=torch.bool)}
    b = {"dense": torch.ones(4, dtype=torch.bool), "sparse": torch.tensor([0, 1, 0, 0], dtype=torch.bool)}
    found = masks.total(masks.compare(a, b).values())
    assert (found.size, found.kept_a, found.kept_b, found.kept_both, found.expected_both) == (8, 5, 5, 4, 4.25)
    assert found.agreement < 0


@pytest.mark.parametrize(
    ("b", "message"),
    [
        ({"w": torch.ones(2, dtype=torch.bool), "x": torch.ones(2, dtype=torch.bool)}, "different networks: x only"),
        ({"w": torch.ones(3, dtype=torch.bool)}, r"mask of w: shape \(2,\) in one, \(3,\) in the other"),
    ],
)
def test_masks_of_different_networks_are_not_compared(b, message):
    with pytest.raises(TicketfindError, match=message):
        masks.compare({"w": torch.ones(2, dtype=torch.bool)}, b)
