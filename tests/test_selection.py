"""Exact selection against numpy's stable argsort, on either way that it may take."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from ticketfind import selection
from ticketfind.selection import keep_highest


def one(scores, k, among=None):
    among = torch.ones(scores.shape, dtype=torch.bool) if among is None else among
    (kept,) = keep_highest([scores], [among], k)
    return kept


def reference(scores, among, k):
    """The k highest of all scores that take part, ties to what comes first; a bool array for each tensor."""
    flat, part = np.concatenate([s.ravel() for s in scores]), np.concatenate([a.ravel() for a in among])
    places = np.flatnonzero(part)
    kept = np.zeros(flat.size, bool)
    kept[places[np.argsort(-flat[places], kind="stable")[: max(k, 0)]]] = True
    cuts = np.cumsum([s.size for s in scores])[:-1]
    return [piece.reshape(s.shape) for piece, s in zip(np.split(kept, cuts), scores, strict=True)]


@settings(deadline=None)
@given(
    scores=st.lists(st.floats(width=32, allow_nan=False) | st.sampled_from([-0.0, 0.0, 1.0]), max_size=40),
    k=st.integers(-1, 41),
)
def test_it_is_a_stable_argsort(scores, k):
    found = one(torch.tensor(scores), k).numpy()
    values = np.array(scores, np.float32)
    np.testing.assert_array_equal(found, reference([values], [np.ones(len(scores), bool)], k)[0])


@pytest.fixture
def small(monkeypatch):
    """Samples of a few dozen, taken from a few thousand scores on."""
    monkeypatch.setattr(selection, "_SAMPLE", 2048)
    monkeypatch.setattr(selection, "_SMALL", 4000)


KINDS = {
    "normal": lambda g, n: g.standard_normal(n),
    "ties": lambda g, n: g.integers(0, 50, n).astype(float),
    "sorted": lambda g, n: np.arange(n, dtype=float),
    "two levels": lambda g, n: np.where(np.arange(n) % 10 == 0, 5.0, g.random(n)),
    "equal": lambda g, n: np.zeros(n),
    "infinite": lambda g, n: np.where(g.random(n) < 0.3, np.inf, g.standard_normal(n)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.01, 0.2, 0.8, 0.999])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sample_changes_nothing(small, kind, share, seed):
    generator = np.random.default_rng(seed)
    shapes = [(70, 90), (5,), (3, 40, 50), (0, 4)]
    scores = [KINDS[kind](generator, int(np.prod(s))).reshape(s).astype(np.float32) for s in shapes]
    among = [generator.random(s) < 0.9 for s in shapes]
    k = int(share * sum(a.sum() for a in among))
    kept = keep_highest([torch.from_numpy(s) for s in scores], [torch.from_numpy(a) for a in among], k)
    for found, expected in zip(kept, reference(scores, among, k), strict=True):
        np.testing.assert_array_equal(found.numpy(), expected)


def test_the_sample_spares_a_look_at_all(small, monkeypatch):
    """Most scores are only compared with two numbers; without this the test above would prove nothing."""
    looked_at, kth = [], selection._kth

    def spy(values, k, above):
        looked_at.append(len(values))
        return kth(values, k, above)

    monkeypatch.setattr(selection, "_kth", spy)
    one(torch.randn(50_000, generator=torch.Generator().manual_seed(0)), 40_000)
    assert len(looked_at) == 1 and looked_at[0] < 20_000


def test_a_sample_that_misleads_is_not_believed(small):
    """Every sampled score is among the highest; the threshold lies elsewhere."""
    scores = torch.rand(40_960, generator=torch.Generator().manual_seed(0))
    scores[:: 40_960 // 2048] += 10
    found = one(scores, 20_000)
    np.testing.assert_array_equal(found.numpy(), reference([scores.numpy()], [np.ones(40_960, bool)], 20_000)[0])


def test_ties_beyond_what_float32_and_quantile_can_count():
    n, k = 2**24 + 5, 2**24 + 3
    kept = one(torch.zeros(n, dtype=torch.float16), k)
    assert int(kept.sum()) == k
    assert not kept[k:].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16, torch.float64])
def test_scores_of_any_type(dtype):
    scores = torch.randint(0, 9, (300_000,), generator=torch.Generator().manual_seed(0))
    expected = reference([scores.numpy()], [np.ones(300_000, bool)], 100_000)[0]
    np.testing.assert_array_equal(one(scores.to(dtype), 100_000).numpy(), expected)
