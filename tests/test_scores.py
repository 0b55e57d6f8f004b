"""Scores, against numbers worked out by hand, numpy, and plain autograd."""

import copy
import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ticketfind import TicketfindError, masks
from ticketfind.arms import Arm, Task
from ticketfind.batches import Data, Order, Split, derived_seed
from ticketfind.contradictions import BEFORE_TRAINING, OF_THE_WAY
from ticketfind.drawing import EXAMPLES, Drawing
from ticketfind.layers import from_layers
from ticketfind.masks import Group, Masks, Weights
from ticketfind.recipe import SCORE_NAMES, Train
from ticketfind.scores import SCORES, Score, Seen, by_function, scored

TRAINED, INITIAL = np.array([[-3.0, 0.5], [1.0, 0.0]], np.float32), np.array([[1.0, -2.0], [1.0, -0.5]], np.float32)


def seen(trained: np.ndarray = TRAINED, initial: np.ndarray = INITIAL, **more: Weights) -> Seen:
    whole = {"w": torch.ones(trained.shape, dtype=torch.bool)}
    return Seen({"w": torch.from_numpy(trained)}, {"w": torch.from_numpy(initial)}, **{"masks": whole, **more})


def test_the_recipe_knows_every_score() -> None:
    assert set(SCORE_NAMES) == SCORES.keys()
    assert set(BEFORE_TRAINING) == {name for name, score in SCORES.items() if score.needs_network}
    assert set(OF_THE_WAY) == {name for name, score in SCORES.items() if score.needs_path}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("magnitude", [[3, 0.5], [1, 0]]),
        ("small_final", [[-3, -0.5], [-1, 0]]),
        ("large_init", [[1, 2], [1, 0.5]]),
        ("small_init", [[-1, -2], [-1, -0.5]]),
        ("magnitude_increase", [[2, -1.5], [0, -0.5]]),
        ("movement", [[4, 2.5], [0, 0.5]]),
        ("movement_per_layer", [[4 / 1.75, 2.5 / 1.75], [0, 0.5 / 1.75]]),
        ("magnitude_per_layer", [[3 / 1.125, 0.5 / 1.125], [1 / 1.125, 0]]),
        # ranks of |w_initial|: 2, 4, 3, 1 (a tie goes by place); of |w_final|: 4, 2, 3, 1
        ("large_init_large_final", [[0.5, 0.5], [0.75, 0.25]]),
        # ranks of -|w_initial|: 2, 1, 3, 4; of -|w_final|: 1, 3, 2, 4
        ("small_init_small_final", [[0.25, 0.25], [0.5, 1.0]]),
    ],
)
def test_scores_by_hand(name: str, expected: list[list[float]]) -> None:
    assert scored(SCORES[name], seen(), seed=0)["w"].numpy() == pytest.approx(np.array(expected))


def test_a_layers_mean_is_that_of_its_kept_weights() -> None:
    """Pruned ones, which are zero, would make it the lower the sparser the layer."""
    kept = {"w": torch.tensor([[True, True], [True, False]])}
    found = scored(SCORES["magnitude_per_layer"], seen(masks=kept), seed=0)["w"].numpy()
    assert found == pytest.approx(np.array([[3, 0.5], [1, 0]]) / (4.5 / 3))


def test_the_path_length_is_what_was_gathered() -> None:
    path = {"w": torch.tensor([[4.0, 5.0], [0.0, 1.0]])}
    assert torch.equal(scored(SCORES["path_length"], seen(path=path), seed=0)["w"], path["w"])
    assert torch.allclose(scored(SCORES["path_length_per_layer"], seen(path=path), seed=0)["w"], path["w"] / 2.5)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(2, 60), kept=st.floats(0.3, 1), fraction=st.floats(0.05, 0.9), number=st.integers(0, 1000))
def test_both_large_prunes_the_same_share_of_both(size: int, kept: float, fraction: float, number: int) -> None:
    """Some a makes min(a |w0|, |wf|) keep the same weights: two thresholds, each with as many weights below it."""
    random = np.random.default_rng(number)
    trained, initial = (random.normal(size=size).astype(np.float32) for _ in range(2))
    mask = random.random(size) < kept
    mask[0] = True
    looked_at = seen(trained * mask, initial, masks={"w": torch.from_numpy(mask)})
    found = scored(SCORES["large_init_large_final"], looked_at, seed=0)
    new = masks.prune(dict(looked_at.masks), found, [Group(("w",), fraction)])["w"].numpy()
    if new.any():
        here, there = (np.sort(np.abs(w)[mask]) for w in (initial, trained))
        # where at most the tie between equal ranks is cut, the kept ones are above both thresholds of some share
        lowest = min(
            np.searchsorted(here, np.abs(initial)[new].min()), np.searchsorted(there, np.abs(trained)[new].min())
        )
        above = mask & (np.abs(initial) >= here[lowest]) & (np.abs(trained) >= there[lowest])
        assert (new <= above).all()
        assert above.sum() - new.sum() <= 1


def test_random_scores_follow_from_the_seed_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = (scored(SCORES["random"], seen(np.zeros(50, np.float32)), seed=seed)["w"] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_score_of_ones_own_draws_follows_from_the_seed_too() -> None:
    def drawing(trained: Weights, initial: Weights) -> Weights:
        return {name: w * 0 + random.random() + np.random.rand() for name, w in trained.items()}

    def outside() -> str:
        return f"{random.getstate()} {np.random.get_state()}"

    before = outside()
    a, b, c = (scored(by_function(drawing), seen(), seed=seed)["w"] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert outside() == before


def failing(trained: Weights, initial: Weights) -> Weights:
    raise KeyError("w9")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t, i: {}, "score of w: expected a tensor of shape (2, 2), found NoneType"),
        (lambda t, i: {"w": t["w"][0]}, "score of w: expected a tensor of shape (2, 2), found shape (2,)"),
        (lambda t, i: {"w": TRAINED}, "score of w: expected a tensor of shape (2, 2), found ndarray"),
        (lambda t, i: {"w": t["w"] / 0}, "score of w: expected finite numbers"),
        (lambda t, i: [t["w"]], "score: expected a dict of tensors by parameter, found list"),
        (failing, "score: the function failed: KeyError: 'w9'"),
    ],
)
def test_bad_scores_are_named(function: Callable[[Weights, Weights], Weights], message: str) -> None:
    with pytest.raises(TicketfindError) as error:
        scored(by_function(function), seen(), seed=0)
    assert message in str(error.value)


def test_a_score_may_be_a_choice() -> None:
    found = scored(by_function(lambda t, i: {"w": t["w"] == 1}), seen(), seed=0)
    kept = masks.prune(masks.dense({"w": (2, 2)}), found, [Group(("w",), 0.75)])
    assert kept["w"].tolist() == [[False, False], [True, False]]


# ---------------------------------------------------------------------------------------- before training


class Net(nn.Module):
    """[b, 6] -> [b, 3], with normalization and a layer that is not scored."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.norm(self.fc1(x))))


SHAPES = {"fc1.weight": (8, 6), "fc2.weight": (3, 8)}
HOW: Train = from_layers({"train": {"batch_size": 32, "iterations": 10, "eval_every": 5}}).train


@pytest.fixture(scope="module")
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 6, generator=generator), torch.randint(3, (200,), generator=generator)
    split = Split(x, y)
    torch.manual_seed(3)
    model = Net()
    return Task(
        model, Data(split, split, split), torch.device("cpu"),
        fresh=lambda seed: {name: t.clone() for name, t in model.state_dict().items()},
    )  # fmt: skip


def old_masks() -> Masks:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.rand(shape, generator=generator) < 0.8 for name, shape in SHAPES.items()}


def drawn(name: str, task: Task, groups: list[Group], arm_seed: int = 4) -> tuple[Masks, Masks, dict[str, Tensor]]:
    """The new masks, the old ones, the weights."""
    state = task.start(0)
    old = old_masks()
    drawing = Drawing(SCORES[name], task, HOW, groups, SHAPES)
    (new,) = drawing.of_training(Arm("x", state, old, arm_seed, round=2), state, state, None)
    return new, old, state


def batches(task: Task, arm_seed: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    count = -(-EXAMPLES // HOW.batch_size)
    assert task.data is not None
    feed = task.data.training(Order(derived_seed(arm_seed, "score", 2), HOW.batch_size, 0, count))
    return itertools.islice(iter(feed), count)  # type: ignore[return-value]


def loaded(task: Task, state: dict[str, Tensor], old: Masks) -> nn.Module:
    model = copy.deepcopy(task.model).train()
    model.load_state_dict({name: t * old[name] if name in old else t for name, t in state.items()})
    return model


EACH = [Group(("fc1.weight",), 0.4), Group(("fc2.weight",), 0.3)]
TOGETHER = [Group(("fc1.weight", "fc2.weight"), 0.4)]


def kept_by(scores: dict[str, Tensor], old: Masks, groups: list[Group]) -> Masks:
    """By sorting, in numpy."""
    new = {}
    for group in groups:
        flat = np.concatenate([scores[n].detach().double().numpy().ravel() for n in group.names])
        among = np.concatenate([old[n].numpy().ravel() for n in group.names])
        count = among.sum() - round(among.sum() * group.fraction)
        order = np.argsort(-np.where(among, flat, -np.inf), kind="stable")[: int(count)]
        kept = np.zeros(len(flat), bool)
        kept[order] = True
        for name in group.names:
            size = old[name].numel()
            new[name], kept = torch.from_numpy(kept[:size].copy()).view(old[name].shape), kept[size:]
    return new


@pytest.mark.parametrize("groups", [EACH, TOGETHER], ids=["layer", "global"])
def test_snip(task: Task, groups: list[Group]) -> None:
    new, old, state = drawn("snip", task, groups)
    model, sums = loaded(task, state, old), {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for x, y in batches(task):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, parameter in model.named_parameters():
            if name in SHAPES:
                sums[name] += parameter.grad
    expected = kept_by({name: (model.get_parameter(name) * g).abs() for name, g in sums.items()}, old, groups)
    assert all(torch.equal(new[name], expected[name]) for name in SHAPES)


def test_grasp_is_the_slope_of_the_gradients_length(task: Task) -> None:
    """Hg is the derivative of |g|^2 / 2; here g is that of all batches, as one sum."""
    new, old, state = drawn("grasp", task, TOGETHER)
    model = loaded(task, state, old)
    weights = [model.get_parameter(name) for name in SHAPES]
    every = [*batches(task)]
    loss = sum(F.cross_entropy(model(x), y) for x, y in every) / len(every)
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    half = sum((g**2).sum() for g in slopes) / 2
    products = torch.autograd.grad(half, weights)
    scores = {name: w.detach() * hg for name, w, hg in zip(SHAPES, weights, products, strict=True)}
    expected = kept_by(scores, old, TOGETHER)
    assert all(torch.equal(new[name], expected[name]) for name in SHAPES)


class Plain(nn.Module):
    """[b, 4] -> [b, 2], linear: its flow can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5, bias=False), nn.Linear(5, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_synflow_step_by_step_in_numpy() -> None:
    """Of two linear layers R = 1' |B| |A| 1: a weight's score is what flows through it; 100 prunings to the count."""
    generator = torch.Generator().manual_seed(1)
    split = Split(torch.randn(10, 4, generator=generator), torch.zeros(10, dtype=torch.int64))
    torch.manual_seed(0)
    model = Plain()
    task = Task(model, Data(split, split, split), torch.device("cpu"), fresh=lambda seed: dict(model.state_dict()))
    state, shapes = task.start(0), {"a.weight": (5, 4), "b.weight": (2, 5)}
    group = Group((*shapes,), 0.7)
    whole = masks.dense(shapes)
    drawing = Drawing(SCORES["synflow"], task, HOW, [group], shapes)
    (found,) = drawing.of_training(Arm("x", state, whole, 0), state, state, None)
    a, b = (state[name].double().abs().numpy() for name in shapes)
    keep = np.ones(30, bool)
    for step in range(1, 101):
        left = round(30 * (9 / 30) ** (step / 100))
        ma, mb = a * keep[:20].reshape(5, 4), b * keep[20:].reshape(2, 5)
        flow = np.concatenate([(ma * mb.sum(0)[:, None]).ravel(), (mb * ma.sum(1)[None]).ravel()])
        order = np.argsort(-np.where(keep, flow, -1), kind="stable")[:left]
        keep = np.isin(np.arange(30), order)
    assert np.array_equal(np.concatenate([found[name].numpy().ravel() for name in shapes]), keep)
    assert int(keep.sum()) == 9


class PlainNormed(nn.Module):
    """[b, 4] -> [b, 2], linear but for what it does in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.norm(self.a(x)), 0.5, self.training))


def test_synflow_looks_at_the_network_as_it_is_evaluated() -> None:
    """BatchNorm by its running statistics, no dropout: what flows through it is written down in numpy."""
    split = Split(torch.zeros(10, 4), torch.zeros(10, dtype=torch.int64))
    torch.manual_seed(0)
    model = PlainNormed().train()
    for tensor in (model.norm.weight.data, model.norm.bias.data, model.norm.running_mean, model.norm.running_var):
        assert tensor is not None
        tensor.uniform_(0.5, 1.5)
    task = Task(model, Data(split, split, split), torch.device("cpu"), fresh=lambda seed: dict(model.state_dict()))
    state, shapes = task.start(0), {"a.weight": (5, 4), "b.weight": (2, 5)}
    drawing = Drawing(SCORES["synflow"], task, HOW, [Group((*shapes,), 0.5)], shapes)
    found = scored(SCORES["synflow"], drawing.seen(Arm("x", state, {}, 0), state, state, None), seed=0)
    a, gain, bias, mean, var, b = (state[name].double().abs().numpy() for name in state if "num_batches" not in name)
    scale = gain / np.sqrt(var + model.norm.eps)
    np.testing.assert_allclose(found["a.weight"], a * (scale * b.sum(0))[:, None], rtol=1e-9)
    np.testing.assert_allclose(found["b.weight"], b * np.abs((a.sum(1) - mean) * scale + bias), rtol=1e-9)


def test_synflow_wants_numbers_that_can_be_one() -> None:
    split = Split(torch.zeros(8, 3, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
    model = nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(6, 2))
    task = Task(model, Data(split, split, split), torch.device("cpu"), fresh=lambda seed: dict(model.state_dict()))
    drawing = Drawing(SCORES["synflow"], task, HOW, [Group(("2.weight",), 0.5)], {"2.weight": (2, 6)})
    with pytest.raises(TicketfindError, match="expected inputs that can be ones, found whole numbers"):
        drawing.of_training(Arm("x", task.start(0), {}, 0), task.start(0), task.start(0), None)


class Bowl:
    """A network whose loss is |w|^2 / 2 in each of 400 batches: its gradient is w, its Hessian the identity."""

    def losses(self) -> Iterator[Callable[[Weights], Tensor]]:
        return itertools.repeat(lambda weights: (weights["w"] ** 2).sum() / 2, 400)

    def flow(self, weights: Weights) -> Tensor:
        raise AssertionError


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_many_batches_add_up_in_half_precision_too(name: str) -> None:
    """A sum in bfloat16 ends at 256 times what is added to it."""
    w = {"w": torch.tensor([1.0, -0.5, 2.0], dtype=torch.bfloat16)}
    whole = {"w": torch.ones(3, dtype=torch.bool)}
    assert scored(SCORES[name], Seen(w, w, whole, network=Bowl()), seed=0)["w"].tolist() == [1.0, 0.25, 4.0]


def test_steps_lead_to_the_count(task: Task) -> None:
    """A score in steps keeps exactly what one at once does, and only ever loses weights."""
    seen_counts = []

    def function(seen: Seen) -> Weights:
        seen_counts.append(masks.count(dict(seen.masks)))
        return {name: w.abs() for name, w in seen.trained.items()}

    state = task.start(0)
    drawing = Drawing(Score(function, steps=7), task, HOW, TOGETHER, SHAPES)
    once = Drawing(Score(function), task, HOW, TOGETHER, SHAPES)
    arm = Arm("x", state, old_masks(), 0)
    in_steps, at_once = (each.of_training(arm, state, state, None)[0] for each in (drawing, once))
    assert all(torch.equal(in_steps[name], at_once[name]) for name in SHAPES)
    n = masks.count(old_masks())
    k = n - round(n * 0.4)
    assert seen_counts[:7] == [round(n * (k / n) ** (step / 7)) for step in range(7)]


class Tied(nn.Module):
    """[b, 6] -> [b, 6]: one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("name", BEFORE_TRAINING)
def test_a_tied_weight_counts_in_both_places(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(32, 6, generator=generator), torch.randint(6, (32,), generator=generator))
    torch.manual_seed(3)
    model = Tied()
    task = Task(model, Data(split, split, split), torch.device("cpu"), fresh=lambda seed: dict(model.state_dict()))
    state = {key: value.detach() for key, value in task.start(0).items()}
    drawing = Drawing(SCORES[name], task, HOW, [Group(("a.weight",), 0.4)], {"a.weight": (6, 6)})
    seen = drawing.seen(Arm("x", state, {}, 0), state, state, None)
    found = scored(SCORES[name], seen, seed=0)["a.weight"]
    if name == "snip":
        model.zero_grad()
        every = [*itertools.islice(task.data.training(Order(derived_seed(0, "score", 0), 32, 0, 32)), 32)]
        for x, y in every:
            (F.cross_entropy(model(x), y) / len(every)).backward()
        torch.testing.assert_close(found, (model.a.weight * model.a.weight.grad).abs().detach())
    assert bool((found != 0).any())
